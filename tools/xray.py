"""The X-ray: what student, teacher and projector do to single tokens, as a web page.

    python -m tools.xray rosd --html out/xray.html      a group of rollouts as ROSD and SDPO see it
    python -m tools.xray spd --html out/spd.html        spectra, what the projector removes, answers with and without

After `python train_rosd.py` the first page also shows both students. It finds them in the folder --runs.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import reflect
import subspace
from data import Problem, Task, load_task
from harness import files
from harness.cli import option, parse_config, run_script
from harness.run import seeded
from losses import divergence
from model import GPT, generate, response_logprobs
from reflect import Rollout, locate_span, parse_reflection, sample_rollouts
from subspace import Place, calibrate, calibration_set, hooked, place_name, project_kv
from tools import strips
from tools.strips import Choices, Token


@dataclass(frozen=True)
class Config(subspace.Config):
    page: str = option("rosd", "which page", choices=("rosd", "spd"), positional=True)
    html: str = option("", "the file to write; else out/xray.html or out/spd.html")
    runs: str = option("out", "rosd: folder of the trained students")
    domain: str = option("mix", "domain of the problem and of the calibration set")
    seed: int = option(reflect.Config.seed, "which problem")


def written_strip(task: Task, problem: Problem, tokens: list[int]) -> str:
    """An answer to a problem, token by token, and whether it is right."""
    correct = task.verify(problem, task.decode(tokens)).correct
    shown = [Token(piece) for piece in task.pieces(tokens)]
    return strips.strip(f"`{problem.question}`", shown, "right" if correct else "wrong")


# ---------------------------------------------------------------------------------------------- ROSD


@dataclass(frozen=True)
class Reading:
    """A rollout as a teacher sees it: what the teacher reads before it, and where the mask and the quote lie."""

    prompt: str  # the teacher's
    note: str
    start: int = 0  # k
    quote_end: int = 0  # the token after the quote, which begins at k

    @torch.no_grad()
    def tokens(self, rollout: Rollout, task: Task, student: GPT, teacher: GPT) -> list[Token]:
        """The rollout's tokens with m_t, D(pi_S || pi_T) as heat, and the five likeliest of student and teacher."""
        asked = [(student, task.student_prompt(rollout.problem)), (teacher, self.prompt)]
        pi_S, pi_T = (response_logprobs(model, [task.encode(x)], [rollout.tokens])[0] for model, x in asked)  # (T, V)
        return [
            Token(
                text,
                heat=(max(0.0, D) / math.log(2)) ** 0.5,  # JSD is at most log 2; the root makes small ones visible
                dimmed=t < self.start,
                quoted=self.start <= t < self.quote_end,
                start=t == self.start > 0,
                says=f"t = {t}, m_t = {int(t >= self.start)}, D = {D:.3f}",
                choices=(("student", likeliest(pi_S[t], task)), ("teacher", likeliest(pi_T[t], task))),
            )
            for t, (text, D) in enumerate(
                zip(task.pieces(rollout.tokens), divergence(pi_S, pi_T).tolist(), strict=True)
            )
        ]


def likeliest(logp: Tensor, task: Task, count: int = 5) -> Choices:
    values, index = logp.exp().topk(count)
    return [(text, round(p, 4)) for text, p in zip(task.pieces(index.tolist()), values.tolist(), strict=True)]


def readings(base: GPT, task: Task, rollout: Rollout, peer: Rollout) -> dict[str, Reading]:
    """How each method's teacher reads the rollout; ROSD is left out where the reflection is malformed."""
    written = reflect.reflect(base, task, [rollout], [peer.text])[0]
    reflection, found = parse_reflection(written), {}
    k, end = locate_span(reflection.quote, task.pieces(rollout.tokens)) or (0, 0)
    if reflection.idea is not None:
        prompt = task.teacher_prompt(rollout.problem, idea=reflection.idea)
        found["ROSD"] = Reading(prompt, f"The reflector writes `{written}`, so k = {k}", k, end)
    prompt = task.teacher_prompt(rollout.problem, solution=peer.text)
    return found | {"SDPO": Reading(prompt, f"The teacher holds `{peer.text}`")}


def rosd_page(base: GPT, task: Task, students: dict[str, GPT], group: list[Rollout], peer: Rollout) -> str:
    """The page of a group: every rollout as ROSD and as SDPO see it, before and after training."""
    problem, texts = peer.problem, [rollout.text for rollout in group]
    trained = {"before training": {}} | ({"after training": students} if students else {})
    views = dict.fromkeys(trained, "")
    wrong_first = sorted(group, key=lambda rollout: rollout.verdict.correct)
    for rollout in {rollout.text: rollout for rollout in wrong_first}.values():
        times = texts.count(rollout.text)
        count = f", {times} of {len(group)} rollouts" if times > 1 else ""
        badge = "right" if rollout.verdict.correct else "wrong"
        read = readings(base, task, rollout, peer)
        for view, models in trained.items():
            row = []
            for name, reading in read.items():
                tokens = reading.tokens(rollout, task, models.get(name, base), base)
                row.append(strips.strip(name + count, tokens, badge, reading.note))
            views[view] += strips.columns(*row)
    answers = []
    for name, student in {"before training": base, **students}.items():
        samples = sample_rollouts(student, task, [problem], 6, seeded("xray", problem.question))
        rows = [written_strip(task, problem, sample.tokens) for sample in samples]
        answers.append(f"<h3>{name}</h3>{''.join(rows)}")
    missing = "" if students else " After `python train_rosd.py` this page also shows both trained students."
    return strips.page(
        "First-error reflection under the X-ray",
        f"Eight rollouts of the problem `{problem.question}`, as two teachers see them. ROSD's teacher holds the "
        "reflector's idea and teaches from the first error on; tokens before k are pale, m_t = 0. SDPO's teacher holds "
        f"a correct solution and teaches every token. Colour is the divergence D of student and teacher.{missing}",
        [
            strips.section(
                "The group",
                "Wrong rollouts come first. The reflector's quote is underlined; the bar is k.",
                [strips.switch("training", views)],
            ),
            strips.section("What they write", "Six samples each at temperature 1.", [strips.columns(*answers)]),
        ],
    )


def trained_students(config: Config) -> dict[str, GPT]:
    """The students of `python train_rosd.py` on this domain, with seed 0, by method."""
    paths = {name: Path(config.runs, f"{name.lower()}-seed0", "model.pt") for name in ("ROSD", "SDPO")}
    return {name: files.load_checkpoint(path)[0] for name, path in paths.items() if path.exists()}


# ---------------------------------------------------------------------------------------------- SPD


@torch.no_grad()
def removed(
    model: GPT, tokens: list[int], projectors: dict[Place, Tensor], coordinate: str
) -> dict[Place, list[float]]:
    """How much of every token's key or value the projector takes away: |x - x P| / |x|, by place."""
    shares: dict[Place, list[float]] = {}

    def measure(place: Place, output: Tensor) -> None:
        x = output.flatten(2)[0]  # (T, d)
        shares[place] = ((x - x @ projectors[place]).norm(dim=1) / x.norm(dim=1)).tolist()

    with hooked(model, list(projectors), coordinate, measure):
        model(torch.tensor([tokens], device=model.device))
    return shares


def spd_page(model: GPT, task: Task, config: Config) -> str:
    """Spectra, what the projector takes away from every token, and the answers with and without it."""
    examples = calibration_set(task, config.calibration_domain or (config.domain,), config, config.seed)
    projectors = calibrate(model, examples, config, config.seed)
    spectra = []
    for place, (s, r) in subspace.spectra(model, task, config).items():
        says = [f"s_{i + 1} = {value:.3g}" for i, value in enumerate(s.tolist())]
        shown = [Token(bar, dimmed=i >= r, says=says[i]) for i, bar in enumerate(subspace.bars(s))]
        note = f"r = {r}" if place in projectors else "not projected"
        spectra.append(strips.strip(place_name(place), shown, note=note))
    problems = task.problems(config.domain, 4, random.Random(f"prompt {config.seed}"), test=True)
    prompts = [task.encode(task.student_prompt(problem)) for problem in problems]
    text, views = [*prompts[0], *task.encode(problems[0].solution)], {}
    for place, shares in removed(model, text, projectors, config.coordinate).items():
        tokens = [
            Token(token, heat=share, says=f"{share:.0%} of its {'key' if place[1] == 'k' else 'value'} is taken away")
            for token, share in zip(task.pieces(text), shares, strict=True)
        ]
        views[place_name(place)] = strips.strip("prompt and golden solution", tokens)
    answered = []
    for name, active in (("without", {}), ("with", projectors)):
        sampling = {"temperature": config.temperature, "generator": seeded("xray", config.seed)}
        with project_kv(model, active, config.coordinate):
            written = generate(model, prompts, task.max_response, task.stop, **sampling)
        rows = [written_strip(task, problem, tokens) for problem, tokens in zip(problems, written, strict=True)]
        answered.append(f"<h3>{name} projection</h3>{''.join(rows)}")
    return strips.page(
        "Self-policy distillation under the X-ray",
        "The gradients of correctness with respect to keys and values have singular values that fall off. While the "
        f"model generates, the projector keeps the first r directions. Problem: `{problems[0].question}`.",
        [
            strips.section(
                "Spectra", "Singular values of G at every layer, pale from r on.", [strips.columns(*spectra)]
            ),
            strips.section(
                "What the projector takes away", "Colour is |x - x P| / |x|.", [strips.switch("place", views)]
            ),
            strips.section(
                "The same prompts, without and with", "Both use the same random numbers.", [strips.columns(*answered)]
            ),
        ],
    )


def main() -> None:
    config = parse_config(Config, __doc__)
    task, model = load_task(config.task), files.load_checkpoint(config.base)[0]
    path = Path(config.html or ("out/xray.html" if config.page == "rosd" else "out/spd.html"))
    files.make_folder(path.resolve().parent)
    if config.page == "rosd":
        _, peer, group = reflect.example(model, task, config.domain, config.seed)
        page = rosd_page(model, task, trained_students(config), group, peer)
    else:
        page = spd_page(model, task, config)
    files.write_text(path, page)
    print(f"-> {path}")


if __name__ == "__main__":
    run_script(main)
