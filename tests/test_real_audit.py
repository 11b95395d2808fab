"""The hint audit on real weights, on a tiny folder whose model is played by canned texts where it writes."""

import json
from pathlib import Path

import pytest
from conftest import ROWS, write_lines
from test_hub import write_model
from test_hub_tokenizer import write_tokenizer

from data import load_task
from model import GPT
from reflect import Rollout
from tools import real_audit, stats

REFLECTION = "<error_quote>= 77</error_quote><explanation>It is {answer}.</explanation>"


def test_every_hint_is_measured_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    write_model(tmp_path, "Qwen3", vocab_size=640, max_position_embeddings=2048)
    task = load_task(str(write_lines(tmp_path / "eggs.jsonl", ROWS)), tmp_path)

    def rollouts(_: GPT, task: real_audit.Words, problems: list, group: int, __: object) -> list[Rollout]:
        texts = [(p, text) for p in problems for text in [f"a + b = {p.answer}"] * (group - 1) + ["a + b = 77"]]
        return [Rollout(p, task.encode(text), [], text, task.verify(p, text)) for p, text in texts]

    def greedy(_: GPT, task: real_audit.Words, length: int, prompts: list[str]) -> list[str]:
        return [REFLECTION.format(answer=7) if length == task.max_reflection else "I say 7" for _ in prompts]

    monkeypatch.setattr(real_audit, "sample_rollouts", rollouts)
    monkeypatch.setattr(real_audit, "greedy", greedy)
    config = real_audit.Config(problems=12, grid=4)
    found = real_audit.audit(GPT.from_pretrained(tmp_path), task, config)
    assert found["wrong"] == found["with an idea"] == found["problems"] and found["right"] == 0.75
    assert all(way["quote found"][0] == way["an idea"][0] == 1 for way in found["reflections"].values())
    assert {row: 0 <= by["P after the mark"][0] <= 1 for row, by in found["hints"].items()}.keys() == {
        "no hint", "an irrelevant hint", "its own reflection", "the true result", "a wrong result",
        "... and that wrong result", "a reference solution",
    }  # fmt: skip
    assert found["hints"]["no hint"]["greedy"][2:] == [0, 0]
    assert "| no hint" in real_audit.tables(json.loads(json.dumps(found)))


def test_a_probability_is_that_of_the_whole_answer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    write_model(tmp_path, "Qwen3", vocab_size=640, max_position_embeddings=2048)
    task, model = load_task(str(write_lines(tmp_path / "eggs.jsonl", ROWS)), tmp_path), GPT.from_pretrained(tmp_path)
    one = real_audit.probability(model, task, ["ask"] * 10, ["= "] * 10, list("0123456789"))
    two = real_audit.probability(model, task, ["ask"] * 100, ["= "] * 100, [f"{n:02}" for n in range(100)])
    longer = sum(two) + sum(
        one
    )  # one digit alone, or two alone: what is left begins with three digits or another token
    assert all(p > 0 for p in one + two) and longer < 1


def test_the_tables_of_the_readme_are_those_of_the_json() -> None:
    readme = (stats.RESULTS / "README.md").read_text(encoding="utf-8")
    for task, found in json.loads((stats.RESULTS / "real-audit.json").read_text(encoding="utf-8")).items():
        assert task in readme and real_audit.tables(found) in readme
