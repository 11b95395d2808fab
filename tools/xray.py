"""The X-ray: what student, teacher and projector do to single tokens, as a web page and in the terminal.

`python reflect.py --html out/xray.html` shows a group of rollouts as ROSD and SDPO see it, before and after training;
`python subspace.py --html out/spd.html` shows spectra, what the projector takes away, and answers with and without it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import strips
from data.arithmetic import golden_solution, verify
from data.documents import hint_prompt, plain_prompt, reflect_prompt, solution_prompt
from data.tokenizer import END, decode, encode, pieces
from losses import divergence
from model import GPT, generate, response_logprobs
from reflect import REFLECTION_BUDGET, Rollout, locate, parse_reflection, sample_rollouts, true_position
from runs import torch_generator
from strips import Token
from subspace import Place, hook_module, place_name


@dataclass(frozen=True)
class Reading:
    """A rollout under the eyes of a teacher: what the mask covers, and where student and teacher differ."""

    prompt: str  # the teacher's
    start: int  # k
    quote: str | None = None

    @torch.no_grad()
    def tokens(self, rollout: Rollout, student: GPT, teacher: GPT) -> list[Token]:
        """The rollout's tokens with m_t, D(pi_S || pi_T) as heat, and the five likeliest of student and teacher."""
        pi_S = response_logprobs(student, [encode(plain_prompt(rollout.problem))], [rollout.tokens])[0]  # (T, V)
        pi_T = response_logprobs(teacher, [encode(self.prompt)], [rollout.tokens])[0]
        quoted = range(self.start, self.start + len(self.quote)) if self.quote else ()
        shown = []
        for t, (text, D) in enumerate(zip(pieces(rollout.tokens), divergence(pi_S, pi_T).tolist(), strict=True)):
            shown.append(
                Token(
                    text,
                    heat=(D / math.log(2)) ** 0.5,  # JSD is at most log 2; the root makes small ones visible
                    dimmed=t < self.start,
                    quoted=t in quoted,
                    start=t == self.start > 0,
                    says=f"t = {t}, m_t = {int(t >= self.start)}, D = {D:.3f}",
                    choices=(("student", likeliest(pi_S[t])), ("teacher", likeliest(pi_T[t]))),
                )
            )
        return shown


def likeliest(logp: Tensor, count: int = 5) -> list[tuple[str, float]]:
    values, index = logp.exp().topk(count)
    return list(zip(pieces(index.tolist()), values.tolist(), strict=True))


def reflection_text(model: GPT, rollout: Rollout, peer: str) -> str:
    prompt = encode(reflect_prompt(rollout.problem, rollout.text, None if rollout.verdict.correct else peer))
    return decode(generate(model, [prompt], REFLECTION_BUDGET, END, temperature=0)[0])


def worked_example(model: GPT, rollout: Rollout, peer: str, colour: bool) -> str:
    """One wrong rollout from its problem to the per-token divergence, as text."""
    written = reflection_text(model, rollout, peer)
    reflection = parse_reflection(written)
    k = locate(reflection.quote, pieces(rollout.tokens))
    lines = [
        f"problem x            {rollout.problem}",
        f"correct peer y*      {peer}",
        f"wrong rollout y-     {rollout.text}",
        f"reflector writes     {written}",
        f"error quote q        {reflection.quote}",
        f"corrective idea e    {reflection.idea}",
        f"k = Locate(q, y-)    {k}  (the verifier's own first error: {true_position(rollout)})",
    ]
    if reflection.idea is None:
        return "\n".join([*lines, "The reflection is malformed: this rollout is left out of the loss."])
    reading = Reading(hint_prompt(rollout.problem, reflection.idea), k or 0, None if k is None else reflection.quote)
    tokens = reading.tokens(rollout, model, model)
    return "\n".join([*lines, f"D, before training   {strips.terminal(tokens, colour)}", "", *map(describe, tokens)])


def describe(token: Token) -> str:
    return f"{token.text:8s} {token.says:28s} {'#' * round(40 * token.heat)}"


def reflection_page(base: GPT, students: dict[str, GPT], group: list[Rollout], peer: str) -> str:
    """The page of a group: every rollout as ROSD and as SDPO sees it, before and after training."""
    problem, texts = group[0].problem, [rollout.text for rollout in group]
    views: dict[str, list[str]] = {"before training": [], "after training": []} if students else {"before training": []}
    distinct = {rollout.text: rollout for rollout in sorted(group, key=lambda rollout: rollout.verdict.correct)}
    for rollout in distinct.values():
        badge, count = "right" if rollout.verdict.correct else "wrong", texts.count(rollout.text)
        written = reflection_text(base, rollout, peer)
        reflection = parse_reflection(written)
        found = locate(reflection.quote, pieces(rollout.tokens))
        k = found or 0
        readings = {"sdpo": (Reading(solution_prompt(problem, peer), 0), f"The teacher holds `{peer}`")}
        if reflection.idea is not None:
            reading = Reading(hint_prompt(problem, reflection.idea), k, None if found is None else reflection.quote)
            readings = {"rosd": (reading, f"The reflector writes `{written}`, so k = {k}")} | readings
        for view, shown in views.items():
            trained = students if view == "after training" else {}
            row = [
                strips.strip(
                    name.upper() + (f", {count} of {len(group)} rollouts" if count > 1 else ""),
                    reading.tokens(rollout, trained.get(name, base), base),
                    badge,
                    note,
                )
                for name, (reading, note) in readings.items()
            ]
            shown.append(strips.columns(*row))
    answers = []
    for name, student in {"before training": base, **students}.items():
        samples = sample_rollouts(student, [problem], 6, torch_generator("xray", problem))
        rows = [
            strips.strip("", [Token(text) for text in pieces(r.tokens)], "right" if r.verdict.correct else "wrong")
            for r in samples
        ]
        answers.append(f"<h3>{name.upper() if name in students else name}</h3>" + "".join(rows))
    missing = "" if students else " Run `python train_rosd.py`, and this page also shows both students after training."
    return strips.page(
        "First-error reflection under the X-ray",
        f"Eight rollouts of the problem `{problem}`, seen by two teachers. ROSD's teacher holds the reflector's idea "
        "and teaches from the first error on: tokens before k are pale, m_t = 0. SDPO's teacher holds a correct "
        f"solution and teaches every token. Colour is the divergence D of student and teacher.{missing}",
        [
            strips.section(
                "The group",
                "Wrong rollouts first. Underlined is what the reflector quotes; the bar is k.",
                [strips.switch("training", {view: "".join(shown) for view, shown in views.items()})],
            ),
            strips.section("What they write", "Six samples each at temperature 1.", [strips.columns(*answers)]),
        ],
    )


@torch.no_grad()
def removed(model: GPT, text: str, projectors: dict[Place, Tensor], coordinate: str) -> dict[Place, list[float]]:
    """How much of the key or value of every token of a text the projector takes away: |x - x P| / |x|, by place."""
    seen: dict[Place, Tensor] = {}
    hooks = [
        hook_module(model, place, coordinate).register_forward_hook(
            lambda module, inputs, output, place=place: seen.update({place: output.flatten(2)[0]})  # (T, d)
        )
        for place in projectors
    ]
    model(torch.tensor([encode(text)]))
    for hook in hooks:
        hook.remove()
    return {place: ((x - x @ projectors[place]).norm(dim=1) / x.norm(dim=1)).tolist() for place, x in seen.items()}


def subspace_page(model: GPT, problem: str, spectra: dict, projectors: dict, answers: dict, coordinate: str) -> str:
    """Spectra, what the projector takes away from every token, and the answers with and without it."""
    figures = [
        strips.spectrum(place_name(place), values.tolist(), r, f"r = {r}" if place in projectors else "not projected")
        for place, (values, r) in spectra.items()
    ]
    text = plain_prompt(problem) + golden_solution(problem)
    views = {}
    for place, shares in removed(model, text, projectors, coordinate).items():
        tokens = [
            Token(token, heat=share, says=f"{share:.0%} of its {place[1].upper()} is projected away")
            for token, share in zip(pieces(encode(text)), shares, strict=True)
        ]
        views[place_name(place)] = strips.strip("prompt and golden solution", tokens)
    answered = []
    for name, texts in answers.items():
        rows = [
            strips.strip("", [Token(c) for c in t], "right" if verify(problem, t).correct else "wrong") for t in texts
        ]
        answered.append(f"<h3>{name}</h3>" + "".join(rows))
    return strips.page(
        "Self-policy distillation under the X-ray",
        "The gradients of correctness at keys and values have singular values that fall off; the projector keeps the "
        f"first r directions while the model generates. Problem: `{problem}`.",
        [
            strips.section(
                "Spectra", "Singular values of G at every layer, filled up to r.", [strips.columns(*figures)]
            ),
            strips.section(
                "What the projector takes away", "Colour is |x - x P| / |x|.", [strips.switch("place", views)]
            ),
            strips.section("The same prompt, without and with", "Same random numbers.", [strips.columns(*answered)]),
        ],
    )
