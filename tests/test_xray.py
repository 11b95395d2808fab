"""The X-ray pages: complete, well-formed, self-contained, and true to what the model says."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import torch

import reflect
import runs
import strips
import subspace
import xray
from data.documents import hint_prompt, plain_prompt
from data.tokenizer import END, encode
from losses import divergence
from model import response_logprobs
from reflect import Rollout, verify
from strips import Token

PROBLEM, WRONG = "3+8-5*2", "3+8=1;1-5=4;4*2=8;#8"
VOID = {"meta", "input", "br"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; gathers the text of the token buttons."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tokens: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if "token" in (dict(attributes).get("class") or "").split():
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "button":
            self.tokens[-1] += data


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return Rollout(PROBLEM, [*encode(WRONG), END], WRONG, verify(PROBLEM, WRONG))


@pytest.mark.parametrize("script", [reflect, subspace], ids=lambda module: module.__name__)
def test_the_page_is_one_well_formed_file_without_network(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "folder" / "page.html"
    monkeypatch.setattr(sys, "argv", [script.__name__, "--html", str(path)])
    script.main()
    printed = capsys.readouterr().out
    text = path.read_text()
    assert str(path) in printed and "\033" not in printed  # no colours where nobody looks
    assert not re.search(r"https?:|src=|@import|url\(", text)
    page = Balanced()
    page.feed(text)
    assert page.open == [] and len(page.tokens) > 50
    assert "#" in page.tokens and "=" in page.tokens


def test_tokens_carry_mask_divergence_and_both_distributions(rollout: Rollout) -> None:
    model, _ = runs.load_checkpoint(runs.BASE_CHECKPOINT)
    tokens = xray.Reading(hint_prompt(PROBLEM, "1-5=6"), 6, "1-5=4").tokens(rollout, model, model)
    with torch.no_grad():
        student = response_logprobs(model, [encode(plain_prompt(PROBLEM))], [rollout.tokens])
        teacher = response_logprobs(model, [encode(hint_prompt(PROBLEM, "1-5=6"))], [rollout.tokens])
        D = divergence(student, teacher)[0]
    assert "".join(token.text for token in tokens) == WRONG + "<|end|>"
    assert [token.dimmed for token in tokens] == [t < 6 for t in range(len(tokens))]
    assert "".join(token.text for token in tokens if token.quoted) == "1-5=4"
    assert [t for t, token in enumerate(tokens) if token.start] == [6]
    for t, token in enumerate(tokens):
        assert f"D = {D[t]:.3f}" in token.says and 0 <= token.heat <= 1
        names, choices = zip(*token.choices, strict=True)
        assert names == ("student", "teacher") and all(len(five) == 5 for five in choices)
        assert choices[0][0][1] == pytest.approx(student[0, t].max().exp().item(), abs=1e-4)


def test_what_the_projector_takes_away_is_a_share() -> None:
    model, _ = runs.load_checkpoint(runs.BASE_CHECKPOINT)
    d = model.config.n_kv_head * model.config.head_dim
    nothing, everything = {(2, "k"): torch.eye(d)}, {(2, "k"): torch.zeros(d, d)}
    text = plain_prompt(PROBLEM)
    assert max(xray.removed(model, text, nothing, "linear")[2, "k"]) == pytest.approx(0, abs=1e-5)
    assert xray.removed(model, text, everything, "linear")[2, "k"] == pytest.approx([1.0] * len(encode(text)))


def test_text_is_escaped_and_the_terminal_is_plain_without_colour() -> None:
    tokens = [Token("<b>"), Token("&", heat=1.0)]
    assert "<b>" not in strips.strip("label <i>", tokens) and "<i>" not in strips.strip("label <i>", tokens)
    assert strips.terminal(tokens, colour=False) == "<b>&"
    assert re.sub(r"\033\[[\d;]*m", "", strips.terminal(tokens)) == "<b>&"
