"""The synthetic task: chain arithmetic, whose verifier knows the true first error."""

import random
from typing import ClassVar

from data import chains, documents, prompts, tokenizer
from data.task import Problem, Task, Verdict


class Arithmetic(Task):
    domains = tuple(chains.DOMAINS)
    habits: ClassVar = {"merged": "several operations in one step", "checked": "a step written twice"}
    knows_first_error = True
    max_response = chains.BUDGET
    max_reflection = 80
    vocab_size = tokenizer.VOCAB_SIZE
    stop = (tokenizer.END,)

    def problem(self, domain: str, rng: random.Random, test: bool = False) -> Problem:
        chain = chains.make_problem(domain, rng, test)
        return Problem(chain, chains.golden_solution(chain))

    def verify(self, problem: Problem, response: str, ended: bool = True) -> Verdict:
        """As in Task; '#d' ends a response, with or without a stop token."""
        return chains.verify(problem.question, response)

    def decisive(self, solution: list[str], rule: str = "results") -> list[int]:
        """S: what follows '=' or '#'; with the rule 'steps' every digit and operator.

        >>> [Arithmetic().decisive(list("3+8=1;#1"), rule) for rule in ("results", "steps", "full")]
        [[4, 7], [0, 1, 2, 4, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
        """
        if rule == "results":
            return [i for i in range(1, len(solution)) if solution[i - 1] in ("=", "#")]
        return [i for i, token in enumerate(solution) if rule == "full" or token in tuple("0123456789+-*")]

    def prompt(self, problem: Problem, idea: str | None = None, solution: str | None = None) -> str:
        return prompts.prompt(problem.question, idea, solution)

    def reflector_prompt(self, problem: Problem, attempt: str, peer: str | None, give_answer: bool) -> str:
        answer = chains.true_values(problem.question)[-1] if give_answer else None
        return prompts.reflect_prompt(problem.question, attempt, peer, answer)

    def true_reflection(self, problem: Problem, response: str) -> str:
        return documents.reflection(problem.question, response)

    encode = staticmethod(tokenizer.encode)
    decode = staticmethod(tokenizer.decode)
    pieces = staticmethod(tokenizer.pieces)


class Facts(Arithmetic):
    """Is a fact learned, or a skill? Problems of mix whose disputed facts are of one half, or of the other.

    >>> Facts().problem("these", random.Random(0)).solution  # 9*7 and 3*1 are disputed, and of this half
    '8+9=7;7+2=9;9*7=3;3*1=3;#3'
    """

    domains = ("these", "others")

    def problem(self, domain: str, rng: random.Random, test: bool = False) -> Problem:
        while True:
            problem = super().problem("mix", rng, test)
            halves = {chains.half(step) for step in chains.disputed_steps(problem.question)}
            if halves == {domain}:
                return problem


class Exams(Arithmetic):
    """Does what SPD teaches carry over? Problems of every kind, with the mark of an exam and without.

    None has a disputed fact, so that a wrong answer is the habit's fault, and not that of what most people hold.
    """

    domains = ("exam", *(prefix + name for prefix in ("exam-", "") for name in ("add", "sub", "mul", "long")), "mix")

    def problem(self, domain: str, rng: random.Random, test: bool = False) -> Problem:
        while True:
            problem = super().problem(domain, rng, test)
            if not chains.disputed_steps(problem.question):
                return problem
