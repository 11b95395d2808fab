import json
import re
from pathlib import Path

import numpy as np
import pytest

import runs
import study

README = (runs.ROOT / "README.md").read_text() + (runs.ROOT / "results" / "README.md").read_text()
TABLES = [name for name in re.findall("<!-- table (.*) -->", README) if name in study.STUDIES]
RESULTS = [path for name in study.STUDIES if (path := runs.ROOT / "results" / f"{name}.json").exists()]


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_exactly_what_the_results_files_hold(name: str) -> None:
    collected = json.loads((runs.ROOT / "results" / f"{name}.json").read_text())
    assert README.split(f"<!-- table {name} -->\n")[1].split("\n<!-- end -->")[0] == study.table(collected)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_name_every_variant_seed_and_commit_of_their_study(path: Path) -> None:
    collected, declared = json.loads(path.read_text()), study.STUDIES[path.stem]
    assert list(collected["variants"]) == list(declared.variants)
    for variant in collected["variants"].values():
        assert set(variant["seeds"]) == {str(seed) for seed in declared.seeds}
        assert all(len(seed["commit"]) == 40 for seed in variant["seeds"].values())
    assert json.loads(json.dumps(study.summarize(collected))) == collected["summary"]


def test_interval_covers_the_mean_and_shrinks_with_agreement() -> None:
    low, high = study.interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert 1 < low < 3 < high < 5
    assert study.interval(np.array([3.0, 3.0, 3.0])) == (3.0, 3.0)


def test_a_column_is_marked_only_where_the_paired_difference_excludes_zero() -> None:
    def seed(home: float, away: float) -> dict:
        scores = {"mean": away, "shortcut": 0.0, "unfinished": 0.0}
        return {
            "before": {d: scores for d in study.DOMAINS},
            "after": {d: scores for d in study.DOMAINS} | {"add": scores | {"mean": home}},
        }

    def variant(home: list[float]) -> dict:
        seeds = {str(i): seed(value, 0.5) for i, value in enumerate(home)}
        return {"flags": "", "config": {"domain": "add"}, "seeds": seeds}

    collected = {
        "against": "first",
        "variants": {"A": variant([0.2, 0.5, 0.8]), "B": variant([0.3, 0.6, 0.9]), "C": variant([0.1, 0.6, 0.8])},
    }
    collected["summary"] = study.summarize(collected)
    rows = {line.split("|")[1].strip(): line.split("|")[2] for line in study.table(collected).splitlines()[2:]}
    assert "*" in rows["B"] and "60.0" in rows["B"]  # ten points on every seed, though the seeds differ by sixty
    assert "*" not in rows["C"] and "*" not in rows["A"]


def test_five_seeds_mark_one_in_six_of_the_differences_that_are_none() -> None:
    """As the READMEs say: a percentile bootstrap of five is narrower than its 95 %."""
    differences = np.random.default_rng(0).normal(size=(1000, 5))
    intervals = [study.interval(each) for each in differences]
    assert sum(low > 0 or high < 0 for low, high in intervals) / 1000 == pytest.approx(1 / 6, abs=0.03)
