"""The task of real language models: problems in words, asked in the chat format of a Hugging Face folder.

`sources.py` has the problems, `answers.py` finds and compares answers, `requests.py` has the prompts' words. Here are
the chat turns, the positions that decide, and the tokens. Nobody knows the true first error of these responses.
"""

import codecs
import random
import re
from pathlib import Path
from typing import ClassVar

from data.answers import MARK, MARKS, falsify, final_answer
from data.requests import ENDING, problem_request, reflection_request
from data.sources import Gym, Lines, WordProblem
from data.task import Task, Verdict
from errors import UserError
from hub.tokenizer import Tokenizer
from hub.weights import read_shape


class Words(Task):
    """Problems of a source, in the tokens of a Hugging Face folder.

    shots worked examples stand before every request. max_response None takes what the source needs.
    """

    habits: ClassVar = {"marked": "the answer stands after its mark", "terse": "nothing stands beside the answer"}
    max_reflection, spare_rows = 160, True

    def __init__(self, source: Gym | Lines, base: Path | str, shots: int = 0, max_response: int | None = None) -> None:
        if not Path(base).is_dir():
            raise UserError(f"this task needs a Hugging Face model, and {base} is not its folder; give one with --base")
        try:
            self.tokenizer = Tokenizer(base)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"the tokenizer in {base} is of another form ({error!r}); choose another model") from error
        self.block_size = read_shape(Path(base), block_size=4096)["block_size"]  # as GPT.from_pretrained has it
        self.source, self.domains, self.shots = source, source.domains, shots
        self.problems_checksum = source.checksum
        self.max_response = max_response or source.max_response
        self.vocab_size, self.stop = self.tokenizer.vocab_size, self.tokenizer.stops
        self.ending = ENDING * source.asks_for_ending
        rng = random.Random("examples")  # one more than is shown: a problem is never an example of itself
        self.shown = {domain: source.draw(domain, shots + 1, rng, False) for domain in self.domains}
        for problem in source.listed():
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
        """UserError where a problem's prompts cannot be written or may not fit, whatever the model will have said."""
        held = (
            self.teacher_prompt(problem, "", problem.solution),
            self.reflector_prompt(problem, "", problem.solution, True),
        )
        try:
            longest = max(len(self.encode(prompt)) for prompt in held) + 2 * self.max_response + self.max_reflection
        except UserError as error:
            raise UserError(f"problem {problem.index} of {problem.domain}: {error}") from error
        if longest > self.block_size:
            what = f"problem {problem.index} of {problem.domain} with its responses and reflection may take {longest}"
            remedy = "leave it out, or give fewer --shots or a lower --max-response"
            raise UserError(f"{what} of the model's {self.block_size} tokens; {remedy}")

    def verify(self, problem: WordProblem, response: str) -> Verdict:
        answer = final_answer(response, problem.answer)
        marked = MARKS.search(response) is not None
        terse = len(response.split()) <= len(problem.answer.split()) + 3 * marked
        habits = tuple(habit for habit, shown in (("marked", marked), ("terse", terse)) if shown and answer is not None)
        correct = answer is not None and self.source.right(problem, answer)
        return Verdict(correct, answer is not None, None, habits)

    def decisive(self, solution: list[str], rule: str = "aligned") -> list[int]:
        """S: the tokens of the answer and of what follows '='; with the rule 'steps' all that calculate."""
        text = "".join(solution)
        calculation = r"=\s*[$€£]*(-?[\d.,/]*\d)" if rule == "aligned" else r"(\S*\d\S*|(?<=\s)[-+*/×÷=](?=\s))"
        spans = [match.span(1) for match in re.finditer(calculation, text)]
        answer = re.compile(rf"{MARK}\s*(.*\S)", re.DOTALL).finditer(text, max(0, text.rfind(MARK)))
        spans += [match.span(1) for match in answer]
        chosen, end = [], 0
        for i, piece in enumerate(solution):
            start, end = end, end + len(piece)
            inner = start + len(piece) - len(piece.lstrip()), max(end, start + 1)  # a part of a character counts as it
            if rule == "full" or any(inner[0] < last and inner[1] > first for first, last in spans):
                chosen.append(i)
        return chosen

    # ------------------------------------------------------------------------------------------ prompts

    def teacher_prompt(self, problem: WordProblem, idea: str | None = None, solution: str | None = None) -> str:
        return self.chat(problem_request(problem.question, self.ending, idea, solution), self.examples(problem))

    def reflector_prompt(self, problem: WordProblem, attempt: str, peer: str | None, told_answer: bool) -> str:
        """With shots, worked examples are of the same kind: false solutions for a wrong attempt, else right ones."""

        def request(asked: WordProblem, attempt: str, peer: str | None) -> str:
            return reflection_request(asked.question, attempt, peer, asked.answer if told_answer else None)

        examples = []
        for other in self.others(problem):
            false = falsify(other.answer, random.Random(0))
            false = false if false != other.answer else "unknown"  # an answer without a number
            wrong = re.sub(place_of(other.answer), lambda _, false=false: false, other.solution)
            shown, beside = (other.solution, None) if peer is None else (wrong, other.solution)
            examples.append((request(other, shown, beside), self.true_reflection(other, shown)))
        return self.chat(request(problem, attempt, peer), examples)

    def true_reflection(self, problem: WordProblem, response: str) -> str:
        """Quotes where a wrong response first writes the result that it ends with; the idea is the right result."""
        idea = f"<explanation>The result is {problem.answer}.</explanation>"
        given = final_answer(response, problem.answer)
        if given is None or self.source.right(problem, given):
            return idea
        spot = place_of(given)
        place = re.search(rf"=\s*{spot}", response) or re.search(spot, response)
        if place is None:
            return f"<error_quote>{given}</error_quote>{idea}"
        start, end = place.span()
        while response.find(response[start:end]) < start:  # '= 4' is also in '= 42'
            start -= 1
        return f"<error_quote>{response[start:end]}</error_quote>{idea}"

    def others(self, problem: WordProblem) -> list[WordProblem]:
        """Training problems of the same domain for worked examples, never the problem itself."""
        return [other for other in self.shown[problem.domain] if other.question != problem.question][: self.shots]

    def examples(self, problem: WordProblem) -> list[tuple[str, str]]:
        return [(problem_request(other.question, self.ending), other.solution) for other in self.others(problem)]

    def chat(self, request: str, examples: list[tuple[str, str]]) -> str:
        """The prompt that asks for the answer to a request; no text in it can pass for a special token."""
        turns = [turn for asked, written in examples for turn in (("user", asked), ("assistant", written))]
        plain = [(role, self.tokenizer.special.sub(" ", text)) for role, text in [*turns, ("user", request)]]
        return self.tokenizer.chat(plain)

    # ------------------------------------------------------------------------------------------ tokens

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces(tokens))

    def pieces(self, tokens: list[int]) -> list[str]:
        """The text of each token; a character that several make up goes to the last of them.

        Stop tokens and what comes after them have no text; bytes that are no character show as a replacement.
        """
        utf8, texts, ended = codecs.getincrementaldecoder("utf-8")("replace"), [], False
        encoding, ranks = self.tokenizer.encoding, self.tokenizer.ranks
        for token in tokens:
            ended = ended or token in self.stop
            known = not ended and token in ranks  # padding rows of the embedding are no tokens
            texts.append(utf8.decode(encoding.decode_single_token_bytes(ranks[token])) if known else "")
        if texts:
            texts[-1] += utf8.decode(b"", final=True)
        return texts

    def end(self) -> int:
        """The chat's end of turn: a folder may name other stop tokens as well."""
        return self.tokenizer.end


def place_of(result: str) -> str:
    """A pattern for a result that is not part of another number or word."""
    return rf"(?<![\w.,]){re.escape(result)}(?![.,]?\d|\w)"
