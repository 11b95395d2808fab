"""Run a study: many small runs of the training scripts, and the table that sums them up.

    python -m tools.study                     lists the studies
    python -m tools.study rosd                runs what is missing, writes results/rosd.json, prints the table
    python -m tools.study rosd --readme       also puts the table between its markers in the READMEs
    python -m tools.study rosd --show         prints the table of what is there and runs nothing
    python -m tools.study all                 every study

results/<study>.json is written after every finished run and is meant to be committed. A run that one of these files
holds with the same flags, seed, base (by its checksum) and code is not run again: a study continues where it stopped,
even on another machine. Runs from before the code was recorded count as well. Delete the files to measure it all anew.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from errors import UserError
from evaluate import elsewhere
from harness import files
from harness.cli import option, parse_config, run_script
from harness.run import run_name
from tools import stats
from tools.studies import STUDIES, Study, flags_of, planned


@dataclass(frozen=True)
class Config:
    study: str = option("", "which study; without one they are listed", choices=("", "all", *STUDIES), positional=True)
    out: str = option("out/studies", "folder for the runs")
    processes: int = option(os.cpu_count() or 1, "runs side by side, one thread each", minimum=1)
    show: bool = option(False, "run nothing")
    readme: bool = option(False, "put the table into the READMEs")


class Job(NamedTuple):
    """One run of a study."""

    script: str
    variant: str
    base: int | str
    seed: int
    flags: str
    checksum: str  # of the base

    @property
    def key(self) -> tuple:
        """What decides the figures of a run; its variant is only a name."""
        return self.script, self.flags, self.checksum, self.seed


def base_path(base: int | str) -> str:
    """The checkpoint of a pretraining seed, or the folder that is named."""
    if isinstance(base, str):
        return base
    return "data/base.pt" if base == 0 else f"results/bases/seed{base}.pt"


def base_checksum(base: int | str) -> str:
    path = base_path(base)
    try:
        return files.checksum(path)
    except UserError as error:
        command = f"-m tools.smollm2 {path}" if isinstance(base, str) else f"pretrain.py --seed {base} --out {path}"
        raise UserError(f"there is no base {path}; `python {command}` makes it") from error


def plan(study: Study) -> list[Job]:
    """All runs; seeds in the outer loop, so that a study cut short has every variant on the same bases and seeds."""
    checksums = {base: base_checksum(base) for base in study.bases}
    return [
        Job(study.script, variant, base, seed, flags_of(study, variant), checksums[base])
        for seed, base, variant in itertools.product(study.seeds, study.bases, study.variants)
    ]


# ---------------------------------------------------------------------------------------------- results files


def known_runs() -> dict[tuple, dict]:
    """The finished runs of today's code in all results files, by the key of their job; see `compact` for a run.

    A run without a version of the code is older than these versions and counts where there is no newer one.
    """
    known, code = {}, files.code_checksum()
    contents = [files.read_json(path) for path in sorted(stats.RESULTS.glob("*.json"))]
    runs = [run | {"script": content["script"]} for content in contents for run in content.get("runs", ())]
    for run in sorted(runs, key=lambda run: ("code" in run, len(run["curve"])), reverse=True):
        if run.get("code", code) == code:
            known.setdefault((run.pop("script"), run["flags"], run["base_checksum"], run["seed"]), run)
    return known


def finished(study: Study, jobs: list[Job]) -> dict[Job, dict]:
    """The runs of a study that need not be run again: known ones that have every column of its curve."""
    done, known = {}, known_runs()
    for job in jobs:
        run = known.get(job.key)
        if run and all(column in run["curve"] for column in study.curve):
            curve = {column: run["curve"][column] for column in study.curve}
            done[job] = run | {"variant": job.variant, "base": job.base, "curve": curve}
    return done


def write_results(name: str, study: Study, jobs: list[Job], done: dict[Job, dict]) -> dict:
    """Write the finished runs to results/<study>.json, variant by variant -> its content."""
    runs = [done[job] for variant in study.variants for job in jobs if job.variant == variant and job in done]
    head = {"study": name, "script": study.script, "reference": study.reference, "planned": planned(study)}
    return stats.write_results(name, head, "runs", runs)


def compact(job: Job, study: Study, folder: Path) -> dict[str, Any]:
    """What tables and pictures need of a finished run, every number rounded to four digits."""
    result = files.read_json(folder / "results.json")
    rows = [json.loads(line) for line in files.read_text(folder / "metrics.jsonl").splitlines()]
    config, home = result["config"], result["config"]["domain"]
    run = {"variant": job.variant, "base": job.base, "seed": job.seed, "flags": job.flags, "domain": home}
    run |= {"base_checksum": job.checksum, "code": files.code_checksum(), "commit": result["commit"]}
    run |= {"seconds": round(result["seconds"])}
    if "group" in config:  # of train_rosd.py
        run["updates"] = config["steps"] * config["minibatches"] * config["updates"]
        run["rollouts"] = config["steps"] * config["batch"] * config["group"]
    run |= {when: compact_scores(result[when]) for when in ("before", "after")}
    if "generation" in result:  # of train_spd.py
        run["base_text"] = compact_scores(result["base_text"])[home]
        run["generation"] = compact_scores(result["generation"][-1])[home]
    run["curve"] = {column: curve_column(rows, column, home) for column in study.curve}
    return json.loads(json.dumps(run), parse_float=lambda digits: round(float(digits), 4))


def compact_scores(scores: dict[str, dict] | None) -> dict[str, dict] | None:
    counts = ("problems", "samples")
    return scores and {d: {name: x for name, x in score.items() if name not in counts} for d, score in scores.items()}


def curve_column(rows: list[dict], column: str, home: str) -> list[float | None]:
    """A column of the metrics, a value a step, None where it has none; [] where no step has one."""
    values, tests = [row.get(column) for row in rows], [row.get("tested", {}) for row in rows]
    if column == "home":
        values = [test.get(home) for test in tests]
    if column == "away":
        values = [elsewhere({d: {"mean": x} for d, x in test.items()}, home).get("elsewhere") for test in tests]
    return values if any(value is not None for value in values) else []


# ---------------------------------------------------------------------------------------------- running


def command_of(job: Job, out: Path) -> tuple[list[str], Path]:
    """The command of a run, and the folder it leaves its results in; UserError where the script rejects its flags."""
    flags = [*job.flags.split(), "--seed", str(job.seed), "--base", base_path(job.base), "--out", str(out)]
    flags += ["--no-baseline", "--resume"]
    script = importlib.import_module(job.script.removesuffix(".py"))
    settings = parse_config(script.Config, "", flags, script.defaults_of)
    preset = {"preset": settings.preset} if hasattr(settings, "preset") else {}
    reference = script.configure(settings.method, **preset)
    return [sys.executable, job.script, *flags], out / run_name(settings, reference)


def run_study(name: str, study: Study, config: Config) -> dict:
    """Run what is missing, `processes` at a time -> the content of the results file."""
    jobs = plan(study)
    done = finished(study, jobs)
    results = write_results(name, study, jobs, done)
    out = files.make_folder(Path(config.out).resolve() / name)
    unique = {job.key: job for job in jobs if job not in done}  # two variants may be the same on a base
    waiting = [(job, *command_of(job, out)) for job in unique.values()]
    running: list[tuple[subprocess.Popen, Job, Path]] = []
    failed: list[Path] = []
    with tqdm(total=len(jobs), initial=len(done), desc=name, unit="run") as progress:
        try:
            while running or waiting:
                while waiting and len(running) < config.processes:
                    job, command, folder = waiting.pop(0)
                    with Path(f"{folder}.log").open("w", encoding="utf-8") as log:
                        one = os.environ | {"OMP_NUM_THREADS": "1"}
                        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=files.ROOT, env=one)
                    running.append((process, job, folder))
                time.sleep(0.3)
                ended = [entry for entry in running if entry[0].poll() is not None]
                running = [entry for entry in running if entry not in ended]
                failed += [folder for process, _, folder in ended if process.returncode]
                for job, folder in [(job, folder) for process, job, folder in ended if not process.returncode]:
                    done |= {twin: compact(twin, study, folder) for twin in jobs if twin.key == job.key}
                    done = finished(study, jobs) | done  # another process may have written some
                    results = write_results(name, study, jobs, done)
                    progress.update()
        finally:
            for process, _, _ in running:
                process.terminate()
                process.wait()
    if failed:
        raise UserError(f"{len(failed)} runs of {name} failed, the others are kept; read {failed[0]}.log")
    return results


def main() -> None:
    config = parse_config(Config, __doc__)
    if not config.study:
        for name, study in STUDIES.items():
            print(f"{name:13s} {planned(study):3d} runs of {study.script}: {'; '.join(study.variants)}")
        return
    for name in STUDIES if config.study == "all" else [config.study]:
        results = stats.read_results(name) if config.show else run_study(name, STUDIES[name], config)
        print(f"\n{name}\n{stats.table(results)}\n")
        if config.readme and not stats.fill_readme(name, partial(stats.table, results)):
            print(f"No README has a line <!-- table {name} -->; put one there with <!-- end --> below it.")


if __name__ == "__main__":
    run_script(main, "Stopped. The same command goes on where it was.")
