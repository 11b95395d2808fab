"""The objectives as pure functions: generalized Jensen-Shannon divergence, masked mean, GRPO's clipped surrogate.

Notation of the ROSD paper: pi_S the student, pi_T the teacher, D the divergence, m_t the mask of the
first error, rho_t the importance ratio.

    L = sum_t m_t min(rho_t, 2) D( pi_S(. | x, y_<t) || stopgrad pi_T(. | x, e, y_<t) ) / sum_t m_t

>>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
>>> [round(divergence(student, teacher, alpha).item(), 3) for alpha in (0.0, 0.5, 1.0)]  # forward KL, JSD, reverse KL
[0.368, 0.102, 0.511]
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 25  # logits in memory at once, positions times vocabulary


def top_k_with_tail(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the student's k likeliest tokens and put all others into one tail bucket.

    student, teacher: log-probs (..., V) -> log-probs (..., k + 1), each again a distribution; unchanged where k >= V.
    """
    if k >= student.size(-1):
        return student, teacher
    index = student.topk(k, dim=-1).indices  # (..., k)

    def coarsen(logp: Tensor) -> Tensor:
        kept = logp.gather(-1, index)
        tail = (1 - kept.exp().sum(-1, keepdim=True)).clamp(min=1e-7).log()
        return torch.cat((kept, tail), dim=-1)

    return coarsen(student), coarsen(teacher)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v): log-probs (..., V) -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence D(pi_S || pi_T) at every position.

    With the mixture M = (1 - alpha) pi_S + alpha pi_T:  D = alpha KL(pi_T || M) + (1 - alpha) KL(pi_S || M).
    At the ends, where that vanishes, D is its limit (divided by alpha or 1 - alpha): alpha = 0 gives the forward
    KL(pi_T || pi_S), alpha = 1 the reverse KL(pi_S || pi_T).

    student, teacher: log-probs (..., V), alpha in [0, 1] -> (...), in nats. No gradient reaches the teacher.
    """
    teacher = teacher.detach()
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return alpha * kl(teacher, mixture) + (1 - alpha) * kl(student, mixture)


def pad(rows: list[list], value: float = 0) -> Tensor:
    """Rows of unequal length -> (B, longest), the value on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def in_chunks(f: Callable[..., Tensor], mask: Tensor, vocab_size: int, *tensors: Tensor) -> Tensor:
    """f(*tensors): (B, T, ...) -> (B, T), where f makes logits at every position.

    Where the logits of all positions exceed CHUNK, f sees the unmasked positions alone, a part of them at a time, and
    runs a second time in the backward pass; the masked positions are 0 then.
    """
    if mask.numel() * vocab_size <= CHUNK:
        return f(*tensors)
    unmasked, size = mask > 0, max(1, CHUNK // vocab_size)
    parts = zip(*(tensor[unmasked].split(size) for tensor in tensors), strict=True)
    values = torch.cat([checkpoint(f, *part, use_reentrant=False) for part in parts])  # (number of unmasked positions,)
    return values.new_zeros(mask.shape).masked_scatter(unmasked, values)


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """sum m_t values_t / sum m_t over the whole batch; 0 where nothing is unmasked. values, mask (B, T) -> ().

    count takes the place of sum m_t where values are a part of a batch: a micro-batch, or a process's share.
    """
    return (values * mask).sum() / (mask.sum() if count is None else count).clamp(min=1)


def importance_ratio(logp: Tensor, logp_sampling: Tensor) -> Tensor:
    """pi_S(y_t) now / pi_S(y_t) when it was sampled; 1 at the first update of a batch. Both (B, T) -> (B, T)."""
    return (logp - logp_sampling.detach()).exp()


def group_advantage(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r), without division by the standard deviation. rewards (groups, G) -> (groups, G)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """GRPO's token loss -min(rho A, clip(rho, 1 - low, 1 + high) A), with DAPO's asymmetric clip. (B, T) -> (B, T)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
