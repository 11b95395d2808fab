"""The X-ray: what student, teacher and projector do to single tokens, as a web page.

    python -m tools.xray rosd --html out/xray.html      a group of rollouts as ROSD and SDPO see it
    python -m tools.xray spd --html out/spd.html        spectra, what the projector removes, answers with and without

After `python train_rosd.py` the first page also shows both students. It finds them in the folder --runs.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2  # torch brings it
import torch
from markupsafe import Markup
from torch import Tensor

import reflect
import subspace
from data import Problem, Task
from harness import files
from harness.cli import option, parse_config, run_script
from harness.run import open_task_and_base, seeded
from losses import divergence
from model import GPT, generate, response_logprobs
from reflect import Rollout, locate, parse_reflection, sample_rollouts
from subspace import Place, calibrate, calibration_set, hooked, place_name, project_kv

Choices = list[tuple[str, float]]  # tokens and their probabilities, likeliest first


@dataclass(frozen=True)
class Config(subspace.Config):
    page: str = option("rosd", "which page", choices=("rosd", "spd"), positional=True)
    html: str = option("", "the file to write; else out/xray.html or out/spd.html")
    runs: str = option("out", "rosd: folder of the trained students")
    domain: str = option("mix", "domain of the problem and of the calibration set")
    seed: int = option(reflect.Config.seed, "which problem")


@dataclass(frozen=True)
class Token:
    text: str
    heat: float = 0.0  # 0 to 1, its colour
    dimmed: bool = False  # outside the mask
    quoted: bool = False  # within the reflector's quote
    start: bool = False  # k: the loss begins here
    says: str = ""  # one sentence about it
    choices: tuple[tuple[str, Choices], ...] = ()  # e.g. (("student", [("3", 0.9), ...]), ("teacher", ...))


@dataclass(frozen=True)
class Strip:
    """A row of tokens, with a label, right or wrong, and a note below."""

    label: str
    tokens: list[Token]
    badge: str = ""
    note: str = ""


def answer_strip(task: Task, problem: Problem, tokens: list[int]) -> Strip:
    """An answer to a problem, token by token, and whether it is right."""
    correct = task.verify(problem, task.decode(tokens)).correct
    label = Markup("<code>{}</code>").format(problem.question)
    return Strip(label, [Token(piece) for piece in task.pieces(tokens)], "right" if correct else "wrong")


def render(page: str, **content: object) -> str:
    """One HTML file that needs no network: style and script are within."""
    form = files.read_text(Path(__file__).with_name("page.html"))
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Template(form, trim_blocks=True, lstrip_blocks=True, **strict).render(page=page, **content)


# ---------------------------------------------------------------------------------------------- ROSD


class Reading(NamedTuple):
    """How a teacher reads a rollout: what it reads before it, and where the mask and the quote lie."""

    prompt: str  # the teacher's
    note: str
    start: int = 0  # k
    quote_end: int = 0  # the token after the quote, which begins at k


def readings(base: GPT, task: Task, rollout: Rollout, peer: Rollout) -> dict[str, Reading]:
    """How each method's teacher reads the rollout; ROSD is left out where the reflection is malformed."""
    written = reflect.write_reflections(base, task, [rollout], [peer.text])[0]
    reflection, found = parse_reflection(written), {}
    k, end = locate(reflection.quote, task.pieces(rollout.tokens)) or (0, 0)
    if reflection.idea is not None:
        prompt = task.teacher_prompt(rollout.problem, idea=reflection.idea)
        note = Markup("The reflector writes <code>{}</code>, so k = {}").format(written, k)
        found["ROSD"] = Reading(prompt, note, k, end)
    prompt = task.teacher_prompt(rollout.problem, solution=peer.text)
    return found | {"SDPO": Reading(prompt, Markup("The teacher holds <code>{}</code>").format(peer.text))}


@torch.no_grad()
def taught_tokens(task: Task, rollout: Rollout, student: GPT, teacher: GPT, reading: Reading) -> list[Token]:
    """The rollout's tokens with m_t, D(pi_S || pi_T) as heat, and the five likeliest of student and teacher."""
    asked = [(student, task.student_prompt(rollout.problem)), (teacher, reading.prompt)]
    pi_S, pi_T = (response_logprobs(model, [task.encode(x)], [rollout.tokens])[0] for model, x in asked)  # (T, V)
    tokens = []
    for t, (text, D) in enumerate(zip(task.pieces(rollout.tokens), divergence(pi_S, pi_T).tolist(), strict=True)):
        heat = (max(0.0, D) / math.log(2)) ** 0.5  # JSD is at most log 2; the root makes small ones visible
        masked, quoted, start = t < reading.start, reading.start <= t < reading.quote_end, t == reading.start > 0
        says = f"t = {t}, m_t = {int(not masked)}, D = {D:.3f}"
        choices = (("student", likeliest(pi_S[t], task)), ("teacher", likeliest(pi_T[t], task)))
        tokens.append(Token(text, heat, masked, quoted, start, says, choices))
    return tokens


def likeliest(logp: Tensor, task: Task, count: int = 5) -> Choices:
    values, index = logp.exp().topk(count)
    return [(text, round(p, 4)) for text, p in zip(task.pieces(index.tolist()), values.tolist(), strict=True)]


def rosd_page(base: GPT, task: Task, students: dict[str, GPT], group: list[Rollout], peer: Rollout) -> str:
    """The page of a group: every rollout as ROSD and as SDPO see it, before and after training."""
    trained = {"before training": {}} | ({"after training": students} if students else {})
    views: dict[str, list[list[Strip]]] = {view: [] for view in trained}
    texts, wrong_first = [rollout.text for rollout in group], sorted(group, key=lambda rollout: rollout.verdict.correct)
    for rollout in {rollout.text: rollout for rollout in wrong_first}.values():
        times, correct = texts.count(rollout.text), rollout.verdict.correct
        count = f", {times} of {len(group)} rollouts" if times > 1 else ""
        read = readings(base, task, rollout, peer)
        for view, models in trained.items():
            row = []
            for name, reading in read.items():
                tokens = taught_tokens(task, rollout, models.get(name, base), base, reading)
                row.append(Strip(name + count, tokens, "right" if correct else "wrong", reading.note))
            views[view].append(row)
    answers = {}
    for name, student in {"before training": base, **students}.items():
        samples = sample_rollouts(student, task, [peer.problem], 6, seeded("xray", peer.problem.question))
        answers[name] = [answer_strip(task, peer.problem, sample.tokens) for sample in samples]
    return render("rosd", question=peer.problem.question, views=views, answers=answers)


# ---------------------------------------------------------------------------------------------- SPD


@torch.no_grad()
def removed(
    model: GPT, tokens: list[int], projectors: dict[Place, Tensor], coordinate: str
) -> dict[Place, list[float]]:
    """How much of every token's key or value the projector takes away: |x - x P| / |x|, by place."""
    shares: dict[Place, list[float]] = {}

    def measure(place: Place, output: Tensor) -> None:
        x = output.flatten(2)[0]  # (T, d)
        shares[place] = ((x - x @ projectors[place].to(x)).norm(dim=1) / x.norm(dim=1)).tolist()

    with hooked(model, list(projectors), coordinate, measure):
        model(torch.tensor([tokens], device=model.device))
    return shares


def spd_page(model: GPT, task: Task, config: Config) -> str:
    """Spectra, what the projector takes away from every token, and the answers with and without it."""
    examples = calibration_set(task, config.calibration_domain or (config.domain,), config, config.seed)
    projectors = calibrate(model, examples, config, config.seed)
    spectra = []
    for place, (s, r) in subspace.spectra(model, examples, config).items():
        says = [f"s_{i + 1} = {value:.3g}" for i, value in enumerate(s.tolist())]
        shown = [Token(bar, dimmed=i >= r, says=says[i]) for i, bar in enumerate(subspace.bars(s))]
        spectra.append(Strip(place_name(place), shown, note=f"r = {r}" if place in projectors else "not projected"))
    problems = task.problems(config.domain, 4, random.Random(f"prompt {config.seed}"), test=True)
    prompts = [task.encode(task.student_prompt(problem)) for problem in problems]
    text, taken = [*prompts[0], *task.encode(problems[0].solution)], {}
    for place, shares in removed(model, text, projectors, config.coordinate).items():
        what = "key" if place[1] == "k" else "value"
        tokens = [
            Token(token, heat=share, says=f"{share:.0%} of its {what} is taken away")
            for token, share in zip(task.pieces(text), shares, strict=True)
        ]
        taken[place_name(place)] = Strip("prompt and golden solution", tokens)
    answers = {}
    for name, active in (("without", {}), ("with", projectors)):
        sampling = {"temperature": config.temperature, "generator": seeded("xray", config.seed)}
        with project_kv(model, active, config.coordinate):
            written = generate(model, prompts, task.max_response, task.stop, **sampling)
        rows = [answer_strip(task, problem, tokens) for problem, tokens in zip(problems, written, strict=True)]
        answers[f"{name} projection"] = rows
    return render("spd", question=problems[0].question, spectra=spectra, removed=taken, answers=answers)


def main() -> None:
    config = parse_config(Config, __doc__)
    task, model = open_task_and_base(config, config.domain)
    path = Path(config.html or ("out/xray.html" if config.page == "rosd" else "out/spd.html"))
    files.make_folder(path.resolve().parent)
    if config.page == "rosd":
        _, peer, group = reflect.example(model, task, config.domain, config.seed)
        paths = {name: Path(config.runs, f"{name.lower()}-seed0", "model.pt") for name in ("ROSD", "SDPO")}
        students = {name: files.load_checkpoint(path).to(model.device) for name, path in paths.items() if path.exists()}
        page = rosd_page(model, task, students, group, peer)
    else:
        page = spd_page(model, task, config)
    files.write_text(path, page)
    print(f"-> {path}")


if __name__ == "__main__":
    run_script(main)
