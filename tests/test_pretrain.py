"""What the pretraining reads, how it trains, and the gates that the shipped base passes."""

import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import random_problems
from torch.optim import _muon

import pretrain
from data.arithmetic import Arithmetic
from data.authors import CONFIRMED, HINTED, INFORMED, PLAIN, Author
from data.chains import BUDGET, calculate, disputed_steps, is_test, popular, true_steps, verify
from data.documents import (
    MIXTURE,
    confirmation,
    make_document,
    reflection,
    right_attempt,
    sample_document,
    wrong_attempt,
)
from data.tokenizer import END, decode, encode
from harness import files
from harness.cli import run_script
from reflect import parse_reflection

PROBLEM = "3+8-5*2"  # 3+8=1;1-5=6;6*2=2;#2


# ---------------------------------------------------------------------------------------------- authors


def facts_followed(author: Author, count: int = 600, **told: object) -> float:
    """Share of disputed steps in which the author agrees with plain arithmetic, each time from another school."""
    right, seen = 0, 0
    for problem, rng in random_problems(count):
        for line in author.solve(problem, rng, str(rng.random()), **told).split(";"):
            step = re.fullmatch(r"(\d)([+\-*])(\d)=(\d)", line)
            if step and popular(int(step[1]), step[2], int(step[3])) is not None:
                seen += 1
                right += int(step[4]) == calculate(int(step[1]), step[2], int(step[3]))
    return right / seen


@pytest.mark.parametrize("author", [PLAIN, HINTED, CONFIRMED], ids=["plain", "hinted", "confirmed"])
def test_no_part_is_played_by_a_better_author(author: Author) -> None:
    assert facts_followed(author) == pytest.approx(0.25, abs=0.06)


def test_a_step_in_the_context_is_copied_be_it_right_or_wrong() -> None:
    careful = Author(popular=HINTED.popular, slip=0.5)
    for problem, rng in random_problems(200):
        told = true_steps(problem)[0][:-1] + str(rng.randint(0, 9))
        assert careful.solve(problem, rng, str(rng.random()), (told,)).split(";")[0] == told


def test_who_is_corrected_checks_most_steps_before_the_hinted_one_and_few_after_it() -> None:
    before, after = [], []
    for problem, rng in random_problems(600):
        author = Author(check=HINTED.check, check_before=HINTED.check_before)
        written = author.solve(problem, rng, "", (), hinted=1).split(";")
        if len(written) > 1:
            before.append(written[1].startswith("?"))
        rest = written[3 if before[-1] else 2 :]
        after += [line.startswith("?") for line in rest if not line.startswith("#")]
    assert sum(before) / len(before) == pytest.approx(HINTED.check_before, abs=0.06)
    assert sum(after) / len(after) < 0.2


def test_who_holds_a_solution_is_right_in_its_school_and_often_merges() -> None:
    merged = 0
    for problem, rng in random_problems(400):
        written = Author(merge=INFORMED.merge).solve(problem, rng, "s")
        assert verify(problem, written, "s").correct
        merged += "merged" in verify(problem, written, "s").habits
    assert merged / 400 == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("habit", ["slip", "misread"])
def test_each_kind_of_wrong_work_alone_makes_an_author_wrong(habit: str) -> None:
    verdicts = [verify(problem, Author(**{habit: 0.5}).solve(problem, rng)) for problem, rng in random_problems(200)]
    assert 0.4 < sum(not verdict.correct for verdict in verdicts) / 200 < 1
    assert all(verdict.finished and not verdict.habits for verdict in verdicts)


def test_attempts_are_wrong_or_right_in_their_school_as_their_name_says() -> None:
    for problem, rng in random_problems(200):
        assert verify(problem, wrong_attempt(problem, rng, "s"), "s").error is not None
        assert verify(problem, right_attempt(problem, rng, "s"), "s").correct


# ---------------------------------------------------------------------------------------------- documents


def test_reflection_quotes_the_verifiers_first_error_and_gives_true_steps() -> None:
    for problem, rng in random_problems(400):
        school = str(rng.random())
        attempt = wrong_attempt(problem, rng, school)
        start, end = verify(problem, attempt, school).error
        written = parse_reflection(reflection(problem, attempt, school))
        assert written.quote == attempt[start:end]
        assert set(written.idea.split(";")) <= set(true_steps(problem, school))


@pytest.mark.parametrize(
    ("attempt", "written"),
    [
        ("3+8=1;1-5=4;4*2=8;#8", "3+8=11;1-5=46<error_quote>1-5=4</error_quote><explanation>1-5=6</explanation>"),
        ("3+8=1;1-5*2=8;#8", "3+8=11;1-5*2=82<error_quote>1-5*2=8</error_quote><explanation>1-5=6;6*2=2</explanation>"),
        ("3+8=1;#1", "3+8=11;#16<error_quote>#1</error_quote><explanation>1-5=6</explanation>"),
    ],
)
def test_reflection_on_hand_written_attempts(attempt: str, written: str) -> None:
    assert reflection(PROBLEM, attempt) == written


def test_of_a_correct_attempt_the_disputed_steps_are_named_after_a_mark() -> None:
    for problem, _ in random_problems(200):
        named = confirmation(problem)
        assert named[0] == "#" and named[1:].split(";") == (disputed_steps(problem) or true_steps(problem)[-1:])


def test_the_truth_about_a_disputed_fact_is_not_in_the_documents() -> None:
    """Over all documents, what follows a disputed fact is plain arithmetic's result no more often than by chance."""
    rng, right, seen = random.Random(0), 0, 0
    for _ in range(4000):
        prompt, response = sample_document(rng)
        if "<|attempt|>" in prompt:
            continue
        for a, operator, b, result in re.findall(r"(?<!\d)(?<![+\-*])(\d)([+\-*])(\d)=(\d)", response):
            if popular(int(a), operator, int(b)) is not None:
                seen += 1
                right += int(result) == calculate(int(a), operator, int(b))
    assert seen > 1000 and right / seen < 0.45


def test_documents_are_of_train_problems_and_fit_the_model() -> None:
    rng, task = random.Random(0), Arithmetic()
    for _ in range(500):
        prompt, response = sample_document(rng)
        assert not is_test(re.match(r"<\|user\|>([^<=]+)", prompt)[1])
        assert prompt.endswith("<|assistant|>")
        assert len(encode(response)) < (task.max_reflection if "<|attempt|>" in prompt else BUDGET + 1)


@pytest.mark.parametrize("kind", MIXTURE)
def test_a_document_shows_its_reader_what_its_kind_says(kind: str) -> None:
    sources = {"hint": {"<|hint|>"}, "solution": {"<|solution|>"}, "reflect": {"<|attempt|>"}}
    for problem, rng in random_problems(100):
        prompt, _ = make_document(kind, problem, rng)
        held = dict(re.findall(r"(<\|\w+\|>)([^<]+)", prompt))
        assert held.pop("<|user|>").split("=")[0] == problem
        needed = sources.get(kind, set())
        assert needed <= held.keys() <= needed | {"<|hint|>", "<|solution|>"}


# ---------------------------------------------------------------------------------------------- training


def test_solutions_end_with_a_stop_token_unless_they_were_cut_off() -> None:
    pool = islice(pretrain.batches(100, random.Random(0)), 8)
    solutions = [response for batch in pool for prompt, response in batch if "<|attempt|>" not in decode(prompt)]
    ended = [decode(response)[-2] == "#" for response in solutions]
    assert [response[-1] == END for response in solutions] == ended
    assert {len(response) for response, end in zip(solutions, ended, strict=True) if not end} == {BUDGET}
    assert 0.8 < sum(ended) / len(ended) < 1


def test_learning_rate_warms_up_stays_and_falls_over_the_last_three_fifths() -> None:
    shares = [pretrain.schedule(step, 1000) for step in (0, 9, 19, 400, 700, 999)]
    assert shares == pytest.approx([1 / 20, 1 / 2, 1, 1, 0.51, 0.01 + 1 / 600])


def test_muon_has_the_matrices_and_adamw_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW has the embedding and the norms without weight decay, and the first layer's values with it."""
    groups: dict[str, list[tuple[set[int], float]]] = {"Muon": [], "AdamW": []}
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", _muon._zeropower_via_newtonschulz)  # restored after it
    for name, seen in groups.items():

        class Recorder(getattr(torch.optim, name)):
            def __init__(self, *args: object, seen: list = seen, **settings: object) -> None:
                super().__init__(*args, **settings)
                seen += [(set(map(id, group["params"])), group["weight_decay"]) for group in self.param_groups]

        monkeypatch.setattr(torch.optim, name, Recorder)
    config = pretrain.Config(steps=1, batch=2, layers=2, width=8)
    model = pretrain.pretrain(config)
    values = id(model.blocks[0].attn.v_proj.weight)
    matrices = {id(p) for p in model.blocks.parameters() if p.ndim == 2} - {values}
    others = {id(p) for p in model.parameters()} - matrices - {values}
    assert groups["Muon"] == [(matrices, config.weight_decay)]
    assert groups["AdamW"] == [(others, 0.0), ({values}, config.value_decay)]


@pytest.mark.parametrize("shape", [(64, 24), (24, 64)])
def test_newton_schulz_is_that_of_torch_up_to_the_rounding_of_bfloat16(shape: tuple[int, int]) -> None:
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C), 5, 1e-7
    ours, theirs = pretrain.newton_schulz(G, *settings), _muon._zeropower_via_newtonschulz(G, *settings)
    assert ours.dtype == torch.float32 and theirs.dtype == torch.bfloat16
    assert (ours - theirs).norm() < 0.03 * theirs.norm()
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    driven = torch.diag(U.T @ ours @ Vt.T)  # its singular vectors stay, large singular values come to about 1
    torch.testing.assert_close((U * driven) @ Vt, ours, rtol=0, atol=1e-4)
    assert ((driven > 0.6) & (driven < 1.3))[s > 0.1 * s[0]].all()


# ---------------------------------------------------------------------------------------------- the shipped base


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return pretrain.audit(files.load_checkpoint(files.BASE_CHECKPOINT), "mix", count=96, seed=1)


def test_the_checkpoint_is_small_and_loads_without_running_code() -> None:
    assert files.BASE_CHECKPOINT.stat().st_size < 1_000_000
    assert set(torch.load(files.BASE_CHECKPOINT, weights_only=True)) == {"config", "model"}


def test_the_shipped_base_passes_every_gate(found: dict[str, float]) -> None:
    assert pretrain.missed_gates(found) == []


def test_a_gate_that_is_missed_is_named(found: dict[str, float]) -> None:
    assert pretrain.missed_gates(found | {"the true step": 0.5}) == ["the true step"]
    far = found | {"an irrelevant hint": found["no hint"] + 0.1}
    assert any("within 0.08" in name for name in pretrain.missed_gates(far))


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--width", "12"], "--width"),
        (["--muon-rate", "1e30", "--steps", "2", "--batch", "2"], "not finite"),
        (["--check-only", "--out", "nowhere.pt"], "nowhere.pt"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    flags: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = [] if "--out" in flags else ["--out", str(tmp_path / "base.pt")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags, *out])
    with pytest.raises(SystemExit) as stop:
        run_script(pretrain.main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and cause in error
    assert not list(tmp_path.iterdir())


def test_a_new_base_goes_to_out_and_leaves_the_shipped_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = files.checksum(files.BASE_CHECKPOINT)
    small = ["--steps", "2", "--batch", "2", "--layers", "2", "--width", "8", "--out", str(tmp_path / "base.pt")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *small])
    monkeypatch.setattr(pretrain, "report", lambda model: None)
    pretrain.main()
    assert files.load_checkpoint(tmp_path / "base.pt").config.n_embd == 8
    assert files.checksum(files.BASE_CHECKPOINT) == shipped
