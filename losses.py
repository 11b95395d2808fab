"""The objectives as pure functions: generalized Jensen-Shannon divergence, importance ratio, GRPO's clipped surrogate.

Notation of the ROSD paper: pi_S the student, pi_T the teacher, D the divergence, m_t the mask of the first error,
rho_t the importance ratio. `train_rosd.py` puts them together:

    L = sum_t m_t min(rho_t, 2) D( pi_S(. | x, y_<t) || stopgrad pi_T(. | x, e, y_<t) ) / sum_t m_t

>>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
>>> [round(divergence(student, teacher, alpha).item(), 3) for alpha in (0.0, 0.5, 1.0)]  # forward KL, JSD, reverse KL
[0.368, 0.102, 0.511]
"""

import math

import torch
from torch import Tensor

from model import GPT, pad, response_logprobs

Document = tuple[list[int], list[int]]  # prompt and response tokens


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


def token_logprobs(log_S: Tensor, y: Tensor) -> Tensor:
    """log pi_S(y_t): log-probs (B, T, V) and tokens (B, T) -> (B, T)."""
    return log_S.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def importance_ratio(logp: Tensor, logp_sampling: Tensor) -> Tensor:
    """rho_t = pi_S(y_t) now / pi_S(y_t) when it was sampled; 1 at the first update of a batch. (B, T) -> (B, T)."""
    return (logp - logp_sampling.detach()).exp()


def group_advantage(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r), without division by the standard deviation. rewards (groups, G) -> (groups, G)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """GRPO's token loss -min(rho A, clip(rho, 1 - low, 1 + high) A), with DAPO's asymmetric clip. (B, T) -> (B, T)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def next_token_loss(model: GPT, documents: list[Document], completion_only: bool = True) -> Tensor:
    """Mean of -log p(y_t | x, y_<t) over all tokens of the responses, or of prompts and responses.

    The loss of SPD's fine-tuning and of the pretraining.
    """
    if not completion_only:
        documents = [(prompt[:1], prompt[1:] + response) for prompt, response in documents]
    prompts, responses = map(list, zip(*documents, strict=True))
    y = pad(responses, -1).to(model.device)  # (B, T)
    logp = token_logprobs(response_logprobs(model, prompts, responses), y.clamp(min=0))  # (B, T)
    return -(logp * (y >= 0)).sum() / (y >= 0).sum()
