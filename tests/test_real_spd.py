"""SPD's protocol on real weights, in the letters of the tests."""

import random

import pytest
import torch
from conftest import Letters, tiny_gpt

from model import response_logprobs
from subspace import SubspaceConfig, calibration_set, capability_gradients, make_projectors
from tools import real_spd
from tools.real_spd import Config, all_gradients, choose_place, golden_logp, projectors, right_answers, show, table

CONFIG = Config(calibration_size=12, every=1, ranks=("25%", "50%"), search=3)


def test_the_short_gradients_span_what_all_gradients_span() -> None:
    task, model = Letters(), tiny_gpt(Letters())
    examples = calibration_set(task, task.domains[:1], SubspaceConfig(calibration_size=12), 0)
    whole = capability_gradients(model.requires_grad_(True), examples, [(0, "v")])
    expected = make_projectors(whole, SubspaceConfig(rank="50%"), model.config.n_kv_head)[0, "v"]
    short = projectors(model, all_gradients(model, task, CONFIG), "aligned", [[0], "v", "50%"], 0)
    torch.testing.assert_close(short[0, "v"], expected, atol=1e-4, rtol=0)


def test_golden_solutions_are_weighed_with_their_end() -> None:
    task, model = Letters(), tiny_gpt(Letters())
    (problem,) = problems = [task.problem("one", random.Random(0))]
    y = [*task.encode(problem.solution), task.end()]
    logp = response_logprobs(model, [task.encode(task.student_prompt(problem))], [y])[0]
    assert golden_logp(model, task, problems) == pytest.approx(sum(logp[t, token].item() for t, token in enumerate(y)))


def test_the_best_place_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model, seen = Letters(), tiny_gpt(Letters()), []
    monkeypatch.setattr(real_spd, "golden_logp", lambda *_: seen.append(0) or -abs(len(seen) - 5))
    best = choose_place(model, task, all_gradients(model, task, CONFIG), "random", CONFIG)
    L = model.config.n_layer
    assert len(seen) == (L + 1) * 3 * 2 and best == (0, [[0], "kv", "25%"]) and show(best[1]) == "layer 1 kv 25%"


def test_equal_problems_count_once() -> None:
    assert len(right_answers(tiny_gpt(Letters()), Letters(), Config(problems=100))) == 8  # 4 letters, 2 numbers


def test_differences_are_paired_by_problem() -> None:
    rows = {"base": {"place": "", "right": "0011"}, "aligned": {"place": "layer 1 k 50%", "right": "1111"}}
    assert "| 100.0    | +50.0 ± 91.9 |" in table({"tasks": {"sums": rows}})
