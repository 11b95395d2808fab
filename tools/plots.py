"""Draw the pictures of the studies from the files in results/.

    python -m tools.plots              every picture whose study has run
    python -m tools.plots curves       this one

Needs `pip install -e '.[plots]'`. Grey text on no background is legible on light and on dark pages. The colours are
those of Okabe and Ito, which colour-blind readers can tell apart, and every line has its own marker.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harness import files
from harness.cli import option, parse_config, run_script
from harness.errors import UserError
from tools import stats
from tools.stats import by_variant, read_results

STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
GREY = "#7f868d"
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
SETTINGS = dict.fromkeys(COLOURED, GREY) | {
    "svg.hashsalt": "fixed",
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def picture(name: str, title: str, rows: int = 1) -> Iterator[Any]:
    """The axes (rows, 2) of a picture; when they have been drawn, it is written to results/<name>.svg."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib; pip install -e '.[plots]'") from error
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        drawing = Figure((9.2, 3.2 * rows + 0.2), layout="constrained")
        drawing.suptitle(title)
        yield drawing.subplots(rows, 2, squeeze=False)
        path = files.make_folder(stats.RESULTS) / f"{name}.svg"
        with files.replacing(path) as temporary:
            drawing.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
    print(path)


def line(axis: Any, points: dict[float, stats.Values], label: str, style: tuple[str, str]) -> None:
    """The mean over runs at every x, in percent, and its 95 % interval as a band, or as a bar where there is one x."""
    x = sorted(points)
    found = [stats.estimate(points[each]) for each in x]
    mean, half = [100 * e.mean for e in found], [100 * (e.half or 0) for e in found]
    colour, marker = style
    if len(x) == 1:
        axis.errorbar(x, mean, half, color=colour, marker=marker, markersize=4, label=label, linestyle="")
        return
    axis.plot(x, mean, color=colour, marker=marker, markersize=4, markevery=max(1, len(x) // 10), label=label)
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


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
            before = stats.figures(run["before"], run["domain"])
            values = [before["in domain" if column == "home" else "elsewhere"], *values]
        for step, value in enumerate(values):
            if value is not None:
                points.setdefault(step * each, {})[key] = value
    return points


def curves(axis: Any, variants: dict[str, list[dict]], column: str, title: str, per_step: str = "") -> None:
    """A column of every variant's curves."""
    for (name, runs), style in zip(variants.items(), STYLES, strict=False):
        line(axis, curve(runs, column, per_step), name, style)
    axis.set(title=title, xlabel=per_step or "steps", ylabel="accuracy, %")


def values(runs: list[dict], measure: Callable[[dict], float]) -> stats.Values:
    return {(run["base"], run["seed"]): measure(run) for run in runs}


# ---------------------------------------------------------------------------------------------- the pictures


def learning_curves() -> None:
    variants = by_variant(read_results("curves"))
    with picture("curves", "Tested while training on mix alone", rows=2) as axes:
        for (home, away), unit in zip(axes, ("updates", "rollouts"), strict=True):
            curves(home, variants, "home", "in domain", unit)
            curves(away, variants, "away", "mean of the other domains", unit)
        axes[0, 0].legend()


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
    with picture("collapse", "What 100 steps do") as ((rollouts, away),):
        curves(rollouts, variants, "accuracy", "rollouts")
        curves(away, variants, "away", "tests on the other domains")
        away.legend()


SPOILED = {"--spoil-kind other": "ideas of another problem", "--spoil-quote 1.0": "random quotes"}


def dose_of(flags: str) -> float | None:
    """The share of false ideas that a variant of the study 'ablations' trains on; None where it changes more."""
    form = re.fullmatch(r"--domain \w+(?: --spoil-idea (\S+))?", flags)
    return float(form[1] or 0) if form else None


def spoiled() -> None:
    """Accuracy after training over the share of reflections whose idea is false."""
    variants = by_variant(read_results("ablations"))
    by_flags = {runs[0]["flags"]: runs for runs in variants.values()}
    with picture("spoiled", "What training on false ideas teaches") as (axes,):
        for axis, column in zip(axes, ("in domain", "elsewhere"), strict=True):

            def after(run: dict, when: str = "after", column: str = column) -> float:
                return stats.figures(run[when], run["domain"])[column]

            doses = {
                100 * d: values(runs, after) for flags, runs in by_flags.items() if (d := dose_of(flags)) is not None
            }
            line(axis, doses, "false ideas", STYLES[0])
            for (ending, label), style in zip(SPOILED.items(), STYLES[1:], strict=False):
                for runs in (runs for flags, runs in by_flags.items() if flags.endswith(ending)):
                    line(axis, {100.0: values(runs, after)}, label, style)
            base = stats.estimate(values(variants["ROSD"], lambda run, after=after: after(run, "before")))
            axis.axhline(100 * base.mean, color=GREY, linestyle="--", label="base")
            axis.set(title=column, xlabel="share of the reflections, %", ylabel="accuracy, %")
        axes[0].legend()


def spd_sweeps() -> None:
    """The text written under projection over rank and over the size of the calibration set."""
    variants = by_variant(read_results("spd-sweeps"))
    sweeps = [("rank, % of the dimensions", r"--rank (\d+)%"), ("calibration examples", r"--calibration-size (\d+)")]
    with picture("spd", "What the base writes under projection, before any training") as (axes,):
        for axis, (title, flag) in zip(axes, sweeps, strict=True):
            for kind, style in zip(("aligned", "full", "random"), STYLES, strict=False):
                points = {}
                for name, runs in variants.items():
                    if name.startswith(kind) and (form := re.search(flag, runs[0]["flags"])):
                        points[float(form[1])] = values(runs, lambda run: run["generation"]["mean"])
                if points:
                    line(axis, points, kind, style)
            own = values([run for runs in variants.values() for run in runs], lambda run: run["own"]["mean"])
            axis.axhline(100 * stats.estimate(own).mean, color=GREY, linestyle="--", label="no projection")
            axis.set(xlabel=title, ylabel="accuracy, %", ylim=(0, 102))
        axes[0].legend()


PICTURES = {
    "curves": learning_curves,
    "reflection": reflection,
    "spoiled": spoiled,
    "collapse": collapse,
    "spd": spd_sweeps,
}


@dataclass(frozen=True)
class Config:
    picture: str = option("", "which picture; without one, all", choices=("", *PICTURES), positional=True)


def main() -> None:
    config = parse_config(Config, __doc__)
    for name in [config.picture] if config.picture else PICTURES:
        try:
            PICTURES[name]()
        except UserError as error:
            if config.picture:
                raise
            print(f"{name} is not drawn: {error}")


if __name__ == "__main__":
    run_script(main)
