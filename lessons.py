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
from reflect import Pair, Rollout, Span, error_mask, pair_with_peers, true_position

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
    start: int  # k: m_t = 1 for start <= t < end
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
    pairs = pair_with_peers(rollouts, config.group, config.peer)
    groups = [pairs[start : start + config.group] for start in range(0, len(pairs), config.group)]
    if config.solved == "drop":
        groups = [group for group in groups if not all(pair.y.verdict.correct for pair in group)]
    pairs = [pair for group in groups for pair in group if has_context(pair, config.context)]
    return [pair for pair in pairs if teaches(pair, config.learn_from)]


def has_context(pair: Pair, context: str) -> bool:
    match context:
        case "reflection":
            return pair.peer is not None or pair.y.verdict.correct
        case "peer" | "both":
            return pair.peer is not None
        case "gold":
            return True
        case "nothing":
            return pair.advantage != 0
    raise ValueError(f"there is no context {context!r}, only {', '.join(CONTEXTS)}")


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
    """Parts whose sizes differ by at most one lesson; parts without an unmasked token are left out."""
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


def statistics(
    rollouts: list[Rollout], pairs: list[Pair], quotes: list[Span | None] | None, task: Task, group: int
) -> dict:
    """What a step logs of its rollouts, and of the quotes in its wrong rollouts, if there are reflections.

    `solved`, the share of groups with a right rollout, is pass@G on fresh training problems.
    """
    verdicts = [y.verdict for y in rollouts]
    groups = [verdicts[i : i + group] for i in range(0, len(verdicts), group)]
    wrong = [(y, quote) for (y, *_), quote in zip(pairs, quotes or [], strict=False) if not y.verdict.correct]
    return {
        "accuracy": [v.correct for v in verdicts],
        "solved": [any(v.correct for v in each) for each in groups],
        **{habit: [habit in v.habits for v in verdicts] for habit in task.habits},
        "unfinished": [not v.finished for v in verdicts],
        "quote_match": [quote is not None for _, quote in wrong],
        "quote_accuracy": [quote is not None and quote[0] == true_position(y) for y, quote in wrong if y.verdict.error],
        "error_position": [quote[0] / len(y.tokens) for y, quote in wrong if quote],  # where the quote was found
    }
