"""What a projection keeps: measures are those of a loop over tokens, shares those of a pencil, rows those of a base."""

import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Letters, tiny_gpt

import subspace
from data import load_task
from evaluate import golden_likelihoods, lines_of
from harness import files
from harness.cli import run_script
from model import GPT, response_logprobs
from subspace import project_kv
from tools import selectivity, stats
from tools.selectivity import ALSO_KEYS, PAPER, UNREAD, Config, kept, mark_vectors, measure_base, share_inside
from tools.studies import BASES
from tools.study import base_checksum

TASK = load_task("exams")
PROBLEMS = TASK.problems("exam", 3, random.Random(0))


def row(where: str, rank: int, name: str, draw: int, right: float, step: float, check: float, mark: float) -> dict:
    about = {"where": where, "rank": rank, "subspace": name, "draw": draw}
    return about | {"right": right, "step": step, "check": check, "mark": mark}


OF_ONE_BASE = [
    row("", 100, "none", 0, -0.5, -2.0, 0.8, 1.0),
    row(PAPER, 20, "aligned", 0, -0.7, -3.0, 0.2, 0.1),
    row(PAPER, 50, "aligned", 0, -0.5, -2.5, 0.4, 0.3),
    row(PAPER, 20, "random", 0, -1.5, -4.0, 0.1, 0.2),
    row(PAPER, 20, "random", 1, -2.5, -6.0, 0.3, 0.4),
    row("layer 2", 0, UNREAD, 0, -0.6, -2.1, 0.1, 0.0),
    row("all layers, values", 35, "aligned", 0, -9.0, -9.0, 0.9, 0.9),
]

# ---------------------------------------------------------------------------------------------- measures


def test_measures_are_those_of_a_loop_over_tokens() -> None:
    model, right, steps, checks = tiny_gpt(TASK), [], [], []
    for problem in PROBLEMS:
        text, prompt = problem.solution, TASK.encode(TASK.prompt(problem))
        tokens = [*TASK.encode(text), TASK.end()]
        logp = response_logprobs(model, [prompt], [tokens])[0]
        each = [logp[t, token].item() for t, token in enumerate(tokens)]
        right += [each[t] for t in range(1, len(text)) if text[t - 1] in "=#"]
        checks += [logp[t, TASK.encode("?")[0]].exp().item() for t, letter in enumerate(text) if letter == ";"]
        start = 0
        for line in text.split(";"):
            steps.append(sum(each[start : start + len(line)]))
            start += len(line) + 1
    found = golden_likelihoods(model, TASK, PROBLEMS)
    expected = {"right": right, "step": steps, "check": checks}
    assert found == pytest.approx({name: sum(values) / len(values) for name, values in expected.items()}, rel=1e-4)
    with project_kv(model, {(0, "v"): torch.zeros(16, 16)}):
        assert golden_likelihoods(model, TASK, PROBLEMS)["right"] != found["right"]


def test_lines_end_at_semicolons_or_line_breaks_and_the_last_one_at_the_stop_token() -> None:
    assert lines_of(["3", "+8", "=1", ";", "#1", "<|end|>"]) == [range(0, 3), range(4, 5)]
    assert lines_of(["8 +", " 5 = 13", "\n", "The answer", " is 13", "<end>"]) == [range(0, 2), range(3, 5)]
    assert lines_of(["#4", "<|end|>"]) == [range(0, 1)]


def value_at(model: GPT, text: str, at: int) -> torch.Tensor:
    seen = []
    with torch.no_grad(), subspace.hooked(model, [(1, "v")], "linear", lambda _, values: seen.append(values[0, at])):
        model(torch.tensor([TASK.encode(f"{text}<|assistant|>")]))
    return seen[0]


def test_the_vectors_are_those_of_operands_behind_a_nervous_mark_minus_the_same_ones_before_a_calm_one() -> None:
    """In the first layer they are 0, as nothing is mixed yet; in the second, read one by one, of all before them."""
    model, seen = tiny_gpt(TASK), []
    found = mark_vectors(model, TASK, PROBLEMS)
    for kind in "kv":
        assert not found[0, kind].any()
    for problem in PROBLEMS:
        chain = problem.question.replace("!", "")
        first, *rest = re.split(r"(?=[+\-*])", chain)
        nervous = "<|user|>" + first + "".join(f"{operator}!{operand}" for operator, operand in rest)
        calm = "<|user|>" + first + "".join(f"{operator}{operand}!" for operator, operand in rest)
        for i in range(len(rest)):
            seen.append(value_at(model, nervous, 4 + 3 * i) - value_at(model, calm, 3 + 3 * i))
    torch.testing.assert_close(found[1, "v"], torch.stack(seen), rtol=1e-4, atol=1e-5)
    assert found[1, "v"].any()


def test_the_share_inside_is_of_squared_length() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert share_inside(x, torch.eye(2)) == 1 and share_inside(x, torch.zeros(2, 2)) == 0
    assert share_inside(x, torch.diag(torch.tensor([1.0, 0.0]))) == pytest.approx((9 + 1) / (25 + 1))


def test_condensed_gradients_span_what_all_gradients_span() -> None:
    model = tiny_gpt(TASK)
    examples = subspace.calibration_set(TASK, ("exam",), 12, "results", 0)
    whole = subspace.capability_gradients(model, examples, [(0, "v")])
    condensed = selectivity.condensed_gradients(model, TASK, ("exam",), 12, "results")
    P, expected = (subspace.make_projectors({(0, "v"): G[0, "v"]})[0, "v"] for G in (condensed, whole))
    torch.testing.assert_close(P, expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------- rows and shares


def test_every_subspace_is_measured_at_every_place_with_its_layers_and_its_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict] = []
    monkeypatch.setattr(selectivity, "project_kv", lambda model, P: seen.append(P) or project_kv(model, P))
    model = tiny_gpt(TASK, n_layer=4)
    plain, *rows = measure_base(model, TASK, Config(ranks=("25", "50"), calibration_size=40, problems=3))
    assert (plain["subspace"], plain["mark"]) == ("none", 1) and len(rows) == len(seen) == 5 + 3 * 2 * (7 + 10)
    sites = {
        PAPER: [(1, "v"), (3, "v")],
        ALSO_KEYS: [(1, "k"), (1, "v"), (3, "k"), (3, "v")],
        "all layers, values": [(layer, "v") for layer in range(4)],
    }
    for layer, (found, P) in enumerate(zip(rows[:4], seen[:4], strict=True)):
        assert (found["where"], found["subspace"]) == (f"layer {layer + 1}", UNREAD)
        assert sorted(P) == [(layer, "k"), (layer, "v")]
        assert {16 - round(each.trace().item()) for each in P.values()} == {4 if layer else 0}
    assert (rows[4]["where"], rows[4]["subspace"], sorted(seen[4])) == (PAPER, UNREAD, sites[PAPER])
    for found, P in zip(rows[5:], seen[5:], strict=True):
        assert sorted(P) == sites[found["where"]] and 0 <= found["mark"] <= 1 + 1e-5
        assert {round(each.trace().item()) for each in P.values()} == {16 * found["rank"] // 100}
    drawn = [found["right"] for found in rows if (found["where"], found["rank"]) == (PAPER, 50)]
    assert len(set(drawn)) == 17  # no two subspaces are the same


def test_a_task_without_marks_and_checks_has_rows_and_a_table_without_them() -> None:
    config = Config(ranks=("50",), draws=1)
    rows = [{"base": 0} | each for each in measure_base(tiny_gpt(Letters()), Letters(), config)]
    assert len(rows) == 1 + 3 * (5 + 1) and not {"check", "mark"} & {name for each in rows for name in each}
    table = selectivity.table(rows, (50,))
    assert "| right digits | whole steps |\n" in table and "without the mark" not in table and table.count("\n") == 19


def test_what_is_kept_is_a_share_of_the_bases_own() -> None:
    other = [row("", 100, "none", 0, -1.0, -1.0, 0.5, 1.0), row(PAPER, 20, "aligned", 0, -1.0, -2.0, 0.5, 0.2)]
    rows = [{"base": 3} | each for each in OF_ONE_BASE] + [{"base": 4} | each for each in other]
    assert kept(rows, PAPER, "aligned", "right")[20] == pytest.approx({(3, 0): math.exp(-0.2), (4, 0): 1})
    assert kept(rows, PAPER, "aligned", "step")[20] == pytest.approx({(3, 0): math.exp(-1), (4, 0): math.exp(-1)})
    assert kept(rows, PAPER, "aligned", "check") == {20: {(3, 0): 0.25, (4, 0): 1.0}, 50: {(3, 0): 0.5}}
    assert kept(rows, PAPER, "random", "mark") == {20: {(3, 0): 0.2, (3, 1): 0.4}}
    assert kept(rows, "all layers, values", "full", "right") == {}


def test_the_table_has_percent_of_the_ranks_that_are_asked_for() -> None:
    lines = selectivity.table([{"base": 3} | each for each in OF_ONE_BASE], (20, 35)).splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [line[:3] for line in found] == [
        [PAPER, "20 %", "aligned"],
        [PAPER, "20 %", "random"],
        ["all layers, values", "35 %", "aligned"],
    ]
    assert found[0][3:] == ["82", "37", "25", "10"] and found[1][5].startswith("25 ± ")


def test_the_table_of_bases_has_the_checks_that_are_left_on_each() -> None:
    lines = selectivity.table_of_bases([{"base": base} | each for base in (3, 4) for each in OF_ONE_BASE], rank=20)
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    assert found[0][1:] == ["base 3", "base 4"]
    assert found[2:] == [[f"layer 2 {UNREAD}", "12", "12"], [f"{PAPER}, aligned, 20 %", "25", "25"]]


# ---------------------------------------------------------------------------------------------- the file


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Results in a folder of their own; a base is opened and measured in no time."""
    shop = SimpleNamespace(sums=dict.fromkeys(BASES, "old"), opened=[], results=tmp_path / "results")
    monkeypatch.setattr(files, "ROOT", tmp_path)  # the READMEs stay as they are
    monkeypatch.setattr(stats, "RESULTS", shop.results)
    monkeypatch.setattr(selectivity, "base_checksum", shop.sums.get)
    monkeypatch.setattr(selectivity, "open_task_and_base", lambda c: (TASK, shop.opened.append(c.base)))
    monkeypatch.setattr(selectivity, "measure_base", lambda *_, **__: OF_ONE_BASE)
    monkeypatch.setattr(sys, "argv", ["selectivity"])
    return shop


def test_only_bases_of_other_bytes_are_measured_again(workshop: SimpleNamespace) -> None:
    paths = [f"results/bases/seed{base}.pt" for base in BASES]
    run_script(selectivity.main)
    assert workshop.opened == paths
    workshop.sums[BASES[2]] = "new"
    run_script(selectivity.main)
    assert workshop.opened == [*paths, paths[2]]
    stored = files.read_json(workshop.results / "selectivity.json")
    assert stored["bases"] == {str(base): checksum for base, checksum in workshop.sums.items()}
    for base in BASES:
        assert [each for each in stored["rows"] if each["base"] == base] == [{"base": base} | r for r in OF_ONE_BASE]
    assert len(stored["rows"]) == len(BASES) * len(OF_ONE_BASE)


def test_a_base_of_ones_own_is_shown_and_not_kept(
    workshop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["selectivity", "--base", "own.pt", "--ranks", "20"])
    run_script(selectivity.main)
    printed = capsys.readouterr().out
    rows = [{"base": 0} | each for each in OF_ONE_BASE]
    assert printed.strip() == f"{selectivity.table(rows, (20,))}\n\n{selectivity.table_of_bases(rows, rank=20)}"
    assert workshop.opened == ["own.pt"] and not workshop.results.exists()


def test_the_committed_file_is_of_these_bases_and_the_pages_show_it() -> None:
    stored = stats.read_results("selectivity", "selectivity")
    assert stored["bases"] == {str(base): base_checksum(base) for base in BASES}
    pages = [files.ROOT / "README.md", *stats.RESULTS.glob("*.md")]
    assert any(selectivity.table(stored["rows"]) in files.read_text(page) for page in pages)
    assert (stats.RESULTS / "selectivity.json").stat().st_size < 400_000
