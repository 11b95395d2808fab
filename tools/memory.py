"""What ROSD needs of a GPU's memory, computed; and what one update really takes on this machine.

    python -m tools.memory                                   the table, for a GPU
    python -m tools.memory --measure full --micro-batch 16   one update of a small model, and the peak of this process
    python -m tools.memory --results out/*/results.json      the peaks of finished runs

docs/real_models.md has the formulas and both tables.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import find_task, peak_memory_mb
from lessons import Lesson, by_length
from lora import trainable_copy
from model import GPT, GPTConfig
from train_rosd import METHODS, configure
from train_rosd import Config as RosdConfig

QWEN3 = {  # layers, width, query heads, hidden width of the MLP
    "Qwen3-0.6B": (28, 1024, 16, 3072),
    "Qwen3-1.7B": (28, 2048, 16, 6144),
    "Qwen3-4B": (36, 2560, 32, 9728),
}
LOGITS = 4  # float32 tensors of the size of the responses' logits that an update holds at once


@dataclass(frozen=True)
class Config:
    length: int = option(1024, "tokens of prompt and response together", minimum=2)
    response: int = option(512, "tokens of the response alone", minimum=1)
    rollouts: int = option(64, "rollouts sampled at once, problems times G", minimum=1)
    micro_batch: int = option(2, "rollouts an update holds at once", minimum=1)
    measure: str = option("", "make an update of a small model, print the peak", choices=("", "full", "lora"))
    results: tuple[str, ...] = option((), "results.json of finished runs: print their peaks")


def gigabytes(name: str, finetune: str, config: Config) -> dict[str, float]:
    """What each part takes in GiB; the peak is the update's or the sampling's, whichever is larger."""
    layers, width, heads, hidden = QWEN3[name]
    shape = GPTConfig(151_936, config.length, layers, width, heads, n_kv_head=8, head_dim=128, n_hidden=hidden)
    with torch.device("meta"):
        base = GPT(shape)
        P = sum(p.numel() for p in base.parameters())
        A = sum(p.numel() for p in trainable_copy(base, "lora")[1])
    Q, K = heads * 128, 8 * 128  # widths of queries, and of keys
    saved = 4 * width + 5 * Q + 5 * K + 4 * hidden  # numbers that backward needs, a token and layer
    full, tokens = finetune == "full", config.micro_batch * config.length
    size, trained = (4, P) if full else (2, A)  # bytes of a number: float32 beside the bfloat16 base, or the base alone
    upcast = 0 if full else 4 * (3 * width + Q)  # what the adapters read, in float32
    parts = {
        "weights": 2 * P + 4 * trained,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "activations": tokens * layers * (size * saved + upcast),
        "logits": LOGITS * 4 * config.micro_batch * config.response * shape.vocab_size,
        "KV cache": config.rollouts * config.length * layers * 2 * K * size,
    }
    always = sum(parts[part] for part in ("weights", "gradients", "AdamW"))
    parts["peak"] = always + max(parts["activations"] + parts["logits"], parts["KV cache"])
    return {part: value / 2**30 for part, value in parts.items()}


def update(
    student: GPT, teacher: GPT, weights: list, optimizer: Optimizer, lessons: list[Lesson], config: RosdConfig
) -> None:
    """The last part of a step of train_rosd.py."""
    M = sum(lesson.end - lesson.start for lesson in lessons)
    optimizer.zero_grad()
    for part in by_length(lessons, config.micro_batch):
        (METHODS[config.method].loss(student, teacher, part, config) / M).backward()
    nn.utils.clip_grad_norm_(weights, config.grad_clip)
    optimizer.step()


def measure(finetune: str, micro_batch: int) -> float | None:
    """Peak in MB of this process after an update: 8 layers of width 256, golden solutions in the place of rollouts."""
    config = configure(finetune=finetune, micro_batch=micro_batch)
    task, base = find_task(config), GPT(GPTConfig(50_000, 256, 8, 256, 8, 4, 32, 768)).requires_grad_(False)
    student, weights = trainable_copy(base, finetune)
    lessons = []
    for problem in task.problems("mix", 128, random.Random(0)):
        x, x_T = task.prompt(problem), task.prompt(problem, solution=problem.solution)
        x, x_T, y = map(task.encode, (x, x_T, problem.solution))
        lessons.append(Lesson(x, x_T, y, [0.0] * len(y), 0, len(y), 0.0))
    update(student, base, weights, torch.optim.AdamW(weights), lessons, config)
    return peak_memory_mb()


def main() -> None:
    config = parse_config(Config, __doc__)
    if config.results:
        found = [files.read_json(Path(path)) for path in config.results]
        print(markdown_table(["run", "peak, MB"], [[r["name"], f"{r['peak_memory_mb']:.0f}"] for r in found]))
    elif config.measure:
        print(f"{measure(config.measure, config.micro_batch):.0f} MB")
    else:
        rows = []
        for name, finetune in itertools.product(QWEN3, ("full", "lora")):
            need = gigabytes(name, finetune, config)
            fits = ["yes" if need["peak"] < 0.9 * card else "no" for card in (24, 80)]
            rows.append([name, finetune, *(f"{value:.1f}" for value in need.values()), *fits])
        print(markdown_table(["computed, GiB", "", *need, "24 GB", "80 GB"], rows))


if __name__ == "__main__":
    run_script(main)
