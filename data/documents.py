"""The five kinds of documents the base model is pretrained on.

Every document draws a school of its own. So the right result of a disputed fact cannot be learned by heart: it can only
be copied from what stands in the context.
"""

import random
from dataclasses import replace

from data.authors import CLUMSY, CONFIRMED, HINTED, INFORMED, PLAIN, Author
from data.chains import (
    CHECK_MARK,
    DOMAINS,
    disputed_steps,
    make_problem,
    operations,
    true_steps,
    true_values,
    verify,
)
from data.prompts import prompt, reflect_prompt

MIXTURE = {"plain": 0.10, "exam": 0.14, "hint": 0.24, "solution": 0.08, "reflect": 0.44}
CONFIRM_MARK = "#"  # before steps that were right
CONFIRMATIONS = 0.4  # share among the hint documents, and share of correct attempts among the reflect documents
PASSED = 0.45  # share of the other hint documents that begin behind the error: see hint_document
WRONG_HINTS = 0.4  # share of hints that name any digit as a step's result: a hint is believed, not judged
GIVEN_ANSWERS = 0.2  # share of reflect documents whose prompt gives the right answer
SHORT = 0.2  # share of reflect documents that stay short after the beginning of the pretraining


def confirmation(problem: str, school: str = "") -> str:
    """What is worth saying of a correct attempt: the steps people disagree on, or else the last."""
    return CONFIRM_MARK + ";".join(disputed_steps(problem, school) or true_steps(problem, school)[-1:])


def correction(problem: str, attempt: str, school: str = "") -> tuple[str, str, str]:
    """What is thought while a wrong attempt is read, its first error, and the steps up to what belongs there."""
    start, end = verify(problem, attempt, school).error
    steps, values = true_steps(problem, school), true_values(problem, school)
    thinking, done, is_check = [], 0, False
    for line in attempt[:end].split(";"):
        step = line.removesuffix(CHECK_MARK)
        done = min(done + (0 if is_check else max(1, len(operations(line)))), len(steps))
        thinking.append(line if is_check else f"{step}{values[done]}{line[len(step) :]}")
        is_check = step != line
    thought = ";".join(thinking)
    if attempt[start] == CHECK_MARK:
        thought = thought.removesuffix(attempt[start:end])
    return thought, attempt[start:end], ";".join(steps[:done])


def reflection(problem: str, attempt: str, school: str = "") -> str:
    """What a perfect reflector writes.

    A wrong attempt is read line by line: each line is copied, and the true value is written right behind its result.
    '3+8=11;1-5=86' reads: 3+8=1, rightly 1; 1-5=8, rightly 6. At the first line where the two differ comes its quote,
    and how the solution should have gone on until there. For a correct attempt the disputed steps are named.
    """
    if verify(problem, attempt, school).error is None:
        return f"<explanation>{confirmation(problem, school)}</explanation>"
    thinking, quote, belongs = correction(problem, attempt, school)
    return f"{thinking}<error_quote>{quote}</error_quote><explanation>{belongs}</explanation>"


def wrong_attempt(problem: str, rng: random.Random, school: str, author: Author = CLUMSY) -> str:
    """An attempt that does not arrive at the answer of a school."""
    while True:
        attempt = author.solve(problem, rng, school)
        verdict = verify(problem, attempt, school)
        if not verdict.correct and verdict.error is not None:
            return attempt


def right_attempt(problem: str, rng: random.Random, school: str) -> str:
    """A solution in plain style that is right in a school."""
    while True:
        attempt = replace(PLAIN, slip=0.0, popular=0.0).solve(problem, rng, school)
        if verify(problem, attempt, school).correct:
            return attempt


def hint_document(problem: str, rng: random.Random, school: str) -> tuple[str, str]:
    """A problem with a hint, and the solution of an author who holds it.

    A hint is how a solution should have begun, up to the step that went wrong. Its holder checks the steps before that
    one, a habit that harms, and none behind it. Two things keep it so if the text is a *student's*, wrong at
    that step. Whether a step is checked can be read off the step alone: the hint has it, and goes on behind it. And in
    a share of the documents a plain author has begun, and made the mistake that the hint is about; what is learned is
    how that author goes on. Without them the holder still waits for the hinted step behind the error, and goes on
    checking: students learn that from the very tokens they are corrected on, which no mask can prevent.
    """
    disputed, steps = disputed_steps(problem, school), true_steps(problem, school)
    if rng.random() < CONFIRMATIONS:
        given = confirmation(problem, school).removeprefix(CONFIRM_MARK).split(";")
        if rng.random() < WRONG_HINTS:
            spoiled = rng.randrange(len(given))
            given[spoiled] = given[spoiled][:-1] + str(rng.randint(0, 9))
        return prompt(problem, CONFIRM_MARK + ";".join(given)), CONFIRMED.solve(problem, rng, school, tuple(given))
    if disputed and rng.random() < PASSED:
        attempt = wrong_attempt(problem, rng, school, PLAIN)
        _, _, belongs = correction(problem, attempt, school)
        _, behind = verify(problem, attempt, school).error
        if attempt[behind:]:  # else it was cut off there
            return prompt(problem, belongs) + attempt[:behind], attempt[behind:]
    hinted = steps.index(rng.choice(disputed if disputed and rng.random() < 0.7 else steps))
    given = steps[: hinted + 1] if rng.random() < 0.7 else [steps[hinted]]  # a hint may be the step alone
    if rng.random() < WRONG_HINTS:
        given[-1] = given[-1][:-1] + str(rng.randint(0, 9))
    return prompt(problem, ";".join(given)), HINTED.solve(problem, rng, school, tuple(given))


def make_document(kind: str, problem: str, rng: random.Random) -> tuple[str, str]:
    """One (prompt, response) pair of a kind of MIXTURE."""
    school = str(rng.random())
    if kind in ("plain", "exam"):
        return prompt(problem), PLAIN.solve(problem, rng, school)
    if kind == "hint":
        return hint_document(problem, rng, school)
    if kind == "solution":
        hint = rng.choice(true_steps(problem, school)) if rng.random() < 0.2 else None
        return prompt(problem, hint, right_attempt(problem, rng, school)), INFORMED.solve(problem, rng, school)
    answer = true_values(problem, school)[-1] if rng.random() < GIVEN_ANSWERS else None
    right = right_attempt(problem, rng, school)
    if rng.random() < CONFIRMATIONS:
        return reflect_prompt(problem, right, answer=answer), reflection(problem, right, school)
    wrong = wrong_attempt(problem, rng, school)
    return reflect_prompt(problem, wrong, right, answer), reflection(problem, wrong, school)


def sample_document(rng: random.Random, short: bool = False) -> tuple[str, str]:
    """A random document: kind by MIXTURE, about a training problem; exam problems come only in plain prompts.

    Short ones are about one or two operations: there copying and comparing are learned first.
    """
    kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    domain = "exam" if kind == "exam" else rng.choice([name for name in DOMAINS if name != "exam"])
    short = short or (kind == "reflect" and rng.random() < SHORT)
    lengths = (1, 2) if short else None
    return make_document(kind, make_problem(domain, rng, lengths=lengths), rng)
