"""First-error reflection: what went wrong first, where, and from which token on the student is corrected.

The reflector reads a problem x, a correct peer y* and the wrong rollout y-, and writes

    (e, q) ~ pi(. | x, y*, y-)        <error_quote>q</error_quote><explanation>e</explanation>

q quotes the place where y- first goes wrong, e is the corrective idea. Locating q in y- gives the mask:

    k = Locate(q, y-)       m_t = 0 for t < k,  1 for t >= k

>>> q, e = parse_reflection("1-5=6<error_quote>6*2=8</error_quote><explanation>6*2=2</explanation>")
>>> q, e
('6*2=8', '6*2=2')
>>> y = list("1-5=6;6*2=8;#8")
>>> k, _ = locate(q, y)
>>> error_mask([k], [len(y)], len(y)).int().tolist()
[[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]

`python reflect.py` prints a whole worked example.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import Problem, Task, Verdict
from errors import UserError
from harness.files import load_checkpoint
from losses import group_advantage
from model import GPT
from sampling import generate, sample


@dataclass(frozen=True)
class Rollout:
    """A response that the student sampled, and what the verifier says of it."""

    problem: Problem
    tokens: list[int]  # with the closing stop token, if there is one
    logprobs: list[float]  # of each token, when it was sampled
    text: str
    pieces: list[str]  # the text of each token
    verdict: Verdict


class Reflection(NamedTuple):
    quote: str | None = None  # q; None where the reflector quotes nothing, as for a correct rollout
    idea: str | None = None  # e; None where the text is malformed


REFLECTORS = ("base", "student", "oracle")  # or the path of a checkpoint
Span = tuple[int, int]  # tokens [k, end) of a rollout


class Pair(NamedTuple):
    y: Rollout
    peer: Rollout | None  # y*: another, correct rollout of the group, if there is one
    advantage: float  # GRPO's


def sample_rollouts(
    student: GPT, task: Task, problems: list[Problem], group: int, generator: torch.Generator, temperature: float = 1.0
) -> list[Rollout]:
    """G rollouts per problem from the student, each with its verdict; those of a problem stand side by side."""
    prompts = [task.encode(task.prompt(problem)) for problem in problems]
    responses = sample(student, prompts, task.max_response, task.stop, group, temperature, generator=generator)
    rollouts = []
    for i, (tokens, logprobs) in enumerate(zip(*responses, strict=True)):
        problem, text = problems[i // group], task.decode(tokens)
        verdict = task.verify(problem, text, ended=tokens[-1] in task.stop)
        rollouts.append(Rollout(problem, tokens, logprobs, text, task.pieces(tokens), verdict))
    return rollouts


def pair_with_peers(rollouts: list[Rollout], group: int, rule: str = "shortest") -> list[Pair]:
    """Every rollout with its peer y*: another, correct rollout of its group, the shortest or the first; or None."""
    pairs = []
    for start in range(0, len(rollouts), group):
        members = rollouts[start : start + group]
        correct = [y for y in members if y.verdict.correct]
        if rule == "shortest":
            correct.sort(key=lambda y: len(y.tokens))
        rewards = torch.tensor([[float(y.verdict.correct) for y in members]])
        for y, advantage in zip(members, group_advantage(rewards)[0].tolist(), strict=True):
            pairs.append(Pair(y, next((peer for peer in correct if peer is not y), None), advantage))
    return pairs


# ---------------------------------------------------------------------------------------------- reflection


def read_reflector(name: str, base: GPT) -> GPT:
    """The frozen model that reflects: the base, or a checkpoint with its vocabulary; UserError where that is none."""
    if name in REFLECTORS:
        return base
    if not Path(name).exists():
        raise UserError(f"--reflector {name} is neither {', '.join(REFLECTORS)} nor a checkpoint")
    reflector = load_checkpoint(name, base.device).requires_grad_(False).eval()
    if reflector.config.vocab_size != base.config.vocab_size:
        raise UserError(f"--reflector {name} has another vocabulary than the base; give one made from the base")
    return reflector.to(base.device)


def write_reflections(
    reflector: GPT,
    task: Task,
    pairs: list[Pair],
    give_answer: bool = False,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Reflection]:
    """(e, q) ~ pi(. | x, y*, y-) for each wrong rollout, e ~ pi(. | x, y+) for each correct one.

    A wrong rollout without a peer is compared with the golden solution (--context gold with a mask that needs a quote).
    """
    prompts = []
    for y, peer, _ in pairs:
        right_solution = peer.text if peer else y.problem.solution
        solution = None if y.verdict.correct else right_solution  # a correct rollout is read alone
        prompts.append(task.reflector_prompt(y.problem, y.text, solution, give_answer))
    # Greedily, equal prompts have equal answers; sorted, those with the same examples are read together.
    unique = sorted(set(prompts)) if temperature == 0 else prompts
    tokens = [task.encode(prompt) for prompt in unique]
    sampling = {"temperature": temperature, "generator": generator, "label": "reflections"}
    texts = list(map(task.decode, generate(reflector, tokens, task.max_reflection, task.stop, **sampling)))
    if temperature == 0:
        by_prompt = dict(zip(unique, texts, strict=True))
        texts = [by_prompt[prompt] for prompt in prompts]
    return list(map(parse_reflection, texts))


def parse_reflection(text: str) -> Reflection:
    """Quote and idea of a reflector's text; malformed text is a normal outcome and gives None, never an error."""
    flags = re.DOTALL | re.IGNORECASE  # as the released code reads the tags
    quote = re.search(r"<error_quote>(.+?)</error_quote>", text, flags)
    idea = re.search(r"<explanation>(.+?)</explanation>", text, flags)
    return Reflection(quote[1] if quote else None, idea[1].strip() or None if idea else None)


# ---------------------------------------------------------------------------------------------- localization


def token_at(character: int, pieces: list[str]) -> int:
    """Index of the token that holds a character of the text that the pieces join to."""
    end = 0
    for index, piece in enumerate(pieces):
        end += len(piece)
        if character < end:
            return index
    return len(pieces)


def locate(quote: str | None, pieces: list[str]) -> Span | None:
    """k = Locate(q, y-), and where the quote ends: tokens [k, end) hold its first occurrence; None if y- has none.

    pieces are the texts of y-'s tokens. A quote that begins inside a token is located at that token. If it is absent,
    it is looked for without the white space around it, as in the released code.
    """
    text = "".join(pieces)
    for q in (quote or "", (quote or "").strip()):
        if q and (character := text.find(q)) >= 0:
            end = token_at(character + len(q) - 1, pieces) + 1
            while end < len(pieces) - 1 and not pieces[end]:  # further bytes of its last character, not y-'s stop token
                end += 1
            return token_at(character, pieces), end
    return None


def true_position(y: Rollout) -> int:
    """The oracle's k: the token where the verifier's first error begins; 0 where it knows none."""
    return token_at(y.verdict.error[0], y.pieces) if y.verdict.error else 0


class Mask(NamedTuple):
    needs_quote: bool
    bounds: Callable[[Rollout, Span | None], Span]  # of a wrong rollout and where its quote is: the tokens with m_t = 1


MASKS = {  # a quote that is not found, or a true error that is not known, leaves the whole response
    "whole": Mask(False, lambda y, quote: (0, len(y.tokens))),
    "suffix": Mask(True, lambda y, quote: (quote[0] if quote else 0, len(y.tokens))),  # the paper's equation
    "span": Mask(True, lambda y, quote: quote or (0, len(y.tokens))),  # the paper's abstract: the erroneous span
    "oracle": Mask(False, lambda y, quote: (true_position(y), len(y.tokens))),
}


def error_mask(starts: list[int], ends: list[int], T: int) -> Tensor:
    """m_t of every rollout: 1 for start <= t < end, else 0 -> (B, T), float."""
    t = torch.arange(T)
    return ((t >= torch.tensor(starts)[:, None]) & (t < torch.tensor(ends)[:, None])).float()


# ---------------------------------------------------------------------------------------------- worked example


def example(model: GPT, task: Task, domain: str, rng: random.Random, generator: torch.Generator) -> tuple[Pair, list]:
    """A wrong rollout that goes wrong late, with its correct peer, and the group of 8 that both come from."""
    for _ in range(200):
        group = sample_rollouts(model, task, task.problems(domain, 1, rng, test=True), 8, generator)
        wrong = [pair for pair in pair_with_peers(group, 8) if pair.peer and not pair.y.verdict.correct]
        wrong = [pair for pair in wrong if pair.y.verdict.error or not task.knows_first_error]
        if len({pair.y.text for pair in wrong}) > 1:
            return max(wrong, key=lambda pair: pair.y.verdict.error or (0, 0)), group
    raise UserError("in 200 problems no group had a right and two wrong rollouts; give the base model with --base")


@torch.no_grad()
def main() -> None:
    from harness.cli import option, parse_config
    from harness.run import TaskConfig, open_task_and_base, seeded
    from losses import divergence
    from model import response_logprobs

    @dataclass(frozen=True)
    class Config(TaskConfig):
        domain: str = option("", "domain of the problem; unset: the task's first")
        seed: int = option(6, "which problem")

    config = parse_config(Config, "One worked example of first-error reflection.")
    task, model = open_task_and_base(config, config.domain)
    sampling = random.Random(config.seed), seeded("example", config.seed)
    pair, _ = example(model, task, config.domain or task.domains[0], *sampling)
    y, peer, _ = pair
    prompt = task.encode(task.reflector_prompt(y.problem, y.text, peer.text, give_answer=False))
    text = task.decode(generate(model, [prompt], task.max_reflection, task.stop, temperature=0.0)[0])
    q, e = parse_reflection(text)
    quote = locate(q, y.pieces)
    truth = f", and the verifier's own first error is at {true_position(y)}" if y.verdict.error else ""
    print(f"problem x            {y.problem.question}")
    print(f"correct peer y*      {peer.text}")
    print(f"wrong rollout y-     {y.text}")
    print(f"reflector writes     {text}")
    print(f"error quote q        {q}")
    print(f"corrective idea e    {e}")
    print(f"k = Locate(q, y-)    {quote[0] if quote else 'not found'}{truth}")
    if e is None:
        print("The reflection is malformed: this rollout is left out of the loss.")
        return
    prompts = [task.prompt(y.problem), task.prompt(y.problem, idea=e)]
    log_S, log_T = (response_logprobs(model, [task.encode(prompt)], [y.tokens])[0] for prompt in prompts)  # (T, V)
    D, (start, end) = divergence(log_S, log_T), MASKS["suffix"].bounds(y, quote)
    print("\ntoken   m_t  student's and teacher's favourite   D(pi_S || pi_T)")
    for t, piece in enumerate(y.pieces):
        student, teacher = (f"{task.pieces([int(p[t].argmax())])[0]} {p[t].max().exp():4.0%}" for p in (log_S, log_T))
        row = f"{piece:8s} {int(start <= t < end)}   {student:16s} {teacher:16s}   {D[t]:.3f} {'#' * int(50 * D[t])}"
        print(row.replace("\n", "↵"))


if __name__ == "__main__":
    from harness.cli import run_script

    run_script(main)
