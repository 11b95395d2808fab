"""Speed and memory, compared with `transformers` and with a loop without cache, in one run on one machine.

    python -m tools.bench                    the table (needs `pip install transformers`)
    python -m tools.bench --compile          also with compiled blocks; the compiler takes a minute or two
    python -m tools.bench --real FOLDER      on real weights, beside transformers and TRL (tools/peers.py)

Both sides of a pair do the same work: the same number of sequences and new tokens, the same documents in an update of
the same optimizer; only real tokens count. They take turns, and each figure is the best of `repeats`.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence

from data.tokenizer import VOCAB_SIZE
from harness import parallel
from harness.cli import markdown_table, option, parse_config, run_script
from harness.errors import UserError
from harness.run import peak_memory_mb
from model import GPT, GPTConfig, generate
from pretrain import batches
from tools import peers
from train_spd import Pair, next_token_loss

PROMPTS, GROUP, PROMPT, NEW = 32, 8, 16, 48  # 256 sequences: 16 tokens read, 48 written
BATCH = 64  # documents an update, of 8 updates
Rows = list[list[str]]
Works = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Config:
    repeats: int = option(5, "repetitions; the best one counts", minimum=1)
    real: str = option("", "folder of a Hugging Face model: the comparison on real weights instead")
    compile: bool = option(False, "also measure the model with compiled blocks")
    threads: int = option(0, "CPU threads; 0 leaves it to torch", minimum=0)
    device: str = option("auto", "cpu, cuda, mps or auto")


def fastest(works: Works, repeats: int) -> dict[str, float]:
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


def models(device: torch.device, compiled: bool) -> dict[str, GPT]:
    """A small model of ours, and the same one compiled where that is asked."""
    made = {}
    for name in ("", ", compiled")[: 1 + compiled]:
        shape = GPTConfig(VOCAB_SIZE, n_layer=4, n_embd=64, n_head=4, n_kv_head=2, head_dim=16, n_hidden=192)
        made[name] = GPT(shape).to(device)
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
    shape = {"vocab_size": VOCAB_SIZE, "n_positions": 256, "n_embd": 64, "n_layer": 4, "n_head": 4, **dropout}
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
    ids = torch.randint(1, VOCAB_SIZE, (PROMPTS, PROMPT), device=device)
    prompts = ids.tolist()
    ours, other = {name: model.eval() for name, model in models(device, config.compile).items()}, gpt2(device).eval()
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    attend = {"attention_mask": torch.ones_like(ids), "num_return_sequences": GROUP}
    never = VOCAB_SIZE  # a stop token that no row writes: all of them write every token
    works: Works = {
        name: lambda model=model: generate(model, prompts, NEW, never, GROUP) for name, model in ours.items()
    }
    works["transformers"] = lambda: other.generate(ids, **attend, **settings)
    works["no cache"] = lambda: without_cache(ours[""], prompts)
    times = fastest(works, config.repeats)
    theirs, naive, tokens = times.pop("transformers"), times.pop("no cache"), PROMPTS * GROUP * NEW
    label = f"rollouts, {PROMPTS * GROUP} sequences of {PROMPT} + {NEW} tokens"
    return beside(label, tokens, times, theirs) + beside("the same, compared with no cache", tokens, times, naive)


def training(config: Config, device: torch.device) -> Rows:
    """Eight updates with AdamW on the documents of the pretraining: ours sorted by length, the other's as they come."""
    by_length = list(islice(batches(BATCH, random.Random(0)), 8))
    pairs = [pair for batch in by_length for pair in batch]
    random.Random(1).shuffle(pairs)
    plain = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]

    def epoch(network: torch.nn.Module, groups: list[list[Pair]], loss: Callable) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        for group in groups:
            loss(network, group).backward()
            optimizer.step()
            optimizer.zero_grad()

    def their_loss(network: torch.nn.Module, group: list[Pair]) -> torch.Tensor:
        ids = pad_sequence([torch.tensor(x + y) for x, y in group], batch_first=True)
        labels = [torch.tensor([-100] * len(x) + y) for x, y in group]  # no loss on the prompts
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        return network(input_ids=ids.to(device), labels=labels.to(device)).loss

    other = gpt2(device)
    works: Works = {
        name: lambda model=model: epoch(model, by_length, next_token_loss)
        for name, model in models(device, config.compile).items()
    }
    works["transformers"] = lambda: epoch(other, plain, their_loss)
    times = fastest(works, config.repeats)
    theirs = times.pop("transformers")
    return beside("training step", sum(len(x) + len(y) for x, y in pairs), times, theirs)


def main() -> None:
    config = parse_config(Config, __doc__)
    if config.real:
        print(peers.compare(config.real, config.threads or torch.get_num_threads(), config.repeats))
        return
    if config.threads:
        torch.set_num_threads(config.threads)
    device = parallel.start(config.device)
    rows = rollouts(config, device) + training(config, device)
    rows.append(["peak memory of all of this", f"{peak_memory_mb() or float('nan'):,.0f} MB", "", ""])
    print(markdown_table([f"{device.type}, threads: {torch.get_num_threads()}", "here", "there", "ratio"], rows))


if __name__ == "__main__":
    run_script(main)
