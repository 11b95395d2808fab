"""Means, 95 % intervals and tables of studies.

A study trains every variant from several bases and with several seeds. Runs from one base resemble each other, so a
base counts once: its seeds are averaged, and Student's t interval is taken over the bases. A variant is compared with
another one run by run, on the same base and seed, and the interval is that of the paired difference.

>>> runs = {(0, 0): 0.50, (0, 1): 0.60, (1, 0): 0.65, (1, 1): 0.75}  # (base, seed): value
>>> estimate(runs).mean, round(estimate(runs).half, 2)  # of two bases at 0.55 and 0.70
(0.625, 0.95)
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from errors import UserError
from evaluate import elsewhere
from harness import files
from harness.cli import markdown_table

RESULTS = files.ROOT / "results"
Values = dict[tuple[int, int], float]  # (base, seed) -> value


@lru_cache
def t_quantile(degrees: int) -> float:
    """The t that Student's distribution exceeds in absolute value with probability 5 %.

    With t = sqrt(n) tan(angle) its density is proportional to cos(angle)^(n - 1).
    """
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))  # the trapezoid rule
    return float(np.sqrt(degrees) * np.tan(np.interp(0.95, below / below[-1], angle)))


@dataclass(frozen=True)
class Estimate:
    mean: float
    half: float | None  # half of the 95 % interval; None where there is but one value

    def __format__(self, digits: str) -> str:
        """E.g. '91.2 ± 1.3'."""
        return f"{self.mean:{digits}}" + ("" if self.half is None else f" ± {self.half:{digits.removeprefix('+')}}")

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def by_unit(values: Iterable[float]) -> Values:
    """Values that belong to no base, such as those of problems: each counts once."""
    return {(i, 0): value for i, value in enumerate(values)}


def estimate(values: Values) -> Estimate:
    """Mean and t interval over bases, each the mean of its seeds; over the seeds where there is one base."""
    bases = {base for base, _ in values}
    units = [np.mean([x for (b, _), x in values.items() if b == base]) for base in bases]
    units = units if len(bases) > 1 else list(values.values())
    n, mean = len(units), float(np.mean(units))
    return Estimate(mean, t_quantile(n - 1) * float(np.std(units, ddof=1)) / n**0.5 if n > 1 else None)


def difference(values: Values, reference: Values) -> Estimate | None:
    """The paired difference, over the bases and seeds that both have; None where there is none."""
    both = {key: value - reference[key] for key, value in values.items() if key in reference}
    return estimate(both) if both else None


# ---------------------------------------------------------------------------------------------- results files


def read_results(name: str, command: str = "") -> dict:
    """The content of results/<name>.json; UserError names the command that makes it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise UserError(f"there is no results/{name}.json; `python -m tools.{command or f'study {name}'}` makes it")
    return files.read_json(path)


def write_results(name: str, head: dict, key: str, rows: list) -> dict:
    """Write results/<name>.json, the head and one line for every row -> its content."""
    lines = ",\n".join(json.dumps(files.plain(row), separators=(",", ":"), allow_nan=False) for row in rows)
    text = json.dumps(files.plain(head), indent=1).removesuffix("\n}")
    files.write_text(files.make_folder(RESULTS) / f"{name}.json", f'{text},\n "{key}": [\n{lines}\n ]\n}}\n')
    return head | {key: rows}


def figures(run: dict, when: str) -> dict[str, float]:
    """The columns of a run's model before or after training: accuracy in and out of domain, habits, unfinished answers.

    For SPD also the accuracy of the text that the base writes by itself, or that the student trains on, and the gain;
    where the run kept it, the share of groups of training problems with a right rollout, in the first or last steps.
    """
    scores, home, found = run[when] or {}, run["domain"], {}
    if scores:
        away = {domain: score["mean"] for domain, score in scores.items() if domain != home}
        found = {"in domain": scores[home]["mean"], **elsewhere(scores, home), **away}
        found |= {name: value for name, value in scores[home].items() if name != "mean"}
    if "base_text" in run:
        text = run["base_text" if when == "before" else "generation"]["mean"]
        found |= {"text": text, "gain": text - run["base_text"]["mean"]}
    if solved := run["curve"].get("solved"):
        steps = solved[:1] if when == "before" else solved[-5:]  # the first step's rollouts are the base's
        found["pass@G"] = sum(steps) / len(steps)
    return found


def values_of(runs: list[dict], when: str) -> dict[str, Values]:
    """column -> (base, seed) -> value in percent, before or after training."""
    columns: dict[str, Values] = {}
    for run in runs:
        for column, value in figures(run, when).items():
            percent = 1 if column == "length" else 100  # a length is in characters
            columns.setdefault(column, {})[run["base"], run["seed"]] = percent * value
    return columns


def by_variant(results: dict) -> dict[str, list[dict]]:
    runs = results["runs"]
    return {name: [run for run in runs if run["variant"] == name] for name in dict.fromkeys(r["variant"] for r in runs)}


def table(results: dict, differences: bool = False, columns: list[str] | None = None) -> str:
    """Markdown of means, or of paired differences; with the flags where no columns are chosen; and how to read it.

    Every training domain has a row for the base and one for every variant. The reference of a row is the first variant
    of the same training domain, or, in a study whose reference is 'base', what each run started from.
    """
    if not results["runs"]:
        return "No run is finished."
    homes = {run["domain"] for run in results["runs"]}
    rows: dict[str, tuple[dict[str, Values], dict[str, Values]]] = {}
    first: dict[str, dict[str, Values]] = {}
    flags: dict[str, str] = {}
    for variant, runs in by_variant(results).items():
        home, base, values = runs[0]["domain"], values_of(runs, "before"), values_of(runs, "after")
        reference = base if results["reference"] == "base" else first.setdefault(home, values)
        rows.setdefault("base" if len(homes) == 1 else f"base, {home}", (base, reference))
        rows[variant], flags[variant] = (values, reference), f"`{runs[0]['flags']}`"
    seen = dict.fromkeys(name for values, _ in rows.values() for name in values)
    order = dict.fromkeys(
        ["in domain", "elsewhere", "other exams", "unmarked", *(results["runs"][0]["after"] or {}), *seen]
    )
    names = columns or [name for name in order if name in seen]
    header, lines = ["difference, points" if differences else "%", *names, *["flags"] * (not columns)], []
    for label, (values, reference) in rows.items():
        cells = [cell(values.get(name, {}), reference.get(name, {}), differences) for name in names]
        lines.append([label, *cells, flags.get(label, "")][: len(header)])
    return f"{markdown_table(header, lines)}\n\n{note(results)}"


def cell(values: Values, reference: Values, differences: bool) -> str:
    """E.g. '91.2 ± 1.3 *', or as a difference '+3.4 ± 0.5 *'; '' without values."""
    paired = difference(values, reference)
    shown = paired if differences else values and estimate(values)
    if not shown:
        return ""
    return f"{shown:{'+' if differences else ''}.1f}" + (" *" if paired and paired.excludes_zero else "")


def note(results: dict) -> str:
    """What the intervals of a table are over, what `*` means, and which runs are missing."""
    runs = results["runs"]
    bases, seeds = {run["base"] for run in runs}, {run["seed"] for run in runs}
    each = "1 seed each" if len(seeds) == 1 else f"{len(seeds)} seeds averaged within each"
    over = f"{len(bases)} bases, {each}" if len(bases) > 1 else f"{len(seeds)} seeds of one base"
    reference = "the base" if results["reference"] == "base" else "the first row below the base"
    text = f"Mean ± half of the 95 % interval, Student's t over {over}.\n`*`: the paired difference from {reference} "
    text += "has an interval that excludes 0."
    missing, versions = results["planned"] - len(runs), {run.get("code") for run in runs}
    text += f" The runs are of {len(versions)} versions of the code." if len(versions) > 1 else ""
    return text + (f" {missing} of {results['planned']} runs are still missing." if missing else "")


def publish(name: str, table: str) -> None:
    """Print a table, and put it between its markers."""
    print(table)
    fill_readme(name, lambda *_: table)


def fill_readme(name: str, make: Callable[[bool, list[str] | None], str]) -> bool:
    """Fill the marked tables of README.md and results/*.md, each up to the next `<!-- end -->`; False without a marker.

    A marker is `<!-- table rosd -->`, or `<!-- table rosd differences -->`, and may choose columns:
    `<!-- table rosd: in domain, elsewhere -->`.
    """
    marker = re.compile(rf"(<!-- table {re.escape(name)}( differences)?(?:: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)

    def filled(match: re.Match) -> str:
        return f"{match[1]}{make(bool(match[2]), match[3].split(', ') if match[3] else None)}\n{match[4]}"

    pages = [path for path in (files.ROOT / "README.md", *RESULTS.glob("*.md")) if path.exists()]
    marked = [path for path in pages if marker.search(files.read_text(path))]
    for path in marked:
        files.write_text(path, marker.sub(filled, files.read_text(path)))
    return bool(marked)
