"""The synthetic task: chain arithmetic, whose verifier knows the true first error, and its prompts.

One weight set plays every part; the parts are told apart by what stands before their text.
"""

import random
from typing import ClassVar

from data import chains, tokenizer
from data.task import Problem, Task, Verdict


def prompt(problem: str, hint: str | None = None, solution: str | None = None) -> str:
    """The student's prompt, which is the problem alone, or a teacher's, who holds a hint, a solution or both."""
    held = {"<|hint|>": hint, "<|solution|>": solution}
    told = "".join(tag + text for tag, text in held.items() if text is not None)
    return f"<|user|>{problem}{told}<|assistant|>"


def reflect_prompt(problem: str, attempt: str, peer: str | None = None, answer: int | None = None) -> str:
    """The reflector's prompt: a wrong attempt comes with a correct peer, a correct one alone.

    The right answer, where it is told, follows the problem: '3+8-5*2=2'.
    """
    told = "" if answer is None else f"={answer}"
    held = "" if peer is None else f"<|solution|>{peer}"
    return f"<|user|>{problem}{told}{held}<|attempt|>{attempt}<|assistant|>"


class Arithmetic(Task):
    domains = tuple(chains.DOMAINS)
    habits: ClassVar = {"merged": "several operations in one step", "checked": "a step written twice"}
    knows_first_error = True
    max_response = chains.BUDGET
    max_reflection = 80
    vocab_size = tokenizer.VOCAB_SIZE
    stop = tokenizer.END

    def problem(self, domain: str, rng: random.Random, test: bool = False) -> Problem:
        chain = chains.make_problem(domain, rng, test)
        return Problem(chain, chains.golden_solution(chain))

    def verify(self, problem: Problem, response: str) -> Verdict:
        return chains.verify(problem.question, response)

    def decisive(self, solution: list[str], rule: str = "aligned") -> list[int]:
        """S: what follows '=' or '#'; with the rule 'steps' every digit and operator.

        >>> [Arithmetic().decisive(list("3+8=1;#1"), rule) for rule in ("aligned", "steps", "full")]
        [[4, 7], [0, 1, 2, 4, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
        """
        if rule == "aligned":
            return [i for i in range(1, len(solution)) if solution[i - 1] in ("=", "#")]
        return [i for i, token in enumerate(solution) if rule == "full" or token in tuple("0123456789+-*")]

    def student_prompt(self, problem: Problem) -> str:
        return prompt(problem.question)

    def teacher_prompt(self, problem: Problem, idea: str | None = None, solution: str | None = None) -> str:
        return prompt(problem.question, idea, solution)

    def reflector_prompt(self, problem: Problem, attempt: str, peer: str | None, told_answer: bool) -> str:
        answer = chains.true_values(problem.question)[-1] if told_answer else None
        return reflect_prompt(problem.question, attempt, peer, answer)

    encode = staticmethod(tokenizer.encode)
    decode = staticmethod(tokenizer.decode)
    pieces = staticmethod(tokenizer.pieces)
