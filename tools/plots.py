"""Draw pictures from the files in results/: what the tables of the studies cannot show.

    python -m tools.plots              every picture
    python -m tools.plots curves       this one

Needs `pip install -e '.[plots]'`. Grey text on no background is legible on light and on dark pages. The colours are
those of Okabe and Ito, which colour-blind readers can tell apart, and every line has its own marker.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from errors import UserError
from harness import files
from harness.cli import option, parse_config, run_script
from tools import stats
from tools.selectivity import ALL_LAYERS, PAPER, kept
from tools.stats import by_variant, read_results

STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
GREY = "#7f868d"
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
SETTINGS = dict.fromkeys(COLOURED, GREY) | {"svg.hashsalt": "fixed", "svg.fonttype": "none", "font.size": 11}
SETTINGS |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9}
SETTINGS |= {"axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25}


@contextmanager
def picture(name: str, title: str, rows: int = 1, columns: int = 2) -> Iterator[Any]:
    """The axes (rows, columns) of a picture; when they have been drawn, it is written to results/<name>.svg."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib; pip install -e '.[plots]'") from error
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        drawing = Figure((4.6 * columns, 3.2 * rows + 0.2), layout="constrained")
        drawing.suptitle(title)
        yield drawing.subplots(rows, columns, squeeze=False)
        path = files.make_folder(stats.RESULTS) / f"{name}.svg"
        with files.replacing(path) as temporary:
            drawing.savefig(temporary, format="svg", dpi=110, transparent=True, metadata={"Date": None})
    print(path)


def line(axis: Any, points: dict[float, stats.Values], label: str, style: tuple[str, str]) -> None:
    """The mean over runs at every x, in percent, and its 95 % interval as a band."""
    x = sorted(points)
    found = [stats.estimate(points[each]) for each in x]
    mean, half = 100 * np.array([(each.mean, each.half or 0) for each in found]).T
    colour, marker = style
    axis.plot(x, mean, color=colour, marker=marker, markersize=4, markevery=max(1, len(x) // 10), label=label)
    axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)


def curve(runs: list[dict], column: str, per_step: str = "") -> dict[float, stats.Values]:
    """A column of the runs' curves by the steps made so far, or by updates or rollouts.

    Tests come after a step's updates, and the base's own is their first point; everything else is of the rollouts
    before the step's updates.
    """
    points: dict[float, stats.Values] = {}
    for run in runs:
        values, key = run["curve"][column], (run["base"], run["seed"])
        each = run[per_step] / len(run["curve"]["accuracy"]) if per_step else 1
        if column in ("home", "away"):
            before = stats.figures(run, "before")
            values = [before["in domain" if column == "home" else "elsewhere"], *values]
        for step, value in enumerate(values):
            if value is not None:
                points.setdefault(step * each, {})[key] = value
    return points


def curves(axis: Any, variants: dict, column: str, title: str, per_step: str = "", ylabel: str = "accuracy, %") -> None:
    """A column of every variant's curves."""
    for (name, runs), style in zip(variants.items(), STYLES, strict=False):
        line(axis, curve(runs, column, per_step), name, style)
    axis.set(title=title, xlabel=per_step or "steps", ylabel=ylabel)


def learning_curves() -> None:
    variants = by_variant(read_results("curves"))
    with picture("curves", "Tested while training on mix alone") as ((home, away),):
        curves(home, variants, "home", "in domain", "rollouts")
        curves(away, variants, "away", "mean of the other domains, without exam", "rollouts")
        home.legend()


def reflection() -> None:
    """How good the reflector's quotes are, and where the first error lies, while the student learns."""
    runs = by_variant(read_results("curves"))["ROSD"]
    with picture("reflection", "The reflector while the student learns (ROSD)") as ((quotes, position),):
        line(quotes, curve(runs, "quote_match"), "found in the rollout", STYLES[0])
        line(quotes, curve(runs, "quote_accuracy"), "is the true first error", STYLES[1])
        line(position, curve(runs, "error_position"), "k", STYLES[2])
        quotes.set(title="error quotes", xlabel="steps", ylabel="% of wrong rollouts", ylim=(0, 102))
        position.set(title="where the first error lies", xlabel="steps", ylabel="k, % of the rollout", ylim=(0, 102))
        quotes.legend()


def collapse() -> None:
    variants = by_variant(read_results("collapse"))
    with picture("collapse", "What 100 steps do", rows=2) as ((home, away), (checked, unfinished)):
        curves(home, variants, "home", "in domain")
        curves(away, variants, "away", "mean of the other domains, without exam")
        curves(checked, variants, "checked", "rollouts with a checked step", ylabel="%")
        curves(unfinished, variants, "unfinished", "rollouts without an answer in time", ylabel="%")
        unfinished.legend(loc="upper left")


def selectivity(name: str = "selectivity", where: str = PAPER, layers: str = "the paper's layers") -> None:
    """What survives a projection of values over its rank: right digits, whole steps, the habit."""
    rows = read_results("selectivity", "selectivity")["rows"]
    columns = {"right": "right digits", "step": "whole steps", "check": "the habit of checking"}
    alone = "aligned, on results alone"
    names = {"aligned": "aligned loss", "full": "full-sequence loss", "random": "random, ten draws", alone: alone}
    with picture(name, f"What survives a projection of values at {layers}", 1, 3) as axes:
        for axis, (column, title) in zip(axes[0], columns.items(), strict=True):
            for (subspace, label), style in zip(names.items(), STYLES, strict=False):
                line(axis, kept(rows, where, subspace, column), label, style)
            axis.axhline(100, color=GREY, linewidth=1, linestyle="--")
            axis.set(title=title, xlabel="rank, % of the dimensions", ylim=(0, 115))
        axes[0, 0].set(ylabel="% of the base's own")
        axes[0, 0].legend(loc="best")


PICTURES = {"curves": learning_curves, "reflection": reflection, "collapse": collapse, "selectivity": selectivity}
PICTURES |= {"selectivity-all": partial(selectivity, "selectivity-all", ALL_LAYERS, "all layers")}


@dataclass(frozen=True)
class Config:
    picture: str = option("", "which picture; without one, all", choices=("", *PICTURES), positional=True)


def main() -> None:
    config = parse_config(Config, __doc__)
    for name in [config.picture] if config.picture else PICTURES:
        PICTURES[name]()


if __name__ == "__main__":
    run_script(main)
