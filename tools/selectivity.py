"""What a projection keeps: right digits, whole steps of golden solutions, and a habit. Nothing is sampled under it.

    python -m tools.selectivity                          measures the bases that are missing, fills in the tables
    python -m tools.selectivity --base out/base.pt       measures a base of your own and keeps nothing
    python -m tools.selectivity --base smollm2 --task steps --shots 4 --problems 40 --calibration-size 60 --draws 3

Golden solutions of training problems are read, with keys and values projected into a subspace:

- right   log p of the tokens at S, the results
- step    log p of a whole line of the solution: what is copied, and the result
- check   the probability that a step is doubted and written again: the habit that the mark of an exam calls for
- mark    how much of what tells a nervous mark from a calm one lies inside the subspace (share of the squared length)
"""

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import subspace
from data import Problem, Task
from data.chains import EXAM_MARK
from evaluate import golden_likelihoods
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base
from model import GPT, pad
from subspace import Site, hooked, project_kv
from tools import stats
from tools.studies import BASES
from tools.study import base_checksum, base_path

NAME = "selectivity"
RANKS = (8, 12, 16, 20, 25, 35, 50)  # percent
PAPER, ALSO_KEYS, ALL_LAYERS = "the paper's layers, values", "the paper's layers, values and keys", "all layers, values"
SITES = {PAPER: ("paper", "v"), ALSO_KEYS: ("paper", "kv"), ALL_LAYERS: ("all", "v")}
UNMARKED = ("mix", "add", "sub", "mul", "long")
SUBSPACES = {  # name: loss, temperature and domains of its calibration
    "aligned": ("steps", subspace.TEMPERATURE, ("exam",)),
    "full": ("full", subspace.TEMPERATURE, ("exam",)),
    "aligned, on results alone": ("results", subspace.TEMPERATURE, ("exam",)),
    "aligned, at temperature 1": ("steps", 1.0, ("exam",)),
    "full, at temperature 1": ("full", 1.0, ("exam",)),
    "aligned, without the mark": ("steps", subspace.TEMPERATURE, UNMARKED),
    "full, without the mark": ("full", subspace.TEMPERATURE, UNMARKED),
}
UNREAD = "without the mark's directions"
COLUMNS = {"right": "right digits", "step": "whole steps", "check": "checks", "mark": "mark inside"}
Gradients = dict[Site, Tensor]


@dataclass(frozen=True)
class Config(TaskConfig):
    base: str = option("", "a base to measure; without one, the bases of the studies")
    task: str = option("exams", "the task; its first domain is taken")
    ranks: tuple[str, ...] = option(tuple(map(str, RANKS)), "ranks to measure it at, percent")
    calibration_size: int = option(500, "calibration examples, N_cal", "20 to 500", minimum=1)
    problems: int = option(100, "golden solutions to read", minimum=1)
    draws: int = option(10, "draws of the random subspace", minimum=1)


def condensed_gradients(
    model: GPT, task: Task, domains: tuple, size: int, loss: str, temperature: float = 1.0, seed: int = 0
) -> Gradients:
    """site -> a matrix (at most d, d) with the singular values and right singular vectors of the gradients G."""
    sites = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    examples, condensed = subspace.calibration_set(task, domains, size, loss, seed), {}
    for site, G in subspace.capability_gradients(model, examples, sites, temperature=temperature).items():
        s, V = subspace.principal_directions(G)
        condensed[site] = s[:, None] * V.T
    return condensed


def projectors_at(
    gradients: dict[str, Gradients], name: str, layers: tuple[int, ...], kinds: str, rank: str, seed: int
) -> Gradients:
    """Projectors on a subspace by its name; a random one takes the ranks of the aligned loss's."""
    G = gradients.get(name, gradients["aligned"])
    chosen = {(layer, kind): G[layer, kind] for layer in layers for kind in kinds}
    return subspace.make_projectors(chosen, rank, "random" if name == "random" else "gradient", seed=seed)


@torch.no_grad()
def mark_vectors(model: GPT, task: Task, problems: list[Problem]) -> Gradients:
    """site -> keys or values of operands behind a nervous mark minus the same before a calm one, (N, d)."""
    sites, seen = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"], []
    chains = [problem.question.replace(EXAM_MARK, "") for problem in problems]
    for form in (rf"\1{EXAM_MARK}\2", rf"\1\2{EXAM_MARK}"):
        texts = [task.prompt(Problem(re.sub(r"([+\-*])(\d)", form, chain), "")) for chain in chains]
        pieces = [task.pieces(task.encode(text)) for text in texts]
        operands = [
            (i, at) for i, text in enumerate(pieces) for at, token in enumerate(text) if token.isdigit() and at > 1
        ]
        found: Gradients = {}
        with hooked(model, sites, "linear", lambda site, output, found=found: found.update({site: output})):
            model.hidden(pad([task.encode(text) for text in texts]))
        i, at = torch.tensor(operands).T
        seen.append({site: output[i, at] for site, output in found.items()})
    nervous, calm = seen
    return {site: nervous[site] - calm[site] for site in sites}


def share_inside(x: Tensor, P: Tensor) -> float:
    """|x P|^2 / |x|^2 of all vectors x (N, d) together."""
    return ((x @ P).square().sum() / x.square().sum()).item()


def without(x: Tensor) -> Tensor:
    """I - V V^T, V the main directions of vectors x (N, d): at most four."""
    s, V = subspace.principal_directions(x)
    return torch.eye(len(V)) - subspace.projector(V, min(4, int((s > 1e-3 * s[0]).sum())))


def measure_base(model: GPT, task: Task, config: Config) -> Iterator[dict]:
    """Rows for the base itself, without the mark at some sites, and for every choice of sites, rank and subspace."""
    problems = task.problems(task.domains[0], config.problems, random.Random("selectivity"))
    marked = task.domains[0] == "exam"  # other tasks have neither checks nor marks
    chosen = {name: of_it for name, of_it in SUBSPACES.items() if marked or of_it[2] != UNMARKED}
    row = {"where": "", "rank": 100, "subspace": "none", "draw": 0}
    yield row | golden_likelihoods(model, task, problems) | ({"mark": 1.0} if marked else {})
    size = config.calibration_size
    gradients = {
        name: condensed_gradients(model, task, domains if marked else task.domains[:1], size, loss, temperature)
        for name, (loss, temperature, domains) in chosen.items()
    }
    marks = mark_vectors(model, task, problems) if marked else {}
    read = {f"layer {layer + 1}": [(layer, kind) for kind in "kv"] for layer in range(model.config.n_layer)}
    read[PAPER] = [(layer, "v") for layer in subspace.target_layers("paper", model.config.n_layer)]
    for where, sites in read.items() if marked else ():
        with project_kv(model, {site: without(marks[site]) for site in sites}):
            row = {"where": where, "rank": 0, "subspace": UNREAD, "draw": 0, "mark": 0.0}
            yield row | golden_likelihoods(model, task, problems)
    draws = [(name, 0) for name in gradients] + [("random", draw) for draw in range(config.draws)]
    for where, rank, (name, draw) in tqdm([*itertools.product(SITES, map(int, config.ranks), draws)], unit="row"):
        spec, kinds = SITES[where]
        layers = subspace.target_layers(spec, model.config.n_layer)
        P = projectors_at(gradients, name, layers, kinds, f"{rank}%", 100 + draw)
        row = {"where": where, "rank": rank, "subspace": name, "draw": draw}
        known = [site for site in P if marked and marks[site].any()]  # in layer 1 a token is only itself
        row |= {"mark": sum(share_inside(marks[site], P[site]) for site in known) / len(known)} if marked else {}
        with project_kv(model, P):
            yield row | golden_likelihoods(model, task, problems)


def kept(rows: list[dict], where: str, name: str, column: str) -> dict[int, stats.Values]:
    """rank -> (base, draw) -> what is left of right digits, steps, checks or the mark, as a share of the base's own."""
    plain, found = {row["base"]: row for row in rows if row["subspace"] == "none"}, {}
    for row in rows:
        if (row["where"], row["subspace"]) == (where, name):
            after, before = row[column], plain[row["base"]][column]
            share = after / before if column in ("check", "mark") else math.exp(after - before)
            found.setdefault(row["rank"], {})[row["base"], row["draw"]] = share
    return found


def choices_in(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["where"] for row in rows if row["where"]))


def table(rows: list[dict], ranks: tuple[int, ...] = (16,)) -> str:
    """What is left under projection, at some ranks of all sites and subspaces, as shares of the base's own."""
    columns = [column for column in COLUMNS if column in rows[0]]
    header, lines = ["sites", "rank", "subspace", *map(COLUMNS.get, columns)], []
    for where, rank, name in itertools.product(choices_in(rows), ranks, (*SUBSPACES, "random")):
        values = [kept(rows, where, name, column).get(rank) for column in columns]
        if values[0]:
            percent = [stats.estimate({key: 100 * x for key, x in each.items()}) for each in values]
            lines.append([where, f"{rank} %", name, *(f"{each:.0f}" for each in percent)])
    return markdown_table(header, lines)


def table_of_bases(rows: list[dict], name: str = "aligned", rank: int = 16) -> str:
    """The checks left on every base, in percent, without what tells the marks apart at one layer, and under projection.

    The layer that leaves few is where the base reads the mark.
    """
    places = [(f"{where} {UNREAD}", where, UNREAD, 0) for where in choices_in(rows) if where not in SITES]
    places += [(f"{PAPER}, {UNREAD}", PAPER, UNREAD, 0)]
    places += [(f"{where}, {name}, {rank} %", where, name, rank) for where in SITES]
    header = ["checks left, %", *(f"base {row['base']}" for row in rows if row["subspace"] == "none")]
    lines = []
    for title, where, subspace_name, at in places:
        shares = kept(rows, where, subspace_name, "check").get(at, {})
        lines += [[title, *(f"{100 * share:.0f}" for share in shares.values())]] * bool(shares)
    return markdown_table(header, lines)


def main() -> None:
    config = parse_config(Config, __doc__)
    measured = partial(measure_base, config=config)
    if config.base:
        task, model = open_task_and_base(config)
        rows = [{"base": 0} | row for row in measured(model, task)]
        print(table(rows, tuple(map(int, config.ranks))))
        if "check" in rows[0]:
            print(f"\n{table_of_bases(rows, rank=int(config.ranks[0]))}")
        return
    path = stats.RESULTS / f"{NAME}.json"
    content = files.read_json(path) if path.exists() else {"bases": {}, "rows": []}
    known = {base: checksum for base, checksum in content["bases"].items() if int(base) in BASES}
    rows = [row for row in content["rows"] if row["base"] in BASES]
    for base in BASES:
        if known.get(str(base)) != (checksum := base_checksum(base)):
            known[str(base)], rows = checksum, [row for row in rows if row["base"] != base]
            task, model = open_task_and_base(Config(base=base_path(base), task=config.task))
            for row in measured(model, task):
                rows.append(
                    {"base": base} | {n: float(f"{x:.3g}") if isinstance(x, float) else x for n, x in row.items()}
                )
            stats.write_results(NAME, {"bases": known}, "rows", rows)
    stats.publish(NAME, table(rows))
    stats.publish(f"{NAME}-bases", table_of_bases(rows))


if __name__ == "__main__":
    run_script(main, "Stopped. The same command goes on with the base it was at.")
