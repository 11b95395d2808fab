"""First-error reflection: what went wrong first, where, and from which token on the student is corrected.

The reflector, the frozen base model, reads a problem, a correct peer y* and the wrong rollout y-, and writes

    (e, q) ~ pi(. | x, y*, y-)        <error_quote>q</error_quote><explanation>e</explanation>

q quotes the place where y- first goes wrong, e is the corrective idea. Locating q in y- gives the mask:

    k = Locate(q, y-)       m_t = 0 for t < k,  1 for t >= k

>>> reflection = parse_reflection("1-5=6<error_quote>6*2=8</error_quote><explanation>6*2=2</explanation>")
>>> reflection
Reflection(quote='6*2=8', idea='6*2=2')
>>> rollout = list("1-5=6;6*2=8;#8")
>>> k = locate(reflection.quote, rollout)
>>> k, error_mask([k], [len(rollout)]).int().tolist()
(6, [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])

`python reflect.py` prints a whole worked example.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import runs
from data.arithmetic import BUDGET, DOMAINS, GAPS, Verdict, make_problem, verify
from data.documents import hint_prompt, plain_prompt, reflect_prompt, solution_prompt
from data.tokenizer import END, decode, encode, pieces
from model import GPT, generate
from runs import option, torch_generator

REFLECTION_BUDGET = 80  # tokens of the longest reflection: the thinking, the quote and the idea


@dataclass(frozen=True)
class Rollout:
    """A response the student sampled, and what the verifier says of it."""

    problem: str
    tokens: list[int]  # with the closing <|end|>, if it came to that
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Reflection:
    quote: str | None  # q; None where the text has none, as for a correct rollout
    idea: str | None  # e; None where the text is malformed


def parse_reflection(text: str) -> Reflection:
    """Quote and corrective idea of any text; malformed text is a normal outcome and gives None, never an error."""
    quote = re.search(r"<error_quote>(.+?)</error_quote>", text, re.DOTALL)
    idea = re.search(r"<explanation>(.+?)</explanation>", text, re.DOTALL)
    return Reflection(quote[1] if quote else None, idea[1] if idea else None)


def token_at(character: int, tokens: list[str]) -> int:
    """Index of the token that holds a character of the text the tokens join to."""
    end = 0
    for index, token in enumerate(tokens):
        end += len(token)
        if character < end:
            return index
    return len(tokens)


def locate(quote: str | None, tokens: list[str]) -> int | None:
    """k = Locate(q, y-): the token in which the quote's first occurrence begins, None where y- does not contain it.

    tokens are the texts of the rollout's tokens; a quote that begins inside a token is located at that token.
    """
    character = "".join(tokens).find(quote) if quote else -1
    return None if character < 0 else token_at(character, tokens)


def true_position(rollout: Rollout) -> int:
    """The oracle's k: the token where the verifier's first error begins; 0 where it names none."""
    return token_at(rollout.verdict.error[0], pieces(rollout.tokens)) if rollout.verdict.error else 0


def error_mask(starts: list[int], lengths: list[int]) -> Tensor:
    """m_t of every rollout: 1 for start <= t < length, else 0 -> (B, max length), float."""
    t = torch.arange(max(lengths))
    return ((t >= torch.tensor(starts)[:, None]) & (t < torch.tensor(lengths)[:, None])).float()


def sample_rollouts(
    student: GPT, problems: list[str], group: int, generator: torch.Generator, temperature: float = 1.0
) -> list[Rollout]:
    """G rollouts a problem from the student, each with its verdict; those of a problem lie side by side."""
    prompts = [encode(plain_prompt(problem)) for problem in problems]
    responses = generate(student, prompts, BUDGET, END, group, temperature, generator=generator)
    owners = [problem for problem in problems for _ in range(group)]
    texts = [decode(tokens) for tokens in responses]
    return [Rollout(p, tokens, text, verify(p, text)) for p, tokens, text in zip(owners, responses, texts, strict=True)]


def choose_peers(rollouts: list[Rollout], group: int, rule: str = "shortest") -> list[Rollout | None]:
    """y* of each rollout: a correct rollout of its group of G, another one than itself where there is another."""
    peers: list[Rollout | None] = []
    for start in range(0, len(rollouts), group):
        members = rollouts[start : start + group]
        correct = [rollout for rollout in members if rollout.verdict.correct]
        if rule == "shortest":
            correct.sort(key=lambda rollout: len(rollout.tokens))
        for rollout in members:
            others = [peer for peer in correct if peer is not rollout]
            peers.append(others[0] if others else rollout if rollout.verdict.correct else None)
    return peers


def reflect(
    reflector: GPT,
    rollouts: list[Rollout],
    peers: list[str | None],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Reflection]:
    """Let the reflector write one reflection on each rollout; a wrong one is paired with a correct peer's text."""
    prompts = [
        encode(reflect_prompt(rollout.problem, rollout.text, None if rollout.verdict.correct else peer))
        for rollout, peer in zip(rollouts, peers, strict=True)
    ]
    texts = generate(reflector, prompts, REFLECTION_BUDGET, END, temperature=temperature, generator=generator)
    return [parse_reflection(decode(tokens)) for tokens in texts]


def teacher_prompt(context: str, problem: str, idea: str | None, solution: str | None) -> str:
    """What the teacher holds: 'reflection' e (the paper), 'peer' or 'gold' a solution, or 'both' e and the peer's."""
    if context == "reflection":
        return hint_prompt(problem, idea)
    return solution_prompt(problem, solution, hint=idea if context == "both" else None)


# ---------------------------------------------------------------------------------------------- worked example, X-ray


@dataclass(frozen=True)
class Config:
    domain: str = option("mix", "domain of the problem; gap needs --base data/gaps.pt", choices=(*DOMAINS, *GAPS))
    seed: int = option(6, "which problem")
    base: str = option("data/base.pt", "checkpoint of the base model")
    html: str = option("", "write the X-ray of the whole group to this file, e.g. out/xray.html")
    rosd: str = option("out/rosd-add-seed0/model.pt", "X-ray: the student after ROSD from the same base")
    sdpo: str = option("out/sdpo-add-seed0/model.pt", "X-ray: the student after SDPO from the same base")


def main() -> None:
    import xray  # which imports this module in turn

    config = runs.parse_config(Config, "One worked example of first-error reflection.")
    runs.check_world(config.base, config.domain)
    model = runs.load_checkpoint(config.base)[0]
    rng, generator = random.Random(config.seed), torch_generator("example", config.seed)
    for _ in range(200):
        problem = make_problem(config.domain, rng, test=True)
        group = sample_rollouts(model, [problem], 8, generator)
        correct = sorted((r for r in group if r.verdict.correct), key=lambda r: len(r.tokens))
        wrong = [r for r in group if r.verdict.error]
        if correct and len({rollout.text for rollout in wrong}) > 1:
            break
    else:
        raise runs.UserError(
            "in 200 problems no group had a right and two wrong rollouts; give the base model with --base"
        )
    latest = max(wrong, key=lambda rollout: rollout.verdict.error[0])  # it shows the mask best
    print(xray.worked_example(model, latest, correct[0].text, sys.stdout.isatty()))
    if config.html:
        runs.make_folder(Path(config.html).resolve().parent)
        paths = {"rosd": Path(config.rosd), "sdpo": Path(config.sdpo)}
        students = {name: runs.load_checkpoint(path)[0] for name, path in paths.items() if path.exists()}
        runs.write_text(Path(config.html), xray.reflection_page(model, students, group, correct[0].text))
        print(f"\n-> {config.html}")


if __name__ == "__main__":
    runs.run_script(main)
