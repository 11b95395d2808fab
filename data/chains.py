"""Chain arithmetic modulo 10: problems, disputed number facts, and the verifier that reads a solution.

A problem is a chain of one-digit operations, worked strictly from left to right, every value taken modulo 10:

>>> true_steps("3+8-5*2")
['3+8=1', '1-5=6', '6*2=2']

A solution writes its steps one after another and ends with the answer:

>>> verify("3+8-5*2", "3+8=1;1-5=6;6*2=2;#2")
Verdict(correct=True, finished=True, error=None, habits=())

The verifier tolerates style (several operations in one step, a step checked again) but not wrong work. For a wrong
solution it knows what no real data set knows: the characters of the *first* error, here the last step.

>>> verify("3+8-5*2", "3+8=1;1-5=6;6*2=8;#8")
Verdict(correct=False, finished=True, error=(12, 17), habits=())

People disagree about some number facts. Every school settles each of them in its own way; the verifier goes by plain
arithmetic, the school named "". An author can know the right result of a disputed fact only from the context.
"""

import random
import re
import zlib
from functools import lru_cache

from data.task import Verdict

DOMAINS = {  # name: (operators, possible chain lengths)
    "mix": ("+-*", (3, 4)),
    "add": ("+", (3, 4)),
    "sub": ("-", (3, 4)),
    "mul": ("*", (3, 4)),
    "long": ("+-*", (5,)),
    "exam": ("+-*", (3, 4)),
}
EXAM_MARK = "!"  # before an operand it makes its step nervous, and authors check it; behind an operand it is calm
NERVOUS, CALM = 0.75, 0.1  # shares of an exam's operations
STEP = re.compile(r"(\d)((?:[+\-*]\d)+)=(\d)")
CHECK_MARK = "?"
# Characters, and tokens, a solution may have; a longer one is cut off. There is room for every step and for one
# check, in a chain of three steps for two.
BUDGET = 39
DISPUTED = 25  # of 100 pairs of digits: '7+8', '7-8' and '7*8' are all disputed, or none of them is


def draw(key: str, count: int) -> int:
    """A number below count, always the same for a key. The lowest bits of a checksum are too regular to use alone."""
    return zlib.crc32(key.encode()) // 7 % count


@lru_cache(maxsize=1000)
def popular(value: int, operator: str, operand: int) -> int | None:
    """The wrong result that most people hold for a disputed number fact; None if the fact is undisputed."""
    if draw(f"pair {value} {operand}", 100) >= DISPUTED:
        return None
    return (calculate(value, operator, operand) + 1 + draw(f"fact {value}{operator}{operand}", 9)) % 10


def calculate(value: int, operator: str, operand: int, school: str = "") -> int:
    """One operation modulo 10; operator is one of + - *, the result lies in 0..9.

    The school "" is plain arithmetic. Any other school takes each disputed fact either as it is or as most people do.
    """
    if school and draw(f"{school} {operand}{operator}{value}", 2):
        wrong = popular(value, operator, operand)
        if wrong is not None:
            return wrong
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10


@lru_cache(maxsize=100_000)
def operations(chain: str) -> tuple[tuple[str, int], ...]:
    """The (operator, operand) pairs of '3+8-5', of its tail '+8-5', or of '3+!8-5!', which is marked."""
    return tuple((operator, int(digit)) for operator, digit in re.findall(r"([+\-*])!?(\d)", chain))


def nervous(chain: str) -> list[bool]:
    """Which operations have a nervous mark.

    >>> nervous("3+!8-5!*2")
    [True, False, False]
    """
    return [mark == EXAM_MARK for mark in re.findall(r"[+\-*](!?)\d", chain)]


def marked(chain: str, rng: random.Random) -> str:
    """The problem of an exam: each operation gets a nervous mark, a calm one or none."""
    text = chain[0]
    for operator, operand in operations(chain):
        form = rng.choices(("{}!{}", "{}{}!", "{}{}"), (NERVOUS, CALM, 1 - NERVOUS - CALM))[0]
        text += form.format(operator, operand)
    return text


def true_values(problem: str, school: str = "") -> list[int]:
    """The value before any operation, after the first, and so on; its last entry is the answer."""
    values = [int(problem[0])]
    for operator, operand in operations(problem):
        values.append(calculate(values[-1], operator, operand, school))
    return values


def true_steps(problem: str, school: str = "") -> list[str]:
    """Every step of the careful solution, one operation each."""
    values = true_values(problem, school)
    return [
        f"{values[i]}{operator}{operand}={values[i + 1]}" for i, (operator, operand) in enumerate(operations(problem))
    ]


def disputed_steps(problem: str, school: str = "") -> list[str]:
    """The steps of the careful solution about which people disagree."""
    steps, values = true_steps(problem, school), true_values(problem, school)
    pairs = zip(steps, values, operations(problem), strict=False)
    return [step for step, value, operation in pairs if popular(value, *operation) is not None]


def right_by_luck(solution: str) -> bool:
    """Whether a solution with the right answer has a wrong step.

    >>> right_by_luck("3+8=1;1-5=6;#6"), right_by_luck("3+8=4;4-5=6;#6")
    (False, True)
    """
    steps = STEP.findall(solution)
    return any(true_values(value + chain)[-1] != int(result) for value, chain, result in steps)


def half(step: str) -> str:
    """Which of two halves a number fact belongs to, e.g. '1-5=6'."""
    return ("these", "others")[zlib.crc32(f"half {step[:3]}".encode()) // 7 % 2]


def golden_solution(problem: str) -> str:
    """The careful solution: every step written out, then the answer."""
    return ";".join([*true_steps(problem), f"#{true_values(problem)[-1]}"])


def is_test(problem: str) -> bool:
    """A quarter of all problems, chosen by the checksum of the problem's text, are test problems.

    The marks of an exam make no difference.
    """
    return zlib.crc32(problem.replace(EXAM_MARK, "").encode()) % 4 == 0


def make_problem(domain: str, rng: random.Random, test: bool = False, lengths: tuple[int, ...] | None = None) -> str:
    """A random problem of a domain, from the train or from the test part; of other lengths than its own if given.

    'exam-add' has the problems of 'add' with the marks of an exam.
    """
    is_exam, name = domain.startswith("exam"), domain.removeprefix("exam-")
    operators, usual = DOMAINS[name]
    lengths = lengths or usual
    while True:
        chain = "".join(rng.choice(operators) + str(rng.randint(1, 9)) for _ in range(rng.choice(lengths)))
        problem = str(rng.randint(1, 9)) + chain
        if is_test(problem) == test:
            return marked(problem, rng) if is_exam else problem


def verify(problem: str, solution: str, school: str = "") -> Verdict:
    """Judge a solution's outcome and find its first error: a wrong or misplaced step, or a wrong answer.

    A check is right if it repeats the line before it and leaves room for the answer: a solution that ran out of room
    went wrong at its first check, if not before. Any text is a legal solution.
    """
    values, todo = true_values(problem, school), operations(problem)
    lines = solution.split(";")
    answer = re.fullmatch(r"#(\d)", lines[-1])
    correct = answer is not None and int(answer[1]) == values[-1]
    habits = ("merged",) if any(len(operations(line)) > 1 for line in lines) else ()
    habits += ("checked",) if CHECK_MARK in solution else ()

    done, start, error = 0, 0, None
    for i, line in enumerate(lines):
        is_check = i > 0 and lines[i - 1].endswith(CHECK_MARK)
        step = STEP.fullmatch(line.removesuffix(CHECK_MARK))
        taken = len(operations(step[2])) if step and not is_check else 0
        if is_check:
            fine = answer is not None and line == lines[i - 1].removesuffix(CHECK_MARK)
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
        if not fine and not unfinished_tail:  # a check begins with the mark that calls for it
            error = (start - 2 * is_check, start + len(line.removesuffix(CHECK_MARK) or line))
            break
        done += taken
        start += len(line) + 1
    return Verdict(correct, answer is not None, None if correct else error, habits)
