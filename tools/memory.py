"""What ROSD needs of a GPU's memory, computed; and what one update really takes on this machine.

docs/real_models.md has the formulas and both tables.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch

import losses
from data import Verdict
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import find_task, peak_memory_mb
from lora import add_lora, make_trainable
from model import GPT, GPTConfig
from reflect import Rollout
from train_rosd import Config as RosdConfig
from train_rosd import Lesson, settle, update

QWEN3 = {  # layers, width, query heads, hidden width of the MLP
    "Qwen3-0.6B": (28, 1024, 16, 3072),
    "Qwen3-1.7B": (28, 2048, 16, 6144),
    "Qwen3-4B": (36, 2560, 32, 9728),
}


@dataclass(frozen=True)
class Config:
    length: int = option(1024, "tokens of prompt and response together", minimum=2)
    rollouts: int = option(64, "rollouts sampled at once, problems times G", minimum=1)
    micro_batch: int = option(4, "rollouts an update holds at once", minimum=1)
    measure: str = option("", "make an update of a small model, print the peak", choices=("full", "lora"))
    results: tuple[str, ...] = option((), "results.json of finished runs: print their peaks")


def gigabytes(name: str, finetune: str, config: Config) -> dict[str, float]:
    """What each part takes in GiB; the peak is the update's or the sampling's, whichever is larger."""
    layers, width, heads, hidden = QWEN3[name]
    shape = GPTConfig(151_936, config.length, layers, width, heads, n_kv_head=8, head_dim=128, n_hidden=hidden)
    with torch.device("meta"):
        model = GPT(shape)
        P = sum(p.numel() for p in model.parameters())
        A = sum(p.numel() for p in add_lora(model))
    Q, K = heads * 128, 8 * 128  # widths of queries, and of keys
    saved = 4 * width + 5 * Q + 5 * K + 4 * hidden  # numbers that backward needs, a token and layer
    full, tokens = finetune == "full", config.micro_batch * config.length
    size = 4 if full else 2  # bytes of a number: float32 beside the bfloat16 base, or the base alone
    upcast = 0 if full else 4 * (3 * width + Q)  # what the adapters read, in float32
    parts = {
        "weights": 2 * P + (4 * P if full else 4 * A),
        "gradients": 4 * (P if full else A),
        "AdamW": 8 * (P if full else A),
        "activations": tokens * layers * (size * saved + upcast),
        "logits": 8 * 4 * min(losses.CHUNK, tokens * shape.vocab_size),
        "KV cache": config.rollouts * config.length * layers * 2 * K * size,
    }
    always = sum(parts[part] for part in ("weights", "gradients", "AdamW"))
    parts["peak"] = always + max(parts["activations"] + parts["logits"], parts["KV cache"])
    return {part: value / 2**30 for part, value in parts.items()}


def measure(finetune: str) -> float:
    """Peak in MB of this process after an update: 8 layers of width 256, golden solutions in the place of rollouts."""
    task, config = find_task(RosdConfig()), settle(RosdConfig(finetune=finetune))
    student, base = (GPT(GPTConfig(50_000, 256, 8, 256, 8, 4, 32, 768)).requires_grad_(False) for _ in range(2))
    optimizer, lessons = torch.optim.AdamW(make_trainable(student, finetune, 8, 8.0)), []
    for problem in task.problems("mix", 128, random.Random(0)):
        tokens, told = task.encode(problem.solution), task.teacher_prompt(problem, solution=problem.solution)
        rollout = Rollout(problem, tokens, [0.0] * len(tokens), problem.solution, Verdict(False, True, None))
        lessons.append(Lesson(rollout, told, 0, len(tokens)))
    update(student, student if finetune == "lora" else base, optimizer, lessons, task, config, 0)
    return peak_memory_mb()


def main() -> None:
    config = parse_config(Config, __doc__)
    if config.results:
        found = [files.read_json(Path(path)) for path in config.results]
        print(markdown_table(["run", "peak, MB"], [[r["name"], f"{r['peak_memory_mb']:.0f}"] for r in found]))
    elif config.measure:
        print(f"logits in chunks {measure(config.measure):.0f} MB", end=", ")
        losses.CHUNK = 1 << 60
        print(f"at once {measure(config.measure):.0f} MB")
    else:
        rows = []
        for name, finetune in itertools.product(QWEN3, ("full", "lora")):
            need = gigabytes(name, finetune, config)
            fits = ["yes" if need["peak"] < 0.9 * card else "no" for card in (24, 80)]
            rows.append([name, finetune, *(f"{value:.1f}" for value in need.values()), *fits])
        print(markdown_table(["computed, GiB", "", *need, "24 GB", "80 GB"], rows))


if __name__ == "__main__":
    run_script(main)
