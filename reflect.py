"""First-error reflection: what went wrong first, where, and from which token on the student is corrected.

The reflector reads a problem x, a correct peer y* and the wrong rollout y-, and writes

    (e, q) ~ pi(. | x, y*, y-)        <error_quote>q</error_quote><explanation>e</explanation>

q quotes the place where y- first goes wrong, e is the corrective idea. Locating q in y- gives the mask:

    k = Locate(q, y-)       m_t = 0 for t < k,  1 for t >= k

>>> reflection = parse_reflection("1-5=6<error_quote>6*2=8</error_quote><explanation>6*2=2</explanation>")
>>> reflection
Reflection(quote='6*2=8', idea='6*2=2')
>>> rollout = list("1-5=6;6*2=8;#8")
>>> k, _ = locate(reflection.quote, rollout)
>>> k, error_mask([k], [len(rollout)], [len(rollout)]).int().tolist()
(6, [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])

`python reflect.py` prints a whole worked example.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import Problem, Task, Verdict, falsify
from errors import UserError
from harness.cli import option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base, seeded
from losses import divergence
from model import GPT, generate, response_logprobs, sample


@dataclass(frozen=True)
class Rollout:
    """A response the student sampled, and what the verifier says of it."""

    problem: Problem
    tokens: list[int]  # with the closing stop token, if there is one
    logprobs: list[float]  # of each token, when it was sampled
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Reflection:
    quote: str | None  # q; None where the text has none, as for a correct rollout
    idea: str | None  # e; None where the text is malformed


def sample_rollouts(
    student: GPT, task: Task, problems: list[Problem], group: int, generator: torch.Generator, temperature: float = 1.0
) -> list[Rollout]:
    """G rollouts per problem from the student, each with its verdict; those of a problem lie side by side."""
    prompts = [task.encode(task.student_prompt(problem)) for problem in problems]
    written = sample(student, prompts, task.max_response, task.stop, group, temperature, generator=generator)
    rollouts = []
    for i, (tokens, logprobs) in enumerate(zip(*written, strict=True)):
        problem, text = problems[i // group], task.decode(tokens)
        rollouts.append(Rollout(problem, tokens, logprobs, text, task.verify(problem, text)))
    return rollouts


def choose_peers(rollouts: list[Rollout], group: int, rule: str = "shortest") -> list[Rollout | None]:
    """y* of each rollout: another, correct rollout of its group of G; None where there is no other."""
    peers: list[Rollout | None] = []
    for start in range(0, len(rollouts), group):
        members = rollouts[start : start + group]
        correct = [rollout for rollout in members if rollout.verdict.correct]
        if rule == "shortest":
            correct.sort(key=lambda rollout: len(rollout.tokens))
        for rollout in members:
            others = [peer for peer in correct if peer is not rollout]
            peers.append(others[0] if others else None)
    return peers


def pair_up(rollouts: list[Rollout], config: Any) -> list[tuple[Rollout, Rollout | None]]:
    """Every rollout that the method can learn from, and its correct peer y*, if it needs one.

    A wrong rollout in a group without a correct one has no peer, and is skipped unless the teacher holds the golden
    solution. A group's only correct rollout has none either, and is skipped where the teacher holds a peer's solution.
    config has group, peer, context, and what else to skip: groups without a wrong rollout (solved), all wrong or all
    right rollouts (learn_from).
    """
    pairs, group = [], config.group
    for i, (rollout, peer) in enumerate(zip(rollouts, choose_peers(rollouts, group, config.peer), strict=True)):
        right = rollout.verdict.correct
        solved = all(member.verdict.correct for member in rollouts[i - i % group :][:group])
        alone_suffices = config.context == "gold" or (config.context == "reflection" and right)
        skipped = (solved and config.solved == "drop") or config.learn_from == ("wrong" if right else "right")
        if (peer or alone_suffices) and not skipped:
            pairs.append((rollout, peer))
    return pairs


# ---------------------------------------------------------------------------------------------- reflection


def write_reflections(
    reflector: GPT,
    task: Task,
    rollouts: list[Rollout],
    peers: list[str | None],
    told_answer: bool = False,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    at_once: int = 512,
) -> list[str]:
    """The text the reflector writes on each rollout; a wrong one is paired with a correct peer's text.

    Greedily, equal rollouts with equal peers are reflected on once. at_once reflections are in memory at a time.
    """
    prompts = []
    for rollout, peer in zip(rollouts, peers, strict=True):
        beside = None if rollout.verdict.correct else peer
        prompts.append(task.reflector_prompt(rollout.problem, rollout.text, beside, told_answer))
    asked = list(dict.fromkeys(prompts)) if temperature == 0 else prompts
    tokens = [task.encode(prompt) for prompt in asked]
    sampling = {"temperature": temperature, "generator": generator}
    written = generate(reflector, tokens, task.max_reflection, task.stop, at_once=at_once, **sampling)
    texts = [task.decode(answer) for answer in written]
    if temperature > 0:
        return texts
    by_prompt = dict(zip(asked, texts, strict=True))
    return [by_prompt[prompt] for prompt in prompts]


def parse_reflection(text: str) -> Reflection:
    """Quote and corrective idea of any text; malformed text is a normal outcome and gives None, never an error."""
    flags = re.DOTALL | re.IGNORECASE  # as the released code reads them
    quote = re.search(r"<error_quote>(.+?)</error_quote>", text, flags)
    idea = re.search(r"<explanation>(.+?)</explanation>", text, flags)
    return Reflection(quote and quote[1], (idea and idea[1].strip()) or None)


def spoil_some(
    read: list[Reflection], rollouts: list[Rollout], task: Task, config: Any, rng: random.Random
) -> list[Reflection]:
    """The reflections, some of which mislead on purpose, to separate the causes of a gain.

    config has the shares spoil_idea and spoil_quote. A spoiled idea is false, or (spoil_kind 'other') that of another
    problem. A spoiled quote of a wrong rollout is a random piece of it, at most as long as the quote was.
    """
    spoiled = []
    for rollout, reflection in zip(rollouts, read, strict=True):
        q, e, tokens = reflection.quote, reflection.idea, task.pieces(rollout.tokens)
        if rng.random() < config.spoil_idea and e is not None:
            others = [r.idea for r, o in zip(read, rollouts, strict=True) if r.idea and o.problem != rollout.problem]
            e = falsify(e, rng) if config.spoil_kind == "false" else rng.choice(others or [e])
        if rng.random() < config.spoil_quote and not rollout.verdict.correct and tokens:
            q = "".join(tokens[rng.randrange(len(tokens)) :])[: max(1, len(q or ""))]
        spoiled.append(Reflection(q, e))
    return spoiled


# ---------------------------------------------------------------------------------------------- localization


def token_at(character: int, tokens: list[str]) -> int:
    """Index of the token that holds a character of the text the tokens join to."""
    end = 0
    for index, token in enumerate(tokens):
        end += len(token)
        if character < end:
            return index
    return len(tokens)


def locate(quote: str | None, tokens: list[str]) -> tuple[int, int] | None:
    """k = Locate(q, y-), and where the quote ends: [k, end) hold its first occurrence; None where y- has none.

    tokens are the texts of the rollout's tokens. A quote that begins inside a token is located at that token. If
    it is absent, it is looked for without the white space around it, as in the released code.
    """
    text = "".join(tokens)
    for form in (quote or "", (quote or "").strip()):
        if form and (character := text.find(form)) >= 0:
            return token_at(character, tokens), token_at(character + len(form) - 1, tokens) + 1
    return None


def true_position(rollout: Rollout, tokens: list[str]) -> int:
    """The oracle's k: the token where the verifier's first error begins; 0 where it names none."""
    return token_at(rollout.verdict.error[0], tokens) if rollout.verdict.error else 0


def error_mask(starts: list[int], ends: list[int], lengths: list[int]) -> Tensor:
    """m_t of every rollout: 1 for start <= t < end, else 0 -> (B, max length), float."""
    t = torch.arange(max(lengths))
    return ((t >= torch.tensor(starts)[:, None]) & (t < torch.tensor(ends)[:, None])).float()


# ---------------------------------------------------------------------------------------------- worked example


@dataclass(frozen=True)
class Config(TaskConfig):
    domain: str = option("", "domain of the problem; the task's first where none is given")
    seed: int = option(6, "which problem")


def example(model: GPT, task: Task, domain: str, seed: int) -> tuple[Rollout, Rollout, list[Rollout]]:
    """A wrong rollout that goes wrong late, its correct peer, and the group of 8 both come from."""
    rng, generator = random.Random(seed), seeded("example", seed)
    for _ in range(200):
        group = sample_rollouts(model, task, task.problems(domain, 1, rng, test=True), 8, generator)
        wrong = [r for r in group if not r.verdict.correct and (r.verdict.error or not task.knows_first_error)]
        if len({rollout.text for rollout in wrong}) > 1 and any(rollout.verdict.correct for rollout in group):
            latest = max(wrong, key=lambda rollout: rollout.verdict.error or (0, 0))
            return latest, choose_peers(group, 8)[group.index(latest)], group
    raise UserError("in 200 problems no group had a right and two wrong rollouts; give the base model with --base")


@torch.no_grad()
def main() -> None:
    config = parse_config(Config, "One worked example of first-error reflection.")
    task, model = open_task_and_base(config, config.domain)
    wrong, peer, _ = example(model, task, config.domain or task.domains[0], config.seed)
    written = write_reflections(model, task, [wrong], [peer.text])[0]
    reflection, tokens = parse_reflection(written), task.pieces(wrong.tokens)
    found = locate(reflection.quote, tokens)
    k = found[0] if found else None
    print(f"problem x            {wrong.problem.question}")
    print(f"correct peer y*      {peer.text}")
    print(f"wrong rollout y-     {wrong.text}")
    print(f"reflector writes     {written}")
    print(f"error quote q        {reflection.quote}")
    print(f"corrective idea e    {reflection.idea}")
    truth = f", and the verifier's own first error is at {true_position(wrong, tokens)}" if wrong.verdict.error else ""
    print(f"k = Locate(q, y-)    {k}{truth}")
    if reflection.idea is None:
        print("The reflection is malformed: this rollout is left out of the loss.")
        return
    prompts = [task.student_prompt(wrong.problem), task.teacher_prompt(wrong.problem, idea=reflection.idea)]
    student, teacher = (response_logprobs(model, [task.encode(prompt)], [wrong.tokens])[0] for prompt in prompts)
    D = divergence(student, teacher)  # (T,)
    print("\ntoken   m_t  student's and teacher's favourite   D(pi_S || pi_T)")
    for t, token in enumerate(tokens):
        favourites = [task.pieces([int(p[t].argmax())])[0] + f" {p[t].max().exp():4.0%}" for p in (student, teacher)]
        mask, bar = int(t >= (k or 0)), "#" * int(50 * D[t])
        line = f"{token:8s} {mask}   {favourites[0]:16s} {favourites[1]:16s}   {D[t]:.3f} {bar}"
        print(line.replace("\n", "↵"))


if __name__ == "__main__":
    run_script(main)
