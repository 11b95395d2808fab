"""What a task is: all that the loops, the reflection, the subspace and the evaluation know of the world they work in.

A task makes problems, words the prompts of every part the model plays, judges any text, names the tokens of a solution
that decide whether it is right, and turns text into tokens. Another task is another file with a subclass of `Task`.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str  # a golden one, labelled; it ends with the answer


@dataclass(frozen=True)
class Verdict:
    """What the verifier finds in a response."""

    correct: bool  # the final answer is right: the outcome reward of both papers
    finished: bool  # there is a final answer, and the response was not cut off
    error: tuple[int, int] | None  # characters [start, end) of the first error; None where there is none or none known
    habits: tuple[str, ...] = ()  # those of the task's `habits` that the response shows


class Task(ABC):
    domains: tuple[str, ...]
    habits: ClassVar[dict[str, str]] = {}  # name of a way of writing -> what it is; each is a column of the tables
    knows_first_error: bool = False  # whether verdicts locate errors; if not, there is no oracle and no quote accuracy
    problems_checksum: str = ""  # of the file of problems, if there is one; a resumed run must have the same
    max_response: int  # tokens of a response; a longer one is cut off
    max_reflection: int
    vocab_size: int
    spare_rows: bool = False  # whether the embedding of a model may have rows that are no token
    stop: tuple[int, ...]  # the tokens that end a response

    # ------------------------------------------------------------------------------------------ problems

    @abstractmethod
    def problem(self, domain: str, rng: random.Random, test: bool = False) -> Problem:
        """A random problem of a domain; no test problem is ever a training problem."""

    def problems(self, domain: str, count: int, rng: random.Random, test: bool = False) -> list[Problem]:
        return [self.problem(domain, rng, test) for _ in range(count)]

    @abstractmethod
    def verify(self, problem: Problem, response: str, ended: bool = True) -> Verdict:
        """Judge any text; ended says whether a stop token closed the response, or it was cut off."""

    @abstractmethod
    def decisive(self, solution: list[str], rule: str = "results") -> list[int]:
        """S: the positions in a solution, given as its tokens' texts, on which being right depends.

        Its last token closes it. rule 'results' takes results and the answer, 'steps' every step, 'full' everything.
        """

    # ------------------------------------------------------------------------------------------ prompts

    @abstractmethod
    def prompt(self, problem: Problem, idea: str | None = None, solution: str | None = None) -> str:
        """x, the student's prompt: the problem alone. With a corrective idea e, a solution, or both: the teacher's."""

    @abstractmethod
    def reflector_prompt(self, problem: Problem, attempt: str, peer: str | None, give_answer: bool) -> str:
        """A wrong attempt beside a correct peer, or a correct attempt alone, perhaps with the right final answer."""

    @abstractmethod
    def true_reflection(self, problem: Problem, response: str) -> str:
        """What a reflector who knows the truth would write: the error quote of a wrong response, and the idea."""

    # ------------------------------------------------------------------------------------------ tokens

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Text -> tokens; ValueError where the vocabulary lacks something."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Tokens -> text, up to and without the first stop token."""

    @abstractmethod
    def pieces(self, tokens: list[int]) -> list[str]:
        """The text of each token by itself; joined, they are the text and perhaps its stop token."""

    def end(self) -> int:
        """The token that closes a complete solution."""
        return self.stop[0]
