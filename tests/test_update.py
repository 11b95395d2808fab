"""The loss of a batch and its updates, checked token by token and by hand."""

import random
from itertools import chain

import pytest
import torch
from conftest import Letters, tiny_gpt
from torch import Tensor

import losses
import train_rosd
from lora import add_lora
from losses import (
    clipped_surrogate,
    divergence,
    importance_ratio,
)
from model import GPT, sample
from reflect import sample_rollouts
from train_rosd import Config, Lesson, lesson_loss, settle, update
from train_spd import next_token_loss

TASK = Letters()


def lessons_of(count: int, temperature: float = 1.0) -> list[Lesson]:
    """Rollouts of a tiny model of unequal length, each with its own part unmasked."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    problems = TASK.problems("two", count, rng)
    rollouts = sample_rollouts(tiny_gpt(TASK), TASK, problems, 1, generator, temperature)
    lessons = []
    for i, rollout in enumerate(rollouts):
        T = len(rollout.tokens)
        prompt = TASK.teacher_prompt(rollout.problem, "abcd"[: i % 4])
        lessons.append(Lesson(rollout, prompt, min(i % 3, T - 1), T, advantage=(-1.0) ** i * (i + 1)))
    return lessons


def loss_of(lessons: list[Lesson], student: GPT, teacher: GPT, **flags: object) -> Tensor:
    count = torch.tensor(float(sum(lesson.end - lesson.start for lesson in lessons)))
    return lesson_loss(student, teacher, lessons, TASK, settle(Config(**flags)), count)


@pytest.mark.parametrize("method", ["rosd", "grpo"])
def test_loss_of_a_batch_is_the_mean_over_its_unmasked_tokens_one_by_one(method: str) -> None:
    lessons, student, teacher = lessons_of(5), tiny_gpt(TASK, seed=1), tiny_gpt(TASK, seed=2)
    values = []
    for lesson in lessons:
        tokens = lesson.rollout.tokens
        asked = (TASK.student_prompt(lesson.rollout.problem), lesson.teacher_prompt)
        prompts = list(map(TASK.encode, asked))
        pi_S = student(torch.tensor([prompts[0] + tokens]))[0].log_softmax(-1)
        pi_T = teacher(torch.tensor([prompts[1] + tokens]))[0].log_softmax(-1)
        for t in range(lesson.start, lesson.end):
            s, teach = pi_S[len(prompts[0]) + t - 1], pi_T[len(prompts[1]) + t - 1]
            ratio = (s[tokens[t]] - lesson.rollout.logprobs[t]).exp()
            if method == "grpo":
                values.append(clipped_surrogate(ratio, torch.tensor(lesson.advantage)))
            else:
                values.append(divergence(s, teach) * ratio.clamp(max=2.0))
    torch.testing.assert_close(loss_of(lessons, student, teacher, method=method), torch.stack(values).mean())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_the_distribution_sampled_from(temperature: float) -> None:
    model, prompts = tiny_gpt(TASK), [TASK.encode("ab0?"), TASK.encode("c1?")]
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = sample(model, prompts, 6, TASK.stop, 3, temperature, generator=generator)
    for i, (row, logs) in enumerate(zip(tokens, logprobs, strict=True)):
        logits = model(torch.tensor([prompts[i // 3] + row]))[0, len(prompts[i // 3]) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)[torch.arange(len(row)), row]
        torch.testing.assert_close(torch.tensor(logs), expected, rtol=1e-4, atol=1e-5)


def test_first_update_is_weighed_by_the_policy_now_over_the_policy_that_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pi(y_t) at temperature 1 / pi(y_t) at temperature 0.7, and 1 where both are the same."""
    seen: list[Tensor] = []

    def ratio(now: Tensor, then: Tensor) -> Tensor:
        seen.append(importance_ratio(now, then))
        return seen[-1]

    monkeypatch.setattr(train_rosd.losses, "importance_ratio", ratio)
    student = tiny_gpt(TASK)
    for temperature in (1.0, 0.7):
        (lesson, *_) = lessons = lessons_of(3, temperature)
        loss_of(lessons, student, student)
        prompt, tokens = TASK.encode(TASK.student_prompt(lesson.rollout.problem)), lesson.rollout.tokens
        logits = student(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        now, then = logits.softmax(-1), (logits / temperature).softmax(-1)
        by_hand = [(now[t, y] / then[t, y]).item() for t, y in enumerate(tokens)]
        assert seen[-1][0, : len(tokens)].tolist() == pytest.approx(by_hand, rel=1e-3)
        assert (max(abs(ratio - 1) for ratio in by_hand) < 1e-4) == (temperature == 1.0)


class Recorder(torch.optim.SGD):
    """Keeps the gradients of every update."""

    def __init__(self, student: GPT) -> None:
        super().__init__([p for p in student.parameters() if p.requires_grad], lr=0.1)
        self.seen: list[list[Tensor]] = []

    def step(self) -> None:
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        super().step()


def updates_of(lessons: list[Lesson], **flags: object) -> tuple[float | None, Recorder, GPT, GPT]:
    student, teacher = tiny_gpt(TASK), tiny_gpt(TASK, seed=2).requires_grad_(False)
    if flags.get("finetune") == "lora":
        teacher = student
        for parameter in add_lora(student, dropout=0.0):
            torch.nn.init.normal_(parameter, std=0.3)
    optimizer = Recorder(student)
    config = settle(Config(**{"grad_clip": 1e9, "warmup": 0, "learning_rate": 0.1} | flags))
    return update(student, teacher, optimizer, lessons, TASK, config, 0), optimizer, student, teacher


@pytest.mark.parametrize("finetune", ["full", "lora"])
@pytest.mark.parametrize("method", ["rosd", "grpo"])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_gradient_of_micro_batches_is_that_of_the_batch(micro_batch: int, method: str, finetune: str) -> None:
    lessons, flags = lessons_of(7), {"method": method, "finetune": finetune}
    whole_loss, whole, *_ = updates_of(lessons, **flags)
    loss, parts, *_ = updates_of(lessons, **flags, micro_batch=micro_batch)
    assert loss == pytest.approx(whole_loss, rel=1e-5) and len(parts.seen) == 1
    for one, other in zip(parts.seen[0], whole.seen[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags", [{}, {"finetune": "lora", "top_k": 5}, {"method": "grpo"}, {"mask": "whole"}], ids=str
)
@pytest.mark.parametrize("positions", [1, 3])
def test_gradient_of_logits_in_chunks_is_that_of_all_at_once(
    flags: dict, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons, seen, logits = lessons_of(7), [], GPT.logits
    whole_loss, whole, *_ = updates_of(lessons, **flags)
    monkeypatch.setattr(losses, "CHUNK", positions * TASK.vocab_size)
    monkeypatch.setattr(
        GPT, "logits", lambda model, hidden: seen.append(hidden[..., 0].numel()) or logits(model, hidden)
    )
    loss, parts, *_ = updates_of(lessons, **flags)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for one, other in zip(parts.seen[0], whole.seen[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert max(seen) == positions  # as many as allowed, and once more in the backward pass; none at a masked position
    passes = 2 if flags.get("method") == "grpo" else 4
    assert sum(seen) == passes * sum(lesson.end - lesson.start for lesson in lessons)


@pytest.mark.parametrize("flags", [{}, {"method": "grpo", "minibatches": 2}, {"micro_batch": 2}], ids=str)
def test_equal_lessons_are_computed_once_and_count_each_time(flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three, four = lessons_of(4)
    lessons, rows, original = [one, two, two, two, three, four, three], [], train_rosd.lesson_loss
    monkeypatch.setattr(train_rosd, "merge_equal", list)
    whole_loss, whole, *_ = updates_of(lessons, **flags)
    monkeypatch.undo()
    monkeypatch.setattr(
        train_rosd, "lesson_loss", lambda s, t, part, *rest: rows.extend(part) or original(s, t, part, *rest)
    )
    loss, merged, *_ = updates_of(lessons, **flags)
    assert len(rows) == (5 if "minibatches" in flags else 4) and sum(lesson.times for lesson in rows) == 7
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    for ours, theirs in zip(chain(*merged.seen), chain(*whole.seen), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_next_token_loss_in_chunks_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, found = [([1], [2, 3, 4]), ([5, 6], [7]), ([8, 9, 1], [2, 3, 4, 5, 6])], []
    for chunk in (losses.CHUNK, 4 * TASK.vocab_size):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        loss = next_token_loss(model := tiny_gpt(TASK), pairs)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_minibatches_are_updates_in_turn_on_parts_of_the_batch() -> None:
    lessons = lessons_of(6)
    loss, optimizer, student, _ = updates_of(lessons, minibatches=2)
    by_hand, by_hand_losses = tiny_gpt(TASK), []
    for part in (lessons[:3], lessons[3:]):
        value = loss_of(part, by_hand, tiny_gpt(TASK, seed=2))
        by_hand_losses.append(value.item())
        for p, gradient in zip(
            by_hand.parameters(), torch.autograd.grad(value, list(by_hand.parameters())), strict=True
        ):
            p.data -= 0.1 * gradient
    assert len(optimizer.seen) == 2 and loss == pytest.approx(sum(by_hand_losses) / 2, rel=1e-5)
    for one, other in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "count"), [({"updates": 3}, 3), ({"updates": 2, "minibatches": 2}, 4), ({"minibatches": 99}, 6)]
)
def test_updates_are_passes_over_all_minibatches_that_hold_a_lesson(flags: dict, count: int) -> None:
    assert len(updates_of(lessons_of(6), **flags)[1].seen) == count


@pytest.mark.parametrize("ema", [0.0, 0.25, 1.0])
def test_teacher_follows_the_student_at_the_rate_of_its_average(ema: float) -> None:
    start = tiny_gpt(TASK, seed=2)
    _, _, student, teacher = updates_of(lessons_of(3), ema=ema)
    for old, new, target in zip(start.parameters(), teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, (1 - ema) * old + ema * target)


def test_without_a_lesson_nothing_moves() -> None:
    start = tiny_gpt(TASK, seed=2)
    loss, optimizer, _, teacher = updates_of([], ema=0.5)
    assert loss is None and optimizer.seen == []
    assert all(map(torch.equal, teacher.parameters(), start.parameters()))


def test_learning_rate_warms_up_to_its_peak_and_the_gradient_is_clipped() -> None:
    lessons = lessons_of(3)
    for step, expected in ((0, 0.2), (3, 0.8), (4, 1.0), (9, 1.0)):
        student, config = tiny_gpt(TASK), settle(Config(learning_rate=1.0, warmup=5, grad_clip=1e-3))
        optimizer = Recorder(student)
        update(student, tiny_gpt(TASK, seed=2).requires_grad_(False), optimizer, lessons, TASK, config, step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        norm = torch.stack([gradient.norm() for gradient in optimizer.seen[0]]).norm()
        assert norm <= 1.001e-3
