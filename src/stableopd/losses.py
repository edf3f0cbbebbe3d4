"""Per-token losses of on-policy distillation: pure, unreduced, in nats.

Arrays are [B, T] (one value per completion token) or [B, T, V] (logits over the vocabulary). Nothing
here knows about masks except `reduce_tokens`, the only place where tokens are summed; its denominator
is fixed by the caller before any backward pass, so that splitting a batch changes nothing.

Divergences are written KL(student ‖ teacher) with the direction in the name of the arguments.
"""

from __future__ import annotations

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
