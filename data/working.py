r"""Find the first wrong step in the working of a sum of terms, such as 8 + 5 - 2 or 3 * 4 + 7.

A step is a chain of equal expressions. It is wrong if two sides differ, or if it joins numbers that the problem does
not join: a foreign one, one term twice, a term with the wrong sign. Any order, brackets, several operations in a step
and running totals are right. Where something before the error cannot be read for certain, no error is known.

>>> first_mistake([(8,), (5,), (-2,)], "8 + 5 = 13\n13 - 2 = 12\nThe answer is 12", "12")
Mistake(start=11, end=22, remedy='13 - 2 = 11')
>>> first_mistake([(8,), (5,), (-2,)], "5 - 2 = 3 + 8 = 11\nThe answer is 12", "12").remedy
'The answer is 11'
>>> first_mistake([(8,), (5,), (-2,)], "Ten less seven is 3.\n3 - 2 = 1\nThe answer is 1", "1")
"""

import ast
import math
import re
from collections import defaultdict
from contextlib import suppress
from copy import deepcopy
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from data.answers import MARK, MARKS

Term = tuple[int, ...]  # a number, or the two factors of a product; the first one has the sign
Parts = set[tuple[int, int]]  # what a number may stand for: a set of terms, as bits, and +1 or -1 times their sum


class Mistake(NamedTuple):
    """Characters [start, end) of the first wrong step, and what belongs there."""

    start: int
    end: int
    remedy: str


class Side(NamedTuple):
    """An expression in a response."""

    start: int
    end: int
    text: str
    tree: ast.expr
    value: Fraction

    def numbers(self) -> list[Fraction]:
        return [evaluate(node) for node in ast.walk(self.tree) if isinstance(node, ast.Constant)]

    def begins_with(self, total: Fraction) -> bool:
        """Whether the operations go on from a running total."""
        node = self.tree
        while isinstance(node, ast.BinOp):
            node = node.left
        return node is not self.tree and evaluate(node) == total


# ---------------------------------------------------------------------------------------------- reading

RUN = re.compile(r"[-+*/()=. \d]*\d[-+*/()=. \d]*")  # of numbers and signs
SIGNS = {"plus": "+", "minus": "-", "times": "*", r"\times": "*", "x": "*", "×": "*", "·": "*", "÷": "/"}
SIGNS |= dict.fromkeys(("equals", "is equal to", "is", "makes", "gives"), "=")
NUMBER_WORDS = re.compile(
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+[nrvxf]ty|seventy|eighty|hundred"
    r"|twice|half|double|dozen|adding \d+ to|subtracting \d+ from)\b",
    re.IGNORECASE,
)


def sign(match: re.Match) -> str:
    """A word as the sign that it stands for, in the middle of as many characters."""
    return f"{match[1]}{SIGNS[match[2].strip().lower()].center(len(match[2]))}"


def blank(match: re.Match) -> str:
    return " " * len(match[0])


def plain(response: str) -> str:
    """The response without labels, units and money signs, with signs for words; every character stays where it is."""
    for pattern, replacement in (
        (r"\d{1,3}(?:,\d{3})+(?!\d)", lambda match: match[0].replace(",", "").ljust(len(match[0]))),
        (r"^[ \t]*(?:[*•] |\W{0,3}(?:step )?\d+[.):]\W{0,3}(?= \S))|\bstep \d+|\*\*|\\[()\[\]]|[$€£](?=-?\d)", blank),
        (r"[−–](?= ?[\d(])", "-"),
        (r"\.(?!\d)", "\n"),
        (r"([\d)])( *(?:plus|minus|times|\\times|[x×·÷]) *)(?=[\d(])", sign),
        (r"(?<=\d)(?: [a-z]+){1,2}(?= ?[-+*/=] ?[-(\d])", blank),
        (r"([-+*/] *\d+)( (?:equals|is equal to|is|makes|gives) )(?=-?\d)", sign),
        (r"\n(?= *=)", " "),
    ):
        response = re.sub(pattern, replacement, response, flags=re.IGNORECASE | re.MULTILINE)
    return response


def evaluate(node: ast.expr) -> Fraction:
    """ValueError for anything but the four operations on numbers."""
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub()):
            return -evaluate(node.operand)
        case ast.BinOp():
            a, b = evaluate(node.left), evaluate(node.right)
            match node.op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div() if b:
                    return a / b
    raise ValueError("not the arithmetic of sums")


def read_sides(text: str, start: int, end: int) -> list[Side]:
    """The expressions between the equals signs of a run of characters; ValueError where one is none."""
    sides = []
    for match in re.compile(r"[^=\s](?:[^=]*[^=\s])?").finditer(text, start, end):
        (start, end), written = match.span(), match[0]
        while (extra := written.count("(") - written.count(")")) and written[0 if extra > 0 else -1] in "()":
            start, end = (start + 1, end) if extra > 0 else (start, end - 1)
            written = text[start:end]
        try:
            tree = ast.parse(written.strip(), mode="eval").body if len(written) < 200 else ast.Name()
        except SyntaxError as error:
            raise ValueError(written) from error
        sides.append(Side(start, end, written, tree, evaluate(tree)))
    return sides


# ---------------------------------------------------------------------------------------------- judging


def minus(parts: Parts) -> Parts:
    return {(terms, -sign) for terms, sign in parts}


def join(p: Parts, q: Parts) -> Parts:
    """What the sum of two numbers may stand for: no term counts twice."""
    return {(a | b, s) for a, s in p for b, t in q if s == t and not a & b}


class Working:
    """What a response knows at some point, and what belongs there."""

    def __init__(self, terms: list[Term]) -> None:
        self.terms, self.values = terms, list(map(math.prod, terms))
        self.given = {Fraction(abs(factor)) for term in terms for factor in term}
        self.products = {1 << i for i, term in enumerate(terms) if len(term) == 2}
        self.done: Parts = set()  # of the right steps
        self.operations = 0  # of them
        self.straight = True  # whether they go from left to right
        self.last = Fraction(self.values[0])  # the running total
        self.every: dict[Fraction, Parts] = defaultdict(set)  # what a number may stand for in any right working
        self.known: dict[Fraction, Parts] = defaultdict(set)  # ... in this one: terms, running totals, right results
        for terms_in in range(1, 1 << len(terms)):
            self.learn(self.every, self.total(terms_in), {(terms_in, 1)})
        for i, value in enumerate(self.values):
            self.learn(self.known, value, {(1 << i, 1)})
            self.learn(self.known, self.total((2 << i) - 1), {((2 << i) - 1, 1)})  # perhaps in the head

    def total(self, terms_in: int) -> int:
        return sum(value for i, value in enumerate(self.values) if terms_in >> i & 1)

    def learn(self, table: dict[Fraction, Parts], value: Fraction | int, parts: Parts) -> None:
        table[Fraction(value)] |= parts
        table[Fraction(-value)] |= minus(parts)

    def parts(self, node: ast.expr, table: dict[Fraction, Parts]) -> Parts:
        """What an expression may stand for; nothing if it joins what the problem does not join."""
        match node:
            case ast.Constant():
                return table.get(evaluate(node), set())
            case ast.UnaryOp():
                return minus(self.parts(node.operand, table))
            case ast.BinOp(op=ast.Add()):
                return join(self.parts(node.left, table), self.parts(node.right, table))
            case ast.BinOp(op=ast.Sub()):
                return join(self.parts(node.left, table), minus(self.parts(node.right, table)))
            case ast.BinOp(op=ast.Mult()):
                factors, value = sorted((abs(evaluate(node.left)), abs(evaluate(node.right)))), evaluate(node)
                same = [i for i, term in enumerate(self.terms) if sorted(map(abs, term)) == factors]
                return {(1 << i, 1 if value == self.values[i] else -1) for i in same}
        return set()

    def may_be_right_by_accident(self) -> bool:
        """Whether a step before a wrong answer may be wrong, although its numbers fit a right way of working."""
        complete = ((1 << len(self.terms)) - 1, 1) in self.done
        return not complete and (not self.straight or self.operations >= sum(map(len, self.terms)) - 1)

    def remedy(self) -> str:
        """The step that belongs here: the largest right total and the next term; if no term is left, the answer."""
        total_of = max((terms for terms, sign in self.done if sign == 1), key=int.bit_count, default=0)
        for i, term in enumerate(self.terms):
            if len(term) == 2 and not any(terms >> i & 1 for terms, _ in self.done):
                return f"{abs(term[0])} * {term[1]} = {abs(self.values[i])}"
        total_of = total_of or 1
        left = [value for i, value in enumerate(self.values) if not total_of >> i & 1]
        if not left:
            return f"{MARK} {sum(self.values)}"
        total = self.total(total_of)
        return f"{total} {'+-'[left[0] < 0]} {abs(left[0])} = {total + left[0]}"

    def judge(self, sides: list[Side]) -> Mistake | None:
        """The first mistake of a chain; what is right is learned. ValueError: that cannot be known."""
        if not any(isinstance(side.tree, ast.BinOp) for side in sides):
            raise ValueError("an equation without an operation")
        runs, wrong = [[sides[0]]], None  # of equal sides; a running total begins another: 8 + 5 = 13 - 2 = 11
        for before, side in pairwise(sides):
            if side.value == before.value:
                runs[-1].append(side)
            elif side.begins_with(before.value):
                runs.append([side])
            else:
                wrong = runs[-1].pop(), side
                break
        for run in runs:
            worked = [side for side in run if isinstance(side.tree, ast.BinOp)]
            if not worked:  # a running total by itself, as in 13 = 13 - 2 = 11
                continue
            parts = set().union(*(self.parts(side.tree, self.known) for side in worked))
            if not parts:
                return self.foreign(run)
            self.learn(self.known, run[0].value, parts)
            self.done |= parts
            self.last = run[-1].value
            self.operations += sum(isinstance(node, ast.BinOp) for node in ast.walk(worked[0].tree))
            usual = any(s == 1 and (not a & a + 1 or a in self.products) for a, s in parts)  # left to right
            self.straight = self.straight and usual
            for number in {number for side in run for number in side.numbers()} - self.given:
                self.learn(self.known, number, self.known.get(number) or self.every[number])
        if wrong:
            before, side = wrong if isinstance(wrong[0].tree, ast.BinOp) else wrong[::-1]
            fits = isinstance(before.tree, ast.BinOp) and self.parts(before.tree, self.known)
            remedy = f"{' '.join(before.text.split())} = {before.value}" if fits else self.remedy()
            return Mistake(wrong[0].start, wrong[1].end, remedy)
        return None

    def foreign(self, run: list[Side]) -> Mistake:
        """A true equation of numbers that do not belong together; ValueError where it may be part of a right way."""
        split = not isinstance(run[0].tree, ast.BinOp) and run[0].value in self.known  # 5 = 2 + 3
        if split or any(self.parts(side.tree, self.every) for side in run if isinstance(side.tree, ast.BinOp)):
            raise ValueError("some of it may have been worked out in the head")
        numbers = {abs(number) for side in run for number in side.numbers()}
        repeated = any(len(t) == 2 and all(n % abs(f) == 0 for n in numbers) for t in self.terms for f in t)
        if repeated or not self.straight:
            raise ValueError("it may be a product worked out as a sum, or a step before may be right by accident")
        return Mistake(run[0].start, run[-1].end, self.remedy())

    def splits(self, mistake: Mistake, text: str, later: list[re.Match]) -> bool:
        """Whether the next step makes good what looks foreign, as 8 + 2 = 10 and 10 + 3 = 13 do for 8 + 5."""
        with suppress(ValueError, IndexError):
            first, *_, last = read_sides(text, mistake.start, mistake.end)
            going_on, *_, total = read_sides(text, *later[0].span())
            if first.value == last.value and going_on.begins_with(first.value) and going_on.value == total.value:
                return any(
                    join(self.known.get(n, set()), self.known.get(total.value - n, set())) for n in first.numbers()
                )
        return False


def judge_run(text: str, run: re.Match, working: Working) -> tuple[Working, Mistake | None, set[Fraction]]:
    """What is known behind a run of numbers and signs, its first mistake, and numbers that it only mentions.

    ValueError where nobody can tell whether it is right.
    """
    end = run.start() + len(run[0].rstrip(" -+*/(="))
    if "=" not in text[run.start() : end].lstrip(" ="):
        return working, None, set(map(Fraction, re.findall(r"\d+(?:\.\d+)?", run[0])))
    around = text[max(0, run.start() - 1) : run.start() + 1], text[run.end() - 1 : run.end() + 1]
    if begins := re.match(r" *[-+*/] *", run[0]):  # a mark of a list, the sign of a number, or a running total
        for written in (f"{working.last} {run[0]}", run[0][begins.end() :], run[0]):
            with suppress(ValueError):
                attempt = deepcopy(working)
                if attempt.judge(read_sides(written, 0, len(written.rstrip(" -+*/(=")))) is None:
                    return attempt, None, set()
        raise ValueError("it may be meant in several ways")
    mistake = working.judge(read_sides(text, run.start(), end))
    touches = any(" " not in pair and re.search(r"[^\W\d]|[\^%!<>≈≠√\\{}]", pair) for pair in around)
    if mistake and (touches or run[0].rstrip()[-1] in "-+*/("):
        raise ValueError("it goes on with something that cannot be read")
    return working, mistake, set()


def first_mistake(terms: list[Term], response: str, given: str | None, ended: bool = True) -> Mistake | None:
    """The first wrong step of a response that is not right, or None where none is known.

    given is its final answer, if there is one; if it did not end, its last number may have been cut.
    """
    text, working, mentioned = plain(response), Working(terms), set()
    runs = [run for run in RUN.finditer(text) if ended or run.end() < len(text.rstrip())]
    mark = max((match.end() for match in MARKS.finditer(text)), default=None)
    answers = [run for run in runs if given is not None and (mark is None or run.end() > mark)]
    answer = answers[0 if mark else -1] if answers else None
    for i, run in enumerate(runs):
        try:
            working, mistake, numbers = judge_run(text, run, working)
        except ValueError:
            return None
        if run is answer and mistake is None:
            begin = max(text.rfind("\n", 0, run.start()) + 1, runs[i - 1].end() if i else 0)
            only_tells = not working.operations and text[:begin].strip()
            if not (mark or numbers) or only_tells or working.may_be_right_by_accident():
                return None  # or it stops in the middle
            begin += len(re.match(r"\W*", response[begin:])[0])
            mistake = Mistake(begin, run.start() + len(run[0].rstrip()), working.remedy())
        if mistake:
            unread = mentioned - working.known.keys() or NUMBER_WORDS.search(text, 0, mistake.start)
            unread = unread or MARKS.search(text, 0, mistake.start)  # an answer before, of something else
            corrected = mistake.remedy in response[mistake.end :]
            return None if unread or corrected or working.splits(mistake, text, runs[i + 1 :]) else mistake
        mentioned |= numbers
    return None
