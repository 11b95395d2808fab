"""What a step of ROSD's family learns from: which rollouts teach, what their teacher reads, and batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from controls import teaches
from data import Task
from model import pad
from reflect import NO_REFLECTION, Pair, Reflection, Rollout, error_mask, pair_with_peers, true_position

if TYPE_CHECKING:
    from train_rosd import Config

CONTEXTS = ("reflection", "peer", "gold", "both", "nothing")


@dataclass(frozen=True)
class Lesson:
    """A rollout that the student learns from, in tokens, and what the teacher reads before it."""

    x: list[int]  # the student's prompt
    x_T: list[int]  # the teacher's: x and e
    y: list[int]
    logp: list[float]  # log-probs of y when it was sampled
    start: int  # m_t = 1 for start <= t < end
    end: int
    advantage: float  # GRPO's


def pairs_to_learn_from(rollouts: list[Rollout], config: Config) -> list[Pair]:
    """The rollouts that teach, each with its correct peer y*.

    | teacher reads | a wrong rollout needs    | a right rollout needs    |
    |---------------|--------------------------|--------------------------|
    | reflection    | a peer                   | nothing                  |
    | peer, both    | a peer                   | a peer                   |
    | gold          | nothing                  | nothing                  |
    | nothing       | a right one in its group | a wrong one in its group |
    """
    pairs = []
    for i, pair in enumerate(pair_with_peers(rollouts, config.group, config.peer)):
        suffices = {
            "reflection": pair.y.verdict.correct or pair.peer,
            "peer": pair.peer,
            "both": pair.peer,
            "gold": True,
            "nothing": pair.advantage != 0,
        }
        solved = all(y.verdict.correct for y in rollouts[i - i % config.group :][: config.group])
        if suffices[config.context] and teaches(pair, config.learn_from) and not (solved and config.solved == "drop"):
            pairs.append(pair)
    return pairs


def teacher_prompt(task: Task, y: Rollout, peer: Rollout | None, e: str | None, config: Config) -> str | None:
    """The problem and the teacher's context; None where a malformed reflection leaves it nothing to read."""
    solution = peer.text if peer else None
    match config.context:
        case "reflection" if e is None:
            return task.prompt(y.problem, solution=solution) if config.malformed == "peer" and solution else None
        case "reflection":
            return task.prompt(y.problem, idea=e)
        case "peer":
            return task.prompt(y.problem, solution=solution)
        case "both":
            return task.prompt(y.problem, idea=e, solution=solution)
        case "gold":
            return task.prompt(y.problem, solution=y.problem.solution)
        case "nothing":
            return task.prompt(y.problem)
    raise ValueError(f"there is no context {config.context!r}, only {', '.join(CONTEXTS)}")


# ---------------------------------------------------------------------------------------------- batches


def split(lessons: list[Lesson], parts: int) -> Iterator[list[Lesson]]:
    """The lessons in so many parts of equal size, but for one; without the empty ones."""
    bounds = [i * len(lessons) // parts for i in range(parts + 1)]
    batches = (lessons[i:j] for i, j in itertools.pairwise(bounds))
    yield from (batch for batch in batches if any(lesson.end > lesson.start for lesson in batch))


def by_length(lessons: list[Lesson], size: int) -> Iterator[list[Lesson]]:
    """Micro-batches of lessons of similar length, which need little padding."""
    ordered = sorted(lessons, key=lambda lesson: len(lesson.x_T) + len(lesson.y))
    yield from (ordered[i : i + size] for i in range(0, len(ordered), size))


def as_tensors(lessons: list[Lesson], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens y, mask m_t, and the log-probs of y when it was sampled, padded to (B, T)."""
    y, logp = pad([lesson.y for lesson in lessons]), pad([lesson.logp for lesson in lessons])
    m = error_mask([lesson.start for lesson in lessons], [lesson.end for lesson in lessons], y.size(1))
    return y.to(device), m.to(device), logp.to(device)


# ---------------------------------------------------------------------------------------------- the log


def statistics(rollouts: list[Rollout], pairs: list[Pair], reflections: list[Reflection], task: Task) -> dict:
    """What a step logs of its rollouts, and of the quotes in its wrong rollouts."""
    verdicts = [y.verdict for y in rollouts]
    read = [(pair.y, r) for pair, r in zip(pairs, reflections, strict=True) if r is not NO_REFLECTION]
    wrong = [(y, r) for y, r in read if not y.verdict.correct]
    return {
        "accuracy": [v.correct for v in verdicts],
        **{habit: [habit in v.habits for v in verdicts] for habit in task.habits},
        "unfinished": [not v.finished for v in verdicts],
        "quote_match": [r.span is not None for _, r in wrong],
        "quote_accuracy": [r.span is not None and r.span[0] == true_position(y) for y, r in wrong if y.verdict.error],
        "error_position": [r.span[0] / len(y.tokens) for y, r in wrong if r.span],  # of the quotes that were found
    }
