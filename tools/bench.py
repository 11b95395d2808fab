"""Speed and memory, measured against `transformers` and a loop without cache, in one run on one machine.

    python bench.py                    the table (needs `pip install transformers`)
    python bench.py --compile          with the blocks compiled, too: a minute or two more, for the compiler
    python bench.py --compile --repeats 9 --readme     the README's table, put between its markers
    python bench.py --scaling          tokens/s over width, batch and length -> results/scaling.json, for plots.py

Every pair does the same work: the same number of sequences and new tokens, the same documents in an update of the same
optimizer, and counts the same real tokens. Both take turns; each figure is the best of `repeats`.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import runs
from data.arithmetic import make_problem
from data.documents import hint_prompt
from data.tokenizer import END, VOCAB_SIZE, encode
from model import GPT, GPTConfig, generate, response_logprobs
from pretrain import batches, next_token_loss
from reflect import reflect, sample_rollouts
from runs import option
from subspace import calibrate, calibration_set

PROMPTS, GROUP, PROMPT, NEW = 32, 8, 16, 48  # 256 sequences: 16 tokens read, 48 written
BATCH = 64  # documents an update, of 8 updates
GRID = [("width", width, 64, 64) for width in (64, 128, 256, 512)]  # what --scaling varies, width, batch, length
GRID += [("batch", 64, batch, 64) for batch in (16, 64, 256, 1024)]
GRID += [("length", 64, 64, length) for length in (64, 128, 256, 512, 1024)]


@dataclass(frozen=True)
class Config:
    repeats: int = option(5, "repetitions; the best one counts", minimum=1)
    compile: bool = option(False, "measure the model with its blocks compiled, too")
    readme: bool = option(False, "put the table into README.md")
    scaling: bool = option(False, "measure how cost grows instead")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)
    device: str = option("auto", "cpu, cuda, mps or auto")


def fastest(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best time of each in seconds, taking turns, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: min(each[1:]) for name, each in times.items()}


def against(label: str, tokens: int, times: dict[str, float], theirs: float) -> list[list[str]]:
    """Rows of the table: tokens/s of each of our times beside theirs, all in seconds."""
    return [
        [label + name, f"{tokens / ours:,.0f} tokens/s", f"{tokens / theirs:,.0f}", f"{theirs / ours:.1f}x"]
        for name, ours in times.items()
    ]


def small_model(device: torch.device, **shape: int) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_hidden": 192} | shape
    return GPT(GPTConfig(VOCAB_SIZE, **sizes)).to(device)


def gpt2(device: torch.device) -> torch.nn.Module:
    """transformers' GPT-2 of the same depth and width."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise runs.UserError("the comparison needs transformers; pip install transformers") from error
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": VOCAB_SIZE, "n_positions": 256, "n_embd": 64, "n_layer": 4, "n_head": 4, **dropout}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=END, eos_token_id=END)).to(device)


@torch.inference_mode()
def without_cache(model: GPT, prompts: list[list[int]]) -> torch.Tensor:
    """The simple loop: read everything again for every token."""
    tokens = torch.tensor([prompt for prompt in prompts for _ in range(GROUP)], device=model.device)
    for _ in range(NEW):
        probs = model(tokens)[:, -1].softmax(dim=-1)
        tokens = torch.cat((tokens, torch.multinomial(probs, 1)), dim=1)
    return tokens


def rollouts(config: Config, device: torch.device) -> list[list[str]]:
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB_SIZE - 2) for _ in range(PROMPT)] for _ in range(PROMPTS)]
    model, other = small_model(device).eval(), gpt2(device).eval()
    never = VOCAB_SIZE  # no row may finish early: all of them write every token
    ids = torch.tensor(prompts, device=device)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": END}
    attend = {"attention_mask": torch.ones_like(ids), "num_return_sequences": GROUP}
    works = {"": lambda: generate(model, prompts, NEW, never, GROUP)}
    if config.compile:
        compiled = small_model(device).eval()
        compiled.compile_blocks()
        works[", compiled"] = lambda: generate(compiled, prompts, NEW, never, GROUP)
    works["transformers"] = lambda: other.generate(ids, **attend, **settings)
    works["no cache"] = lambda: without_cache(model, prompts)
    times = fastest(works, config.repeats)
    theirs, naive, tokens = times.pop("transformers"), times.pop("no cache"), PROMPTS * GROUP * NEW
    label = f"rollouts, {PROMPTS * GROUP} sequences of {PROMPT} + {NEW} tokens"
    return against(label, tokens, times, theirs) + against("the same, against no cache", tokens, times, naive)


def training(config: Config, device: torch.device) -> list[list[str]]:
    """Eight updates with AdamW on the same documents: ours sorted by length, the other padded as they come."""
    chunks = batches(BATCH, random.Random(0))
    documents = [document for _ in range(8) for document in next(chunks)]
    real = sum(len(prompt) + len(response) for prompt, response in documents)
    model, other = small_model(device), gpt2(device)

    def epoch(network: torch.nn.Module, groups: list, loss: Callable) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        for group in groups:
            loss(network, group).backward()
            optimizer.step()
            optimizer.zero_grad()

    def their_loss(network: torch.nn.Module, group: list) -> torch.Tensor:
        width = max(len(prompt) + len(response) for prompt, response in group)
        ids, labels = torch.full((len(group), width), END), torch.full((len(group), width), -100)
        for i, (prompt, response) in enumerate(group):
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        return network(input_ids=ids.to(device), labels=labels.to(device)).loss

    shuffled = random.Random(1).sample(documents, len(documents))
    plain = [shuffled[i : i + BATCH] for i in range(0, len(shuffled), BATCH)]
    ordered = sorted(documents, key=lambda document: len(document[0]) + len(document[1]))
    by_length = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    works = {"": lambda: epoch(model, by_length, next_token_loss)}
    if config.compile:
        compiled = small_model(device)
        compiled.compile_blocks()
        works[", compiled"] = lambda: epoch(compiled, by_length, next_token_loss)
    works["transformers"] = lambda: epoch(other, plain, their_loss)
    times = fastest(works, config.repeats)
    theirs = times.pop("transformers")
    rows = against("training step, documents of the pretraining", real, times, theirs)
    weights = sum(p.numel() for p in model.parameters())
    a = torch.randn(1024, 1024, device=device)
    rate = 2 * 1024**3 / fastest({"": lambda: a @ a}, config.repeats)[""]
    share = 6 * weights * real / times[""] / rate  # 2 a weight forward, 4 backward
    return [*rows, ["its share of the matrix-product rate", f"{share:.0%} of {rate / 1e9:,.0f} GFLOP/s", "", ""]]


def parts(config: Config, device: torch.device) -> list[list[str]]:
    """The other parts of both loops, with the shipped base."""
    base = runs.load_checkpoint(runs.BASE_CHECKPOINT)[0].to(device).eval()
    rng = random.Random(0)
    problems = [make_problem("add", rng) for _ in range(PROMPTS)]
    group = sample_rollouts(base, problems, GROUP, runs.torch_generator("bench"))
    peers = [next((r.text for r in group if r.problem == p.problem and r.verdict.correct), p.text) for p in group]
    prompts = [encode(hint_prompt(r.problem, "1+1=2")) for r in group]
    responses = [r.tokens for r in group]
    examples = calibration_set(("add",), 200, 0)
    works = {
        "reflections on 256 rollouts": lambda: reflect(base, group, peers),
        "teacher pass over 256 rollouts": torch.no_grad()(lambda: response_logprobs(base, prompts, responses)),
        "SPD calibration: 200 gradients and the SVD of every layer": lambda: calibrate(base, examples, "all", "50%"),
    }
    rows = [[name, f"{1000 * best:,.0f} ms", "", ""] for name, best in fastest(works, config.repeats).items()]
    return [*rows, ["peak memory of all of this", f"{runs.peak_memory_mb():,.0f} MB", "", ""]]


def scaling(config: Config, device: torch.device) -> list[dict]:
    """Tokens/s of rollouts and of training, one size varied at a time."""
    rows = []
    for varied, width, batch, length in GRID:
        shape = {"n_embd": width, "n_hidden": 3 * width, "n_head": width // 16, "n_kv_head": width // 16}
        model = small_model(device, block_size=length + 16, **shape)
        prompts = [[1] * 16 for _ in range(batch)]
        tokens = batch * length
        pairs = [([1] * (length // 2), [2] * (length // 2)) for _ in range(batch)]

        def update(m: GPT = model, p: list = pairs) -> None:
            next_token_loss(m, p).backward()
            m.zero_grad()

        works = {"rollouts": lambda p=prompts, m=model, n=length: generate(m, p, n, VOCAB_SIZE), "training": update}
        size = {"width": width, "batch": batch, "length": length}
        rows.append({"varied": varied, **size} | {name: tokens / best for name, best in fastest(works, 2).items()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    config = runs.parse_config(Config, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = runs.pick_device(config.device)
    if config.scaling:
        machine = {**runs.provenance(), "device": str(device), "threads": torch.get_num_threads()}
        runs.write_json(runs.RESULTS / "scaling.json", {**machine, "rows": scaling(config, device)})
        return
    rows = rollouts(config, device) + training(config, device) + parts(config, device)
    text = runs.markdown_table([f"{device.type}, {torch.get_num_threads()} threads", "here", "there", "ratio"], rows)
    print(text)
    if config.readme:
        runs.put_into_readme("bench", text)


if __name__ == "__main__":
    runs.run_script(main)
