"""Draw the pictures of the READMEs from the files in results/.

    python -m tools.plots              every picture whose study has run
    python -m tools.plots curves       this one

Needs `pip install -e '.[plots]'`. Grey text on no background is legible on light and on dark pages. The colours are
those of Okabe and Ito, which colour-blind readers can tell apart, and every line has its own marker.
"""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import files
from harness.cli import option, parse_config, run_script
from harness.errors import UserError
from tools import stats
from tools.stats import by_variant, read_results

STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]
GREY = "#7f868d"
DOCS = files.ROOT / "docs"
Save = Callable[[str], Path]


def figure(columns: int, title: str, rows: int = 1, folder: Path | None = None) -> tuple[Any, Save]:
    """An array of axes (rows, columns), and a function that saves them, in results/ if no other folder is given."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib; pip install -e '.[plots]'") from error
    matplotlib.use("svg")
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    matplotlib.rcParams |= dict.fromkeys(coloured, GREY) | {
        "svg.hashsalt": "fixed",
        "svg.fonttype": "none",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
    from matplotlib import pyplot

    size = (4.6 * columns, 3.2 * rows + 0.2)
    drawing, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    drawing.suptitle(title)

    def save(name: str) -> Path:
        path = files.make_folder(folder or stats.RESULTS) / f"{name}.svg"
        with files.replacing(path) as temporary:
            drawing.savefig(temporary, format="svg", dpi=110, transparent=True, metadata={"Date": None})
        pyplot.close(drawing)
        return path

    return axes, save


def line(axis: Any, points: dict[float, stats.Values], label: str, style: tuple[str, str], marked: bool = True) -> None:
    """The mean over runs at every x, in percent, and its 95 % interval as a band, or as a bar where there is one x."""
    x = sorted(points)
    found = [stats.estimate(points[each]) for each in x]
    mean, half = [100 * e.mean for e in found], [100 * (e.half or 0) for e in found]
    colour, marker = style
    if len(x) == 1:
        axis.errorbar(x, mean, half, color=colour, marker=marker, markersize=4, label=label, linestyle="")
        return
    axis.plot(x, mean, color=colour, marker=marker if marked else "", markersize=4, label=label)
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


def learning_curves() -> Path:
    """Tests in and out of domain, over updates and over rollouts."""
    variants = by_variant(read_results("curves"))
    axes, save = figure(2, "Tested while training on mix alone", rows=2)
    for row, unit in zip(axes, ("updates", "rollouts"), strict=True):
        for axis, column, title in zip(row, ("home", "away"), ("in domain", "mean of the other domains"), strict=True):
            for (name, runs), style in zip(variants.items(), STYLES, strict=False):
                line(axis, curve(runs, column, unit), name, style)
            axis.set(title=title, xlabel=unit, ylabel="accuracy, %")
    axes[0, 0].legend(fontsize=9)
    return save("curves")


def reflection() -> Path:
    """How good the reflector's quotes are, and where the first error lies, while the student learns."""
    runs = by_variant(read_results("curves"))["ROSD"]
    ((quotes, position),), save = figure(2, "The reflector while the student learns (ROSD)")
    line(quotes, curve(runs, "quote_match"), "found in the rollout", STYLES[0])
    line(quotes, curve(runs, "quote_accuracy"), "is the true first error", STYLES[1])
    line(position, curve(runs, "error_position"), "k", STYLES[2])
    quotes.set(title="error quotes", xlabel="update", ylabel="% of wrong rollouts", ylim=(0, 102))
    position.set(title="where the first error lies", xlabel="update", ylabel="k, % of the rollout", ylim=(0, 102))
    quotes.legend()
    return save("reflection")


def spoiled() -> Path:
    """Accuracy after training over the share of reflections whose idea is false."""
    variants = by_variant(read_results("ablations"))
    ((home, away),), save = figure(2, "What training on false ideas teaches")
    for axis, column in ((home, "in domain"), (away, "elsewhere")):

        def after(runs: list[dict], when: str = "after", column: str = column) -> stats.Values:
            return {(r["base"], r["seed"]): stats.figures(r[when], r["domain"])[column] for r in runs}

        doses = {dose: after(runs) for runs in variants.values() if (dose := dose_of(runs[0]["flags"])) is not None}
        line(axis, {100 * dose: values for dose, values in doses.items()}, "false ideas", STYLES[0])
        for (flags, label), style in zip(SPOILED.items(), STYLES[1:], strict=False):
            runs = next((runs for runs in variants.values() if runs[0]["flags"].endswith(flags)), None)
            if runs:
                line(axis, {100.0: after(runs)}, label, style)
        base = stats.estimate(after(variants["ROSD"], "before"))
        axis.axhline(100 * base.mean, color=GREY, linestyle="--", label="base")
        axis.set(title=column, xlabel="share of the reflections, %", ylabel="accuracy, %")
    home.legend(fontsize=9)
    return save("spoiled")


SPOILED = {"--spoil-kind other": "ideas of another problem", "--spoil-quote 1.0": "random quotes"}


def dose_of(flags: str) -> float | None:
    """The share of false ideas that a variant of the study 'ablations' trains on; None where it changes more."""
    form = re.fullmatch(r"--domain \w+(?: --spoil-idea (\S+))?", flags)
    return float(form[1] or 0) if form else None


def collapse() -> Path:
    """100 updates: accuracy of the rollouts, and tests elsewhere."""
    variants = by_variant(read_results("collapse"))
    ((rollouts, away),), save = figure(2, "What 100 updates do")
    for (name, runs), style in zip(variants.items(), STYLES, strict=False):
        line(rollouts, curve(runs, "accuracy"), name, style, marked=False)
        line(away, curve(runs, "away"), name, style)
    rollouts.set(title="rollouts", xlabel="update", ylabel="right, %")
    away.set(title="tests on the other domains", xlabel="update", ylabel="accuracy, %")
    away.legend(fontsize=9)
    return save("collapse")


def spectra() -> Path:
    """Singular values of the gradients of correctness, at every layer's keys and values."""
    found = read_results("spectra", "xray spd --spectra")
    (axes,), save = figure(2, f"Singular values of the gradients of correctness, {found['examples']} examples")
    for loss, dashes in (("aligned", "-"), ("full", ":")):
        for place, values in found[loss].items():
            layer, kind = place.rsplit(" ", 1)
            colour, _ = STYLES[(int(layer.split()[-1]) - 1) % len(STYLES)]
            label = layer + (", full sequence" if loss == "full" else "")
            axis, x = axes["KV".index(kind)], range(1, len(values) + 1)
            axis.semilogy(x, [s / values[0] for s in values], color=colour, linestyle=dashes, label=label)
    for axis, title in zip(axes, ("keys", "values"), strict=True):
        axis.set(title=title, xlabel="i", ylabel="$s_i / s_1$", ylim=(1e-3, 1.2))
    axes[0].legend(fontsize=8)
    return save("spectra")


def spd_sweeps() -> Path:
    """The text written under projection over rank and over the size of the calibration set."""
    variants = by_variant(read_results("spd-sweeps"))
    (axes,), save = figure(2, "What the base writes under projection, before any training")
    sweeps = [
        ("rank", r"--rank (\d+)%", ("aligned", "full", "random")),
        ("calibration examples", r"--calibration-size (\d+)", ("aligned",)),
    ]
    for axis, (title, flag, kinds) in zip(axes, sweeps, strict=True):
        for kind, style in zip(kinds, STYLES, strict=False):
            points = {}
            for name, runs in variants.items():
                if name.startswith(kind) and (form := re.search(flag, runs[0]["flags"])):
                    points[float(form[1])] = {(r["base"], r["seed"]): r["generation"]["mean"] for r in runs}
            line(axis, points, kind, style)
        own = {(r["base"], r["seed"]): r["own"]["mean"] for runs in variants.values() for r in runs}
        axis.axhline(100 * stats.estimate(own).mean, color=GREY, linestyle="--", label="no projection")
        axis.set(title=title, ylabel="accuracy, %", ylim=(0, 102))
    axes[0].set(xlabel="rank, % of the dimensions")
    axes[1].set(xlabel="number")
    axes[0].legend(fontsize=9)
    return save("spd")


MECHANISM = {"aligned": "aligned loss", "full": "full-sequence loss", "random": "random, three draws"}
MECHANISM |= {"mix": "aligned loss, calibrated without the mark"}


def mechanism() -> Path:
    """Correctness kept against checks removed: a point a place and draw, as large as golden solutions are likely."""
    rows = stats.mechanism_rows()
    axes, save = figure(3, "What projecting keys or values does to the decisions of five bases", 2, DOCS)
    kinds = [*zip(MECHANISM, STYLES, strict=False)]
    for axis, base in zip(axes.flat, sorted({row["base"] for row in rows}), strict=False):
        plain = stats.best_place(rows, base, "none")
        axis.axhline(0, color=GREY, linewidth=1)
        axis.axvline(100, color=GREY, linewidth=1)
        for ring, (subspace, (colour, marker)) in itertools.product((False, True), kinds[::-1]):
            best = stats.place_name(stats.best_place(rows, base, subspace))
            shown = [row for row in rows if (row["base"], row["subspace"]) == (base, subspace)]
            shown = [row for row in shown if not ring or stats.place_name(row) == best]
            x = [100 * math.exp(row["right"] - plain["right"]) for row in shown]
            y = [100 * (1 - row["check"] / plain["check"]) for row in shown]
            style = {"facecolors": "none", "edgecolors": colour} if ring else {"color": colour, "alpha": 0.5}
            size = [(60 if ring else 8) + 6000 * math.exp(row["golden"]) for row in shown]
            axis.scatter(x, y, size, marker=marker, linewidths=1.5 * ring, rasterized=not ring, **style)
        axis.set(title=f"base {base}", xlabel="right digits kept, %", ylabel="checks removed, %")
        axis.set(xlim=(0, 115), ylim=(-30, 105))
    key = axes[1, 2]
    for subspace, (colour, marker) in kinds:
        key.scatter([], [], 50, color=colour, marker=marker, label=MECHANISM[subspace])
    key.axis("off")
    title = "Size: how likely golden solutions are.\nOutlined: the place that the rule takes."
    key.legend(loc="upper left", alignment="left", title=title)
    return save("spd-mechanism")


def scaling() -> Path:
    """Tokens per second over width, batch and length."""
    measured = read_results("scaling", "bench --scaling")
    (axes,), save = figure(3, f"Tokens per second, {measured['device']}, {measured['threads']} threads")
    from matplotlib import ticker

    for axis, varied in zip(axes, ("width", "batch", "length"), strict=True):
        rows = [row for row in measured["rows"] if row["varied"] == varied]
        sizes = [row[varied] for row in rows]
        for kind, (colour, marker) in zip(("rollouts", "training"), STYLES, strict=False):
            axis.loglog(sizes, [row[kind] for row in rows], color=colour, marker=marker, label=kind)
        axis.set(title=varied, xlabel=varied, ylabel="tokens/s")
        axis.minorticks_off()
        axis.set_xticks(sizes, map(str, sizes))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes[0].legend()
    return save("scaling")


PICTURES = {
    "curves": learning_curves,
    "reflection": reflection,
    "spoiled": spoiled,
    "collapse": collapse,
    "spectra": spectra,
    "spd": spd_sweeps,
    "spd-mechanism": mechanism,
    "scaling": scaling,
}


@dataclass(frozen=True)
class Config:
    picture: str = option("", "which picture; without one, all", choices=("", *PICTURES), positional=True)


def main() -> None:
    config = parse_config(Config, __doc__)
    for name in [config.picture] if config.picture else PICTURES:
        try:
            print(PICTURES[name]())
        except UserError as error:
            if config.picture:
                raise
            print(f"{name} is not drawn: {error}")


if __name__ == "__main__":
    run_script(main)
