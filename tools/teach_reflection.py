"""A short supervised start on reflections, for a model that is too small to compare two solutions. Not in the papers.

    python -m tools.teach_reflection --base smollm2 --task steps --out out/reflects
    python train_rosd.py --base smollm2 --task steps --shots 4 --reflector out/reflects/model --reflect-shots 0 ...

Every example is a training problem, its golden solution, the same with a slip, and the reflection that quotes the slip;
one in eight is a right solution alone. The loss is on the reflection. The folder OUT/model holds the model with its
adapters merged. It can only reflect: a model that has learned to copy slips makes them.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from data.sources import WordProblem
from data.words import Words
from errors import UserError
from harness import files
from harness.cli import option, parse_config, run_script
from harness.progress import progress_bar
from harness.run import TaskConfig, open_task_and_base
from lora import merge_lora, trainable_copy
from losses import Document, next_token_loss
from model import GPT


@dataclass(frozen=True)
class Config(TaskConfig):
    task: str = option("steps", "what the problems are from")
    domain: str = option("", "domain of the problems; unset: the task's first")
    reflect_shots: int | None = option(0, "worked reflections in the prompts", minimum=0)
    out: str = option("out/reflects", "the taught model goes to the folder model in it")
    steps: int = option(60, "updates", minimum=1)
    batch: int = option(8, "reflections an update", minimum=1)
    learning_rate: float = option(1e-3, "peak rate of AdamW, down to 0", minimum=0)


def example(task: Words, problem: WordProblem, right: bool) -> Document:
    """Request and reflection, in tokens, of a solution with a slip or of a right one."""
    attempt, peer = (problem.solution, None) if right else (task.wrong_solution(problem), problem.solution)
    prompt = task.reflector_prompt(problem, attempt, peer, False)
    return task.encode(prompt), [*task.encode(task.worked_reflection(problem, attempt, peer)), task.end()]


def teach(base: GPT, task: Words, config: Config) -> GPT:
    """A copy of the base that has learned to reflect."""
    torch.manual_seed(config.seed)
    student, weights = trainable_copy(base, "lora", rank=16, alpha=32)
    optimizer, rng = torch.optim.AdamW(weights, weight_decay=0.0), random.Random(f"reflections {config.seed}")
    for step in (bar := progress_bar(range(config.steps), "reflections")):
        problems = task.problems(config.domain or task.domains[0], config.batch, rng)
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, (step + 1) / 5) * (1 - step / config.steps)
        optimizer.zero_grad()
        loss = next_token_loss(student, [example(task, problem, i % 8 == 0) for i, problem in enumerate(problems)])
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    merge_lora(student)
    return student


def main() -> None:
    config = parse_config(Config, __doc__)
    task, base = open_task_and_base(config, config.domain)
    if not isinstance(task, Words):
        raise UserError(f"the models of {config.task} learn to reflect in pretrain.py; give a --task in words")
    files.save_model(Path(config.out), teach(base, task, config), config.base)
    print(f"{config.out}/model: {config.base}, taught to reflect")


if __name__ == "__main__":
    run_script(main)
