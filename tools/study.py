"""Studies: many small runs of the training scripts, and the table that sums them up.

    python study.py                    lists the studies
    python study.py rosd               runs what is missing of one, prints its table, writes results/rosd.json
    python study.py rosd --readme      also puts the table into README.md, between its markers
    python study.py all                every study that is missing or unfinished, and their tables

A study is data: a script, variants by their flags, seeds. One process a core, one thread each; finished runs are
skipped, so Ctrl-C and the same command again go on where it stopped.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import runs
from data.arithmetic import DOMAINS
from runs import option

CURVES = ("step", "accuracy", "tested", "error_position", "quote_match", "quote_accuracy", "shortcut")


@dataclass(frozen=True)
class Study:
    """Variants (name -> flags) of a script over seeds."""

    script: str
    variants: dict[str, list[str]]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    flags: list[str] = field(default_factory=list)  # of every run
    against: str = "first"  # what a variant is compared with: "first" variant of its training domain, or "base"


SHORT = ["--steps", "20", "--eval-problems", "32"]
GENERATION = ["--epochs", "0", "--prompts", "1"]  # of SPD: only what the base writes under projection, before training

STUDIES = {
    "rosd": Study(
        "train_rosd.py",
        {
            "ROSD": [],
            "SDPO": ["--method", "sdpo"],
            "OPSD": ["--method", "opsd"],
            "GRPO": ["--method", "grpo"],
            "ROSD without localization": ["--mask", "whole"],
            "ROSD without reflection": ["--context", "peer"],
            "ROSD, oracle localization": ["--mask", "oracle"],
        },
    ),
    "rosd-domains": Study(
        "train_rosd.py",
        {
            f"{method.upper()} on {domain}": ["--method", method, "--domain", domain]
            for domain in ("sub", "mul", "mix", "long")
            for method in ("rosd", "sdpo", "opsd", "grpo")
        },
        flags=SHORT,
    ),
    "rosd-curves": Study(
        "train_rosd.py",
        {"ROSD": [], "SDPO": ["--method", "sdpo"], "GRPO": ["--method", "grpo"]},
        flags=["--eval-every", "4"],
    ),
    "reflector": Study(
        "train_rosd.py",
        {"ROSD": []} | {f"{share:.0%} of the reflections spoiled": ["--spoil", str(share)] for share in (0.5, 1.0)},
        flags=SHORT,
    ),
    "composition": Study(
        "train_rosd.py",
        {"ROSD": [], "teacher projected": ["--project", "teacher"], "rollouts projected": ["--project", "rollouts"]},
        flags=SHORT,
    ),
    "localization": Study(
        "train_rosd.py",
        {
            "ROSD": [],
            "ROSD without localization": ["--mask", "whole"],
            "ROSD, oracle localization": ["--mask", "oracle"],
            "SDPO": ["--method", "sdpo"],
            "GRPO": ["--method", "grpo"],
        },
        flags=["--base", "data/gaps.pt", "--domain", "gap"],
    ),
    "spd": Study(
        "train_spd.py",
        {
            "SPD": [],
            "PSR": ["--method", "psr"],
            "SSD": ["--method", "ssd"],
            "SSD, temperature 0.3": ["--method", "ssd", "--temperature", "0.3"],
            "SSD, temperature 0.6": ["--method", "ssd", "--temperature", "0.6"],
            "SPD, full-sequence loss": ["--loss", "full"],
            "SPD, random subspace": ["--subspace", "random"],
            "SPD, loss on the prompt too": ["--no-completion-only"],
        },
        seeds=(1, 2, 3, 4, 5),
    ),
    "spd-calibration": Study(
        "train_spd.py",
        {"SPD": []}
        | {f"{size} calibration examples": ["--calibration-size", str(size)] for size in (20, 50, 100, 200)}
        | {f"calibrated on {domain}": ["--calibration-domain", domain] for domain in ("sub", "mul", "mix")}
        | {"keys only": ["--project", "k"], "values only": ["--project", "v"]}
        | {
            f"values only, {size} calibration examples": ["--project", "v", "--calibration-size", str(size)]
            for size in (20, 50, 100, 200)
        }
        | {
            f"values only, calibrated on {domain}": ["--project", "v", "--calibration-domain", domain]
            for domain in ("sub", "mul", "mix")
        },
        seeds=(1, 2, 3, 4, 5),
        flags=GENERATION,
        against="base",
    ),
    "spd-ablations": Study(
        "train_spd.py",
        {"SPD": []}
        | {f"rank {share}": ["--rank", share] for share in ("25%", "37.5%", "62.5%", "75%")}
        | {f"full-sequence loss, rank {share}": ["--loss", "full", "--rank", share] for share in ("25%", "50%", "75%")}
        | {f"random, rank {share}": ["--subspace", "random", "--rank", share] for share in ("25%", "50%", "75%")}
        | {f"layers {layers}": ["--layers", layers] for layers in ("paper", "2", "4", "3,4")}
        | {
            "layers paper, full-sequence loss": ["--layers", "paper", "--loss", "full"],
            "layers paper, random": ["--layers", "paper", "--subspace", "random"],
        }
        | {f"coordinate {coordinate}": ["--coordinate", coordinate] for coordinate in ("head", "norm", "rope")}
        | {"S: whole steps": ["--loss", "steps"]},
        seeds=(1, 2, 3, 4, 5),
        flags=GENERATION,
        against="base",
    ),
    "spd-temperature": Study(
        "train_spd.py",
        {f"temperature {t}": ["--temperature", str(t)] for t in (0.0, 0.1, 0.3, 0.6, 1.0)},
        seeds=(1, 2, 3, 4, 5),
        flags=GENERATION,
        against="base",
    ),
}


@dataclass(frozen=True)
class Config:
    study: str = option("", "which study; without one they are listed", choices=("", "all", *STUDIES), positional=True)
    out: str = option("out/studies", "folder for the runs")
    processes: int = option(os.cpu_count() or 1, "runs side by side", minimum=1)
    readme: bool = option(False, "put the table into README.md")


def run_folder(name: str, study: Study, variant: str, seed: int, config: Config) -> tuple[Path, list[str], object]:
    """Where a run leaves its results, its flags, and the configuration they make."""
    folder = Path(config.out).resolve() / name / "".join(c if c.isalnum() else "_" for c in variant)
    flags = [*study.flags, *study.variants[variant], "--seed", str(seed), "--out", str(folder)]
    flags += ["--no-baseline", "--threads", "1", "--resume"]
    settings = runs.parse_config(importlib.import_module(study.script.removesuffix(".py")).Config, "", flags)
    return folder / runs.run_name(settings), flags, settings


def run_all(name: str, study: Study, config: Config) -> None:
    """Run what is not finished yet, `processes` at a time, each in a process with one thread."""
    waiting = []
    for seed in study.seeds:
        for variant in study.variants:
            folder, flags, settings = run_folder(name, study, variant, seed, config)
            if not runs.finished(folder, settings):
                waiting.append(([sys.executable, study.script, *flags], folder.with_name(folder.name + ".log")))
    running: list[tuple[subprocess.Popen, Path]] = []
    with tqdm(total=len(waiting), desc=name, unit="run") as progress:
        try:
            while waiting or running:
                while waiting and len(running) < config.processes:
                    command, log = waiting.pop(0)
                    log.parent.mkdir(parents=True, exist_ok=True)
                    with log.open("w") as output:
                        running.append((subprocess.Popen(command, stdout=output, stderr=output, cwd=runs.ROOT), log))
                time.sleep(0.5)
                for process, log in [entry for entry in running if entry[0].poll() is not None]:
                    running.remove((process, log))
                    progress.update()
                    if process.returncode:
                        raise runs.UserError(f"a run failed with exit code {process.returncode}; read {log}")
        finally:
            for process, _ in running:
                process.terminate()


def collect(name: str, study: Study, config: Config) -> dict:
    """variant -> seed -> the figures of its results.json that tables and pictures need."""
    collected: dict = {"study": name, "against": study.against, "variants": {}}
    for variant, flags in study.variants.items():
        entry = collected["variants"][variant] = {"flags": " ".join(study.flags + flags), "seeds": {}}
        for seed in study.seeds:
            folder, _, _ = run_folder(name, study, variant, seed, config)
            result = json.loads((folder / "results.json").read_text())
            seeds = {"commit": result["commit"], "before": result["before"], "after": result["after"]}
            if "rounds" in result:  # of SPD: what it trains on, and what the base would have written by itself
                seeds["generation"] = result["rounds"][0]["generation"]
                if not result["after"]:
                    seeds |= {"before": result["own_generation"], "after": seeds.pop("generation")}
            steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            seeds["curve"] = [{key: step[key] for key in CURVES if key in step} for step in steps if "tested" in step]
            entry["seeds"][str(seed)] = seeds
            settings = {name: value for name, value in result["config"].items() if name != "out"}
            entry["config"] = settings | {"base": Path(settings["base"]).name}  # no path of this machine
    collected["summary"] = summarize(collected)
    return collected


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (resamples, len(values))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def figures(scores: dict, home: str) -> dict[str, float]:
    """The columns of a table, in percent, of one model's evaluation."""
    away = {domain: scores[domain]["mean"] for domain in DOMAINS if domain != home and domain in scores}
    columns = {"in domain": scores[home]["mean"]}
    columns |= {"OOD average": sum(away.values()) / len(away), **away} if away else {}
    columns |= {"short cuts": scores[home]["shortcut"], "unfinished": scores[home]["unfinished"]}
    return {name: 100 * value for name, value in columns.items()}


def summarize(collected: dict) -> dict:
    """row -> column -> mean, 95 % interval, and the same of the paired difference.

    Every training domain has a row for the base and one for every variant. The difference is that to the first variant
    of the domain, or to what the base does at the same seed and temperature.
    """
    measured: dict[str, list[dict[str, float]]] = {}
    others: dict[str, list[dict[str, float]]] = {}  # what each row is compared with
    first: dict[str, list[dict[str, float]]] = {}  # the first variant of every training domain
    homes = {name: entry["config"]["domain"] for name, entry in collected["variants"].items()}
    for name, entry in collected["variants"].items():
        home, seeds = homes[name], entry["seeds"].values()
        base = "base" if len(set(homes.values())) == 1 else f"base, {home}"
        before = [figures(seed["before"], home) for seed in seeds]
        rows = [figures(seed["after"], home) for seed in seeds]
        for row, own, seed in zip(rows, before, seeds, strict=True):
            if "generation" in seed:
                row["trained on"] = 100 * seed["generation"][home]["mean"]
            if collected["against"] == "base":
                own["gain"], row["gain"] = 0.0, row["in domain"] - own["in domain"]
        reference = before if collected["against"] == "base" else first.setdefault(home, rows)
        for label, values in ((base, before), (name, rows)):
            measured.setdefault(label, values)
            others.setdefault(label, reference)
    summary: dict = {}
    for name, rows in measured.items():
        for column in rows[0]:
            values = np.array([row[column] for row in rows])
            difference = values - np.array([row[column] for row in others[name]])
            (low, high), (low_difference, high_difference) = interval(values), interval(difference)
            summary.setdefault(name, {})[column] = {
                "mean": values.mean(),
                "interval": [low, high],
                "difference": difference.mean(),
                "difference_interval": [low_difference, high_difference],
                "significant": low_difference > 0 or high_difference < 0,
            }
    return summary


def table(collected: dict) -> str:
    """Markdown: mean over seeds ± half of its 95 % interval; * where the paired difference to the first excludes 0."""
    summary, variants, columns = collected["summary"], collected["variants"], []
    for row in summary.values():
        columns += [column for column in row if column not in columns]
    order = ["in domain", "OOD average", *DOMAINS]
    columns.sort(key=lambda column: order.index(column) if column in order else len(order))
    rows = []
    for name, row in summary.items():
        cells = []
        for column in columns:
            cell = row.get(column)
            half = (cell["interval"][1] - cell["interval"][0]) / 2 if cell else 0
            cells.append(f"{cell['mean']:.1f} ± {half:.1f}" + (" *" if cell["significant"] else "") if cell else "")
        flags = variants[name]["flags"] if name in variants else ""
        rows.append([name, *cells, f"`{flags}`" if flags else ""])
    return runs.markdown_table(["%", *columns, "flags"], rows)


def main() -> None:
    config = runs.parse_config(Config, __doc__)
    if not config.study:
        for name, study in STUDIES.items():
            print(f"{name:16s} {study.script}, {len(study.seeds)} seeds of: {', '.join(study.variants)}")
        return
    for name in STUDIES if config.study == "all" else [config.study]:
        study = STUDIES[name]
        run_all(name, study, config)
        collected = collect(name, study, config)
        runs.write_json(runs.make_folder(runs.RESULTS) / f"{name}.json", collected)
        print(f"\n{name}\n{table(collected)}")
        if config.readme and not runs.put_into_readme(name, table(collected)):
            print(f"No README has a line <!-- table {name} -->; put one there with <!-- end --> below it.")


if __name__ == "__main__":
    runs.run_script(main, "Stopped. The same command goes on where it was.")
