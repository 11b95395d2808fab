"""Where to project, base by base, from results/spd-mechanism.json, which tools/mechanism.py writes."""

import numpy as np

from harness.cli import markdown_table
from tools.stats import read_results

CALIBRATION = {  # domains of the calibration set, by the name of the subspace
    "aligned": ("exam",),
    "unmarked": ("mix", "add", "sub", "mul", "long"),  # the same problems without the mark
    "full": ("exam",),
    "random": ("exam",),
}


def mechanism_rows() -> list[dict]:
    """What tools/mechanism.py measured of the bases of the studies."""
    held = read_results("spd-mechanism", "mechanism")
    return with_golden(rows_of(held), held["S"])


def rows_of(held: dict) -> list[dict]:
    """The rows of results/spd-mechanism.json, whose columns are named once."""
    return [dict(zip(held["columns"], row, strict=True)) for row in held["rows"]]


def with_golden(rows: list[dict], S: float) -> list[dict]:
    """Rows with `golden`: the mean log-probability of golden solutions, of their tokens at S and of the rest."""
    return [row | {"golden": row["rest"] + S * row["right"]} for row in rows]


def best_place(rows: list[dict], base: int | str, subspace: str) -> dict:
    """The rule of the studies: where golden solutions of training problems are likeliest under projection.

    The measures of a place (layers, keys or values, rank) are averaged over the draws of a random subspace.
    """
    draws: dict[str, list[dict]] = {}
    for row in rows:
        if (row["base"], row["subspace"]) == (base, subspace):
            draws.setdefault(place_name(row), []).append(row)
    best = max(draws.values(), key=lambda found: np.mean([row["golden"] for row in found]))
    names = ("base", "layers", "project", "rank", "subspace", "draw")
    return {name: x if name in names else float(np.mean([row[name] for row in best])) for name, x in best[0].items()}


def place_name(row: dict) -> str:
    return f"layer {row['layers']} {row['project']} {row['rank']}%" if row["project"] else "not projected"


def mechanism_table(rows: list[dict]) -> str:
    """What happens to the decisions of every base, unprojected and at the best place of every subspace."""
    header = ["base", "subspace", "best place", "log p", "right, kept", "check", "check, own", "merge", "mark inside"]
    lines = []
    for base in sorted({row["base"] for row in rows}):
        plain = best_place(rows, base, "none")
        for subspace in ("none", *CALIBRATION):
            row = best_place(rows, base, subspace)
            kept = np.exp(row["right"] - plain["right"])
            values = kept, row["check"], row["own check"], row["merge"], row["mark"]
            cells = [f"{row['golden']:.1f}", *(f"{100 * value:.0f}" for value in values)]
            lines.append([str(base), subspace, place_name(row), *cells])
    return f"{markdown_table(header, lines)}\n\n{corner_note(rows)}"


def corner_note(rows: list[dict]) -> str:
    """How many projections keep right digits and remove checks, and what they have in common."""
    plain = {row["base"]: row for row in rows if row["subspace"] == "none"}
    counts, marks = [], [0.0]
    for name, subspaces in {"aligned": ("aligned", "unmarked"), "full": ("full",), "random": ("random",)}.items():
        tried = [row for row in rows if row["subspace"] in subspaces]
        kept = [row for row in tried if row["right"] > plain[row["base"]]["right"] + np.log(0.9)]
        found = [row for row in kept if row["check"] < plain[row["base"]]["check"] / 2]
        counts.append(f"{len(found)} of {len(tried)} {name}")
        marks += [row["mark"] for row in found]
    text = f"At least 90 % of the right digits kept and half of the checks removed: {', '.join(counts)} projections. "
    return f"{text}In all of them at most {100 * max(marks):.0f} % of the mark is inside."
