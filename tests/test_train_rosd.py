"""The losses of ROSD's family token by token, the training loop on a task and a model that take milliseconds."""

import dataclasses
import json
import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Letters, file_of, metrics, settings, stopped_run, tiny_gpt, train
from torch import Tensor

import train_rosd
from errors import UserError
from harness import files
from lessons import Lesson
from losses import clipped_surrogate, divergence
from model import GPT, GPTConfig
from reflect import sample_rollouts
from train_rosd import METHODS, configure, grpo_loss, rosd_loss

TASK = Letters()
GOLDEN = {  # flags and fields: the loss of every step; a refactoring changes none of them
    "": [0.136522, 0.117224, 0.135262],
    "--mask whole": [0.136702, 0.124572, 0.135631],
    "--mask span": [0.134292, 0.140953, 0.124406],
    "--context peer": [0.184127, 0.15704, 0.154667],
    "--context both --ema 0.5": [0.186889, 0.174138, 0.157617],
    "--method sdpo": [0.179958, 0.157708, 0.157124],
    "--method opsd": [0.10323, 0.106169, 0.0770995],
    "--method grpo --updates 2": [-0.0757526, -0.119491, -0.00944037],
    "--preset released": [0.145407, 0.137395, 0.165599],
    "--finetune lora --learning-rate 0.1": [0.136522, 0.1658, 0.1188],
    "minibatches=3 temperature=0.7": [0.107163, 0.141267, 0.118621],
    "solved=drop malformed=peer --alpha 0 top_k=4": [0.3377, 0.342071, 0.30237],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_losses_are_those_of_earlier_versions(text: str, base: str, tmp_path: Path) -> None:
    flags = [word for word in text.split() if "=" not in word]
    pairs = (word.split("=") for word in text.split() if "=" in word)
    fields = {name: json.loads(x) if x[0].isdigit() else x for name, x in pairs} | {"reflect_temperature": 1.0}
    train(train_rosd, base, tmp_path / "out", "--steps", "3", "--batch", "6", *flags, **fields)
    assert [row["loss"] for row in metrics(tmp_path / "out")] == pytest.approx(GOLDEN[text], rel=1e-3)


# ---------------------------------------------------------------------------------------------- one loss


def lessons_of(count: int, temperature: float = 1.0) -> list[Lesson]:
    """Rollouts of a tiny model, of unequal length, each with its own part unmasked."""
    generator = torch.Generator().manual_seed(0)
    problems = TASK.problems("two", count, random.Random(0))
    lessons = []
    for i, y in enumerate(sample_rollouts(tiny_gpt(TASK), TASK, problems, 1, generator, temperature)):
        T = len(y.tokens)
        x, x_T = TASK.encode(TASK.prompt(y.problem)), TASK.encode(TASK.prompt(y.problem, "abcd"[: i % 4]))
        lessons.append(Lesson(x, x_T, y.tokens, y.logprobs, min(i % 3, T - 1), T - i % 2, (-1.0) ** i * (i + 1)))
    return lessons


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("loss_of", [rosd_loss, grpo_loss])
def test_loss_is_the_sum_over_unmasked_tokens_read_one_by_one(loss_of: Any, alpha: float) -> None:
    lessons, student, teacher = lessons_of(5), tiny_gpt(TASK, seed=1), tiny_gpt(TASK, seed=2)
    values, ratios = [], []
    for lesson in lessons:
        for t in range(lesson.start, lesson.end):
            log_S = student(torch.tensor([lesson.x + lesson.y[:t]]))[0, -1].log_softmax(-1)
            log_T = teacher(torch.tensor([lesson.x_T + lesson.y[:t]]))[0, -1].log_softmax(-1)
            rho = (log_S[lesson.y[t]] - lesson.logp[t]).exp()
            ratios.append(rho.item())
            if loss_of is grpo_loss:
                values.append(clipped_surrogate(rho, torch.tensor(lesson.advantage)))
            else:
                values.append(divergence(log_S, log_T, alpha) * rho.clamp(max=2.0).detach())
    assert min(ratios) < 0.8 < 2.0 < max(ratios)  # both clips act
    ours, expected = loss_of(student, teacher, lessons, configure(alpha=alpha)), torch.stack(values).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, list(student.parameters())) for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_weighs_the_policy_now_by_the_distribution_that_was_sampled(temperature: float) -> None:
    """GRPO's loss without clipping is -A sum_t pi(y_t) / pi_sampling(y_t); the ratio is 1 at temperature 1 alone."""
    student = tiny_gpt(TASK)
    for lesson in lessons_of(4, temperature):
        logits = student(torch.tensor([lesson.x + lesson.y]))[0, len(lesson.x) - 1 : -1]
        y = torch.tensor(lesson.y)[:, None]
        ratio = (logits.softmax(-1).gather(1, y) / (logits / temperature).softmax(-1).gather(1, y))[:, 0]
        assert (ratio - 1).abs().max() < 1e-4 or temperature != 1
        whole = dataclasses.replace(lesson, start=0, end=len(lesson.y), advantage=-1.0)
        expected = ratio.clamp(min=0.8).sum()  # a negative advantage is clipped from below
        torch.testing.assert_close(grpo_loss(student, student, [whole], configure()), expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------- the updates


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every call of the loss in a run: the lessons, and the weights of student and teacher."""
    seen = SimpleNamespace(lessons=[], teachers=[], students=[])

    def recorded(loss: Any, student: GPT, teacher: GPT, lessons: list[Lesson], config: Any) -> Tensor:
        seen.lessons.append(lessons)
        seen.students.append([p.detach().clone() for p in student.parameters()])
        seen.teachers.append([p.detach().clone() for p in teacher.parameters()])
        return loss(student, teacher, lessons, config)

    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, dataclasses.replace(method, loss=partial(recorded, method.loss)))
    return seen


@pytest.mark.parametrize(("method", "loss_of"), [("sdpo", rosd_loss), ("grpo", grpo_loss)])
def test_each_update_follows_the_mean_over_the_tokens_of_its_minibatch(
    method: str, loss_of: Any, base: str, tmp_path: Path, trace: SimpleNamespace, optimizer_steps: list
) -> None:
    flags = ("--method", method, "--steps", "1", "--batch", "8", "--updates", "2")
    train(train_rosd, base, tmp_path, *flags, minibatches=3, grad_clip=0.05)
    sizes = list(map(len, trace.lessons))
    assert len(sizes) == len(optimizer_steps) == 6 and max(sizes) - min(sizes) <= 1
    assert trace.lessons[:3] == trace.lessons[3:]
    student, teacher, losses = files.load_checkpoint(base), files.load_checkpoint(base), []
    for lessons, now, (_, gradients) in zip(trace.lessons, trace.students, optimizer_steps, strict=True):
        for parameter, value in zip(student.parameters(), now, strict=True):
            parameter.data.copy_(value)
        count = sum(lesson.end - lesson.start for lesson in lessons)
        losses.append(loss_of(student, teacher, lessons, configure(method)) / count)
        expected = torch.autograd.grad(losses[-1], list(student.parameters()))
        norm = torch.stack([gradient.norm() for gradient in expected]).norm()
        assert norm > 0.05  # and is clipped to it
        for ours, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, gradient * 0.05 / norm, rtol=1e-3, atol=1e-6)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(sum(losses).item() / 6, rel=1e-4)


@pytest.mark.parametrize("flags", ["--method rosd --mask span", "--method grpo", "--method sdpo --finetune lora"])
def test_gradient_of_micro_batches_is_that_of_the_batch(
    flags: str, base: str, tmp_path: Path, trace: SimpleNamespace, optimizer_steps: list
) -> None:
    for size in ("64", "2"):
        out = tmp_path / size
        train(train_rosd, base, out, *flags.split(), "--steps", "1", "--batch", "6", "--micro-batch", size)
    (_, whole), (_, parts) = optimizer_steps
    assert len(trace.lessons) > 4 and any(gradient.any() for gradient in whole)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_learning_rate_warms_up_linearly_to_its_peak(base: str, tmp_path: Path, optimizer_steps: list) -> None:
    flags = ("--method", "opsd", "--learning-rate", "0.01")
    train(train_rosd, base, tmp_path / "a", *flags, "--steps", "5", "--warmup", "4")
    train(train_rosd, base, tmp_path / "b", *flags, "--steps", "2", "--warmup", "0")
    rates = [rate for rate, _ in optimizer_steps]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("ema", [0.0, 0.25, 1.0])
def test_teacher_follows_the_student_at_the_rate_of_its_average(
    ema: float, base: str, tmp_path: Path, trace: SimpleNamespace
) -> None:
    train(train_rosd, base, tmp_path, "--method", "opsd", "--ema", str(ema), "--learning-rate", "0.1")
    start = list(files.load_checkpoint(base).parameters())
    assert len(trace.teachers) == 2 and not torch.equal(trace.students[1][0], start[0])
    torch.testing.assert_close(trace.teachers[0], start)
    expected = [(1 - ema) * old + ema * new for old, new in zip(start, trace.students[1], strict=True)]
    torch.testing.assert_close(trace.teachers[1], expected)


# ---------------------------------------------------------------------------------------------- the run


def weights(out: Path) -> list[Tensor]:
    return list(files.load_checkpoint(file_of(out, "model.pt")).parameters())


def test_the_sdpo_beside_a_run_has_its_own_context_and_mask_and_no_reflector(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(_: Any, configs: list) -> None:
        seen.extend(configs)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_rosd, "train_all", stop)
    flags = ["--mask", "span", "--reflector", "oracle", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["train_rosd.py", *flags])
    with pytest.raises(KeyboardInterrupt):
        train_rosd.main()
    assert seen == [configure(mask="span", reflector="oracle", steps=3), configure("sdpo", steps=3)]


@pytest.mark.parametrize("who", ["base", "student", "another checkpoint"])
def test_reflections_are_written_by_the_reflector_that_was_chosen(
    who: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, write = [], train_rosd.write_reflections

    def watched(reflector: GPT, *rest: Any) -> Any:
        embeddings.append(reflector.embed.weight.detach().clone())
        return write(reflector, *rest)

    monkeypatch.setattr(train_rosd, "write_reflections", watched)
    start = another = files.load_checkpoint(base).embed.weight
    if who == "another checkpoint":
        files.save_checkpoint(tmp_path / (who := "another.pt"), tiny_gpt(Letters(), seed=7))
        monkeypatch.chdir(tmp_path)
        another = tiny_gpt(Letters(), seed=7).embed.weight
    train(train_rosd, base, tmp_path, "--reflector", who, "--learning-rate", "0.1", "--batch", "6", malformed="peer")
    assert torch.equal(embeddings[0], another)
    assert torch.equal(embeddings[1], start if who == "base" else another) == (who != "student")


def test_a_reflector_has_to_exist_and_to_share_the_vocabulary(base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--reflector studnet is neither base, student, oracle nor a checkpoint"):
        train(train_rosd, base, tmp_path, "--reflector", "studnet")
    files.save_checkpoint(tmp_path / "large.pt", GPT(GPTConfig(50)))
    with pytest.raises(UserError, match="another vocabulary than the base"):
        train(train_rosd, base, tmp_path, "--reflector", str(tmp_path / "large.pt"))


def test_the_base_is_evaluated_for_all_runs_with_equal_settings_and_code(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, evaluate_run = [], train_rosd.evaluate_run

    def counted(model: GPT, *arguments: object) -> dict:
        evaluated.append("student" if model.embed.weight.requires_grad else "base")
        return evaluate_run(model, *arguments)

    monkeypatch.setattr(train_rosd, "evaluate_run", counted)
    first, second = (train(train_rosd, base, tmp_path, "--method", method) for method in ("rosd", "sdpo"))
    assert first["before"] == second["before"] and evaluated == ["base", "student", "student"]
    evaluated.clear()
    train(train_rosd, base, tmp_path, "--seed", "1")
    train(train_rosd, base, tmp_path, "--eval-temperature", "0.5")
    monkeypatch.setattr(files, "code_checksum", lambda: "of other code")
    train(train_rosd, base, tmp_path, "--method", "grpo")
    assert evaluated == 3 * ["base", "student"]


def test_a_learning_curve_has_a_point_every_so_many_steps(base: str, letters: Letters, tmp_path: Path) -> None:
    train(train_rosd, base, tmp_path, "--steps", "4", "--eval-every", "2")
    assert ["tested" in row for row in metrics(tmp_path)] == [False, True, False, True]
    assert set(metrics(tmp_path)[1]["tested"]) == set(letters.domains)


def test_the_seed_determines_the_run(base: str, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        train(train_rosd, base, tmp_path / name, "--seed", seed)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert all(map(torch.equal, weights(tmp_path / "a"), weights(tmp_path / "b")))


@pytest.mark.parametrize("flags", ["", "--ema 0.5", "--finetune lora --reflector student --learning-rate 0.1"])
def test_a_stopped_run_resumes_to_the_same_metrics_and_weights(flags: str, base: str, tmp_path: Path) -> None:
    more = ["--steps", "4", "--method", "opsd", *flags.split()]
    train(train_rosd, base, tmp_path / "whole", *more)
    stopped_run(base, tmp_path / "stopped", *more)
    assert len(metrics(tmp_path / "stopped")) == 1
    train(train_rosd, base, tmp_path / "stopped", *more, "--resume")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert all(map(torch.equal, weights(tmp_path / "stopped"), weights(tmp_path / "whole")))


# ---------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rosd", ("reflection", "suffix", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("sdpo", ("peer", "whole", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("opsd", ("gold", "whole", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("grpo", ("nothing", "whole", "shortest", "base", False, "keep", "drop", 0.0, 1, 1e-3)),
        ("rosd released", ("reflection", "suffix", "first", "student", True, "drop", "peer", 0.0, 1, 1e-3)),
        ("sdpo released", ("peer", "whole", "first", "base", False, "drop", "drop", 0.05, 1, 1e-3)),
        ("opsd released", ("gold", "whole", "shortest", "base", False, "drop", "drop", 0.0, 1, 1e-3)),
        ("grpo released", ("nothing", "whole", "shortest", "base", False, "keep", "drop", 0.0, 4, 1e-4)),
    ],
)
def test_presets_are_the_table_of_paper_and_released_code(method: str, expected: tuple) -> None:
    name, preset = [*method.split(), "paper"][:2]
    names = ("context", "mask", "peer", "reflector", "give_answer", "solved", "malformed", "ema", "minibatches")
    for config in (configure(name, preset), settings(train_rosd, "", "", "--method", name, "--preset", preset)):
        assert tuple(getattr(config, field) for field in (*names, "learning_rate")) == expected


def test_a_flag_wins_over_preset_and_method() -> None:
    flags = ["--context", "both", "--peer", "shortest", "--ema", "0.1", "--learning-rate", "0.5"]
    config = settings(train_rosd, "", "", "--preset", "released", *flags)
    assert (config.context, config.peer, config.ema, config.learning_rate) == ("both", "shortest", 0.1, 0.5)
    assert config.reflector == "student"


def test_an_average_teacher_of_a_bfloat16_base_keeps_small_steps(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "load_checkpoint", lambda *_: tiny_gpt(TASK).bfloat16())
    stopped_run(base, tmp_path / "out", "--ema", "0.001")
    teacher = torch.load(file_of(tmp_path / "out", "state.pt"), weights_only=True)["parts"]["teacher"]
    start = tiny_gpt(TASK).bfloat16().state_dict()
    assert {x.dtype for x in teacher.values()} == {torch.float32}
    assert any((teacher[name] != x.float()).any() for name, x in start.items())
