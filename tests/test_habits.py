"""Where a check could begin, with and without a hint, and before and after the hinted step."""

import pytest
import torch
from conftest import tiny_gpt
from torch import Tensor

from data import load_task
from data.chains import CHECK_MARK
from model import GPT
from tools import habits


def test_checks_are_asked_where_a_step_begins_before_and_after_the_hinted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("arithmetic")
    check = task.encode(CHECK_MARK)[0]

    def canned(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        text, probs = "".join(task.pieces(responses[0])), torch.full((2, len(responses[0]), task.vocab_size), 0.9)
        hinted = "".join(task.pieces(prompts[1])).split("<|hint|>")[1].removesuffix("<|assistant|>")
        for t in range(1, len(text)):
            if text[t - 1] == ";":
                probs[0, t, check], probs[1, t, check] = 0.1, 0.2 if t <= text.index(";" + hinted) + 1 else 0.7
        return probs.log()

    monkeypatch.setattr(habits, "response_logprobs", canned)
    found = habits.check_probabilities(tiny_gpt(task), task, 20)
    assert list(found.values()) == pytest.approx([0.1, 0.2, 0.7])


def test_the_table_averages_over_bases() -> None:
    rows = [{"variant": "base", "base": base} | dict.fromkeys(habits.PLACES, base / 10) for base in (1, 3)]
    assert "| base        | 20 ± 127 " in habits.table(rows)
