"""SPD's protocol on real weights: the place by a rule on training problems, then fresh problems, greedily.

    python -m tools.real_spd --base FOLDER --task gym:products
    python -m tools.real_spd --readme       puts the table of what is there between its markers in the READMEs

The rule is that of tools/mechanism.py: the layer, keys or values, and rank at which golden solutions of training
problems are likeliest under projection, for each kind of subspace. Then every kind answers the same test problems at
its place. Intervals are Student's t over problems, of paired differences from the base's own answers. Writes
results/real-spd.json after every answered set; what that file holds for the same settings is not done again.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Task
from data.task import Problem
from evaluate import answer
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base, provenance
from model import GPT, response_logprobs
from subspace import Place, SubspaceConfig, calibration_set, capability_gradients, condense, make_projectors, project_kv
from tools import stats

PATH = stats.RESULTS / "real-spd.json"
INCIDENTAL = ("task", "threads", "device", "batch", "readme")  # settings that change no answer to a task
DRAWS = 3  # random subspaces at the aligned loss's place; their best place is that of the first draw


@dataclass(frozen=True)
class Config(TaskConfig):
    base: str = option("", "folder of a Hugging Face model; without one, the table of what is there")
    task: str = option("gym:chain_sum:max_digits=1", "what the problems are from; its first domain is taken")
    every: int = option(3, "search every so many layers, and the paper's pair", minimum=1)
    ranks: tuple[str, ...] = option(("50%", "75%"), "ranks to search")
    calibration_size: int = option(100, "calibration examples, N_cal", "20 to 500", minimum=1)
    search: int = option(24, "training problems on which a place is chosen", minimum=1)
    problems: int = option(400, "test problems drawn; equal ones count once", minimum=2)
    batch: int = option(16, "responses in memory at once", minimum=1)
    readme: bool = option(False, "put the table into the READMEs")


Gradients = dict[Place, Tensor]


def all_gradients(model: GPT, task: Task, config: Config) -> dict[str, Gradients]:
    """loss -> the condensed gradients at the keys and values of every layer."""
    places = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    found = {}
    for loss in ("aligned", "full"):
        settings = SubspaceConfig(loss=loss, calibration_size=config.calibration_size)
        examples = calibration_set(task, task.domains[:1], settings, config.seed)
        rows = capability_gradients(model, examples, places, batch=config.batch)
        found[loss] = {place: condense(G) for place, G in rows.items()}
    model.requires_grad_(False)
    return found


def projectors(model: GPT, gradients: dict[str, Gradients], kind: str, place: list, draw: int) -> dict[Place, Tensor]:
    layers, project, rank = place
    chosen = [(layer, each) for layer in layers for each in project]
    G = {each: gradients["full" if kind == "full" else "aligned"][each] for each in chosen}
    settings = SubspaceConfig(rank=rank, subspace="random" if kind == "random" else "gradient")
    return make_projectors(G, settings, model.config.n_kv_head, draw)


@torch.no_grad()
def golden_logp(model: GPT, task: Task, problems: list[Problem]) -> float:
    """Mean log-probability of the golden solutions."""
    prompts = [task.encode(task.student_prompt(problem)) for problem in problems]
    responses = [[*task.encode(problem.solution), task.end()] for problem in problems]
    logp = response_logprobs(model, prompts, responses)  # (B, T, V)
    return sum(p[range(len(y)), y].sum().item() for p, y in zip(logp, responses, strict=True)) / len(problems)


def choose_place(model: GPT, task: Task, gradients: dict[str, Gradients], kind: str, config: Config) -> tuple:
    """(log p of golden solutions, place) of the best place of a kind of subspace."""
    L, rng = model.config.n_layer, random.Random(f"search {config.seed}")
    problems = task.problems(task.domains[0], config.search, rng)
    layers = [*([layer] for layer in range(config.every - 1, L, config.every)), [L // 2 - 1, L - 1]]
    found = []
    for place in tqdm([*itertools.product(layers, ("k", "v", "kv"), config.ranks)], desc=f"places, {kind}"):
        with project_kv(model, projectors(model, gradients, kind, place, config.seed)):
            found.append((golden_logp(model, task, problems), list(place)))
    return max(found, key=lambda each: each[0])


def right_answers(model: GPT, task: Task, config: Config) -> str:
    """A digit for every different test problem: 1 where it is answered rightly, greedily."""
    drawn = task.problems(task.domains[0], config.problems, random.Random(f"test {config.seed}"), test=True)
    problems = list({problem.question: problem for problem in drawn}.values())
    _, verdicts = answer(model, task, problems, temperature=0.0, at_once=config.batch)
    return "".join(str(int(verdict.correct)) for verdict in verdicts)


def table(content: dict) -> str:
    lines = []
    for task, rows in content["tasks"].items():
        base = {(i, 0): x for i, x in enumerate(map(int, rows["base"]["right"]))}
        for name, row in rows.items():
            right = {(i, 0): x for i, x in enumerate(map(int, row["right"]))}
            paired = stats.difference(right, base)
            gain = "" if name == "base" else f"{100 * paired.mean:+.1f} ± {100 * paired.half:.1f}"
            accuracy = f"{100 * stats.estimate(right).mean:.1f}"
            lines.append([task, name, row["place"], str(len(right)), accuracy, gain])
    return markdown_table(["task", "text of", "place", "problems", "right, %", "difference"], lines)


def show(place: list) -> str:
    layers, project, rank = place
    return f"layer {', '.join(str(layer + 1) for layer in layers)} {project} {rank}"


def measure_all(config: Config) -> dict:
    """Answer with every subspace that results/real-spd.json lacks -> its content."""
    task, model = open_task_and_base(config)
    model = model.float()
    settings = files.plain(config) | {"base": Path(config.base).name, "checksum": files.checksum(config.base)}
    settings["system"] = task.tokenizer.system
    settings |= {"device type": model.device.type} if model.device.type != "cpu" else {}  # rounds in its own way
    about = {name: x for name, x in settings.items() if name not in INCIDENTAL}
    content = files.read_json(PATH) if PATH.exists() else {}
    if content.get("settings") != about:
        content = {"settings": about, "commit": provenance()["commit"], "tasks": {}}
    rows = content["tasks"].setdefault(config.task, {})

    def measure(name: str, place: str, found: dict[Place, Tensor]) -> None:
        if name not in rows:
            with project_kv(model, found):
                rows[name] = {"place": place, "right": right_answers(model, task, config)}
            files.write_text(PATH, json.dumps(content, indent=1) + "\n")

    measure("base", "", {})
    gradients = all_gradients(model, task, config)
    half, L = "50%", model.config.n_layer
    paper = [[L // 2 - 1, L - 1], "kv", half]
    measure("aligned, the paper's place", show(paper), projectors(model, gradients, "aligned", paper, 0))
    best = {}
    for kind in ("aligned", "full", "random"):
        best[kind] = choose_place(model, task, gradients, kind, config)[1]
        measure(kind, show(best[kind]), projectors(model, gradients, kind, best[kind], config.seed))
    for draw in range(1, DRAWS):
        found = projectors(model, gradients, "random", best["aligned"], config.seed + draw)
        measure(f"random at the place of aligned, draw {draw}", show(best["aligned"]), found)
    return content


def main() -> None:
    config = parse_config(Config, __doc__)
    content = measure_all(config) if config.base else files.read_json(PATH)
    print(table(content))
    if config.readme:
        stats.fill_readme("real-spd", lambda *_: table(content))


if __name__ == "__main__":
    run_script(main, "Stopped. The same command goes on with what is missing.")
