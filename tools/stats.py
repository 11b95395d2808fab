"""Means, 95 % intervals and tables of studies.

A study trains every variant from several bases and with several seeds. Runs from one base resemble each other, so a
base counts once: its seeds are averaged, and Student's t interval is taken over the bases. A variant is compared with
another one run by run, on the same base and seed, and the interval is that of the paired difference.

>>> runs = {(0, 0): 0.50, (0, 1): 0.60, (1, 0): 0.65, (1, 1): 0.75}  # (base, seed): value
>>> estimate(runs).mean, round(estimate(runs).half, 2)  # of two bases at 0.55 and 0.70
(0.625, 0.95)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from harness import files
from harness.cli import markdown_table
from harness.errors import UserError

RESULTS = files.ROOT / "results"
Values = dict[tuple[int, int], float]  # (base, seed) -> value


@lru_cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t that Student's distribution exceeds in absolute value with probability 1 - level.

    With t = sqrt(n) tan(angle) its density is proportional to cos(angle)^(n - 1).

    >>> [round(t_quantile(n), 3) for n in (1, 2, 4)]
    [12.706, 4.303, 2.776]
    """
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))  # the trapezoid rule
    return float(np.sqrt(degrees) * np.tan(np.interp(level, below / below[-1], angle)))


@dataclass(frozen=True)
class Estimate:
    mean: float
    half: float | None  # half of the 95 % interval; None where there is but one value

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Values) -> Estimate:
    """Mean and t interval over bases, each the mean of its seeds; over the seeds where there is one base."""
    bases: dict[int, list[float]] = {}
    for (base, _), value in values.items():
        bases.setdefault(base, []).append(value)
    units = [float(np.mean(seeds)) for seeds in bases.values()] if len(bases) > 1 else list(values.values())
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


def figures(scores: dict[str, dict] | None, home: str) -> dict[str, float]:
    """The columns of one model's test: accuracy in and out of domain, habits, unfinished responses."""
    if not scores:
        return {}
    away = {domain: score["mean"] for domain, score in scores.items() if domain != home}
    mean_away = {"elsewhere": sum(away.values()) / len(away)} if away else {}
    habits = {name: value for name, value in scores[home].items() if name != "mean"}
    return {"in domain": scores[home]["mean"]} | mean_away | away | habits


def of_base(run: dict) -> dict[str, float]:
    """The columns of the model that a run started from; of SPD also the text that it writes by itself."""
    return figures(run["before"], run["domain"]) | ({"text": run["own"]["mean"], "gain": 0.0} if "own" in run else {})


def of_run(run: dict) -> dict[str, float]:
    """The columns of a run; of SPD also the text that it trains on, and its gain over the base's own."""
    own, written = (run.get(name, {}).get("mean", 0.0) for name in ("own", "generation"))
    return figures(run["after"], run["domain"]) | ({"text": written, "gain": written - own} if "own" in run else {})


def values_of(runs: list[dict], measure: Callable[[dict], dict[str, float]]) -> dict[str, Values]:
    """column -> (base, seed) -> value in percent."""
    columns: dict[str, Values] = {}
    for run in runs:
        for column, value in measure(run).items():
            columns.setdefault(column, {})[run["base"], run["seed"]] = 100 * value
    return columns


def by_variant(results: dict) -> dict[str, list[dict]]:
    variants: dict[str, list[dict]] = {}
    for run in results["runs"]:
        variants.setdefault(run["variant"], []).append(run)
    return variants


def summarize(results: dict) -> dict[str, dict[str, tuple[Estimate, Estimate | None]]]:
    """row -> column -> the mean, and the paired difference from the row's reference.

    Every training domain has a row for the base and one for every variant. The reference is the first variant of the
    same training domain, or, in a study whose reference is 'base', what each run started from.
    """
    homes = {run["domain"] for run in results["runs"]}
    rows: dict[str, tuple[dict[str, Values], dict[str, Values]]] = {}
    first: dict[str, dict[str, Values]] = {}
    for variant, runs in by_variant(results).items():
        home, base, values = runs[0]["domain"], values_of(runs, of_base), values_of(runs, of_run)
        reference = base if results["reference"] == "base" else first.setdefault(home, values)
        rows.setdefault("base" if len(homes) == 1 else f"base, {home}", (base, reference))
        rows[variant] = values, reference
    return {
        row: {name: (estimate(each), difference(each, reference.get(name, {}))) for name, each in columns.items()}
        for row, (columns, reference) in rows.items()
    }


def table(results: dict, differences: bool = False, columns: list[str] | None = None) -> str:
    """Markdown of means, or of paired differences; with the flags where no columns are chosen; and how to read it."""
    if not results["runs"]:
        return "No run is finished."
    summary = summarize(results)
    flags = {variant: f"`{shared_flags(runs)}`" for variant, runs in by_variant(results).items()}
    names = columns or ordered(summary, results)
    rows = []
    for label, row in summary.items():
        cells = [show(*row[name], differences) if name in row else "" for name in names]
        rows.append([label, *cells, *([] if columns else [flags.get(label, "")])])
    header = ["difference, points" if differences else "%", *names, *([] if columns else ["flags"])]
    return f"{markdown_table(header, rows)}\n\n{note(results)}"


def shared_flags(runs: list[dict]) -> str:
    """The flags of a variant's runs; '…' is what differs from base to base.

    >>> shared_flags([{"flags": "--layers 1 --rank 35%"}, {"flags": "--layers 4 --rank 35%"}])
    '--layers … --rank 35%'
    """
    words = zip(*(run["flags"].split() for run in runs), strict=True)
    return " ".join(each[0] if len(set(each)) == 1 else "…" for each in words)


def ordered(summary: dict, results: dict) -> list[str]:
    """In and out of domain, then the domains, then the rest as it comes."""
    order = ["in domain", "elsewhere", *(results["runs"][0]["after"] or {})]
    seen = list(dict.fromkeys(name for row in summary.values() for name in row))
    return [name for name in order if name in seen] + [name for name in seen if name not in order]


def show(value: Estimate, paired: Estimate | None, differences: bool) -> str:
    """E.g. '91.2 ± 1.3 *', or as a difference '+3.4 ± 0.5 *'."""
    shown = paired if differences else value
    if shown is None:
        return ""
    text = f"{shown.mean:{'+' if differences else ''}.1f}" + ("" if shown.half is None else f" ± {shown.half:.1f}")
    return text + (" *" if paired and paired.excludes_zero else "")


def note(results: dict) -> str:
    """What the intervals of a table are over, what `*` means, and which runs are missing."""
    runs = results["runs"]
    bases, seeds = {run["base"] for run in runs}, {run["seed"] for run in runs}
    each = "1 seed each" if len(seeds) == 1 else f"{len(seeds)} seeds averaged within each"
    over = f"{len(bases)} bases, {each}" if len(bases) > 1 else f"{len(seeds)} seeds of one base"
    reference = "the base" if results["reference"] == "base" else "the first row below the base"
    text = f"Mean ± half of the 95 % interval, Student's t over {over}. `*`: the paired difference from {reference} "
    text += "has an interval that excludes 0."
    missing = results["planned"] - len(runs)
    return text + (f" {missing} of {results['planned']} runs are still missing." if missing else "")


def fill_readme(name: str, make: Callable[[bool, list[str] | None], str]) -> bool:
    """Write tables between their marker and the next `<!-- end -->` of both READMEs; False where there is no marker.

    A marker is `<!-- table rosd -->`, or `<!-- table rosd differences -->`, and may choose columns:
    `<!-- table rosd: in domain, elsewhere -->`.
    """
    marker = re.compile(rf"(<!-- table {re.escape(name)}( differences)?(?:: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)

    def filled(match: re.Match) -> str:
        return f"{match[1]}{make(bool(match[2]), match[3].split(', ') if match[3] else None)}\n{match[4]}"

    found = False
    for path in (files.ROOT / "README.md", RESULTS / "README.md"):
        if path.exists() and marker.search(text := files.read_text(path)):
            found = True
            files.write_text(path, marker.sub(filled, text))
    return found
