"""How the pretraining trains, and the gates that the shipped base passes."""

import random
import re
import sys
from copy import deepcopy
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import _muon

import pretrain
from data import Problem, Task
from data.arithmetic import Arithmetic
from data.chains import BUDGET, operations
from data.tokenizer import END, VOCAB_SIZE, decode, encode
from harness import files
from harness.cli import run_script
from model import GPT
from reflect import Pair, Reflection, Rollout, parse_reflection

SHIPPED = files.load_checkpoint(files.BASE_CHECKPOINT)

# ---------------------------------------------------------------------------------------------- training


def test_solutions_end_with_a_stop_token_unless_they_were_cut_off() -> None:
    pool = [x for batch in islice(pretrain.batches(100, random.Random(0)), 8) for x in batch]
    texts = [(decode(prompt).partition("<|assistant|>")[2] + decode(response), response) for prompt, response in pool]
    solutions = [(text, response) for text, response in texts if not text.endswith(">")]
    ended = [bool(re.search(r"(^|;)#\d$", text)) for text, _ in solutions]
    assert [response[-1] == END for _, response in solutions] == ended
    assert {len(text) for (text, _), end in zip(solutions, ended, strict=True) if not end} == {BUDGET}
    assert all(response[-1] == END for text, response in texts if text.endswith(">"))
    assert 0.7 < sum(ended) / len(ended) < 1


@pytest.mark.parametrize(
    ("response", "ended"),
    [
        ("3+8=1?;3+8=1;1-5=6?;1-5=6;6*2=2?;6*2=2;", False),  # cut off
        ("3+8=1;1-5=6?;1-5=6;6*2=2;2+1=3;3+4=7;#7", True),  # fills its room to the last token
        (";4*2=8;#8", True),  # goes on behind an error
        ("3+8=11;1-5=46<error_quote>1-5=4</error_quote><explanation>3+8=1;1-5=6</explanation>", True),
        ("?;1-5=4;4*2=8?;4*2=", False),  # cut off behind an error
        (";4*2=8;#", False),
        (";", False),
    ],
)
def test_what_was_cut_off_teaches_no_stop_token(response: str, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "sample_document", lambda rng, short: ("<|user|>3+8-5*2<|assistant|>", response))
    for _, tokens in next(pretrain.batches(2, random.Random(0))):
        assert tokens == encode(response) + [END] * ended


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


def test_the_audit_reads_the_wrong_digit_and_the_checks_from_the_wrong_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probability of this model is told by hand: of digits where the wrong one stands, of checks behind steps."""
    task = Arithmetic()
    problem = Problem("3+8-5*2", "3+8=1;1-5=6;6*2=2;#2")
    texts = ["3+8=1;1-5=6;6*2=2;#2", "3+8=1;1-5=4?;1-5=4;<|user|>;4*2=8;#8"]  # a tag is one token
    rollouts = []
    for text in texts * 4:
        tokens = [*encode(text), END]
        pieces, verdict = task.pieces(tokens), task.verify(problem, text)
        rollouts.append(Rollout(problem, tokens, [0.0] * len(tokens), text, pieces, verdict))
    right, wrong, other = encode("6")[0], 10, (11, 26)  # the wrong digit's position; behind 1-5=4 and behind 4*2=8

    def canned(model: GPT, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        hinted = ["<|hint|>3+8=1;1-5=6<" in decode(prompt) for prompt in prompts]
        p = torch.full((len(prompts), len(responses[0]), VOCAB_SIZE), 0.7)
        for i, each in enumerate(hinted):
            p[i, wrong, right] = 0.9 if each else 0.2
            p[i, other, encode("?")[0]] = torch.tensor([0.4, 0.2] if each else [0.1, 0.0])
        return p.log()

    def reflections(_: GPT, task: Task, pairs: list[Pair]) -> list[Reflection]:
        return [parse_reflection(task.true_reflection(pair.y.problem, pair.y.text)) for pair in pairs]

    monkeypatch.setattr(Arithmetic, "problems", lambda *_, **__: [problem])
    monkeypatch.setattr(pretrain, "sample_rollouts", lambda *_: rollouts)
    monkeypatch.setattr(pretrain, "write_reflections", reflections)
    monkeypatch.setattr(pretrain, "response_logprobs", canned)
    found = pretrain.audit(None)
    expected = {
        "no hint": 0.2,
        "an irrelevant hint": 0.2,
        "its own reflection": 0.9,
        "the true step": 0.9,
        "the true step with a wrong digit": 0.2,
        "... and of that wrong digit": 0.7,
        "a check behind it, given no hint": 0.05,
        "a check behind it, given the true step": 0.3,
        "first error quoted": 1,
        "correct step confirmed": 1,
        "right answers": 0.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return pretrain.audit(SHIPPED, "mix", count=96, seed=1)


def test_the_checkpoint_is_small_and_loads_without_running_code() -> None:
    assert files.BASE_CHECKPOINT.stat().st_size < 1_000_000
    assert set(torch.load(files.BASE_CHECKPOINT, weights_only=True)) == {"config", "model"}


def test_the_shipped_base_passes_every_gate(found: dict[str, float]) -> None:
    assert pretrain.missed_gates(found) == []


def test_the_shipped_bases_aligned_subspace_keeps_steps_and_drops_the_habit() -> None:
    left = pretrain.room(SHIPPED, count=24)
    assert pretrain.missed_room(left) == []
    assert pretrain.missed_room(left | {"random": (1.0, 0.3, 0.4)}) == ["steps left under projection, random"]
    assert pretrain.missed_room(left | {"aligned loss": (1.0, 0.4, 0.8)}) == [
        f"{what} left under projection, aligned loss" for what in ("steps", "checks")
    ]


def test_room_is_a_share_of_what_the_base_does_unprojected(monkeypatch: pytest.MonkeyPatch) -> None:
    project = pretrain.subspace.project_kv
    monkeypatch.setattr(pretrain.subspace, "project_kv", lambda model, P, *_: project(model, {}))
    for shares in pretrain.room(SHIPPED, count=4).values():
        assert shares == (1.0, 1.0, 1.0)


PASSING = {name: (low + high) / 2 for name, (low, high) in pretrain.GATES.items()} | {
    "an irrelevant hint": 0.25,
    "a check behind it, given no hint": 0.1,
    "a check behind it, given the true step": 0.1,
}


def test_a_gate_that_is_missed_is_named() -> None:
    assert pretrain.missed_gates(PASSING) == []
    for name, (low, high) in pretrain.GATES.items():
        assert pretrain.missed_gates(PASSING | {name: low - 0.01 if low else high + 0.01})[0] == name


@pytest.mark.parametrize(("name", "other", "most"), pretrain.NEAR, ids=lambda value: str(value)[:24])
def test_rows_that_must_be_near_each_other_are(name: str, other: str, most: float) -> None:
    for difference in (most - 0.001, 0.001 - most):
        assert pretrain.missed_gates(PASSING | {name: PASSING[other] + difference}) == []
    for difference in (most + 0.001, -most - 0.001):
        missed = pretrain.missed_gates(PASSING | {name: PASSING[other] + difference})
        assert missed == [f"{name} is not within {most} of {other}"]


@pytest.mark.parametrize(
    ("text", "start", "places"),
    [
        ("3+8=1;1-5=4;4*2=8;#8", 0, [5, 11, 17]),
        ("3+8=1;1-5=4;4*2=8;#8", 6, [11, 17]),  # the wrong step's own result and what follows
        ("3+8=1?;3+8=1;1-5=4?;1-5=4;4*2=8;#8", 0, [5, 18, 31]),  # no check is checked
        ("3+8=1?;3+8=1;1-5=4?;1-5=4;4*2=8;#8", 13, [18, 31]),
        ("3+8-5=4;4*2=8;#8", 0, [7, 13]),
        ("3+8=1;1-5=4", 6, []),  # cut off: nothing is decided behind the last result
        ("", 0, []),
    ],
)
def test_checks_are_looked_for_behind_every_result_but_those_of_checks(
    text: str, start: int, places: list[int]
) -> None:
    assert pretrain.check_places(text, start) == places


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--width", "12"], "--width"),
        (["--muon-rate", "1e30", "--steps", "2", "--batch", "2"], "lower --muon-rate"),
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
    small = ["--steps", "2", "--settle", "1", "--batch", "2", "--layers", "2", "--width", "8"]
    small += ["--out", str(tmp_path / "base.pt")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *small])
    monkeypatch.setattr(pretrain, "report", lambda model: None)
    pretrain.main()
    assert files.load_checkpoint(tmp_path / "base.pt").config.n_embd == 8
    assert files.checksum(files.BASE_CHECKPOINT) == shipped


def test_settling_shrinks_values_and_outputs_of_the_layers_that_see_everything_and_the_mlps() -> None:
    attention = {f"blocks.{i}.attn.{part}_proj.weight" for i in (1, 3) for part in "vo"}
    mlps = {f"blocks.{i}.mlp.{part}_proj.weight" for i in range(4) for part in ("gate", "up", "down")}
    for decays, expected in (((300.0, 0.0), attention), ((0.0, 300.0), mlps)):
        config = pretrain.Config(settle=2, settle_decay=decays[0], mlp_decay=decays[1], batch=2)
        settled = pretrain.settle(deepcopy(SHIPPED), config).state_dict()
        assert expected == {name for name, w in SHIPPED.state_dict().items() if settled[name].norm() < 0.98 * w.norm()}


def test_the_first_batches_are_about_one_or_two_operations_and_later_ones_about_all_lengths() -> None:
    longest = []
    for batch, _ in zip(pretrain.batches(64, random.Random(0), short=16), range(32), strict=False):
        questions = [re.match(r"<\|user\|>([^<=]+)", decode(prompt))[1] for prompt, _ in batch]
        longest.append(max(len(operations(question)) for question in questions))
    assert max(longest[:16]) == 2 and max(longest[16:]) == 5
