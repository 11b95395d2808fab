"""The pictures of the README, drawn from the files in results/: `python plots.py` (needs `pip install -e '.[plots]'`).

Grey text on no background is legible on light and dark pages; the colours are of Okabe and Ito, which colour-blind
readers can tell apart, and every line has a marker of its own.
"""

import json
from pathlib import Path

import numpy as np

import runs
from data.arithmetic import DOMAINS
from study import interval
from subspace import calibration_set, capability_gradients, principal_directions

STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]


def read(name: str) -> dict:
    path = runs.RESULTS / f"{name}.json"
    if not path.exists():
        maker = "bench.py --scaling" if name == "scaling" else f"study.py {name}"
        raise runs.UserError(f"there is no {path}; python {maker} makes it")
    return json.loads(path.read_text())


def figure(columns: int, title: str):
    """A row of axes and a function that saves them."""
    try:
        import matplotlib
    except ImportError as error:
        raise runs.UserError("pictures need matplotlib; pip install -e '.[plots]'") from error
    matplotlib.use("svg")
    grey = "#7f868d"
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    matplotlib.rcParams |= dict.fromkeys(keys, grey) | {
        "svg.hashsalt": "fixed",
        "svg.fonttype": "none",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": grey,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, columns, figsize=(4.6 * columns, 3.4), squeeze=False, layout="constrained")
    drawing.suptitle(title)

    def save(name: str) -> Path:
        path = runs.RESULTS / f"{name}.svg"
        with runs.replacing(path) as temporary:
            drawing.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(drawing)
        return path

    return axes[0], save


def line(axis, x: list, seeds: list[list[float]], label: str, style: tuple[str, str]) -> None:
    """Mean over seeds with the band of its 95 % interval; seeds (number of seeds, points)."""
    values = np.array(seeds)
    bands = np.array([interval(column) for column in values.T])
    colour, marker = style
    axis.plot(x, values.mean(axis=0), color=colour, marker=marker, markersize=4, label=label)
    axis.fill_between(x, bands[:, 0], bands[:, 1], color=colour, alpha=0.2, linewidth=0)


def learning_curves() -> Path:
    variants = read("rosd-curves")["variants"]
    (home_axis, away_axis), save = figure(2, "Learning on add alone, tested while training")
    for (name, entry), style in zip(variants.items(), STYLES, strict=False):
        curves = [seed["curve"] for seed in entry["seeds"].values()]
        steps = [point["step"] + 1 for point in curves[0]]
        home = entry["config"]["domain"]
        away = [domain for domain in DOMAINS if domain != home]
        line(home_axis, steps, [[100 * p["tested"][home] for p in curve] for curve in curves], name, style)
        averages = [[100 * np.mean([p["tested"][d] for d in away]) for p in curve] for curve in curves]
        line(away_axis, steps, averages, name, style)
    for axis, title in ((home_axis, "in domain"), (away_axis, "average of the other domains")):
        axis.set(title=title, xlabel="update", ylabel="accuracy, %", ylim=(0, 102))
    home_axis.legend()
    return save("curves")


def reflection_over_time() -> Path:
    curves = [seed["curve"] for seed in read("rosd-curves")["variants"]["ROSD"]["seeds"].values()]
    curves = [[p for p in curve if "error_position" in p] for curve in curves]
    steps = sorted(set.intersection(*({p["step"] for p in curve} for curve in curves)))
    curves = [[p for p in curve if p["step"] in steps] for curve in curves]
    (quotes, position), save = figure(2, "The reflector while the student learns (ROSD)")
    x = [step + 1 for step in steps]
    line(quotes, x, [[100 * p["quote_match"] for p in c] for c in curves], "found in the rollout", STYLES[0])
    line(quotes, x, [[100 * p["quote_accuracy"] for p in c] for c in curves], "is the true first error", STYLES[1])
    line(position, x, [[100 * p["error_position"] for p in c] for c in curves], "k", STYLES[2])
    quotes.set(title="error quotes", xlabel="update", ylabel="% of wrong rollouts", ylim=(0, 102))
    position.set(title="where the first error lies", xlabel="update", ylabel="k, % of the rollout", ylim=(0, 102))
    quotes.legend()
    return save("reflection")


def spectra() -> Path:
    model, _ = runs.load_checkpoint(runs.BASE_CHECKPOINT)
    places = [(layer, kind) for layer in range(model.config.n_layer) for kind in "kv"]
    (keys, values), save = figure(2, "Singular values of the gradients of correctness, 200 examples of add")
    for loss, dashes in (("aligned", "-"), ("full", ":")):
        gradients = capability_gradients(model, calibration_set(("add",), 200, 0), places, loss)
        for (layer, kind), G in gradients.items():
            s, _ = principal_directions(G)
            colour, _ = STYLES[layer]
            label = f"layer {layer + 1}" + (", full sequence" if loss == "full" else "")
            axis = keys if kind == "k" else values
            axis.semilogy(range(1, len(s) + 1), (s / s[0]).tolist(), color=colour, linestyle=dashes, label=label)
    for axis, title in ((keys, "keys"), (values, "values")):
        axis.set(title=title, xlabel="i", ylabel="$s_i / s_1$", ylim=(1e-3, 1.2))
    keys.legend(fontsize=8)
    return save("spectra")


def ablation_sweeps() -> Path:
    collected, sizes_too = read("spd-ablations"), read("spd-calibration")
    home = next(iter(collected["variants"].values()))["config"]["domain"]
    (ranks, sizes), save = figure(2, "What the base writes under projection, before any training")
    sweeps = [(ranks, "rank", loss, STYLES[i]) for i, loss in enumerate(("aligned", "full", "random"))]
    sweeps.append((sizes, "calibration_size", "aligned", STYLES[0]))
    default = next(iter(collected["variants"].values()))["config"]
    for axis, field, loss, style in sweeps:
        points = {}
        for entry in (sizes_too if field == "calibration_size" else collected)["variants"].values():
            config = entry["config"]
            kind = "random" if config["subspace"] == "random" else config["loss"]
            others = [f for f in default if f not in (field, "loss", "subspace", "seed", "out")]
            if kind == loss and all(config[f] == default[f] for f in others):
                x = float(str(config[field]).rstrip("%"))
                points[x] = [100 * seed["after"][home]["mean"] for seed in entry["seeds"].values()]
        x = sorted(points)
        line(axis, x, [list(row) for row in zip(*(points[value] for value in x), strict=True)], loss, style)
    for axis, source in ((ranks, collected), (sizes, sizes_too)):
        seeds = next(iter(source["variants"].values()))["seeds"].values()
        own = [100 * seed["before"][home]["mean"] for seed in seeds]
        axis.axhline(np.mean(own), color="#7f868d", linestyle="--", label="no projection")
        axis.set(ylabel="accuracy, %", ylim=(0, 102))
    ranks.set(title="rank", xlabel="rank, % of the dimensions")
    sizes.set(title="calibration examples", xlabel="number", xscale="log")
    sizes.minorticks_off()
    sizes.set_xticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
    ranks.legend(fontsize=9)
    return save("spd")


def scaling() -> Path:
    measured = read("scaling")
    rows = measured["rows"]
    axes, save = figure(3, f"Tokens per second, {measured['device']}, {measured['threads']} threads")
    from matplotlib import ticker

    for axis, varied in zip(axes, ("width", "batch", "length"), strict=True):
        for kind, (colour, marker) in zip(("rollouts", "training"), STYLES, strict=False):
            points = [(row[varied], row[kind]) for row in rows if row["varied"] == varied]
            axis.loglog(*zip(*points, strict=True), color=colour, marker=marker, label=kind)
        axis.set(title=varied, xlabel=varied, ylabel="tokens/s")
        sizes = [row[varied] for row in rows if row["varied"] == varied]
        axis.minorticks_off()
        axis.set_xticks(sizes, map(str, sizes))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes[0].legend()
    return save("scaling")


PICTURES = (learning_curves, reflection_over_time, spectra, ablation_sweeps, scaling)


def main() -> None:
    for draw in PICTURES:
        try:
            print(draw())
        except runs.UserError as error:
            print(error)


if __name__ == "__main__":
    runs.run_script(main)
