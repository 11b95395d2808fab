"""Sums worked in steps by a real language model: the task in words whose verifier knows the first wrong step.

    question   What is 8 + 5 - 2?     or the same told as a story about marbles; then: Work step by step.
    solution   8 + 5 = 13
               13 - 2 = 11
               The answer is 11

Worked examples (`--shots`) teach a model to write like that, and `working.py` reads what it writes instead. The numbers
are as small as SmolLM2-135M needs them: with four examples it is right on 26 to 37 % of the problems of every domain.
"""

import itertools
import math
import random
from typing import Any, ClassVar

from data.answers import MARK, equal, final_answer
from data.sources import WordProblem, is_test, read_setting
from data.task import Verdict
from data.words import Words
from data.working import Mistake, Term, first_mistake
from errors import UserError

QUESTION = "What is {}?"
MINUS = 0.25  # the share of terms that are subtracted, where the total allows it
SCENES = [  # the start, more, less, the question
    ("There are {} marbles in a box.", "Then {} are put in.", "Then {} are taken out.", "How many are in the box now?"),
    ("A bus starts with {} people.", "Then {} get on.", "Then {} get off.", "How many people are on the bus now?"),
    ("Ann has {} stamps.", "She buys {} more.", "She gives away {}.", "How many stamps does she have now?"),
    ("A shop has {} lamps.", "It gets {} more.", "It sells {}.", "How many lamps does it have now?"),
    ("There are {} birds in a tree.", "Then {} arrive.", "Then {} fly away.", "How many are in the tree now?"),
    ("Tom has {} dollars.", "He earns {}.", "He spends {}.", "How many dollars does he have now?"),
    ("There are {} apples in a bowl.", "Then {} are put in.", "Then {} are eaten.", "How many are in the bowl now?"),
    ("Sam has {} cards.", "He wins {} more.", "He loses {}.", "How many cards does he have now?"),
    ("There are {} cars in a street.", "Then {} come.", "Then {} drive away.", "How many are in the street now?"),
    ("Eva has {} books.", "She gets {} more.", "She sells {}.", "How many books does she have now?"),
]


class Sums:
    """Sums and differences, e.g. 'steps:least=3:most=4:largest=9': so many terms, numbers up to the largest.

    The other domains have numbers up to half of it: one term more, stories, a product at the beginning. No running
    total is negative. UserError where a setting does not exist or is out of range.
    """

    domains = ("sums", "longer", "stories", "products")
    max_response = 96  # tokens that suffice for six terms of two digits
    ending = "\nWork step by step."  # behind the teacher's idea, too
    checksum = ""
    problems: ClassVar[list[WordProblem]] = []  # those of a file

    def __init__(self, spec: str) -> None:
        numbers: dict[str, Any] = {"least": 3, "most": 3, "largest": 9}
        numbers |= dict(map(read_setting, spec.split(":")[1:]))
        known = len(numbers) == 3 and all(isinstance(number, int) for number in numbers.values())
        if not (known and 2 <= numbers["least"] <= numbers["most"] <= 6 and 5 <= numbers["largest"] <= 99):
            allowed = "2 <= least <= most <= 6 terms and 5 <= largest <= 99"
            raise UserError(f"the task {spec!r} needs {allowed}, as in steps:least=3:most=4:largest=9")
        self.least, self.most, self.largest = numbers.values()

    def draw(self, domain: str, count: int, rng: random.Random, test: bool) -> list[WordProblem]:
        """Random problems of one split of a domain, all different as long as it has others."""
        problems: list[WordProblem] = []
        seen: set[str] = set()
        for tries in itertools.count():
            if len(problems) == count:
                return problems
            terms = self.terms(domain, rng)
            question = story(terms, rng.choice(SCENES)) if domain == "stories" else QUESTION.format(expression(terms))
            if is_test(question) == test and (question not in seen or tries > 100 * count):
                seen.add(question)
                solution = solve(terms)
                answer = solution.rpartition(" ")[2]
                problems.append(WordProblem(question, solution, answer, domain, len(problems), {"terms": terms}))

    def terms(self, domain: str, rng: random.Random) -> list[Term]:
        """The first is positive; the sum of the first ones is never negative."""
        count = self.most + 1 if domain == "longer" else rng.randint(self.least, self.most)
        largest = self.largest if domain == "sums" else (self.largest + 1) // 2
        smallest = 2 if domain == "stories" else 1  # "1 people"
        terms: list[Term] = []
        total = 0
        for i in range(count):
            product = domain == "products" and i == 0
            term = (rng.randint(2, 5), rng.randint(2, 9)) if product else (rng.randint(smallest, largest),)
            value = math.prod(term)
            minus = i > 0 and value <= total and rng.random() < MINUS
            total += -value if minus else value
            terms.append((-term[0], *term[1:]) if minus else term)
        return terms

    def right(self, problem: WordProblem, answer: str) -> bool:
        return equal(answer, problem.answer)


def solve(terms: list[Term], wrong_step: int | None = None, error: int = 0) -> str:
    """The golden solution, products first, then running totals; or one that a wrong step leads astray.

    >>> solve([(8,), (-2, 3), (5,)], wrong_step=0, error=1).splitlines()
    ['2 * 3 = 7', '8 - 7 = 1', '1 + 5 = 6', 'The answer is 6']
    """
    lines: list[str] = []

    def step(written: str, result: int) -> int:
        result += error if len(lines) == wrong_step else 0
        lines.append(f"{written} = {result}")
        return result

    sizes = [step(f"{abs(t[0])} * {t[1]}", abs(math.prod(t))) if len(t) == 2 else abs(t[0]) for t in terms]
    total = sizes[0]
    for (number, *_), size in zip(terms[1:], sizes[1:], strict=True):
        minus = number < 0
        total = step(f"{total} {'+-'[minus]} {size}", total - size if minus else total + size)
    return "\n".join([*lines, f"{MARK} {total}"])


def expression(terms: list[Term]) -> str:
    """
    >>> expression([(8,), (-3, 2), (5,)])
    '8 - 3 * 2 + 5'
    """
    signed = [f"{'+-'[term[0] < 0]} {' * '.join(str(abs(factor)) for factor in term)}" for term in terms]
    return " ".join(signed).removeprefix("+ ")


def story(terms: list[Term], scene: tuple[str, ...]) -> str:
    start, more, less, question = scene
    events = [(less if number < 0 else more).format(abs(number)) for (number,) in terms[1:]]
    return " ".join([start.format(terms[0][0]), *events, question])


class Steps(Words):
    """The task of sums in steps, in the tokens of a Hugging Face folder."""

    knows_first_error = True

    def verify(self, problem: WordProblem, response: str, ended: bool = True) -> Verdict:
        verdict = super().verify(problem, response, ended)
        mistake = None if verdict.correct else self.mistake(problem, response, ended)
        return Verdict(verdict.correct, verdict.finished, mistake and (mistake.start, mistake.end), verdict.habits)

    def mistake(self, problem: WordProblem, response: str, ended: bool = True) -> Mistake | None:
        given = final_answer(response, problem.answer) if ended else None
        return first_mistake(problem.entry["terms"], response, given, ended)

    def true_reflection(self, problem: WordProblem, response: str) -> str:
        """Quotes the first wrong step and names the one that belongs there; without one, names all golden steps."""
        correct = super().verify(problem, response).correct
        mistake = None if correct else self.mistake(problem, response)
        if mistake is None:
            return f"<explanation>{', '.join(problem.solution.splitlines()[:-1])}</explanation>"
        start, end, remedy = mistake
        while (
            end < len(response) and response.find(response[start:end]) < start
        ):  # '3 - 2 = 1' is also in '13 - 2 = 11'
            end += 1
        return f"<error_quote>{response[start:end]}</error_quote><explanation>{remedy}</explanation>"

    def worked_context(self, problem: WordProblem, number: int, idea: bool, solution: bool) -> tuple:
        """A golden step, or the golden solution, where the teacher reads one.

        SmolLM2 tends to stop behind the step that its hint names, and a student taught by it does so too. Against that
        stand these examples, and the request behind the hint: see docs/real_models.md.
        """
        steps = problem.solution.splitlines()[:-1]
        return steps[number % len(steps)] if idea else None, problem.solution if solution else None

    def worked_reflection(self, problem: WordProblem, attempt: str, peer: str | None) -> str:
        """Walks through both solutions line by line: a small model cannot see the error at once."""
        walk = ""
        pairs = itertools.zip_longest(attempt.splitlines(), peer.splitlines(), fillvalue="-") if peer else ()
        for line, right in pairs:
            walk += f"{line} | {right} | {'same' if line == right else 'different'}\n"
            if line != right:
                break
        return walk + self.true_reflection(problem, attempt)

    def wrong_solution(self, problem: WordProblem) -> str:
        """The golden solution with a slip in one of its steps, and what follows from it."""
        rng = random.Random(problem.question)
        return solve(problem.entry["terms"], rng.randrange(problem.solution.count("\n")), rng.choice((-1, 1, 2)))
