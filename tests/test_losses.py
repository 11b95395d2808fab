"""The objectives compared with formulas written another way, their gradients with finite differences."""

import numpy as np
import pytest
import torch
from conftest import Letters, tiny_gpt
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from losses import (
    clipped_surrogate,
    divergence,
    group_advantage,
    importance_ratio,
    next_token_loss,
    token_logprobs,
    top_k_with_tail,
)

each_alpha = pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.8, 1.0])
with_and_without_tail = pytest.mark.parametrize("k", [2, 100])


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def student_and_teacher(*shape: int) -> tuple[Tensor, Tensor]:
    return random_logits(*shape, seed=1).log_softmax(-1), random_logits(*shape, seed=2).log_softmax(-1)


# ---------------------------------------------------------------------------------------------- divergence


@each_alpha
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


@each_alpha
def test_divergence_is_zero_for_equal_distributions_only(alpha: float) -> None:
    student, teacher = student_and_teacher(50, 8)
    assert divergence(student, student, alpha).abs().max() < 1e-12
    assert divergence(student, teacher, alpha).min() > 1e-3


@each_alpha
@with_and_without_tail
def test_gradient_of_divergence_equals_finite_differences(alpha: float, k: int) -> None:
    teacher = random_logits(3, 6, seed=2).log_softmax(-1)

    def loss(logits: Tensor) -> Tensor:
        return divergence(*top_k_with_tail(logits.log_softmax(-1), teacher, k), alpha)

    assert torch.autograd.gradcheck(loss, random_logits(3, 6, seed=1).requires_grad_())


@each_alpha
@with_and_without_tail
def test_no_gradient_reaches_the_teacher(alpha: float, k: int) -> None:
    student, teacher = random_logits(3, 6, seed=1).requires_grad_(), random_logits(3, 6, seed=2).requires_grad_()
    divergence(*top_k_with_tail(student.log_softmax(-1), teacher.log_softmax(-1), k), alpha).sum().backward()
    assert student.grad.abs().max() > 1e-3
    assert teacher.grad is None or not teacher.grad.any()


@each_alpha
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
    assert top_k_with_tail(student, teacher, 9) == (student, teacher)


# ---------------------------------------------------------------------------------------------- ratio, surrogate


def test_token_logprobs_are_those_of_the_tokens_that_were_sampled() -> None:
    log_S, y = random_logits(2, 3, 5).log_softmax(-1), torch.tensor([[4, 0, 2], [1, 1, 3]])
    expected = [[log_S[b, t, y[b, t]].item() for t in range(3)] for b in range(2)]
    assert token_logprobs(log_S, y).tolist() == expected


def test_importance_ratio_divides_now_by_then() -> None:
    now, then = torch.tensor([0.6, 0.1]).log(), torch.tensor([0.3, 0.4]).log()
    torch.testing.assert_close(importance_ratio(now, then), torch.tensor([2.0, 0.25]))


def test_importance_ratio_of_an_unchanged_policy_is_one_and_has_the_gradient_of_its_logprob() -> None:
    logits = random_logits(4, 6).requires_grad_()
    logp = logits.log_softmax(-1)[:, 2]
    ratio = importance_ratio(logp, logp)
    assert torch.equal(ratio, torch.ones_like(ratio))
    (of_ratio,) = torch.autograd.grad(ratio.sum(), logits, retain_graph=True)
    (of_logp,) = torch.autograd.grad(logp.sum(), logits)
    torch.testing.assert_close(of_ratio, of_logp)
    assert of_logp.abs().max() > 0


def test_group_advantage_is_the_reward_less_its_groups_mean() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 4.0, 2.0, 2.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4, [-2.0, 2.0, 0.0, 0.0]])
    assert torch.equal(group_advantage(rewards), expected)


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
    value = clipped_surrogate(rho, torch.tensor([[advantage]]))
    value.sum().backward()
    assert value.item() == pytest.approx(loss)
    assert rho.grad.item() == pytest.approx(gradient)


# ---------------------------------------------------------------------------------------------- next-token loss


@pytest.mark.parametrize("completion_only", [True, False])
def test_next_token_loss_is_the_mean_over_all_tokens_read_one_by_one(completion_only: bool) -> None:
    model = tiny_gpt(Letters())
    pairs, values = [([1], [2, 3, 4]), ([5, 6], [7]), ([8, 9, 1], [0, 3, 4, 5, 6])], []
    for prompt, response in pairs:
        tokens = prompt + response
        for t in range(len(prompt) if completion_only else 1, len(tokens)):
            values.append(-model(torch.tensor([tokens[:t]]))[0, -1].log_softmax(-1)[tokens[t]])
    assert len(values) == (9 if completion_only else 12)
    torch.testing.assert_close(next_token_loss(model, pairs, completion_only), torch.stack(values).mean())
