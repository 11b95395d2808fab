"""The objectives against formulas written another way, and their gradients against finite differences."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import Letters, tiny_gpt
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import losses
import train_rosd
from lora import add_lora
from losses import (
    clipped_surrogate,
    divergence,
    group_advantage,
    importance_ratio,
    masked_mean,
    top_k_with_tail,
)
from model import GPT, sample
from reflect import sample_rollouts
from train_rosd import Config, Lesson, lesson_loss, settle, update
from train_spd import next_token_loss

ALPHAS = [0.0, 0.1, 0.5, 0.8, 1.0]


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def student_and_teacher(*shape: int) -> tuple[Tensor, Tensor]:
    return random_logits(*shape, seed=1).log_softmax(-1), random_logits(*shape, seed=2).log_softmax(-1)


# ---------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergence_equals_torch_distributions(alpha: float) -> None:
    student, teacher = student_and_teacher(4, 6, 9)
    p_student, p_teacher = Categorical(logits=student), Categorical(logits=teacher)
    mixture = Categorical(probs=(1 - alpha) * p_student.probs + alpha * p_teacher.probs)
    if alpha == 0:
        expected = kl_divergence(p_teacher, p_student)
    elif alpha == 1:
        expected = kl_divergence(p_student, p_teacher)
    else:
        expected = alpha * kl_divergence(p_teacher, mixture) + (1 - alpha) * kl_divergence(p_student, mixture)
    torch.testing.assert_close(divergence(student, teacher, alpha), expected)


def test_forward_and_reverse_kl_are_the_limits_of_the_divergence() -> None:
    student, teacher = student_and_teacher(5, 7)
    small = 1e-6
    forward, reverse = divergence(student, teacher, small) / small, divergence(student, teacher, 1 - small) / small
    torch.testing.assert_close(forward, divergence(student, teacher, 0.0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(reverse, divergence(student, teacher, 1.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergence_is_zero_for_equal_distributions_only(alpha: float) -> None:
    student, teacher = student_and_teacher(50, 8)
    assert divergence(student, student, alpha).abs().max() < 1e-12
    assert divergence(student, teacher, alpha).min() > 1e-3


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [2, 100])
def test_gradient_of_divergence_equals_finite_differences(alpha: float, k: int) -> None:
    teacher = random_logits(3, 6, seed=2).log_softmax(-1)

    def loss(logits: Tensor) -> Tensor:
        return divergence(*top_k_with_tail(logits.log_softmax(-1), teacher, k), alpha)

    assert torch.autograd.gradcheck(loss, random_logits(3, 6, seed=1).requires_grad_())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [2, 100])
def test_no_gradient_reaches_the_teacher(alpha: float, k: int) -> None:
    student, teacher = random_logits(3, 6, seed=1).requires_grad_(), random_logits(3, 6, seed=2).requires_grad_()
    divergence(*top_k_with_tail(student.log_softmax(-1), teacher.log_softmax(-1), k), alpha).sum().backward()
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None or not teacher.grad.any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergence_of_certain_and_opposed_distributions_is_finite(alpha: float) -> None:
    student = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 200.0, 0.0]])
    value = divergence(*top_k_with_tail(student.log_softmax(-1), teacher.log_softmax(-1), 2), alpha)
    value.backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- top k with tail


def coarse(probs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.append(probs[kept], 1 - probs[kept].sum())


@pytest.mark.parametrize("k", [1, 3, 8])
def test_tail_bucket_holds_all_but_the_students_top_k(k: int) -> None:
    student, teacher = student_and_teacher(5, 9)
    for log_s, log_t, s, t in zip(*top_k_with_tail(student, teacher, k), student, teacher, strict=True):
        s, t = s.exp().numpy(), t.exp().numpy()
        kept = np.argsort(-s)[:k]
        np.testing.assert_allclose(log_s.exp().numpy(), coarse(s, kept), rtol=1e-9)
        np.testing.assert_allclose(log_t.exp().numpy(), coarse(t, kept), rtol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergence_with_tail_equals_numpy(alpha: float) -> None:
    student, teacher = student_and_teacher(5, 9)
    values = divergence(*top_k_with_tail(student, teacher, 3), alpha).tolist()
    for value, s, t in zip(values, student.exp().numpy(), teacher.exp().numpy(), strict=True):
        kept = np.argsort(-s)[:3]
        s, t = coarse(s, kept), coarse(t, kept)
        m = (1 - alpha) * s + alpha * t
        to_student, to_teacher = np.sum(s * np.log(s / m)), np.sum(t * np.log(t / m))
        assert value == pytest.approx(
            {0.0: np.sum(t * np.log(t / s)), 1.0: np.sum(s * np.log(s / t))}.get(
                alpha, alpha * to_teacher + (1 - alpha) * to_student
            )
        )


def test_tail_sums_to_one_even_where_nothing_is_left() -> None:
    certain = torch.tensor([[60.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    flat = torch.zeros(1, 4).log_softmax(-1)
    for logp in (*top_k_with_tail(certain, flat, 2), *top_k_with_tail(flat, certain, 2)):
        assert logp.exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert logp.isfinite().all()


def test_coarsening_loses_divergence_unless_the_tail_is_one_token() -> None:
    student, teacher = student_and_teacher(5, 9)
    full = divergence(student, teacher)
    assert (divergence(*top_k_with_tail(student, teacher, 3)) < full).all()
    torch.testing.assert_close(divergence(*top_k_with_tail(student, teacher, 8)), full)
    torch.testing.assert_close(divergence(*top_k_with_tail(student, teacher, 9)), full)


# ---------------------------------------------------------------------------------------------- mean, ratio, surrogate


def test_masked_mean_weighs_every_unmasked_token_of_the_batch_alike() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [7.0, 9.0, 9.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert masked_mean(values, mask).item() == 4.0  # (2 + 3 + 7) / 3; the mean of the rows' means would be 4.75
    assert masked_mean(values, torch.zeros(2, 3)).item() == 0.0


def test_masked_tokens_get_no_gradient() -> None:
    values = torch.ones(2, 3, requires_grad=True)
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    masked_mean(values, mask).backward()
    torch.testing.assert_close(values.grad, mask / 3)


def test_group_advantage_is_the_reward_less_its_groups_mean() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 4.0, 2.0, 2.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [-2.0, 2.0, 0.0, 0.0]])
    assert torch.equal(group_advantage(rewards), expected)


def test_importance_ratio_is_one_with_the_gradient_of_the_logprob() -> None:
    logits = random_logits(4, 6).requires_grad_()
    logp = logits.log_softmax(-1)[:, 2]
    ratio = importance_ratio(logp, logp)
    assert torch.equal(ratio, torch.ones_like(ratio))
    (of_ratio,) = torch.autograd.grad(ratio.sum(), logits, retain_graph=True)
    (of_logp,) = torch.autograd.grad(logp.sum(), logits)
    torch.testing.assert_close(of_ratio, of_logp)
    assert of_logp.abs().max() > 0


def test_importance_ratio_divides_now_by_then() -> None:
    now, then = torch.tensor([0.6, 0.1]).log(), torch.tensor([0.3, 0.4]).log()
    torch.testing.assert_close(importance_ratio(now, then), torch.tensor([2.0, 0.25]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.25, 1.0, -1.25, -1.0),  # above 1 + low, below 1 + high: not clipped yet
        (1.5, 1.0, -1.28, 0.0),
        (0.5, 1.0, -0.5, -1.0),  # a good token grown unlikely: never clipped
        (0.75, -1.0, 0.8, 0.0),  # below 1 - low, above 1 - high: clipped already
        (0.85, -1.0, 0.85, 1.0),
        (1.5, -1.0, 1.5, 1.0),  # a bad token grown likely: never clipped
    ],
)
def test_surrogate_clips_asymmetrically_and_only_what_went_far_enough(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    rho = torch.tensor([[ratio]], requires_grad=True)
    value = clipped_surrogate(rho, torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.28)
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert rho.grad.item() == pytest.approx(gradient)


def test_one_advantage_serves_all_tokens_of_its_row() -> None:
    losses = clipped_surrogate(torch.ones(2, 3), torch.tensor([[1.0], [-math.e]]))
    torch.testing.assert_close(losses, torch.tensor([[-1.0] * 3, [math.e] * 3]))


# ---------------------------------------------------------------------------------------------- a batch's loss, updates

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
