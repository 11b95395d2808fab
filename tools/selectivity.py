"""What a projection keeps: right digits, whole steps of golden solutions, and a habit. Nothing is sampled under it.

    python -m tools.selectivity                          measures the bases that are missing, fills in the tables
    python -m tools.selectivity --base out/base.pt       measures a base of your own and keeps nothing
    python -m tools.selectivity --base FOLDER --task steps --shots 4

Golden solutions of training problems are read, with keys and values projected into a subspace:

- right   log p of the tokens at S, the results
- step    log p of a whole line of the solution: what is copied, and the result
- check   the probability that a step is doubted and written again: the habit that the mark of an exam calls for
- mark    how much of what tells a nervous mark from a calm one lies inside the subspace (share of the squared length)
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import subspace
from data import Problem, Task
from data.chains import CALM, CHECK_MARK, NERVOUS, STEP
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import TaskConfig, open_task_and_base
from losses import token_logprobs
from model import GPT, pad, response_logprobs
from subspace import Site, hooked, project_kv
from tools import stats
from tools.studies import BASES
from tools.study import base_checksum, base_path

NAME, PROBLEMS = "selectivity", 100
RANKS = (20, 35, 50, 65, 80)  # percent
DRAWS = 10  # of a random subspace
SUBSPACES = {  # name: the loss and the domains of its calibration
    "aligned": ("aligned", ("exam",)),
    "steps": ("steps", ("exam",)),
    "full": ("full", ("exam",)),
    "without the mark": ("aligned", ("mix", "add", "sub", "mul", "long")),
}
COLUMNS = {"right": "right digits", "step": "whole steps", "check": "checks", "mark": "mark inside"}
Gradients = dict[Site, Tensor]


@dataclass(frozen=True)
class Config(TaskConfig):
    base: str = option("", "a base to measure; without one, the bases of the studies")
    task: str = option("exams", "the task; its first domain is taken")
    ranks: tuple[str, ...] = option(tuple(map(str, RANKS)), "ranks to measure it at, percent")
    calibration_size: int = option(500, "calibration examples, N_cal", "20 to 500", minimum=1)


def sites_of(n_layer: int) -> dict[str, tuple[str, str]]:
    """Where is projected: the paper's sites, and the values of one layer of the second half -> layers, kinds.

    >>> list(sites_of(4))
    ["the paper's sites", 'layer 2, values', 'layer 3, values', 'layer 4, values']
    """
    single = sorted({max(1, n_layer // 2), max(1, 3 * n_layer // 4), n_layer})
    return {"the paper's sites": ("paper", "kv")} | {f"layer {n}, values": (str(n), "v") for n in single}


def condensed_gradients(model: GPT, task: Task, domains: tuple, size: int, loss: str, seed: int = 0) -> Gradients:
    """site -> a matrix (at most d, d) with the singular values and right singular vectors of the gradients G."""
    sites = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    examples, condensed = subspace.calibration_set(task, domains, size, loss, seed), {}
    for site, G in subspace.capability_gradients(model, examples, sites).items():
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


def lines_of(written: list[str]) -> list[range]:
    """The tokens of every line of a solution, without the ';', the line break or the stop token that follows it.

    >>> lines_of(list("3+8=1;#1") + ["<|end|>"])
    [range(0, 5), range(6, 8)]
    """
    ends = [t for t, token in enumerate(written) if token in (";", "\n")] + [len(written) - 1]
    return [range(start, end) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


@torch.no_grad()
def measure(model: GPT, task: Task, problems: list[Problem]) -> dict[str, float]:
    """Mean log p of the results and of the lines of golden solutions, and the mean probability of a check, if any."""
    prompts = [task.encode(task.prompt(problem)) for problem in problems]
    solutions = [[*task.encode(problem.solution), task.end()] for problem in problems]
    logp = response_logprobs(model, prompts, solutions)  # (B, T, V)
    taken = token_logprobs(logp, pad(solutions).to(logp.device))  # (B, T)
    found: dict[str, list[float]] = {"right": [], "step": [], "check": []}
    for i, solution in enumerate(solutions):
        written = task.pieces(solution)
        found["right"] += taken[i, task.decisive(written)].tolist()
        for line in lines_of(written):
            found["step"].append(taken[i, line.start : line.stop].sum().item())
            if STEP.fullmatch("".join(written[line.start : line.stop])) and written[line.stop] == ";":
                found["check"].append(logp[i, line.stop, task.encode(CHECK_MARK)[0]].exp().item())
    return {name: sum(values) / len(values) for name, values in found.items() if values}


@torch.no_grad()
def mark_vectors(model: GPT, task: Task, problems: list[Problem]) -> Gradients:
    """site -> keys or values at the end of a nervous mark minus those of calm ones, (problems * 2, d)."""
    sites, seen = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"], {}
    questions = [problem.question.removesuffix(NERVOUS) for problem in problems]
    for mark in (NERVOUS, *CALM):
        prompts = [task.encode(task.prompt(Problem(question + mark, ""))) for question in questions]
        rows, at = torch.arange(len(prompts)), torch.tensor([len(prompt) - 2 for prompt in prompts])
        found: Gradients = {}
        with hooked(model, sites, "linear", lambda site, output, found=found: found.update({site: output})):
            model.hidden(pad(prompts))
        seen[mark] = {site: output[rows, at].clone() for site, output in found.items()}
    return {site: torch.cat([seen[NERVOUS][site] - seen[calm][site] for calm in CALM]) for site in sites}


def share_inside(x: Tensor, P: Tensor) -> float:
    """|x P|^2 / |x|^2 of vectors x (N, d), on average."""
    return ((x @ P).square().sum(dim=-1) / x.square().sum(dim=-1).clamp(min=1e-12)).mean().item()


def measure_base(model: GPT, task: Task, config: Config) -> Iterator[dict]:
    """A row for the base itself, and one for every choice of sites, rank and subspace."""
    problems = task.problems(task.domains[0], PROBLEMS, random.Random("selectivity"))
    marked = task.domains[0] == "exam"  # other tasks have neither checks nor marks
    calibrations = {
        name: (loss, domains if marked else task.domains[:1]) for name, (loss, domains) in SUBSPACES.items()
    }
    if not marked:
        del calibrations["without the mark"]
    row = {"where": "", "rank": 100, "subspace": "none", "draw": 0}
    yield row | measure(model, task, problems) | ({"mark": 1.0} if marked else {})
    size = config.calibration_size
    gradients = {
        name: condensed_gradients(model, task, domains, size, loss) for name, (loss, domains) in calibrations.items()
    }
    marks = mark_vectors(model, task, problems) if marked else {}
    draws = [(name, 0) for name in gradients] + [("random", draw) for draw in range(DRAWS)]
    choices = sites_of(model.config.n_layer)
    for where, rank, (name, draw) in tqdm([*itertools.product(choices, map(int, config.ranks), draws)], unit="row"):
        spec, kinds = choices[where]
        layers = subspace.target_layers(spec, model.config.n_layer)
        P = projectors_at(gradients, name, layers, kinds, f"{rank}%", 100 + draw)
        row = {"where": where, "rank": rank, "subspace": name, "draw": draw}
        row |= {"mark": sum(share_inside(marks[site], P[site]) for site in P) / len(P)} if marked else {}
        with project_kv(model, P):
            yield row | measure(model, task, problems)


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


def table(rows: list[dict], ranks: tuple[int, ...] = (35, 50)) -> str:
    """What is left under projection, at some ranks of all sites and subspaces, as shares of the base's own."""
    columns = [column for column in COLUMNS if column in rows[0]]
    header, lines = ["sites", "rank", "subspace", *map(COLUMNS.get, columns)], []
    for where, rank, name in itertools.product(choices_in(rows), ranks, (*SUBSPACES, "random")):
        values = [kept(rows, where, name, column).get(rank) for column in columns]
        if values[0]:
            percent = [stats.estimate({key: 100 * x for key, x in each.items()}) for each in values]
            lines.append([where, f"{rank} %", name, *(f"{each:.0f}" for each in percent)])
    return markdown_table(header, lines)


def table_of_bases(rows: list[dict], name: str = "aligned", rank: int = 35) -> str:
    """The checks that are left on every base, in percent: few where a projected layer reads the mark."""
    left = {where: kept(rows, where, name, "check").get(rank, {}) for where in choices_in(rows)}
    header = [f"checks left, {name}, {rank} %", *(f"base {row['base']}" for row in rows if row["subspace"] == "none")]
    lines = [[where, *(f"{100 * share:.0f}" for share in shares.values())] for where, shares in left.items() if shares]
    return markdown_table(header, lines)


def main() -> None:
    config = parse_config(Config, __doc__)
    measured = partial(measure_base, config=config)
    if config.base:
        task, model = open_task_and_base(config)
        rows = [{"base": 0} | row for row in measured(model, task)]
        print(table(rows, tuple(map(int, config.ranks))))
        return
    path = stats.RESULTS / f"{NAME}.json"
    content = files.read_json(path) if path.exists() else {"bases": {}, "rows": []}
    rows, known = content["rows"], content["bases"]
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
