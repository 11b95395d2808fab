"""The X-ray: what student, teacher and projector do to single tokens, as a web page.

    python -m tools.xray rosd --html out/xray.html      a group of rollouts as ROSD and SDPO see it
    python -m tools.xray spd --html out/spd.html        spectra, what the projector removes, answers with and without

After `python train_rosd.py` the first page also shows both students. It finds them in the folder --runs.
"""

import dataclasses
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
from harness.run import TaskConfig, open_task_and_base, seeded
from losses import divergence
from model import GPT, response_logprobs
from reflect import Pair, Rollout, locate, sample_rollouts, write_reflections
from sampling import generate
from subspace import Site, hooked, project_kv, site_name
from train_spd import SubspaceConfig

Choices = list[tuple[str, float]]  # tokens and their probabilities, likeliest first


@dataclass(frozen=True)
class Config(SubspaceConfig, TaskConfig):
    page: str = option("rosd", "which page", choices=("rosd", "spd"), positional=True)
    html: str = option("", "the file to write; else out/xray.html or out/spd.html")
    runs: str = option("out", "rosd: folder of the trained students")
    domain: str = option("", "domain of the problem and of the calibration set; unset: mix, and exam for spd")
    seed: int = option(6, "which problem")


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


def answer_strip(model: GPT, task: Task, problem: Problem, tokens: list[int]) -> Strip:
    """An answer to a problem, token by token, with the model's likeliest tokens, and whether it is right."""
    correct = task.verify(problem, task.decode(tokens), ended=tokens[-1] in task.stop).correct
    with torch.no_grad():
        logp = response_logprobs(model, [task.encode(task.prompt(problem))], [tokens])[0]  # (T, V)
    shown = []
    for t, piece in enumerate(task.pieces(tokens)):
        says = f"t = {t}, P = {logp[t, tokens[t]].exp():.3f}"
        shown.append(Token(piece, says=says, choices=(("likeliest", likeliest(logp[t], task)),)))
    return Strip(Markup("<code>{}</code>").format(problem.question), shown, "right" if correct else "wrong")


def render(page: str, **content: object) -> str:
    """One HTML file that needs no network: style and script are within."""
    source = files.read_text(Path(__file__).with_name("page.html"))
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Template(source, trim_blocks=True, lstrip_blocks=True, **strict).render(page=page, **content)


# ---------------------------------------------------------------------------------------------- ROSD


class Reading(NamedTuple):
    """How a teacher reads a rollout: what it reads before it, and where the mask and the quote lie."""

    prompt: str  # the teacher's
    note: str
    start: int = 0  # k
    quote_end: int = 0  # the token after the quote, which begins at k


def readings(base: GPT, task: Task, pair: Pair) -> dict[str, Reading]:
    """How each method's teacher reads the rollout; ROSD is left out where the reflection is malformed."""
    (reflection,), (y, peer, _), found = write_reflections(base, task, [pair]), pair, {}
    k, end = locate(reflection.quote, y.pieces) or (0, 0)
    if reflection.idea is not None:
        quoted = Markup("quotes <code>{}</code> and ").format(reflection.quote) if reflection.quote else ""
        note = Markup("The reflector {}writes <code>{}</code>, so k = {}").format(quoted, reflection.idea, k)
        found["ROSD"] = Reading(task.prompt(y.problem, idea=reflection.idea), note, k, end)
    note = Markup("The teacher reads <code>{}</code>").format(peer.text)
    return found | {"SDPO": Reading(task.prompt(y.problem, solution=peer.text), note)}


@torch.no_grad()
def taught_tokens(task: Task, rollout: Rollout, student: GPT, teacher: GPT, reading: Reading) -> list[Token]:
    """The rollout's tokens with m_t, D(pi_S || pi_T) as heat, and the five likeliest of student and teacher."""
    read = [(student, task.prompt(rollout.problem)), (teacher, reading.prompt)]
    pi_S, pi_T = (response_logprobs(model, [task.encode(x)], [rollout.tokens])[0] for model, x in read)  # (T, V)
    tokens, k = [], reading.start
    for t, (text, D) in enumerate(zip(rollout.pieces, divergence(pi_S, pi_T).tolist(), strict=True)):
        heat = (max(0.0, D) / math.log(2)) ** 0.5  # JSD is at most log 2; the root makes small ones visible
        says = f"t = {t}, m_t = {int(t >= k)}, D = {D:.3f}"
        choices = (("student", likeliest(pi_S[t], task)), ("teacher", likeliest(pi_T[t], task)))
        tokens.append(Token(text, heat, t < k, k <= t < reading.quote_end, t == k > 0, says, choices))
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
        times, badge = texts.count(rollout.text), "right" if rollout.verdict.correct else "wrong"
        count = f", {times} of {len(group)} rollouts" if times > 1 else ""
        read = readings(base, task, Pair(rollout, peer, 0.0))
        for view, models in trained.items():
            views[view].append([])
            for name, reading in read.items():
                tokens = taught_tokens(task, rollout, models.get(name, base), base, reading)
                views[view][-1].append(Strip(name + count, tokens, badge, reading.note))
    answers = {}
    for name, student in {"before training": base, **students}.items():
        samples = sample_rollouts(student, task, [peer.problem], 6, seeded("xray", peer.problem.question))
        answers[name] = [answer_strip(student, task, peer.problem, sample.tokens) for sample in samples]
    return render("rosd", question=peer.problem.question, views=views, answers=answers)


# ---------------------------------------------------------------------------------------------- SPD


@torch.no_grad()
def removed(model: GPT, tokens: list[int], projectors: dict[Site, Tensor], coordinate: str) -> dict[Site, list[float]]:
    """How much of every token's key or value the projector takes away: |x - x P| / |x|, by site."""
    shares: dict[Site, list[float]] = {}

    def measure(site: Site, output: Tensor) -> None:
        x = output.flatten(2)[0]  # (T, d)
        shares[site] = ((x - x @ projectors[site].to(x)).norm(dim=1) / x.norm(dim=1)).tolist()

    with hooked(model, list(projectors), coordinate, measure):
        model(torch.tensor([tokens], device=model.device))
    return shares


def spd_page(model: GPT, task: Task, config: Config) -> str:
    """Spectra, what the projector takes away from every token, and the answers with and without it."""
    c, domains = config, config.calibration_domain or (config.domain,)
    examples = subspace.calibration_set(task, domains, c.calibration_size, c.loss, c.seed)
    sites = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    gradients = subspace.capability_gradients(model, examples, sites, c.coordinate, c.calibration_temperature)
    targets = subspace.target_layers(c.layers, model.config.n_layer)
    chosen = {site: G for site, G in gradients.items() if site[0] in targets and site[1] in c.project}
    heads = model.config.n_kv_head if c.coordinate == "head" else 1
    rank = subspace.smallest_rank(c.rank, model, task, domains, chosen, c.coordinate)
    projectors = subspace.make_projectors(chosen, rank, c.subspace, heads, c.seed)
    spectra = []
    for site, G in gradients.items():
        s, r = subspace.principal_directions(G)[0], subspace.choose_rank(rank, G.size(1))
        says = [f"s_{i + 1} = {value:.3g}" for i, value in enumerate(s.tolist())]
        shown = [Token(bar, dimmed=i >= r, says=says[i]) for i, bar in enumerate(subspace.bars(s))]
        spectra.append(Strip(f"{site_name(site)}, {f'r = {r}' if site in projectors else 'not projected'}", shown))
    problems = task.problems(c.domain, 4, random.Random(f"prompt {c.seed}"), test=True)
    prompts = [task.encode(task.prompt(problem)) for problem in problems]
    text, taken = [*prompts[0], *task.encode(problems[0].solution)], {}
    for site, shares in removed(model, text, projectors, c.coordinate).items():
        says = f"of its {'key' if site[1] == 'k' else 'value'} is taken away"
        each = zip(task.pieces(text), shares, strict=True)
        tokens = [Token(token, heat=share, says=f"{share:.0%} {says}") for token, share in each]
        taken[site_name(site)] = Strip("prompt and golden solution", tokens)
    answers = {}
    for name, active in (("without projection", {}), ("with projection", projectors)):
        with project_kv(model, active, c.coordinate):
            written = generate(model, prompts, task.max_response, task.stop, generator=seeded("xray", c.seed))
            answers[name] = [answer_strip(model, task, *each) for each in zip(problems, written, strict=True)]
    return render("spd", question=problems[0].question, spectra=spectra, removed=taken, answers=answers)


def main() -> None:
    config = parse_config(Config, __doc__)
    domain = config.domain or {"rosd": "mix", "spd": "exam"}[config.page] * (config.task == "arithmetic")
    task, model = open_task_and_base(config, domain)
    config = dataclasses.replace(config, domain=domain or task.domains[0])
    path = Path(config.html or ("out/xray.html" if config.page == "rosd" else "out/spd.html"))
    files.make_folder(path.resolve().parent)
    if config.page == "rosd":
        drawn = random.Random(config.seed), seeded("example", config.seed)
        pair, group = reflect.example(model, task, config.domain, *drawn)
        paths = {name: Path(config.runs, f"{name.lower()}-seed0", "model.pt") for name in ("ROSD", "SDPO")}
        students = {name: files.load_checkpoint(path).to(model.device) for name, path in paths.items() if path.exists()}
        page = rosd_page(model, task, students, group, pair.peer)
    else:
        page = spd_page(model, task, config)
    files.write_text(path, page)
    print(f"-> {path}")


if __name__ == "__main__":
    run_script(main)
