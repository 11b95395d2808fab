"""The task of real language models: problems in words, in the chat format of a Hugging Face folder.

`sources.py` has the problems, `answers.py` finds and compares answers, `requests.py` words the requests. Here are the
chat turns, the decisive positions, and the tokens. Nobody knows the true first error of these responses, except for
the sums of `steps.py`.
"""

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data.answers import MARK, MARKS, falsify, final_answer
from data.requests import problem_request, reflection_request
from data.sources import Gym, Lines, WordProblem
from data.task import Task, Verdict
from errors import UserError
from hub.tokenizer import Tokenizer
from hub.weights import read_shape

if TYPE_CHECKING:
    from data.steps import Sums


class Words(Task):
    """Problems of a source, in the tokens of a Hugging Face folder.

    shots worked examples precede every request, reflect_shots a request for a reflection (None: as many). max_response
    None takes what the source needs. UserError where the folder, or a problem of a file, does not fit.
    """

    habits: ClassVar = {"marked": "the answer stands after its mark", "terse": "nothing stands beside the answer"}
    max_reflection, spare_rows = 160, True

    def __init__(
        self, source: "Gym | Lines | Sums", base: Path | str, shots: int = 0, max_response: int | None = None,
        reflect_shots: int | None = None,
    ) -> None:  # fmt: skip
        if not Path(base).is_dir():
            raise UserError(f"this task needs a Hugging Face model, and {base} is not its folder; give one with --base")
        self.tokenizer = Tokenizer(base)
        self.block_size = read_shape(Path(base), block_size=4096)["block_size"]  # as GPT.from_pretrained has it
        self.source, self.domains, self.shots = source, source.domains, shots
        self.reflect_shots = shots if reflect_shots is None else reflect_shots
        self.problems_checksum = source.checksum
        self.max_response = max_response or source.max_response
        self.vocab_size, self.stop = self.tokenizer.vocab_size, self.tokenizer.stops
        self.ending = source.ending
        rng = random.Random("examples")  # one to spare: a problem is never an example of itself
        count = max(shots, self.reflect_shots) + 1
        self.worked = {domain: source.draw(domain, count, rng, False) for domain in self.domains}
        for problem in source.problems:
            self.check(problem)

    # ------------------------------------------------------------------------------------------ problems

    def problem(self, domain: str, rng: random.Random, test: bool = False) -> WordProblem:
        return self.problems(domain, 1, rng, test)[0]

    def problems(self, domain: str, count: int, rng: random.Random, test: bool = False) -> list[WordProblem]:
        drawn = self.source.draw(domain, count, rng, test)
        for problem in drawn:
            self.check(problem)
        return drawn

    def check(self, problem: WordProblem) -> None:
        """UserError where a problem's prompts cannot be encoded or may not fit, whatever the model will write."""
        reflector_prompt = self.reflector_prompt(problem, "", problem.solution, True)
        prompts = (self.prompt(problem, "", problem.solution), reflector_prompt)
        try:
            longest = max(len(self.encode(prompt)) for prompt in prompts) + 2 * self.max_response + self.max_reflection
        except UserError as error:
            raise UserError(f"problem {problem.index} of {problem.domain}: {error}") from error
        if longest > self.block_size:
            what = f"problem {problem.index} of {problem.domain} with its responses and reflection may take {longest}"
            remedy = "leave it out, or give fewer --shots and --reflect-shots or a lower --max-response"
            raise UserError(f"{what} of the model's {self.block_size} tokens; {remedy}")

    def verify(self, problem: WordProblem, response: str, ended: bool = True) -> Verdict:
        answer = final_answer(response, problem.answer) if ended else None  # "The answer is 3" may be the start of 357
        if answer is None:
            return Verdict(correct=False, finished=False, error=None)
        marked = MARKS.search(response) is not None
        terse = len(response.split()) <= len(problem.answer.split()) + 3 * marked
        habits = ("marked",) * marked + ("terse",) * terse
        return Verdict(self.source.right(problem, answer), finished=True, error=None, habits=habits)

    def decisive(self, solution: list[str], rule: str = "results") -> list[int]:
        """S: the tokens of the answer and of what follows '='; with the rule 'steps' of every calculation."""
        text = "".join(solution)
        calculation = r"=\s*[$€£]*(-?[\d.,/]*\d)" if rule == "results" else r"(\S*\d\S*|(?<=\s)[-+*/×÷=](?=\s))"
        spans = [match.span(1) for match in re.finditer(calculation, text)]
        answer = re.compile(rf"{MARK}\s*(.*\S)", re.DOTALL).finditer(text, max(0, text.rfind(MARK)))
        spans += [match.span(1) for match in answer]
        chosen, end = [], 0
        for i, piece in enumerate(solution):
            start, end = end + len(piece) - len(piece.lstrip()), end + len(piece)
            # An empty piece is the rest of the character before it. The last one is the stop token.
            continues = not piece and chosen[-1:] == [i - 1] and i < len(solution) - 1
            if rule == "full" or continues or any(start < last and end > first for first, last in spans):
                chosen.append(i)
        return chosen

    # ------------------------------------------------------------------------------------------ prompts

    def prompt(self, problem: WordProblem, idea: str | None = None, solution: str | None = None) -> str:
        examples = []
        for i, other in enumerate(self.others(problem, self.shots)):
            context = self.worked_context(other, i, idea is not None, solution is not None)
            examples.append((problem_request(other.question, self.ending, *context), other.solution))
        return self.chat(problem_request(problem.question, self.ending, idea, solution), examples)

    def reflector_prompt(self, problem: WordProblem, attempt: str, peer: str | None, give_answer: bool) -> str:
        """Worked examples are of the same kind: false solutions for a wrong attempt, else right ones."""

        def request(problem: WordProblem, attempt: str, peer: str | None) -> str:
            return reflection_request(problem.question, attempt, peer, problem.answer if give_answer else None)

        examples = []
        for other in self.others(problem, self.reflect_shots):
            example = (other.solution, None) if peer is None else (self.wrong_solution(other), other.solution)
            examples.append((request(other, *example), self.worked_reflection(other, *example)))
        return self.chat(request(problem, attempt, peer), examples)

    def worked_context(self, problem: WordProblem, number: int, idea: bool, solution: bool) -> tuple:
        """The idea and the solution that worked example `number` is given in a teacher's prompt: none, but in Steps."""
        return None, None

    def worked_reflection(self, problem: WordProblem, attempt: str, peer: str | None) -> str:
        """What a worked example answers to a request for a reflection."""
        return self.true_reflection(problem, attempt)

    def wrong_solution(self, problem: WordProblem) -> str:
        """The solution with another answer, for a worked example of a reflection."""
        false = falsify(problem.answer, random.Random(0))
        false = false if false != problem.answer else "unknown"  # an answer without a number
        return re.sub(alone(problem.answer), lambda _: false, problem.solution)

    def true_reflection(self, problem: WordProblem, response: str) -> str:
        """Quotes where a wrong response first writes the result that it ends with; the idea is the right result."""
        idea = f"<explanation>The result is {problem.answer}.</explanation>"
        given = final_answer(response, problem.answer)
        if given is None or self.source.right(problem, given):
            return idea
        match = re.search(rf"=\s*{alone(given)}", response) or re.search(alone(given), response)
        if match is None:
            return f"<error_quote>{given}</error_quote>{idea}"
        start, end = match.span()
        while response.find(response[start:end]) < start:  # '= 4' is also in '= 42'
            start -= 1
        return f"<error_quote>{response[start:end]}</error_quote>{idea}"

    def others(self, problem: WordProblem, count: int) -> list[WordProblem]:
        """Training problems of the same domain for worked examples, never the problem itself."""
        return [other for other in self.worked[problem.domain] if other.question != problem.question][:count]

    def chat(self, request: str, examples: list[tuple[str, str]]) -> str:
        """The prompt for a request after (request, response) examples; no text in it can pass for a special token."""
        turns = [turn for pair in examples for turn in zip(("user", "assistant"), pair, strict=True)]
        return self.tokenizer.chat(
            [(role, self.tokenizer.special.sub(" ", text)) for role, text in [*turns, ("user", request)]]
        )

    # ------------------------------------------------------------------------------------------ tokens

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces(tokens))

    def pieces(self, tokens: list[int]) -> list[str]:
        """The text of each token; a character that several tokens make up belongs to the first of them."""
        return self.tokenizer.pieces(tokens)

    def end(self) -> int:
        """The chat's end of turn: a folder may name other stop tokens as well."""
        return self.tokenizer.end


def alone(result: str) -> str:
    """A pattern for a result that is not part of another number or word."""
    return rf"(?<![\w.,]){re.escape(result)}(?![.,]?\d|\w)"
