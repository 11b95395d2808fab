"""Studies: statistics that cover what they promise, runs that are never lost or repeated, tables that match files."""

import dataclasses
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from errors import UserError
from harness import files
from harness.cli import parse_config
from harness.run import run_name
from tools import stats, study
from tools.stats import Estimate, difference, estimate
from tools.studies import STUDIES, Study, flags_of, planned

SMALL = "--eval-problems 1 --eval-samples 1"
TINY = {
    "train_rosd.py": f"{SMALL} --steps 2 --batch 2 --group 2",
    "train_spd.py": f"{SMALL} --prompts 4 --calibration-size 64 --epochs 1",
}
STORED = {path.stem: files.read_json(path) for path in stats.RESULTS.glob("*.json") if path.stem in STUDIES}
STORED = {name: content for name, content in STORED.items() if "runs" in content}
PAGES = "".join(map(files.read_text, (files.ROOT / "README.md", *stats.RESULTS.glob("*.md"))))
SHOWN = re.findall(r"<!-- table ([\w-]+)( differences)?(?:: (.+?))? -->\n(.*?)\n<!-- end -->", PAGES, re.DOTALL)

# ---------------------------------------------------------------------------------------------- statistics


def test_quantiles_are_those_of_the_printed_tables() -> None:
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}
    assert {degrees: stats.t_quantile(degrees) for degrees in printed} == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize(("problems_of", "covers"), [("each base and seed", True), ("each seed", False)])
def test_intervals_cover_the_truth_in_95_of_100_studies_where_no_bases_share_problems(
    problems_of: str, covers: bool
) -> None:
    """4,000 studies of 5 bases x 3 seeds: a base is 3 points off, a problem 30; 512 problems x 2 samples a run.

    Bases that share the 64 problems of a seed are off together, which no interval over bases can see.
    """
    rng, shape = np.random.default_rng(0), (4000, 5, 3)
    problems, shared = (512, shape) if covers else (64, (4000, 1, 3))
    accuracy = 0.7 + rng.normal(0, 0.03, (4000, 5, 1))  # of the base that a run starts from
    accuracy = accuracy + rng.normal(0, 0.30 / problems**0.5, shared)  # on the problems that it is tested on
    accuracy = accuracy + rng.normal(0, 0.45 / (1024**0.5), shape)  # of the samples
    keys = [*itertools.product(range(5), range(3))]
    found = [estimate(dict(zip(keys, study.ravel(), strict=True))) for study in accuracy]
    covered = sum(abs(each.mean - 0.7) < each.half for each in found) / len(found)
    assert abs(covered - 0.95) < 0.015 if covers else covered < 0.9


def test_a_base_counts_once_however_many_seeds_it_has() -> None:
    two = {(0, 0): 1.0, (1, 0): 2.0}
    many = {(base, seed): float(base + 1) for base in (0, 1) for seed in range(50)}
    assert estimate(many) == estimate(two) == Estimate(1.5, pytest.approx(stats.t_quantile(1) * 0.5))


def test_one_base_falls_back_to_its_seeds_and_one_run_has_no_interval() -> None:
    found = estimate({(3, seed): value for seed, value in enumerate((1.0, 2.0, 3.0))})
    assert found == Estimate(2.0, pytest.approx(4.303 / 3**0.5, abs=1e-3))
    assert estimate({(0, 0): 7.0}) == Estimate(7.0, None) and not estimate({(0, 0): 7.0}).excludes_zero


def test_differences_are_paired_and_ignore_runs_without_a_partner() -> None:
    reference = {(base, 0): 10.0 * base for base in range(4)}
    better = {key: value + 1 + 0.1 * key[0] for key, value in reference.items()} | {(9, 9): 500.0}
    found = difference(better, reference)
    assert found.mean == pytest.approx(1.15) and found.excludes_zero
    assert not difference({(b, 0): (-1.0) ** b for b in range(4)}, dict.fromkeys(reference, 0.0)).excludes_zero
    assert difference(better, {}) is None


# ---------------------------------------------------------------------------------------------- tables


def a_run(variant: str, base: int, seed: int, home: float, away: float = 0.5, **more: object) -> dict:
    scores = {d: {"mean": mean, "merged": 0.1, "unfinished": 0.0} for d, mean in (("mix", home), ("add", away))}
    before = {domain: score | {"mean": 0.4} for domain, score in scores.items()}
    about = {"variant": variant, "base": base, "seed": seed, "domain": "mix", "flags": f"--flag {variant}"}
    return about | {"before": before, "after": scores, "curve": {}} | more


def results_of(runs: list[dict], **more: object) -> dict:
    return {"study": "x", "script": "train_rosd.py", "reference": "first", "planned": len(runs), "runs": runs} | more


def cells(table: str, row: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} ")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_row_is_marked_only_where_its_paired_difference_excludes_zero() -> None:
    homes = {"A": (0.2, 0.5, 0.8), "B": (0.3, 0.61, 0.9), "C": (0.1, 0.6, 0.8)}
    results = results_of([a_run(name, base, 0, x) for name, row in homes.items() for base, x in enumerate(row)])
    table = stats.table(results)
    assert cells(table, "B")[0].startswith("60.3 ± ") and cells(table, "B")[0].endswith(" *")
    assert not cells(table, "A")[0].endswith("*") and not cells(table, "C")[0].endswith("*")
    assert cells(table, "base")[:2] == ["40.0 ± 0.0", "40.0 ± 0.0 *"]  # elsewhere: 10 points below A on every base
    assert cells(stats.table(results, True), "B")[0].startswith("+10.3 ± ")
    assert cells(stats.table(results, False, ["elsewhere", "merged"]), "A") == ["50.0 ± 0.0", "10.0 ± 0.0"]
    assert "Student's t over 3 bases, 1 seed each" in table and "missing" not in table


def test_the_note_names_one_base_and_missing_runs() -> None:
    note = stats.note(results_of([a_run("A", 0, seed, 0.5) for seed in range(3)], planned=9))
    assert "3 seeds of one base" in note and "6 of 9 runs are still missing" in note
    assert stats.table(results_of([])) == "No run is finished."


def test_spd_rows_show_the_text_and_its_gain_over_the_base_at_the_same_temperature() -> None:
    runs = []
    for base in range(3):
        for variant, own, written in (("SPD", 0.5, 0.6 + base / 100), ("PSR", 0.3, 0.3)):
            text = {"base_text": {"mean": own}, "generation": {"mean": written}}
            runs.append(a_run(variant, base, 0, 0.7, **text) | {"before": None, "after": None})
    table = stats.table(results_of(runs, reference="base"))
    assert [cell[:4] for cell in cells(table, "base")[:2]] == ["50.0", "0.0 "]
    assert cells(table, "SPD")[1].startswith("11.0 ± ") and cells(table, "SPD")[1].endswith("*")
    assert cells(table, "PSR")[:2] == ["30.0 ± 0.0", "0.0 ± 0.0"]


def test_a_length_is_in_characters_and_the_groups_with_a_right_rollout_are_of_the_first_and_the_last_steps() -> None:
    run = a_run("A", 0, 0, 0.7) | {"curve": {"solved": [0.5, 0.9, 0.6, 0.7, 0.8, 0.9, 1.0]}}
    run["after"]["mix"]["length"] = 21.5
    before, after = (stats.values_of([run], when) for when in ("before", "after"))
    assert after["length"] == {(0, 0): 21.5} and after["in domain"] == {(0, 0): 70.0}
    assert before["pass@G"] == {(0, 0): 50.0} and after["pass@G"] == {(0, 0): pytest.approx(80.0)}
    assert "pass@G" not in stats.values_of([a_run("A", 0, 0, 0.7)], "after")


def test_other_exams_and_unmarked_problems_are_columns_of_their_own() -> None:
    means = {"exam": 0.1, "exam-add": 0.2, "exam-mul": 0.3, "add": 0.5, "mul": 0.7, "mix": 0.9}
    scores = {domain: {"mean": mean, "unfinished": 0.0} for domain, mean in means.items()}
    more = {"domain": "exam", "before": scores, "after": scores}
    table = stats.table(results_of([a_run("A", base, 0, 0.0) | more for base in (0, 1)]))
    assert [cell.strip() for cell in table.splitlines()[0].split("|")[2:5]] == ["in domain", "other exams", "unmarked"]
    assert cells(table, "A")[:3] == ["10.0 ± 0.0", "25.0 ± 0.0", "70.0 ± 0.0"]


def test_a_table_goes_between_its_markers_and_chooses_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(stats, "RESULTS", tmp_path / "results")
    page = "ä\n<!-- table x: a, b -->\nold\n<!-- end -->\n<!-- table x differences -->\n<!-- end -->\nrest\n"
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    assert stats.fill_readme("x", lambda differences, columns: f"± {differences} {columns}")
    filled = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "± False ['a', 'b']\n<!-- end -->" in filled and "± True None\n<!-- end -->\nrest" in filled
    assert "old" not in filled and not stats.fill_readme("y", lambda differences, columns: "")


@pytest.mark.parametrize("row", [row for row in SHOWN if row[0] in STORED], ids=lambda row: "".join(row[:3]))
def test_the_readmes_show_exactly_what_the_results_files_hold(row: tuple[str, str, str, str]) -> None:
    name, differences, columns, shown = row
    assert shown == stats.table(STORED[name], bool(differences), columns.split(", ") if columns else None)


@pytest.mark.parametrize("name", STORED)
def test_a_results_file_is_small_and_holds_runs_of_its_study(name: str) -> None:
    stored, declared = STORED[name], STUDIES[name]
    for run in stored["runs"]:
        assert run["flags"] == flags_of(declared, run["variant"])
        assert run["base"] in declared.bases and run["seed"] in declared.seeds and len(run["commit"]) >= 40
    assert (stats.RESULTS / f"{name}.json").stat().st_size < 400_000


# ---------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("name", STUDIES)
def test_the_scripts_know_every_flag_and_no_two_variants_are_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = STUDIES[name]
    monkeypatch.setattr(study, "base_path", lambda base: "data/base.pt")
    jobs = [study.Job(declared.script, v, declared.bases[0], 0, flags_of(declared, v), "") for v in declared.variants]
    folders = {study.command_of(job, tmp_path)[1] for job in jobs}
    assert len(folders) == len(set(declared.variants.values())) == len(declared.variants)


def test_seeds_are_in_the_outer_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "base_checksum", str)
    jobs = study.plan(Study({"A": "", "B": "--mask span"}, bases=(0, 1), seeds=(0, 1)))
    assert [(job.seed, job.base, job.variant) for job in jobs] == [*itertools.product((0, 1), (0, 1), "AB")]


def test_a_missing_base_is_told_with_the_command_that_makes_it() -> None:
    with pytest.raises(UserError, match=r"pretrain.py --seed 99 --out results/bases/seed99.pt"):
        study.base_checksum(99)
    with pytest.raises(UserError, match=r"python -m tools.smollm2 nowhere"):
        study.base_checksum("nowhere")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Studies that write into a folder of their own; runs take no time, and may be interrupted."""
    monkeypatch.setattr(stats, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(study, "base_checksum", lambda seed: f"base{seed}")
    monkeypatch.setattr(study, "base_path", lambda seed: "data/base.pt")
    shop = SimpleNamespace(started=[], stop_after=None, fail=())

    class Instant:
        """Takes the place of subprocess.Popen; writes what a run would leave."""

        def __init__(self, command: list[str], **_: object) -> None:
            if len(shop.started) == shop.stop_after:
                raise KeyboardInterrupt
            script, *flags = command[1:]
            shop.started.append(" ".join(flags[: flags.index("--out")]))
            self.returncode = int(any(text in shop.started[-1] for text in shop.fail))
            module = importlib.import_module(script[:-3])
            config = parse_config(module.Config, "", flags, module.defaults_of)
            folder = files.make_folder(Path(config.out) / run_name(config, module.configure(config.method)))
            scores = {d: {"mean": 1 / 3, "unfinished": 0.0, "problems": 9, "samples": 9} for d in ("mix", "add")}
            about = {"config": files.plain(config) | {"domain": "mix", "minibatches": 2}, "commit": "c" * 40}
            files.write_json(folder / "results.json", about | {"seconds": 1.25, "before": scores, "after": scores})
            tested = {"mix": 0.4, "add": 0.2, "exam": 0.9}
            rows = [{"step": 0, "accuracy": 0.123456}, {"step": 1, "accuracy": 0.5, "tested": tested}]
            files.write_lines(folder / "metrics.jsonl", rows)

        def poll(self) -> int:
            return self.returncode

        terminate = wait = poll

    monkeypatch.setattr(study.subprocess, "Popen", Instant)
    shop.config = study.Config(out=str(tmp_path / "runs"), processes=1)
    shop.study = Study({"A": "", "B": "--mask span"}, bases=(0, 1), seeds=(0, 1))
    shop.run = lambda declared=shop.study, name="x": study.run_study(name, declared, shop.config)
    shop.file = lambda name="x": files.read_json(stats.RESULTS / f"{name}.json")
    return shop


def test_an_interrupted_study_keeps_finished_runs_and_goes_on_with_the_others(workshop: SimpleNamespace) -> None:
    workshop.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        workshop.run()
    assert len(workshop.file()["runs"]) == 3
    workshop.stop_after = None
    results = workshop.run()
    assert len(workshop.started) == planned(workshop.study) == len(results["runs"]) == 8
    assert workshop.file() == json.loads(json.dumps(results))
    assert [run["variant"] for run in results["runs"]] == ["A"] * 4 + ["B"] * 4
    workshop.run()
    assert len(workshop.started) == 8  # nothing is run twice


def test_only_other_flags_and_other_bases_are_run_again(
    workshop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.run()
    renamed = dataclasses.replace(workshop.study, variants={"A, renamed": "", "B": "--mask oracle"})
    assert {run["variant"] for run in workshop.run(renamed)["runs"]} == {"A, renamed", "B"}
    assert len(workshop.started) == 12 and all("--mask oracle" in command for command in workshop.started[8:])
    monkeypatch.setattr(study, "base_checksum", lambda seed: f"new{seed}" if seed else "base0")
    workshop.run(renamed)
    assert len(workshop.started) == 16  # those of base 1


def test_runs_of_other_code_are_not_reused_but_those_from_before_it_was_recorded_are(
    workshop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stats.RESULTS / "x.json"
    stored = workshop.run()
    other = [{**run, "code": "other"} for run in stored["runs"][:3]]
    files.write_json(path, stored | {"runs": other + stored["runs"][3:]})
    workshop.run()
    assert len(workshop.started) == 11
    old = [{name: x for name, x in run.items() if name != "code"} for run in stored["runs"]]
    files.write_json(path, stored | {"runs": old[:4] + stored["runs"][4:]})
    assert "2 versions of the code" in stats.note(workshop.run()) and len(workshop.started) == 11


def test_equal_variants_and_studies_whose_curves_suffice_share_runs(workshop: SimpleNamespace) -> None:
    twins = dataclasses.replace(workshop.study, variants={"A": "", "B": "--mask span", "A again": ""})
    assert len(workshop.run(twins)["runs"]) == 12 and len(workshop.started) == 8
    workshop.run(name="y")
    assert len(workshop.started) == 8 and len(workshop.file("y")["runs"]) == 8
    more = workshop.run(dataclasses.replace(workshop.study, curve=("accuracy", "home", "quote_match")), name="z")
    assert len(workshop.started) == 16  # the home column was not kept
    assert more["runs"][0]["curve"] == {"accuracy": [0.1235, 0.5], "home": [None, 0.4], "quote_match": []}


def test_a_failed_run_is_told_with_its_log_and_stops_no_other(workshop: SimpleNamespace) -> None:
    workshop.fail = ("--mask span",)
    with pytest.raises(UserError, match=r"4 runs of x failed.*\.log"):
        workshop.run()
    assert [run["variant"] for run in workshop.file()["runs"]] == ["A"] * 4


@pytest.mark.parametrize("script", TINY)
def test_real_runs_leave_what_the_study_collects(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Study({"A": ""}, TINY[script], bases=(0,), seeds=(0,), script=script)
    job = study.plan(small)[0]
    command, folder = study.command_of(job, tmp_path)
    monkeypatch.setattr(sys, "argv", command[1:])
    importlib.import_module(script[:-3]).main()
    run = study.compact(job, small, folder)
    away = {"elsewhere"} if script == "train_rosd.py" else {"other exams", "unmarked"}
    assert stats.figures(run, "after").keys() >= away | {"in domain", "unfinished", "length"}
    assert stats.figures(run, "before")
    assert len(json.dumps(run)) < 3000 and run["base_checksum"] == files.checksum("data/base.pt")
    if script == "train_rosd.py":
        assert (run["updates"], run["rollouts"], len(run["curve"]["accuracy"])) == (2, 8, 2)
    else:
        assert set(run["base_text"]) == set(run["generation"]) and "gain" in stats.figures(run, "after")
