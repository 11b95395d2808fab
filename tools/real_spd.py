"""SPD's protocol on real weights: the site by a rule on training problems, then fresh problems, greedily.

    python -m tools.real_spd --base FOLDER --task gym:products
    python -m tools.real_spd                fills in the table with what is there

The rule: the layer, keys or values, and rank at which golden solutions of training
problems are likeliest under projection, for each kind of subspace. Then every kind answers the same test problems at
its site. Intervals are Student's t over problems, of paired differences from the base's answers. Writes
results/real-spd.json after every answered set; what that file holds for the same settings is not done again.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import Problem, Task
from evaluate import answer
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base, provenance
from losses import next_token_loss
from model import GPT
from subspace import project_kv
from tools import stats
from tools.selectivity import Gradients, condensed_gradients, projectors_at

PATH = stats.RESULTS / "real-spd.json"
INCIDENTAL = ("task", "device")  # settings that change no answer to a task
DRAWS = 3  # random subspaces at the aligned loss's site; their best site is that of the first draw


@dataclass(frozen=True)
class Config(TaskConfig):
    base: str = option("", "folder of a Hugging Face model; without one, the table of what is there")
    task: str = option("gym:chain_sum:max_digits=1", "what the problems are from; its first domain is taken")
    every: int = option(3, "search every so many layers, and the paper's pair", minimum=1)
    ranks: tuple[str, ...] = option(("50%", "75%"), "ranks to search")
    calibration_size: int = option(100, "calibration examples, N_cal", "20 to 500", minimum=1)
    search: int = option(24, "training problems on which a site is chosen", minimum=1)
    problems: int = option(400, "test problems drawn; equal ones count once", minimum=2)


class Where(NamedTuple):
    layers: tuple[int, ...]
    project: str
    rank: str

    def __str__(self) -> str:
        return f"layer {', '.join(str(layer + 1) for layer in self.layers)} {self.project} {self.rank}"


@torch.no_grad()
def golden_logp(model: GPT, task: Task, problems: list[Problem]) -> float:
    """Mean log-probability of the golden solutions."""
    golden = [(task.encode(task.prompt(x)), [*task.encode(x.solution), task.end()]) for x in problems]
    tokens = sum(len(response) for _, response in golden)
    return -next_token_loss(model, golden).item() * tokens / len(problems)  # the loss is a mean over tokens


def best_site(model: GPT, task: Task, gradients: dict[str, Gradients], kind: str, config: Config) -> Where:
    """Where golden solutions of training problems are likeliest under projection."""
    L, rng = model.config.n_layer, random.Random(f"search {config.seed}")
    problems = task.problems(task.domains[0], config.search, rng)
    layers = [*((layer,) for layer in range(config.every - 1, L, config.every)), (L // 2 - 1, L - 1)]
    found = {}
    for where in tqdm([Where(*each) for each in itertools.product(layers, ("k", "v", "kv"), config.ranks)], desc=kind):
        with project_kv(model, projectors_at(gradients, kind, *where, config.seed)):
            found[where] = golden_logp(model, task, problems)
    return max(found, key=found.get)


def right_answers(model: GPT, task: Task, config: Config) -> str:
    """A digit for every different test problem: 1 where it is answered rightly, greedily."""
    drawn = task.problems(task.domains[0], config.problems, random.Random(f"test {config.seed}"), test=True)
    problems = list({problem.question: problem for problem in drawn}.values())
    _, verdicts = answer(model, task, problems, temperature=0.0)
    return "".join(str(int(verdict.correct)) for verdict in verdicts)


def table(content: dict) -> str:
    lines = []
    for task, rows in content["tasks"].items():
        percent = {name: stats.by_unit(100 * int(digit) for digit in row["right"]) for name, row in rows.items()}
        for name, right in percent.items():
            gain = "" if name == "base" else f"{stats.difference(right, percent['base']):+.1f}"
            accuracy = f"{stats.estimate(right).mean:.1f}"
            lines.append([task, name, rows[name]["site"], str(len(right)), accuracy, gain])
    return markdown_table(["task", "text of", "site", "problems", "right, %", "difference"], lines)


def measure_all(config: Config) -> dict:
    """Answer with every subspace that results/real-spd.json lacks -> its content."""
    task, model = open_task_and_base(config)
    model = model.float()
    settings = files.plain(config) | {"base": Path(config.base).name, "checksum": files.checksum(config.base)}
    settings |= {"device type": model.device.type} if model.device.type != "cpu" else {}  # rounds in its own way
    about = {name: x for name, x in settings.items() if name not in INCIDENTAL}
    content = files.read_json(PATH) if PATH.exists() else {}
    if content.get("settings") != about:
        content = {"settings": about, "commit": provenance(model)["commit"], "tasks": {}}
    rows = content["tasks"].setdefault(config.task, {})

    def measure(name: str, where: Where | None = None, kind: str = "", draw: int = 0) -> None:
        if name not in rows:
            with project_kv(model, projectors_at(gradients, kind, *where, draw) if where else {}):
                rows[name] = {"site": str(where or ""), "right": right_answers(model, task, config)}
            files.write_json(PATH, content)

    examples = task, task.domains[:1], config.calibration_size
    losses = {"aligned": "results", "full": "full"}
    gradients = {name: condensed_gradients(model, *examples, loss, seed=config.seed) for name, loss in losses.items()}
    paper, best = Where((model.config.n_layer // 2 - 1, model.config.n_layer - 1), "kv", "50%"), {}
    measure("base")
    measure("aligned, the paper's site", paper, "aligned")
    for kind in ("aligned", "full", "random"):
        best[kind] = best_site(model, task, gradients, kind, config)
        measure(kind, best[kind], kind, config.seed)
    for draw in range(1, DRAWS):
        measure(f"random at the site of aligned, draw {draw}", best["aligned"], "random", config.seed + draw)
    return content


def main() -> None:
    config = parse_config(Config, __doc__)
    content = measure_all(config) if config.base else files.read_json(PATH)
    stats.publish("real-spd", table(content))


if __name__ == "__main__":
    run_script(main, "Stopped. The same command goes on with what is missing.")
