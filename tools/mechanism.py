"""What a projection does to a model's decisions, by teacher forcing: nothing is sampled under it.

    python -m tools.mechanism                       measures the bases that are missing, prints and fills in the table
    python -m tools.mechanism --base out/base.pt    measures a base of your own and keeps nothing

For every base, site (layers; keys, values or both; rank) and subspace, on training problems alone: the log-probability
of the right digit at S, and the probability of each nuisance decision of this world, after prefixes of golden solutions
and of the base's own text. The studies' rule: a base's site is where golden solutions have the highest mean log p.

results/spd-mechanism.json has a line a site; a base that it holds, by its checksum, is not measured again.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import subspace
from data import Problem, Task, load_task
from data.chains import CHECK_MARK, STEP, calculate, operations
from harness import files
from harness.cli import markdown_table, option, parse_config, run_script
from harness.run import seeded
from losses import token_logprobs
from model import GPT, generate, pad, response_logprobs
from subspace import Site, hooked, project_kv
from tools import stats
from tools.studies import BASES, CALIBRATION, best_site, mechanism_rows, site_label
from tools.study import base_checksum, base_path

NAME, DOMAIN, PROBLEMS = "spd-mechanism", "exam", 200  # a quarter of the problems with a sampled text as well
PROJECT, RANKS = ("k", "v", "kv"), (30, 35, 40, 45, 50, 60)  # percent
DRAWS, FIRST_DRAW = 3, 100  # random subspaces are not those of the studies, whose seeds count from 0
DIGITS, OPERATORS, END = "0123456789", "+-*", "<|end|>"
Gradients = dict[Site, Tensor]
NUISANCES = ("check", "merge", "wrong", "stop")


@dataclass(frozen=True)
class Config:
    base: str = option("", "a checkpoint to measure; without one, the bases of the studies")
    ranks: tuple[str, ...] = option(tuple(map(str, RANKS)), "ranks to measure it at, percent")


def decisions(question: str, written: list[str]) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """(decision, position, the tokens that take it) of a text, given as its tokens' texts, prefix by prefix.

    'right' and 'wrong' go by plain arithmetic on the step as it is written. 'check' is possible right behind the result
    of every step, 'merge' where a step could take in the next operation, 'stop' where operations are left.

    >>> [(name, t) for name, t, _ in decisions("3+8-5", list("3+8=1;1-5=6;#6")) if name != "wrong"]
    [('merge', 3), ('right', 4), ('check', 5), ('stop', 6), ('right', 10), ('check', 11), ('right', 13)]
    """
    before, line, done, todo = "", "", 0, len(operations(question))
    for t, token in enumerate(written):
        is_check, value = before.endswith(CHECK_MARK), ""
        if STEP.fullmatch(line) and not is_check:
            yield "check", t, (CHECK_MARK,)
        if line == "" and STEP.fullmatch(before) and done < todo:
            yield "stop", t, ("#", END)
        if STEP.fullmatch(line + "=0") and not is_check and done + len(operations(line)) < todo:
            yield "merge", t, tuple(OPERATORS)
        if STEP.fullmatch(line + "0"):
            value = int(line[0])
            for operator, operand in operations(line):
                value = calculate(value, operator, operand)
        elif line == "#" and STEP.fullmatch(before):
            value = before[-1]
        if value != "":
            yield "right", t, (str(value),)
            yield "wrong", t, tuple(digit for digit in DIGITS if digit != str(value))
        if token == ";":
            done += len(operations(line)) if STEP.fullmatch(line.removesuffix(CHECK_MARK)) and not is_check else 0
            before, line = line, ""
        else:
            line += token


@dataclass(frozen=True)
class Probe:
    """Texts to read, and the decisions in them: name -> rows (N,), positions (N,), the tokens that take it (N, V)."""

    prompts: list[list[int]]
    texts: list[list[int]]
    decisions: dict[str, tuple[Tensor, Tensor, Tensor]]


def make_probe(task: Task, problems: list[Problem], texts: list[list[int]]) -> Probe:
    found: dict[str, list[tuple[int, int, Tensor]]] = {}
    for row, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        for name, t, taking in decisions(problem.question, task.pieces(text)):
            tokens = torch.zeros(task.vocab_size)
            tokens[[task.encode(token)[0] for token in taking]] = 1
            found.setdefault(name, []).append((row, t, tokens))
    columns = {name: zip(*entries, strict=True) for name, entries in found.items()}
    indexed = {name: (torch.tensor(r), torch.tensor(t), torch.stack(v)) for name, (r, t, v) in columns.items()}
    return Probe([task.encode(task.prompt(problem)) for problem in problems], texts, indexed)


@torch.no_grad()
def measure(model: GPT, golden: Probe, sampled: Probe) -> dict[str, float]:
    """Means over golden solutions and over decisions; `rest` is log p of a golden solution without the tokens at S."""
    measures = {}
    for probe, kind in ((golden, ""), (sampled, "sampled ")):
        logp = response_logprobs(model, probe.prompts, probe.texts)  # (B, T, V)
        taken = {name: (logp[r, t].exp() * v).sum(dim=-1) for name, (r, t, v) in probe.decisions.items()}  # (N,)
        if probe is golden:
            y = pad(probe.texts, -1)  # (B, T)
            each = (token_logprobs(logp, y.clamp(min=0)) * (y >= 0)).sum(dim=1)  # (B,)
            measures["rest"] = (each.sum() - taken["right"].log().sum()).item() / len(each)
        measures[kind + "right"] = taken["right"].log().mean().item()
        measures |= {kind + name: taken[name].mean().item() for name in NUISANCES}
    return measures


def projectors_at(
    gradients: dict[str, Gradients], name: str, layers: tuple[int, ...], kinds: str, rank: str, seed: int
) -> Gradients:
    """Projectors on a subspace by its name; a random one takes the ranks of the aligned loss's."""
    G = gradients.get(name, gradients["aligned"])
    chosen = {(layer, kind): G[layer, kind] for layer in layers for kind in kinds}
    return subspace.make_projectors(chosen, rank, "random" if name == "random" else "gradient", seed=seed)


@torch.no_grad()
def mark_vectors(model: GPT, prompts: list[list[int]], sites: list[Site]) -> dict[Site, Tensor]:
    """Keys and values where the exam's mark is complete, at the last token but one of a prompt: site -> (prompts, d).

    That token alone is a plus like any other: the first layer does not know yet what stands before it.
    """
    seen: dict[Site, Tensor] = {}
    with hooked(model, sites, "linear", lambda site, output: seen.update({site: output})):
        model.hidden(pad(prompts))
    rows, at = torch.arange(len(prompts)), torch.tensor([len(prompt) - 2 for prompt in prompts])
    return {site: output[rows, at] for site, output in seen.items()}


def condensed_gradients(model: GPT, task: Task, domains: tuple, size: int, loss: str, seed: int = 0) -> Gradients:
    """site -> a matrix (at most d, d) with the singular values and right singular vectors of the gradients G."""
    sites = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    examples, condensed = subspace.calibration_set(task, domains, size, loss, seed), {}
    for site, G in subspace.capability_gradients(model, examples, sites).items():
        s, V = subspace.principal_directions(G)
        condensed[site] = s[:, None] * V.T
    return condensed


def share_inside(x: Tensor, P: Tensor) -> float:
    """|x P|^2 / |x|^2 of vectors x (N, d), on average."""
    return ((x @ P).square().sum(dim=-1) / x.square().sum(dim=-1)).mean().item()


def measure_base(
    model: GPT, task: Task, problems: list[Problem], solutions: list[list[int]],
    ranks: tuple[int, ...] = RANKS, calibration_size: int = 500,
) -> Iterator[dict]:  # fmt: skip
    """A row for the base itself, and one for every site and subspace."""
    golden = make_probe(task, problems, solutions)
    written = generate(model, golden.prompts[::4], task.max_response, task.stop, generator=seeded("mechanism"))
    sampled = make_probe(task, problems[::4], written)
    row = {"layers": "", "project": "", "rank": 100, "subspace": "none", "draw": 0, "mark": 1.0}
    yield row | measure(model, golden, sampled)
    gradients = {
        name: condensed_gradients(model, task, CALIBRATION[name], calibration_size, loss)
        for name, loss in (("aligned", "aligned"), ("full", "full"), ("unmarked", "aligned"))
    }
    marks = mark_vectors(model, golden.prompts, list(gradients["aligned"]))
    subspaces = [(name, 0) for name in gradients] + [("random", draw) for draw in range(DRAWS)]
    layers = range(1, model.config.n_layer + 1)
    wheres = [*itertools.product(map(str, layers), PROJECT), ("paper", "kv")]
    for (spec, kinds), rank in tqdm([*itertools.product(wheres, ranks)], unit="site"):
        chosen = subspace.target_layers(spec, len(layers))
        for name, draw in subspaces:
            projectors = projectors_at(gradients, name, chosen, kinds, f"{rank}%", FIRST_DRAW + draw)
            row = {"layers": spec, "project": kinds, "rank": rank, "subspace": name, "draw": draw}
            row["mark"] = min(share_inside(marks[site], P) for site, P in projectors.items())  # read through both
            with project_kv(model, projectors):
                yield row | measure(model, golden, sampled)


def mechanism_table(rows: list[dict]) -> str:
    """What happens to the decisions of every base, unprojected and at the best site of every subspace."""
    header, lines = ["base", "subspace", "best site", "log p", "right, kept", "check", "check, sampled"], []
    header += ["merge", "mark inside"]
    for base in sorted({row["base"] for row in rows}):
        plain = best_site(rows, base, "none")
        for name in ("none", *CALIBRATION):
            row = best_site(rows, base, name)
            kept = math.exp(row["right"] - plain["right"])
            values = kept, row["check"], row["sampled check"], row["merge"], row["mark"]
            cells = [f"{row['golden']:.1f}", *(f"{100 * value:.0f}" for value in values)]
            lines.append([str(base), name, site_label(row), *cells])
    return f"{markdown_table(header, lines)}\n\n{corner_note(rows)}"


def corner_note(rows: list[dict]) -> str:
    """How many projections keep right digits and remove checks, and what they have in common."""
    plain = {row["base"]: row for row in rows if row["subspace"] == "none"}
    kept = [row for row in rows if row["right"] > plain[row["base"]]["right"] + math.log(0.9)]
    found = [row for row in kept if row["check"] < plain[row["base"]]["check"] / 2]
    counts, marks = [], [0.0, *(row["mark"] for row in found)]
    for name, kinds in {"aligned": ("aligned", "unmarked"), "full": ("full",), "random": ("random",)}.items():
        some, tried = (sum(row["subspace"] in kinds for row in each) for each in (found, rows))
        counts.append(f"{some} of {tried} {name}")
    text = f"At least 90 % of the right digits kept and half of the checks removed: {', '.join(counts)} projections. "
    return f"{text}In all of them at most {100 * max(marks):.0f} % of the mark is inside."


def main() -> None:
    config = parse_config(Config, __doc__)
    torch.set_num_threads(1)
    task = load_task("arithmetic")
    problems = task.problems(DOMAIN, PROBLEMS, random.Random("mechanism"))
    solutions = [[*task.encode(problem.solution), task.end()] for problem in problems]
    S = sum(len(task.decisive(task.pieces(solution))) for solution in solutions) / len(solutions)
    if config.base:
        model = files.load_checkpoint(config.base).eval()
        found = [*measure_base(model, task, problems, solutions, tuple(map(int, config.ranks)))]
        rows = [[config.base, *row.values()] for row in found]
        print(mechanism_table(mechanism_rows({"S": S, "columns": ["base", *found[0]], "rows": rows})))
        return
    path = stats.RESULTS / f"{NAME}.json"
    content = files.read_json(path) if path.exists() else {"bases": {}, "rows": []}
    rows, known = content["rows"], content["bases"]
    for base in BASES:
        if known.get(str(base)) != (checksum := base_checksum(base)):
            known[str(base)], rows = checksum, [row for row in rows if row[0] != base]
            model = files.load_checkpoint(base_path(base)).eval()
            for row in measure_base(model, task, problems, solutions):
                rows.append([base, *(float(f"{x:.3g}") if isinstance(x, float) else x for x in row.values())])
            rows.sort(key=lambda row: row[0])
            stats.write_results(NAME, {"bases": known, "S": S, "columns": ["base", *row]}, "rows", rows)
    stats.publish(NAME, mechanism_table(mechanism_rows()))


if __name__ == "__main__":
    run_script(main, "Stopped. The same command goes on with the base it was at.")
