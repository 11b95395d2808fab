"""What projections do to decisions: the right positions are asked, and measures are what they say."""

import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt
from tools.mechanism import decisions, make_probe, mark_vectors, measure, share_inside

import subspace
from data import load_task
from harness import files
from harness.cli import run_script
from model import response_logprobs
from subspace import project_kv
from tools import mechanism, stats
from tools.studies import BASES, mechanism_rows

TASK = load_task("arithmetic")
PROBLEMS = TASK.problems("exam", 3, random.Random(0))
GOLDEN = [[*TASK.encode(problem.solution), TASK.end()] for problem in PROBLEMS]
PATH = stats.RESULTS / "spd-mechanism.json"
ROWS = mechanism_rows()
OF_ONE_BASE = [
    {n: x for n, x in row.items() if n not in ("base", "golden")} for row in ROWS if row["base"] == ROWS[0]["base"]
]


def found_in(question: str, text: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for name, t, tokens in decisions(question, list(text)):
        found.setdefault(name, []).append((t, "".join(tokens)))
    return found


def test_a_check_is_asked_once_a_step_and_never_of_a_check() -> None:
    found = found_in("3+8-5!+", "3+8=1?;3+8=1;1-5=6;#6")
    assert found["check"] == [(5, "?"), (18, "?")]
    assert found["stop"] == [(13, "#<|end|>")]  # not before a check; all is done at 19: there the answer belongs
    assert found["right"] == [(4, "1"), (11, "1"), (17, "6"), (20, "6")]
    assert found["merge"] == [(3, "+-*")]


def test_right_is_judged_by_the_step_as_it_is_written_and_the_answer_by_the_last_step() -> None:
    found = found_in("3+8-5*2", "3+8-5=7;7*2=4;#5")
    assert found["right"] == [(6, "6"), (12, "4"), (15, "4")]
    assert found["wrong"][0] == (6, "012345789")
    assert found["merge"] == [(3, "+-*"), (5, "+-*")]  # a third operation is left; the last step has none to take in
    assert found_in("3+8", "+;3=;#3") == {}  # no step, nothing to judge


def test_on_golden_solutions_right_is_asked_at_S() -> None:
    for problem, solution in zip(PROBLEMS, GOLDEN, strict=True):
        pieces = TASK.pieces(solution)
        found = [(t, tokens) for name, t, tokens in decisions(problem.question, pieces) if name == "right"]
        assert [t for t, _ in found] == TASK.decisive(pieces)
        assert all(tokens == (pieces[t],) for t, tokens in found)


def test_measures_are_those_of_a_loop_over_tokens() -> None:
    model = tiny_gpt(TASK)
    probe = make_probe(TASK, PROBLEMS, GOLDEN)
    found = measure(model, probe, probe)
    S, rest, checks = [], [], []
    for prompt, text in zip(probe.prompts, GOLDEN, strict=True):
        logp = response_logprobs(model, [prompt], [text])[0]
        each = [logp[t, token].item() for t, token in enumerate(text)]
        decisive = TASK.decisive(TASK.pieces(text))
        S += [each[t] for t in decisive]
        rest.append(sum(x for t, x in enumerate(each) if t not in decisive))
        behind = [t for t, piece in enumerate(TASK.pieces(text)) if piece == ";"]
        checks += [logp[t, TASK.encode("?")[0]].exp().item() for t in behind]
    assert found["right"] == found["sampled right"] == pytest.approx(sum(S) / len(S), rel=1e-4)
    assert found["rest"] == pytest.approx(sum(rest) / 3, rel=1e-4)
    assert found["check"] == pytest.approx(sum(checks) / len(checks), rel=1e-4)
    with project_kv(model, {(0, "v"): torch.zeros(16, 16)}):
        assert measure(model, probe, probe)["right"] != found["right"]


def test_the_vectors_are_those_of_the_mark() -> None:
    model, prompts = tiny_gpt(TASK), [TASK.encode(TASK.prompt(problem)) for problem in PROBLEMS]
    first = model.blocks[0]
    with torch.no_grad():
        expected = first.attn.v_proj(first.attn_norm(model.embed(torch.tensor(TASK.encode("+")))))  # (1, d)
    torch.testing.assert_close(mark_vectors(model, prompts, [(0, "v")])[(0, "v")], expected.expand(3, -1))


def test_the_share_inside_is_of_squared_length() -> None:
    x, half = torch.randn(4000, 8), torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4))
    assert share_inside(x, torch.eye(8)) == 1 and share_inside(x, torch.zeros(8, 8)) == 0
    assert share_inside(x, half) == pytest.approx(0.5, abs=0.02)


def test_only_bases_of_other_bytes_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["mechanism"])
    sums, measured = dict.fromkeys(BASES, "old"), []
    monkeypatch.setattr(mechanism, "base_checksum", sums.get)
    monkeypatch.setattr(mechanism, "base_path", lambda base: measured.append(base) or "data/base.pt")
    monkeypatch.setattr(mechanism, "measure_base", lambda *_: OF_ONE_BASE)
    run_script(mechanism.main)
    assert measured == [*BASES]
    sums[BASES[2]] = "new"
    run_script(mechanism.main)
    assert measured == [*BASES, BASES[2]]
    held, order = files.read_json(tmp_path / PATH.name), [row["base"] for row in mechanism_rows()]
    assert held["bases"] == {str(base): sum for base, sum in sums.items()}
    assert order == [base for base in BASES for _ in OF_ONE_BASE]


def test_a_base_of_ones_own_is_shown_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["mechanism", "--base", "data/base.pt", "--ranks", "10", "20"])
    ranks: list[tuple] = []
    monkeypatch.setattr(mechanism, "measure_base", lambda *given: ranks.append(given[-1]) or OF_ONE_BASE)
    mechanism.main()
    own = mechanism.mechanism_table([row for row in ROWS if row["base"] == ROWS[0]["base"]])
    shown, expected = ([row.split("|")[2:] for row in x.splitlines()] for x in (capsys.readouterr().out, own))
    assert shown == expected
    assert ranks == [(10, 20)] and not list(tmp_path.iterdir())


def test_golden_is_S_and_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    files.write_json(tmp_path / PATH.name, {"S": 4.5, "columns": ["rest", "right"], "rows": [[-3.0, -0.2]]})
    assert mechanism_rows()[0]["golden"] == pytest.approx(-3.9)


def test_projections_in_the_corner_are_counted_base_by_base() -> None:
    columns = ("base", "subspace", "right", "check", "mark")
    rows = [(0, "none", -0.4, 0.8, 1), (1, "none", -1.0, 0.4, 1), (0, "aligned", -0.45, 0.39, 0.3)]
    rows += [(1, "unmarked", -1.1, 0.19, 0.2), (1, "aligned", -1.0, 0.39, 0.9), (0, "full", -0.4, 0.7, 0.8)]
    rows += [(0, "random", -0.6, 0.1, 0.1)]
    note = mechanism.corner_note([dict(zip(columns, row, strict=True)) for row in rows])
    assert "2 of 3 aligned, 0 of 1 full, 0 of 1 random" in note and "at most 30 %" in note


def test_the_committed_file_is_of_these_bases_and_the_page_shows_it() -> None:
    held = files.read_json(PATH)
    assert held["bases"] == {str(base): mechanism.base_checksum(base) for base in BASES}
    assert mechanism.mechanism_table(ROWS) in files.read_text(stats.RESULTS / "spd-mechanism.md")
    assert PATH.stat().st_size < 400_000


def test_every_kind_of_subspace_is_measured_at_every_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "generate", lambda *_, **__: GOLDEN[::4])
    model = tiny_gpt(TASK)
    rows = list(mechanism.measure_base(model, TASK, PROBLEMS, GOLDEN, ranks=(30,), calibration_size=40))
    kinds = [row["subspace"] for row in rows]
    each = 3 * model.config.n_layer + 1  # every layer with k, v and kv, and the paper's pair
    assert [kinds.count(kind) for kind in ("none", "aligned", "full", "unmarked")] == [1, each, each, each]
    assert kinds.count("random") == each * mechanism.DRAWS
    assert all(0 <= row["mark"] <= 1 + 1e-5 for row in rows)


def test_condensed_gradients_span_what_all_gradients_span() -> None:
    model = tiny_gpt(TASK)
    examples = subspace.calibration_set(TASK, ("exam",), 12, "aligned", 0)
    whole = subspace.capability_gradients(model, examples, [(0, "v")])
    condensed = mechanism.condensed_gradients(model, TASK, ("exam",), 12, "aligned")
    P, expected = (subspace.make_projectors({(0, "v"): G[0, "v"]})[0, "v"] for G in (condensed, whole))
    torch.testing.assert_close(P, expected, atol=1e-4, rtol=0)
