"""Per-token losses of on-policy distillation: pure, unreduced, in nats.

Arrays are [B, T] (one value per completion token) or [B, T, V] (logits over the vocabulary). Nothing
here knows about masks except `reduce_tokens`, the only place where tokens are summed; its denominator
is fixed by the caller before any backward pass, so that splitting a batch changes nothing.

Divergences are written KL(student ‖ teacher) with the direction in the name of the arguments.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

_MAX_LOG_RATIO = 20.0
"""exp(20) is finite in every dtype used here; beyond it a ratio carries no information."""


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each given token under softmax(logits / temperature).

    Args:
        logits: [B, T, V].
        token_ids: [B, T] int64, each below V.
        temperature: > 0, the one that the tokens were drawn with.

    Returns: [B, T] in nats, float32 (float64 for float64 logits).
    """
    scaled = _upcast(logits, temperature)
    picked = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return picked - scaled.logsumexp(dim=-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) at each position: [B, T, V] -> [B, T] in nats."""
    log_p = _upcast(logits, temperature).log_softmax(dim=-1)
    return torch.special.entr(log_p.exp()).sum(dim=-1)


def sampled_reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """log S(y) − log T(y) of the sampled token y: the one-sample estimate of KL(student ‖ teacher).

    Its negative is the token advantage A = log T(y) − log S(y) of on-policy distillation.

    Args: both [B, T] in nats, at the same temperature.
    Returns: [B, T] in nats; may be negative.
    Source: Luo et al. 2026, arXiv 2604.08527 (token advantage of OPD).
    """
    return student_logprobs - teacher_logprobs


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Tensor:
    """Clipped policy-gradient loss of each token: −min(r·A, clip(r, 1−ε_low, 1+ε_high)·A), r = π/π_old.

    Args:
        logprobs: [B, T] of the policy being trained, differentiable.
        old_logprobs: [B, T] of the policy that drew the tokens; treated as constant.
        advantages: [B, T]; treated as constant.

    Returns: [B, T]. At r = 1 its gradient is −A ∇ log π.
    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; token advantage as in arXiv 2604.08527.
    """
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, clipped * advantages)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher) over the whole vocabulary at each position, exact.

    Definition: Σ_v S(v) (log S(v) − log T(v)), both at `temperature`.
    Args: [B, T, V] each. A vocabulary entry may be −inf in both, and in the student alone.
    Returns: [B, T] in nats, ≥ 0; gradients flow into both arguments that require them.
    Raises: ValueError when the shapes differ.
    """
    _check_same_shape(student_logits, teacher_logits)
    log_s = _upcast(student_logits, temperature).log_softmax(dim=-1)
    log_t = _upcast(teacher_logits, temperature).log_softmax(dim=-1)
    return _expectation(log_s, log_s - log_t)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) over the whole vocabulary at each position, exact.

    Definition: Σ_v T(v) (log T(v) − log S(v)), both at `temperature`.
    Args: [B, T, V] each. A vocabulary entry may be −inf in both, and in the teacher alone.
    Returns: [B, T] in nats, ≥ 0; infinite where the student forbids what the teacher allows.
    Raises: ValueError when the shapes differ.
    """
    return reverse_kl(teacher_logits, student_logits, temperature)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence over the whole vocabulary at each position, exact.

    Definition: with M = β·T + (1 − β)·S: β KL(T ‖ M) + (1 − β) KL(S ‖ M). Continuous in β: it is 0 at β = 0 and at
    β = 1. For the limits of jsd/β and jsd/(1 − β) use `forward_kl` and `reverse_kl`.

    Args:
        student_logits, teacher_logits: [B, T, V]. Either may be −inf anywhere.
        beta: weight of the teacher, in [0, 1].

    Returns: [B, T] in nats, in [0, log 2].
    Raises: ValueError when the shapes differ or beta is outside [0, 1].
    Source: Agarwal et al. 2024, arXiv 2306.13649, eq. 1, with its endpoints left continuous.
    """
    _check_same_shape(student_logits, teacher_logits)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it is the teacher's share of the mixture and lies in [0, 1]")
    if beta in (0.0, 1.0):
        return (student_logits * 0.0).nan_to_num(0.0).sum(dim=-1)
    log_s = _upcast(student_logits, temperature).log_softmax(dim=-1)
    log_t = _upcast(teacher_logits, temperature).log_softmax(dim=-1)
    nowhere = (log_s == -torch.inf) & (log_t == -torch.inf)  # logaddexp has no gradient there
    log_s_safe, log_t_safe = log_s.masked_fill(nowhere, 0.0), log_t.masked_fill(nowhere, 0.0)
    log_m = torch.logaddexp(log_t_safe + math.log(beta), log_s_safe + math.log1p(-beta))
    return beta * _expectation(log_t, log_t - log_m) + (1.0 - beta) * _expectation(log_s, log_s - log_m)


def topk_reverse_kl(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(student ‖ teacher), both renormalised on the teacher's top-k ids: local support matching.

    Definition: Σ_{v in top-k} S~(v) (log S~(v) − log T~(v)), ~ renormalised on the set. Without renormalising the
    student could lower the loss by moving its mass off the set. It is 0 for k = 1.

    Args:
        student_logits: [B, T, V].
        teacher_topk_ids: [B, T, K] int64, distinct at each position.
        teacher_topk_logprobs: [B, T, K] in nats, at `temperature`, before renormalising; treated as constant.

    Returns: [B, T] in nats, ≥ 0.
    Source: Fu et al. 2026, arXiv 2603.25562 (teacher top-k local support matching).
    """
    log_s = _upcast(student_logits.gather(-1, teacher_topk_ids), temperature).log_softmax(dim=-1)
    log_t = _upcast(teacher_topk_logprobs.detach(), 1.0).log_softmax(dim=-1)
    return _expectation(log_s, log_s - log_t)


def discounted_advantages(advantages: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Each token's advantage with the discounted ones of the tokens that follow: Σ_{i ≥ t} γ^{i−t} A_i.

    Args:
        advantages: [B, T]; masked entries are never read.
        mask: [B, T] bool, the real tokens, without holes.
        gamma: in [0, 1]; 0 leaves the advantages as they are, 1 gives the sum to go.

    Returns: [B, T], 0 where masked.
    Raises: ValueError when gamma is outside [0, 1].
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma}; a discount lies in [0, 1]")
    total = torch.where(mask, advantages, torch.zeros_like(advantages))
    reach, width = 1, advantages.shape[1]
    while reach < width and gamma > 0:  # sums over 1, 2, 4, ... tokens ahead
        ahead = torch.nn.functional.pad(total[:, reach:], (0, reach))
        total, reach = total + gamma**reach * ahead, 2 * reach
    return torch.where(mask, total, torch.zeros_like(total))


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlEstimator = "k3") -> Tensor:
    """One-sample estimate of KL(policy ‖ reference) from the log-probabilities of the sampled token.

    Definition: with d = log π(y) − log π_ref(y): k1 = d; k2 = d²/2; k3 = exp(−d) + d − 1.
    k1 and k3 are unbiased as *values*, k3 with less variance and never negative. Their autograd gradients are
    not those of the divergence: for a loss use `kl_penalty`.

    Args: [B, T] each, nats. Returns: [B, T], nats.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return (-d).clamp(max=_MAX_LOG_RATIO).exp() + d - 1.0
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(get_args(KlEstimator))}")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Differentiable one-sample penalty for KL(policy ‖ reference): value of k3, gradient of k2.

    On tokens drawn from the policy the expected gradient of k2, d ∇log π, is that of KL(policy ‖ reference);
    the gradient of k3 itself would be that of KL(reference ‖ policy).

    Args: [B, T] each, nats; the reference is treated as constant. Returns: [B, T], nats, ≥ 0.
    """
    ref_logprobs = ref_logprobs.detach()
    value = kl_estimate(logprobs, ref_logprobs, "k3").detach()
    carrier = kl_estimate(logprobs, ref_logprobs, "k2")
    return value + carrier - carrier.detach()


def reduce_tokens(token_loss: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """Σ(token_loss · mask) / denominator, with masked entries never read.

    Args:
        token_loss: [B, T], unreduced. Masked entries may hold anything, also inf and nan.
        mask: [B, T], bool or non-negative weights.
        denominator: total weight over all micro-batches and processes, fixed before the backward pass.

    Returns: scalar; 0 with zero gradient when the mask is empty.
    Raises: ValueError when denominator is not positive.
    Holds: summing over any split of the rows with one denominator gives the loss of the whole batch.
    """
    if not denominator > 0:
        raise ValueError(f"denominator is {denominator}; it must be the positive total weight of the tokens")
    weight = mask.to(token_loss.dtype)
    kept = torch.where(weight != 0, token_loss, torch.zeros_like(token_loss))
    return (kept * weight).sum() / denominator


def _upcast(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need a temperature above 0")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def _expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Σ_v p(v) · values(v) over the last axis; entries with p = 0 count nothing, in the gradient too."""
    possible = log_p > -torch.inf
    safe_log_p = log_p.masked_fill(~possible, 0.0)
    terms = safe_log_p.exp() * values.masked_fill(~possible, 0.0)
    return terms.masked_fill(~possible, 0.0).sum(dim=-1)


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}; "
            "cut both to the common vocabulary first"
        )
