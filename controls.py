"""Interventions on ROSD that separate the causes of its gain. None of them is in the paper.

--control false-ideas     the teacher holds an idea with a wrong result: does the content of e matter?
--control other-ideas     the teacher holds an idea about another problem: does it have to be about this one?
--control random-quotes   the loss begins at a random token: does the first error have to be found?
--control other-quotes    ... where another wrong rollout went wrong: does its position alone explain the gain?
--dose 0.25               ... in so many of the reflections
--reflector oracle        an oracle's reflections, which know the truth: what does the reflector's own skill cost?
--learn-from wrong        the corrected wrong rollouts alone, or the confirmed right ones
"""

import random
from dataclasses import dataclass
from typing import Any

from data import Task, falsify
from harness.cli import option
from model import GPT
from reflect import Pair, Reflection, Span, parse_reflection

CONTROLS = ("none", "false-ideas", "other-ideas", "random-quotes", "other-quotes")


@dataclass(frozen=True)
class ControlsConfig:
    """our controls, not in the paper"""  # the title of the group in --help

    control: str = option("none", "what is wrong with the reflections on purpose", "none", CONTROLS)
    dose: float = option(1.0, "the share of the reflections that --control spoils", minimum=0, maximum=1)
    learn_from: str = option("all", "which rollouts teach: all, right or wrong ones", "all", ("all", "right", "wrong"))


def teaches(pair: Pair, learn_from: str) -> bool:
    correct = pair.y.verdict.correct
    return {"all": True, "right": correct, "wrong": not correct}[learn_from]


def oracle_reflections(reflector: GPT, task: Task, pairs: list[Pair], *args: Any) -> list[Reflection]:
    """What a reflector who knows the truth would write; it replaces `reflect.write_reflections`."""
    return [parse_reflection(task.true_reflection(y.problem, y.text)) for y, *_ in pairs]


def spoil(
    reflections: list[Reflection],
    spans: list[Span | None],
    pairs: list[Pair],
    control: str,
    dose: float,
    rng: random.Random,
) -> tuple[list[Reflection], list[Span | None]]:
    """The reflections and the spans of their quotes, a share `dose` of them spoiled."""
    ideas, moved = [reflection.idea for reflection in reflections], list(spans)
    for i, (y, *_) in enumerate(pairs):
        if rng.random() >= dose:
            continue
        if control == "false-ideas" and ideas[i]:
            ideas[i] = falsify(ideas[i], rng)
        elif control == "other-ideas" and ideas[i]:
            others = zip(reflections, pairs, strict=True)
            others = [other.idea for other, pair in others if other.idea and pair.y.problem != y.problem]
            ideas[i] = rng.choice(others or [ideas[i]])
        elif control == "random-quotes" and not y.verdict.correct:
            k = rng.randrange(len(y.tokens))
            length = spans[i][1] - spans[i][0] if spans[i] else 1
            moved[i] = k, min(k + length, len(y.tokens))
        elif control == "other-quotes" and not y.verdict.correct:
            others = zip(spans, pairs, strict=True)
            others = [span for span, p in others if span and p.y.problem != y.problem and not p.y.verdict.correct]
            k, end = rng.choice([span for span in others if span[0] < len(y.tokens)] or [(0, len(y.tokens))])
            moved[i] = k, min(end, len(y.tokens))
    return [Reflection(r.quote, idea) for r, idea in zip(reflections, ideas, strict=True)], moved
