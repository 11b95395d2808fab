"""Speed and memory, compared with `transformers` and with a loop without cache, in one run on one machine.

    python -m tools.bench                    the table (needs `pip install transformers`)
    python -m tools.bench --compile          also with compiled blocks; the compiler takes a minute or two
    python -m tools.bench --readme           also puts the table between its markers in the READMEs
    python -m tools.bench --scaling          tokens/s over width, batch and length -> results/scaling.json

Every pair does the same work: the same number of sequences and new tokens, the same documents in an update of the same
optimizer; only real tokens count. Both take turns, and each figure is the best of `repeats`.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data import Task, load_task
from harness import files, parallel
from harness.cli import markdown_table, option, parse_config, run_script
from harness.errors import UserError
from harness.run import peak_memory_mb, provenance, seeded
from model import GPT, GPTConfig, generate, response_logprobs
from reflect import choose_peers, reflect, sample_rollouts
from subspace import SubspaceConfig, calibrate, calibration_set
from tools import stats
from train_spd import Pair, next_token_loss

PROMPTS, GROUP, PROMPT, NEW = 32, 8, 16, 48  # 256 sequences: 16 tokens read, 48 written
BATCH = 64  # documents an update, of 8 updates
VOCAB = 50
GRID = [("width", width, 64, 64) for width in (64, 128, 256, 512)]  # what --scaling varies, width, batch, length
GRID += [("batch", 64, batch, 64) for batch in (16, 64, 256, 1024)]
GRID += [("length", 64, 64, length) for length in (64, 128, 256, 512, 1024)]
Rows = list[list[str]]


@dataclass(frozen=True)
class Config:
    task: str = option("arithmetic", "whose documents and problems to measure with")
    base: str = option("data/base.pt", "checkpoint for the parts of both loops")
    repeats: int = option(5, "repetitions; the best one counts", minimum=1)
    compile: bool = option(False, "also measure the model with compiled blocks")
    readme: bool = option(False, "put the table into the READMEs")
    scaling: bool = option(False, "measure how cost grows instead")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)
    device: str = option("auto", "cpu, cuda, mps or auto")


def fastest(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best time of each in seconds; they take turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: min(each[1:]) for name, each in times.items()}


def beside(label: str, tokens: int, times: dict[str, float], theirs: float) -> Rows:
    """Rows of the table: tokens/s of each of our times, and of theirs."""
    return [
        [label + name, f"{tokens / ours:,.0f} tokens/s", f"{tokens / theirs:,.0f}", f"{theirs / ours:.1f}x"]
        for name, ours in times.items()
    ]


def models(device: torch.device, compiled: bool, **shape: int) -> dict[str, GPT]:
    """A small model of ours, and the same one compiled where that is asked."""
    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_hidden": 192} | shape
    made = {}
    for name in ("", ", compiled") if compiled else ("",):
        torch.manual_seed(0)
        made[name] = GPT(GPTConfig(VOCAB, **sizes)).to(device)
    if compiled:
        made[", compiled"].compile_blocks()
    return made


def gpt2(device: torch.device) -> torch.nn.Module:
    """transformers' GPT-2 of the same depth and width."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UserError("the comparison needs transformers; pip install transformers") from error
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": VOCAB, "n_positions": 256, "n_embd": 64, "n_layer": 4, "n_head": 4, **dropout}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).to(device)


@torch.inference_mode()
def without_cache(model: GPT, prompts: list[list[int]]) -> torch.Tensor:
    """The simple loop: it reads everything again for every token."""
    tokens = torch.tensor([prompt for prompt in prompts for _ in range(GROUP)], device=model.device)
    for _ in range(NEW):
        probs = model(tokens)[:, -1].softmax(dim=-1)
        tokens = torch.cat((tokens, torch.multinomial(probs, 1)), dim=1)
    return tokens


def rollouts(config: Config, device: torch.device) -> Rows:
    rng = random.Random(0)
    prompts = [[rng.randrange(1, VOCAB) for _ in range(PROMPT)] for _ in range(PROMPTS)]
    ours, other = {name: model.eval() for name, model in models(device, config.compile).items()}, gpt2(device).eval()
    ids = torch.tensor(prompts, device=device)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    attend = {"attention_mask": torch.ones_like(ids), "num_return_sequences": GROUP}
    never = VOCAB  # a stop token that no row writes: all of them write every token
    works: dict[str, Callable[[], object]] = {
        name: lambda model=model: generate(model, prompts, NEW, never, GROUP) for name, model in ours.items()
    }
    works["transformers"] = lambda: other.generate(ids, **attend, **settings)
    works["no cache"] = lambda: without_cache(ours[""], prompts)
    times = fastest(works, config.repeats)
    theirs, naive, tokens = times.pop("transformers"), times.pop("no cache"), PROMPTS * GROUP * NEW
    label = f"rollouts, {PROMPTS * GROUP} sequences of {PROMPT} + {NEW} tokens"
    return beside(label, tokens, times, theirs) + beside("the same, compared with no cache", tokens, times, naive)


def documents(task: Task, count: int) -> list[Pair]:
    """Teacher's prompts with golden solutions: (prompt, completion) pairs of unequal lengths, of VOCAB tokens."""
    rng, pairs = random.Random(0), []
    for i in range(count):
        problem = task.problem(task.domains[i % len(task.domains)], rng)
        prompt = task.teacher_prompt(problem, solution=problem.solution) if i % 2 else task.student_prompt(problem)
        pairs.append(tuple([token % VOCAB for token in task.encode(text)] for text in (prompt, problem.solution)))
    return pairs


def training(config: Config, device: torch.device, task: Task) -> Rows:
    """Eight updates with AdamW on the same documents: ours sorted by length, the other's padded as they come."""
    pairs = documents(task, 8 * BATCH)
    real = sum(len(prompt) + len(completion) for prompt, completion in pairs)

    def epoch(network: torch.nn.Module, groups: list[list[Pair]], loss: Callable) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        for group in groups:
            loss(network, group).backward()
            optimizer.step()
            optimizer.zero_grad()

    def their_loss(network: torch.nn.Module, group: list[Pair]) -> torch.Tensor:
        width = max(len(prompt) + len(completion) for prompt, completion in group)
        ids, labels = torch.zeros((len(group), width), dtype=torch.long), torch.full((len(group), width), -100)
        for i, (prompt, completion) in enumerate(group):
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
        return network(input_ids=ids.to(device), labels=labels.to(device)).loss

    def in_batches(ordered: list[Pair]) -> list[list[Pair]]:
        return [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]

    plain = in_batches(random.Random(1).sample(pairs, len(pairs)))
    by_length = in_batches(sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1])))
    ours, other = models(device, config.compile), gpt2(device)
    works: dict[str, Callable[[], object]] = {
        name: lambda model=model: epoch(model, by_length, next_token_loss) for name, model in ours.items()
    }
    works["transformers"] = lambda: epoch(other, plain, their_loss)
    times = fastest(works, config.repeats)
    theirs = times.pop("transformers")
    rows = beside("training step", real, times, theirs)
    weights = sum(p.numel() for p in ours[""].parameters())
    a = torch.randn(1024, 1024, device=device)
    rate = 2 * 1024**3 / fastest({"": lambda: a @ a}, config.repeats)[""]
    share = 6 * weights * real / times[""] / rate  # 2 operations a weight and token forward, 4 backward
    return [*rows, ["its share of the matrix-product rate", f"{share:.0%} of {rate / 1e9:,.0f} GFLOP/s", "", ""]]


def parts(config: Config, device: torch.device, task: Task) -> Rows:
    """The other parts of both loops, with the base."""
    base = files.load_checkpoint(config.base)[0].to(device).eval()
    problems = task.problems(task.domains[0], PROMPTS, random.Random(0))
    group = sample_rollouts(base, task, problems, GROUP, seeded("bench"))
    peers = [
        peer.text if peer else r.problem.solution for r, peer in zip(group, choose_peers(group, GROUP), strict=True)
    ]
    prompts = [task.encode(task.teacher_prompt(r.problem, solution=peer)) for r, peer in zip(group, peers, strict=True)]
    settings = SubspaceConfig(calibration_size=200, layers="all")
    examples = calibration_set(task, task.domains[:1], settings, 0)
    works = {
        f"reflections on {len(group)} rollouts": lambda: reflect(base, task, group, peers),
        f"teacher pass over {len(group)} rollouts": torch.no_grad()(
            lambda: response_logprobs(base, prompts, [rollout.tokens for rollout in group])
        ),
        "SPD calibration: 200 gradients and the SVD of every layer": lambda: calibrate(base, examples, settings),
    }
    rows = [[name, f"{1000 * best:,.0f} ms", "", ""] for name, best in fastest(works, config.repeats).items()]
    return [*rows, ["peak memory of all of this", f"{peak_memory_mb() or float('nan'):,.0f} MB", "", ""]]


def scaling(device: torch.device) -> list[dict]:
    """Tokens/s of rollouts and of training, one size varied at a time."""
    rows = []
    for varied, width, batch, length in GRID:
        shape = {"n_embd": width, "n_hidden": 3 * width, "n_head": width // 16, "n_kv_head": width // 16}
        model = models(device, False, block_size=length + 16, **shape)[""]
        prompts, half = [[1] * 16] * batch, length // 2
        pairs = [([1] * half, [2] * half)] * batch

        def update(model: GPT = model, pairs: list[Pair] = pairs) -> None:
            next_token_loss(model, pairs).backward()
            model.zero_grad()

        write = lambda p=prompts, m=model, n=length: generate(m, p, n, VOCAB)  # noqa: E731
        times = fastest({"rollouts": write, "training": update}, repeats=2)
        rows.append({"varied": varied, "width": width, "batch": batch, "length": length})
        rows[-1] |= {name: round(batch * length / best) for name, best in times.items()}
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    config = parse_config(Config, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    device, threads = parallel.start(config.device), torch.get_num_threads()
    if config.scaling:
        machine = {**provenance(), "device": device.type, "threads": threads}
        files.write_json(files.make_folder(stats.RESULTS) / "scaling.json", {**machine, "rows": scaling(device)})
        return
    task = load_task(config.task)
    rows = rollouts(config, device) + training(config, device, task) + parts(config, device, task)
    text = markdown_table([f"{device.type}, threads: {threads}", "here", "there", "ratio"], rows)
    print(text)
    if config.readme and not stats.fill_readme("bench", lambda differences, columns: text):
        print("No README has a line <!-- table bench -->; put one there with <!-- end --> below it.")


if __name__ == "__main__":
    run_script(main)
