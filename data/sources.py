"""Problems for real language models: procedural ones of Reasoning Gym, or files of questions and answers.

Both tell training from test problems by the question itself: a hash puts a quarter of all questions into the test
split, so that no seed, order or file makes a test problem a training problem.
"""

import ast
import builtins
import hashlib
import json
import math
import random
import re
import zlib
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from data.answers import MARK, equal, golden_number, value, variants
from data.task import Problem
from errors import UserError


@dataclass(frozen=True)
class WordProblem(Problem):
    """A problem in words; its solution is the data's own work, if there is some, and 'The answer is 42'."""

    answer: str
    domain: str
    index: int  # of the file's line, counted from 1, or of the procedural problem
    entry: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # Reasoning Gym's, for its scorer


def is_test(question: str) -> bool:
    return hashlib.sha256(question.strip().encode()).digest()[0] % 4 == 0


# ---------------------------------------------------------------------------------------------- Reasoning Gym

# 'gym:gcd' alone is made easy enough for a model of 135M parameters; any other dataset is as Reasoning Gym has it.
EASY: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 2, "max_digits": 2},
    "gcd": {"max_value": 30},
    "products": {"max_digits": 2},
}
SIZE = 50_000  # procedural problems to draw from, training and test


class Gym:
    """Datasets of Reasoning Gym, e.g. 'chain_sum,gcd:max_value=50': the first is in domain, the others out of domain.

    Settings are those of the dataset's own configuration and come before those of EASY. UserError where a dataset does
    not exist, has no golden answers, or can only judge an answer by running it as code.
    """

    max_response = 128  # tokens that suffice, as a rule
    ending = ""  # the questions say themselves how to end
    checksum = ""
    problems: ClassVar[list[WordProblem]] = []  # those of a file

    def __init__(self, names: str) -> None:
        try:
            from reasoning_gym import create_dataset
        except ImportError as error:
            raise UserError('the task gym:… needs Reasoning Gym; pip install -e ".[real]"') from error
        self.domains = tuple(dict.fromkeys(names.split(",")))
        self.datasets = {}
        for domain in self.domains:
            name, *given = domain.split(":")
            settings = {"size": SIZE, "seed": 0} | EASY.get(name, {}) | dict(map(read_setting, given))
            try:
                dataset = self.datasets[domain] = create_dataset(name, **settings)
                first = next(iter(dataset))
            except Exception as error:  # every dataset refuses settings in its own way
                reason = str(error).partition("\n")[0] or "it is empty"
                raise UserError(f"there is no dataset {domain!r} ({reason}); give another name or settings") from error
            if name == "codeio":  # its partial marks may take minutes
                dataset._compute_json_similarity = lambda *_: 0.0
            if first["answer"] is None:
                raise UserError(f"the dataset {name} has no golden answers; choose another one")
            if not full_marks(dataset, first["answer"], first):
                raise UserError(f"the dataset {name} scores an answer by running it as code; choose another one")

    def draw(self, domain: str, count: int, rng: random.Random, test: bool) -> list[WordProblem]:
        """Random problems of one split of a domain."""
        dataset, problems = self.datasets[domain], []
        for _ in range(1000 * count + 1):
            if len(problems) == count:
                return problems
            index = rng.randrange(dataset.size)
            entry = dataset[index]
            question, answer = (str(entry[key]).strip() for key in ("question", "answer"))
            if answer and is_test(question) == test:  # polynomial_equations may have no solution, so no answer
                problems.append(WordProblem(question, f"{MARK} {answer}", answer, domain, index, entry))
        split = "test" if test else "training"
        raise UserError(f"{domain} gave too few {split} problems in 1000 draws each; give settings that allow more")

    def right(self, problem: WordProblem, answer: str) -> bool:
        """Whether an answer, without any words around it, is the golden one or gets full marks from its dataset."""
        texts, number = variants(answer), golden_number(problem.answer)
        if problem.answer in texts:
            return True
        if number:
            given, golden = value(answer), value(number[0])
            # A scorer may round, but one that looks for digits in a text also finds 3 in -3, in 3/2 and in 3e2.
            if given is None or abs(given - golden) > abs(golden) / 100:
                return False
            whole = given.denominator == 1
            texts = [re.sub("[ ,]", "", answer), str(given if whole else Decimal(given.numerator) / given.denominator)]
        dataset, entry = self.datasets[problem.domain], problem.entry
        accepts_all = full_marks(dataset, "?", entry)  # as game_of_life_halting does
        return not accepts_all and any(full_marks(dataset, text, entry) for text in texts)


def full_marks(dataset: Any, answer: str, entry: dict[str, Any]) -> bool:
    """Whether the dataset's own scorer takes an answer as right; text of a model is read as a literal, never run."""

    def evaluate(text: Any, *names: Any, run: Any = builtins.eval) -> Any:
        expression = entry["metadata"].get("problem")  # bitwise_arithmetic evaluates its own problem
        return run(text, *names) if text == expression else ast.literal_eval(text)

    with mock.patch("builtins.eval", evaluate), redirect_stdout(None):  # tower_of_hanoi prints
        try:
            return bool(dataset.score_answer(answer, entry) == 1)
        except Exception:  # some datasets cannot read every text
            return False


def read_setting(text: str) -> tuple[str, Any]:
    """'max_value=50' -> ('max_value', 50); a value that is no Python literal is a word."""
    name, _, value = text.partition("=")
    if not re.fullmatch(r"\w+=\S+", text):
        raise UserError(f"the setting {text!r} is not of the form name=value, as in gym:gcd:max_value=50")
    with suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value)
    return name, value


# ---------------------------------------------------------------------------------------------- files


class Lines:
    """A file of JSON lines with a question and an answer, which may end as in GSM8K: its work, then '#### 42'."""

    max_response = 256
    ending = f'\n\nWork in short steps where that helps. End with the words "{MARK}" and the result.'

    def __init__(self, path: str) -> None:
        self.problems, self.domains = read_lines(Path(path)), (Path(path).stem,)
        self.checksum = f"{zlib.crc32(repr(self.problems).encode()):08x}"

    def draw(self, domain: str, count: int, rng: random.Random, test: bool) -> list[WordProblem]:
        """Each problem once, before any comes again."""
        pool = [problem for problem in self.problems if is_test(problem.question) == test]
        return [*pool * (count // len(pool)), *rng.sample(pool, count % len(pool))]

    def right(self, problem: WordProblem, answer: str) -> bool:
        return equal(answer, problem.answer)


def read_lines(path: Path) -> list[WordProblem]:
    """The problems of a file; UserError names the first line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give JSON lines with question and answer") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=finite, parse_constant=finite)
            question, answer = (row[key].strip() for key in ("question", "answer"))
            (question + answer).encode()  # no half of a character
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            expected = '{"question": "…", "answer": "…"}'
            raise UserError(
                f"{path}, line {number}, is not of the form {expected} ({error}); repair or remove it"
            ) from error
        work, _, answer = map(str.strip, answer.rpartition("####"))
        if not (question and answer):
            raise UserError(f"{path}, line {number}, has an empty question or answer; repair or remove it")
        work = re.sub(r"<<[^<>]*>>", "", work).strip()  # GSM8K's notes for a calculator
        solution = "\n".join([*[work] * bool(work), f"{MARK} {answer}"])
        problems.append(WordProblem(question, solution, answer, path.stem, number))
    for test, split in ((False, "training"), (True, "test")):
        if not any(is_test(problem.question) == test for problem in problems):
            raise UserError(f"{path} has {len(problems)} problems, none of them for the {split} split; add more lines")
    return problems


def finite(number: str) -> str:
    """A number of a JSON file as it is written; ValueError for NaN, Infinity and 1e999."""
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is no finite number")
    return number
