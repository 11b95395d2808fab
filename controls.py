"""Interventions on ROSD that separate the causes of its gain. None of them is in the paper.

--control false-ideas     the teacher holds an idea with a wrong result: does the content of e matter?
--control other-ideas     the teacher holds an idea about another problem: does it have to be about this one?
--control random-quotes   the loss begins at a random token: does the first error have to be found?
--dose 0.25               ... in so many of the reflections
--reflector oracle        the reflections of somebody who knows the truth: what does the reflector's own skill cost?
--learn-from wrong        the corrected wrong rollouts alone, or the confirmed right ones
"""

import dataclasses
import random
from dataclasses import dataclass

from data import Task, falsify
from harness.cli import option
from reflect import Pair, Reflection, parse_reflection

CONTROLS = ("none", "false-ideas", "other-ideas", "random-quotes")


@dataclass(frozen=True)
class Controls:
    """controls of ours"""

    control: str = option("none", "what is wrong with the reflections on purpose", "none", CONTROLS)
    dose: float = option(1.0, "the share of the reflections that --control spoils", minimum=0, maximum=1)
    learn_from: str = option("all", "which rollouts teach: all, right or wrong ones", "all", ("all", "right", "wrong"))


def teaches(pair: Pair, learn_from: str) -> bool:
    return learn_from == "all" or (learn_from == "right") == pair.y.verdict.correct


def oracle_reflections(_: object, task: Task, pairs: list[Pair], *__: object, **___: object) -> list[Reflection]:
    """What a reflector who knows the truth would write; takes the arguments of `reflect.write_reflections`."""
    return [parse_reflection(task.true_reflection(y.problem, y.text), y.pieces) for y, *_ in pairs]


def spoil(
    reflections: list[Reflection], pairs: list[Pair], control: str, dose: float, rng: random.Random
) -> list[Reflection]:
    """The reflections, a share `dose` of them with a false idea, an idea of another problem, or at a random place."""
    spoiled = []
    for reflection, (y, *_) in zip(reflections, pairs, strict=True):
        if control == "none" or rng.random() >= dose:
            spoiled.append(reflection)
        elif control == "false-ideas":
            idea = reflection.idea and falsify(reflection.idea, rng)
            spoiled.append(dataclasses.replace(reflection, idea=idea))
        elif control == "other-ideas":
            others = [r.idea for r, (other, *_) in zip(reflections, pairs, strict=True) if other.problem != y.problem]
            idea = reflection.idea and rng.choice([idea for idea in others if idea] or [reflection.idea])
            spoiled.append(dataclasses.replace(reflection, idea=idea))
        elif y.verdict.correct:  # random-quotes: a correct rollout is taught whole, whatever is quoted
            spoiled.append(reflection)
        else:
            k = rng.randrange(len(y.tokens))
            length = reflection.span[1] - reflection.span[0] if reflection.span else 1
            spoiled.append(dataclasses.replace(reflection, span=(k, min(k + length, len(y.tokens)))))
    return spoiled
