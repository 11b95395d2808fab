"""Chain arithmetic modulo 10: problems, the authors who solve them, and the verifier who reads their work.

A problem is a chain of one-digit operations, worked strictly from left to right, every value taken modulo 10:

>>> true_steps("3+8-5*2")
['3+8=1', '1-5=6', '6*2=2']

A solution writes its steps one after another and ends with the answer:

>>> verify("3+8-5*2", "3+8=1;1-5=6;6*2=2;#2")
Verdict(correct=True, finished=True, error=None, shortcut=False)

The verifier tolerates style (several operations in one step, a step checked again) but not wrong work. Of a wrong
solution it knows what no real data set knows: the characters of the *first* error, here the last step.

>>> verify("3+8-5*2", "3+8=1;1-5=6;6*2=8;#8")
Verdict(correct=False, finished=True, error=(12, 17), shortcut=False)
"""

import random
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache

DOMAINS = {  # name: (operators, possible chain lengths)
    "add": ("+", (3, 4)),
    "sub": ("-", (3, 4)),
    "mul": ("*", (3, 4)),
    "mix": ("+-*", (3, 4)),
    "long": ("+-*", (5,)),
}
# Domains whose last operand is missing: '3+8-5*?'. It follows no rule, one has to know it. (The same character as
# CHECK_MARK: the one stands for an operand, the other opens a line.)
GAPS = {"gap": ("+-*", (4,))}
GAP = "?"
STEP = re.compile(r"(\d)((?:[+\-*]\d)+)=(\d)")
CHECK_MARK = "?"
BUDGET = 48  # characters, and tokens, a solution may have: who needs more is cut off


def calculate(value: int, operator: str, operand: int) -> int:
    """One operation modulo 10; operator is one of + - *, the result lies in 0..9."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10


@lru_cache(maxsize=100_000)
def operations(chain: str) -> tuple[tuple[str, int], ...]:
    """The (operator, operand) pairs of '3+8-5' or of its tail '+8-5'; a gap hides a checksum of the whole problem."""
    hidden = str(zlib.crc32(chain.encode()) % 9 + 1)
    pairs = re.findall(r"([+\-*])([\d?])", chain)
    return tuple((operator, int(digit.replace(GAP, hidden))) for operator, digit in pairs)


def true_values(problem: str) -> list[int]:
    """The value before any operation, after the first, and so on; its last entry is the answer."""
    values = [int(problem[0])]
    for operator, operand in operations(problem):
        values.append(calculate(values[-1], operator, operand))
    return values


def true_steps(problem: str) -> list[str]:
    """Every step of the careful solution, one operation each."""
    values = true_values(problem)
    return [
        f"{values[i]}{operator}{operand}={values[i + 1]}" for i, (operator, operand) in enumerate(operations(problem))
    ]


def golden_solution(problem: str) -> str:
    """The careful solution: every step written out, then the answer."""
    return ";".join([*true_steps(problem), f"#{true_values(problem)[-1]}"])


def is_test(problem: str) -> bool:
    """Train and test problems are disjoint by construction: its checksum puts a quarter of all problems in test."""
    return zlib.crc32(problem.encode()) % 4 == 0


def make_problem(domain: str, rng: random.Random, test: bool = False) -> str:
    """A random problem of a domain (a key of DOMAINS or GAPS), from the train or from the test part."""
    operators, lengths = (DOMAINS | GAPS)[domain]
    while True:
        chain = "".join(rng.choice(operators) + str(rng.randint(1, 9)) for _ in range(rng.choice(lengths)))
        problem = str(rng.randint(1, 9)) + (chain[:-1] + GAP if domain in GAPS else chain)
        if is_test(problem) == test:
            return problem


@dataclass(frozen=True)
class Author:
    """How someone writes a solution; every number is a probability."""

    misread: float = 0.0  # an operand is copied wrong from the problem
    slip: float = 0.0  # a step's result is a wrong digit, and the work goes on from there
    hurry: float = 0.0  # the whole solution is cut short: two or three operations go into each step
    doubt: float = 0.0  # a result at either end, 0 or 9, looks suspicious and is checked: '3+7=0;?3+7=0'
    brood: float = 0.0  # whoever has just checked a step checks it once more
    guess: float = 0.0  # what the problem leaves out is guessed
    wary: bool = False  # every step before the hinted one is checked

    def solve(self, problem: str, rng: random.Random, hinted: int = 0) -> str:
        """The solution this author writes, e.g. '3+8=1;1-5=6;6*2=2;#2'; a hint is about step `hinted`."""
        todo, value, lines = operations(problem), int(problem[0]), []
        steps = len(todo)
        hurried = rng.random() < self.hurry
        while todo:
            taken = list(todo[: rng.choice((2, 3)) if hurried else 1])
            todo = todo[len(taken) :]
            if rng.random() < self.misread:
                taken[0] = (taken[0][0], rng.randint(1, 9))
            if GAP in problem and not todo and rng.random() < self.guess:
                taken[-1] = (taken[-1][0], rng.randint(1, 9))
            line = str(value) + "".join(f"{operator}{operand}" for operator, operand in taken)
            for operator, operand in taken:
                value = calculate(value, operator, operand)
            if rng.random() < self.slip:
                value = (value + rng.randint(1, 9)) % 10
            lines.append(f"{line}={value}")
            if self.wary and steps - len(todo) <= hinted:
                lines.append(CHECK_MARK + lines[-1])
            elif value in (0, 9) and rng.random() < self.doubt:
                check = CHECK_MARK + lines[-1]
                lines.append(check)
                while rng.random() < self.brood and len(lines) < BUDGET // 6:
                    lines.append(check)
        return ";".join([*lines, f"#{value}"])[:BUDGET]


@dataclass(frozen=True)
class Verdict:
    """What the verifier found."""

    correct: bool  # the final answer is right: the outcome reward of both papers
    finished: bool  # there is a final answer
    error: tuple[int, int] | None  # characters [start, end) of the first error; None where the answer is right,
    # or where it is cut off before anything went wrong
    shortcut: bool  # some step takes in more than one operation


def verify(problem: str, solution: str) -> Verdict:
    """Judge a solution's outcome and find its first error: a wrong or misplaced step, a stall, or a wrong answer.

    A stall is the first of two or more checks of the same step in a row: it is an error only of a solution that
    does not arrive at the right answer. Any text is a legal solution.
    """
    values, todo = true_values(problem), operations(problem)
    lines = solution.split(";")
    answer = re.fullmatch(r"#(\d)", lines[-1])
    correct = answer is not None and int(answer[1]) == values[-1]
    shortcut = any(len(operations(line)) > 1 for line in lines)

    done, start, error = 0, 0, None
    for i, line in enumerate(lines):
        step = STEP.fullmatch(line)
        taken = len(operations(step[2])) if step else 0
        if line.startswith(CHECK_MARK):
            repeats = line.strip(CHECK_MARK) == lines[i - 1].strip(CHECK_MARK)
            stalls = i + 1 < len(lines) and lines[i + 1].startswith(CHECK_MARK)
            fine = i > 0 and repeats and not stalls
        elif line.startswith("#"):
            fine = correct
        else:
            fine = (
                step is not None
                and int(step[1]) == values[done]
                and operations(step[2]) == todo[done : done + taken]
                and int(step[3]) == values[done + taken]
            )
        unfinished_tail = i == len(lines) - 1 and answer is None and step is None
        if not fine and not unfinished_tail:
            error = (start, start + len(line))
            break
        done += taken
        start += len(line) + 1
    return Verdict(correct, answer is not None, None if correct else error, shortcut)
