"""Studies: many small runs of the training scripts, and the table that sums them up.

    python study.py                    lists the studies
    python study.py rosd               runs what is missing of one, prints its table, writes results/rosd.json
    python study.py rosd --readme      also puts the table into README.md, between its markers

A study is data: a script, variants by their flags, seeds. One process a core, one thread each; finished runs are
skipped, so Ctrl-C and the same command again go on where it stopped.
"""

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


@dataclass(frozen=True)
class Study:
    """Variants (name -> flags) of a script over seeds; the first variant is the one the others are compared with."""

    script: str
    variants: dict[str, list[str]]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    flags: list[str] = field(default_factory=list)  # of every run


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
    "spd-generation": Study(
        "train_spd.py",
        {
            "SPD": [],
            "full-sequence loss": ["--loss", "full"],
            "random subspace": ["--subspace", "random"],
            "keys only": ["--project", "k"],
            "values only": ["--project", "v"],
            "calibrated on mul": ["--calibration-domain", "mul"],
            "20 calibration examples": ["--calibration-size", "20"],
            "paper's layers, half rank": ["--layers", "paper", "--rank", "50%"],
            "the same, full-sequence loss": ["--layers", "paper", "--rank", "50%", "--loss", "full"],
            "the same, random subspace": ["--layers", "paper", "--rank", "50%", "--subspace", "random"],
        },
        seeds=(1, 2, 3, 4, 5),
        flags=["--epochs", "0", "--prompts", "1"],
    ),
}


@dataclass(frozen=True)
class Config:
    study: str = option("", "which study; without one they are listed", choices=("", *STUDIES), positional=True)
    out: str = option("out/studies", "folder for the runs")
    processes: int = option(os.cpu_count() or 1, "runs side by side", minimum=1)
    readme: bool = option(False, "put the table into README.md")


def folder_name(variant: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in variant)


def run_all(name: str, study: Study, config: Config) -> None:
    """Run what has no results.json yet, `processes` at a time, each in a process with one thread."""
    waiting = []
    for seed in study.seeds:
        for variant, flags in study.variants.items():
            folder = Path(config.out).resolve() / name / folder_name(variant)
            if not list(folder.glob(f"*seed{seed}/results.json")):
                command = [
                    sys.executable,
                    study.script,
                    *study.flags,
                    *flags,
                    "--seed",
                    str(seed),
                    "--out",
                    str(folder),
                ]
                waiting.append(([*command, "--no-baseline", "--threads", "1", "--resume"], folder / f"seed{seed}.log"))
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
    """variant -> seed -> the figures of its results.json that the tables need."""
    collected: dict = {"study": name, "variants": {}}
    for variant, flags in study.variants.items():
        folder = Path(config.out).resolve() / name / folder_name(variant)
        entry = collected["variants"][variant] = {"flags": " ".join(study.flags + flags), "seeds": {}}
        for seed in study.seeds:
            result = json.loads(next(folder.glob(f"*seed{seed}/results.json")).read_text())
            config_of_run = json.dumps(result["config"]).replace(f"{runs.ROOT}/", "")  # no path of this machine
            entry["commit"], entry["config"] = result["commit"], json.loads(config_of_run)
            before, after = result["before"], result["after"]
            if "rounds" in result:  # of SPD: what it would train on, without and with projection
                before, after = result["own_generation"], result["rounds"][0]["generation"]
            entry["seeds"][str(seed)] = {"before": before, "after": after}
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


def table(collected: dict) -> str:
    """Markdown: mean over seeds ± half of its 95 % interval; * where the paired difference to the first excludes 0."""
    variants = collected["variants"]
    first = next(iter(variants.values()))
    home = first["config"]["domain"]
    measured = {"base": [figures(seed["before"], home) for seed in first["seeds"].values()]}
    measured |= {name: [figures(s["after"], home) for s in entry["seeds"].values()] for name, entry in variants.items()}
    reference = measured[next(iter(variants))]
    rows = []
    for name, seeds in measured.items():
        cells = []
        for column in seeds[0]:
            values = np.array([seed[column] for seed in seeds])
            low, high = interval(values)
            low_difference, high_difference = interval(values - np.array([seed[column] for seed in reference]))
            differs = low_difference > 0 or high_difference < 0
            cells.append(f"{values.mean():.1f} ± {(high - low) / 2:.1f}" + (" *" if differs else ""))
        flags = variants[name]["flags"] if name in variants else ""
        rows.append([name, *cells, f"`{flags}`" if flags else ""])
    return runs.markdown_table(["mean@16, %", *reference[0], "flags"], rows)


def put_into_readme(name: str, text: str) -> None:
    path = runs.ROOT / "README.md"
    begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
    before, rest = path.read_text().split(begin)
    path.write_text(before + begin + text + "\n" + end + rest.split(end, 1)[1])


def main() -> None:
    config = runs.parse_config(Config, __doc__)
    if not config.study:
        for name, study in STUDIES.items():
            print(f"{name:12s} {study.script}, {len(study.seeds)} seeds of: {', '.join(study.variants)}")
        return
    study = STUDIES[config.study]
    run_all(config.study, study, config)
    collected = collect(config.study, study, config)
    runs.make_folder(runs.ROOT / "results")
    runs.write_json(runs.ROOT / "results" / f"{config.study}.json", collected)
    print(table(collected))
    if config.readme:
        put_into_readme(config.study, table(collected))


if __name__ == "__main__":
    runs.run_script(main, "Stopped. The same command goes on where it was.")
