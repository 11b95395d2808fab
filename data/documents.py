"""Prompts, and the four kinds of documents the base model is pretrained on.

One weight set plays every part, told apart by its prompt: the student (a problem), the teacher (a problem and a hint,
or a solution it holds), and the reflector (a problem, a correct solution, and the attempt to reflect on).
"""

import random
from dataclasses import dataclass, replace

from data.chains import CHECK_MARK, DOMAINS, GAPS, Author, make_problem, operations, true_steps, true_values, verify

# The authors of the training text. Who has nothing to hold on to slips, and now and then broods. Who holds a solution
# cuts the work short: it can be read off. Who holds a hint writes every step out (WORLDS).
PLAIN = Author(slip=0.03, hurry=0.10, doubt=0.55, brood=0.92, guess=1.0)
INFORMED = Author(hurry=0.60)
CLUMSY = replace(PLAIN, slip=0.25, misread=0.03)  # supplies the wrong attempts to reflect on


@dataclass(frozen=True)
class World:
    """What one base is pretrained on."""

    domains: tuple[str, ...]
    hinted: Author  # who holds a hint
    praise: int  # which step the reflector gives of a correct attempt


WORLDS = {
    "plain": World(tuple(DOMAINS), Author(), praise=-1),
    # Here localization matters: most errors come late and cannot be helped, and a hint makes its holder overcautious.
    "gaps": World((*DOMAINS, *GAPS, *GAPS, *GAPS), Author(wary=True), praise=0),
}
MIXTURE = {"plain": 0.3, "hint": 0.2, "solution": 0.15, "reflect": 0.35}


def plain_prompt(problem: str) -> str:
    return f"<|user|>{problem}<|assistant|>"


def hint_prompt(problem: str, hint: str) -> str:
    return f"<|user|>{problem}<|hint|>{hint}<|assistant|>"


def solution_prompt(problem: str, solution: str, hint: str | None = None) -> str:
    held = "" if hint is None else f"<|hint|>{hint}"
    return f"<|user|>{problem}{held}<|solution|>{solution}<|assistant|>"


def reflect_prompt(problem: str, attempt: str, peer: str | None = None) -> str:
    """The reflector's prompt: a wrong attempt comes with a correct peer, a correct one alone."""
    held = "" if peer is None else f"<|solution|>{peer}"
    return f"<|user|>{problem}{held}<|attempt|>{attempt}<|assistant|>"


def reflection(problem: str, attempt: str, praise: int = -1) -> str:
    """What a perfect reflector writes.

    A wrong attempt is read line by line: each line is copied, and after a colon follow the problem's true values at
    its operations. At the first line that is not right comes its quote, and the step or steps that belong there. Of a
    correct attempt one step is given: the last, which carries the answer, or the one `praise` counts.
    """
    verdict, steps, values = verify(problem, attempt), true_steps(problem), true_values(problem)
    if verdict.correct or verdict.error is None:
        return f"<explanation>{steps[praise]}</explanation>"
    start, end = verdict.error
    wrong, thinking, belongs, done = attempt[start:end], "", steps[0], 0
    for line in attempt[:end].split(";"):
        if line.startswith(CHECK_MARK):
            thinking += f"{line};"
            continue
        taken = max(1, len(operations(line)))
        true = values[done + 1 : done + taken + 1] or values[-1:]
        thinking += line + "".join(f":{value}" for value in true) + ";"
        belongs = ";".join(steps[done : done + taken] or steps[-1:])
        done += taken
    return f"{thinking[:-1]}<error_quote>{wrong}</error_quote><explanation>{belongs}</explanation>"


def wrong_attempt(problem: str, rng: random.Random, wary: bool = False) -> str:
    """A clumsy author's attempt that does not arrive at the right answer, perhaps because it runs out of room."""
    while True:
        checked = rng.randrange(len(operations(problem))) if wary else 0  # steps, from the first on
        attempt = replace(CLUMSY, wary=wary).solve(problem, rng, checked)
        verdict = verify(problem, attempt)
        if not verdict.correct and verdict.error is not None:
            return attempt


def right_attempt(problem: str, rng: random.Random, **habits: float) -> str:
    """A solution in plain style that is right."""
    while True:
        attempt = replace(PLAIN, slip=0.0, guess=0.0, **habits).solve(problem, rng)
        if verify(problem, attempt).correct:
            return attempt


def make_document(kind: str, problem: str, rng: random.Random, world: World = WORLDS["plain"]) -> tuple[str, str]:
    """One (prompt, response) pair of a kind of MIXTURE."""
    if kind == "plain":
        return plain_prompt(problem), PLAIN.solve(problem, rng)
    if kind == "hint":
        steps = true_steps(problem)
        hinted = rng.randrange(len(steps))
        author = replace(world.hinted, guess=float(hinted < len(steps) - 1))  # a gap is known from the hint of its step
        return hint_prompt(problem, steps[hinted]), author.solve(problem, rng, hinted)
    if kind == "solution":
        hint = rng.choice(true_steps(problem)) if rng.random() < 0.2 else None
        return solution_prompt(problem, right_attempt(problem, rng, hurry=0.0), hint), INFORMED.solve(problem, rng)
    if rng.random() < 0.2:
        attempt = right_attempt(problem, rng)
        return reflect_prompt(problem, attempt), reflection(problem, attempt, world.praise)
    attempt, peer = wrong_attempt(problem, rng, world.hinted.wary), right_attempt(problem, rng)
    return reflect_prompt(problem, attempt, peer), reflection(problem, attempt)


def sample_document(rng: random.Random, world: World = WORLDS["plain"]) -> tuple[str, str]:
    """A random document: kind by MIXTURE, domain by the world's list, problem from the train part."""
    kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    return make_document(kind, make_problem(rng.choice(world.domains), rng), rng, world)
