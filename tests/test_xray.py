"""The X-ray pages: complete, well-formed, without network, and true to what the model says."""

import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from markupsafe import escape

from data import Task, load_task
from harness import files
from losses import divergence
from model import GPT, response_logprobs
from reflect import Rollout, locate, pair_with_peers, sample_rollouts, write_reflections
from tools import xray
from tools.xray import Strip, Token


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; counts the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tokens = 0

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.open += [tag] * (tag not in {"meta", "input", "br"})
        self.tokens += "token" in (dict(attributes).get("class") or "").split()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("arithmetic")


@pytest.fixture(scope="module")
def model() -> GPT:
    return files.load_checkpoint(files.BASE_CHECKPOINT)


@pytest.fixture(scope="module")
def rollout(task: Task) -> Rollout:
    problem = task.problem("mix", random.Random(0))
    tokens = [*task.encode(problem.solution), task.end()]
    verdict = task.verify(problem, problem.solution)
    return Rollout(problem, tokens, [0.0] * len(tokens), problem.solution, task.pieces(tokens), verdict)


@pytest.mark.parametrize("page", ["rosd", "spd"])
def test_the_page_is_one_well_formed_file_without_network(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "folder" / "page.html"
    flags = ["--html", str(path), "--runs", str(tmp_path)] + ["--calibration-size", "64"] * (page == "spd")
    monkeypatch.setattr(sys, "argv", ["xray", page, *flags])
    xray.main()
    assert str(path) in capsys.readouterr().out
    text = files.read_text(path)
    assert not re.search(r"https?:|src=|@import|url\(", text)
    parsed = Balanced()
    parsed.feed(text)
    assert parsed.open == [] and parsed.tokens > 50


def test_tokens_carry_mask_divergence_and_both_distributions(task: Task, model: GPT, rollout: Rollout) -> None:
    prompt = task.prompt(rollout.problem, solution=rollout.text)
    tokens = xray.taught_tokens(task, rollout, model, model, xray.Reading(prompt, "", 6, 9))
    with torch.no_grad():
        student = response_logprobs(model, [task.encode(task.prompt(rollout.problem))], [rollout.tokens])
        teacher = response_logprobs(model, [task.encode(prompt)], [rollout.tokens])
        D = divergence(student, teacher)[0]
    assert [token.text for token in tokens] == task.pieces(rollout.tokens)
    assert [token.dimmed for token in tokens] == [t < 6 for t in range(len(tokens))]
    assert [t for t, token in enumerate(tokens) if token.quoted] == [6, 7, 8]
    assert [t for t, token in enumerate(tokens) if token.start] == [6]
    for t, token in enumerate(tokens):
        assert f"D = {D[t]:.3f}" in token.says and 0 <= token.heat <= 1
        names, choices = zip(*token.choices, strict=True)
        assert names == ("student", "teacher") and all(len(five) == 5 for five in choices)
        assert choices[0][0][1] == pytest.approx(student[0, t].max().exp().item(), abs=1e-4)
        assert choices[1][0][1] == pytest.approx(teacher[0, t].max().exp().item(), abs=1e-4)


def test_rosd_reads_from_the_quote_on_and_sdpo_reads_everything(task: Task, model: GPT) -> None:
    problems = task.problems("mix", 8, random.Random(1))
    rollouts = sample_rollouts(model, task, problems, 8, torch.Generator().manual_seed(1))
    pair = next(pair for pair in pair_with_peers(rollouts, 8) if pair.peer and not pair.y.verdict.correct)
    (reflection,), read = write_reflections(model, task, [pair]), xray.readings(model, task, pair)
    k, end = locate(reflection.quote, pair.y.pieces) or (0, 0)
    assert read["SDPO"].prompt == task.prompt(pair.y.problem, solution=pair.peer.text) and read["SDPO"].start == 0
    assert read["ROSD"].prompt == task.prompt(pair.y.problem, idea=reflection.idea)
    assert (read["ROSD"].start, read["ROSD"].quote_end) == (k, end) and escape(reflection.idea) in read["ROSD"].note


def test_what_the_projector_takes_away_is_a_share(task: Task, model: GPT, rollout: Rollout) -> None:
    d = model.config.n_kv_head * model.config.head_dim
    nothing, everything = {(2, "k"): torch.eye(d)}, {(2, "k"): torch.zeros(d, d)}
    assert max(xray.removed(model, rollout.tokens, nothing, "linear")[2, "k"]) == pytest.approx(0, abs=1e-5)
    all_of_it = xray.removed(model, rollout.tokens, everything, "linear")[2, "k"]
    assert all_of_it == pytest.approx([1.0] * len(rollout.tokens))


def test_text_is_escaped() -> None:
    row = Strip("label <i>", [Token("<b>"), Token("&", heat=1.0)])
    shown = xray.render("spd", question="", spectra=[row], removed={}, answers={})
    assert "<b>" not in shown and "<i>" not in shown and "&amp;" in shown
