"""Losses of the sampled token alone: policy gradients, one-sample estimates of a divergence, importance weights.

Log-probabilities are [B, T] in nats, of the tokens that were drawn.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stableopd.losses._numerics import MAX_LOG_RATIO, bounded_ratio, check_choice

KlEstimator = Literal["k1", "k2", "k3"]
CorrectionKind = Literal["truncate", "mask"]


def sampled_reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """log S(y) − log T(y) of the sampled token y: the one-sample estimate of KL(student ‖ teacher).

    Its negative is the token advantage A = log T(y) − log S(y) of on-policy distillation. A value, not a loss: the
    expectation of its own gradient is 0.

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

    Direction: with A = log T − log S_old, that of KL(student ‖ teacher).

    Args:
        logprobs: [B, T] of the policy being trained, differentiable.
        old_logprobs: [B, T] of the policy that drew the tokens; treated as constant.
        advantages: [B, T]; treated as constant.
        epsilon_low, epsilon_high: ≥ 0; a low one of 1 and a high one of infinity clip nothing.

    Returns: [B, T]. At r = 1 its gradient is −A ∇ log π.
    Raises: ValueError when an epsilon is below 0 or no number.
    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; token advantage as in arXiv 2604.08527.
    """
    if not (epsilon_low >= 0.0 and epsilon_high >= 0.0):
        raise ValueError(
            f"epsilon_low is {epsilon_low} and epsilon_high is {epsilon_high}; the ratio is clipped to "
            "[1 - epsilon_low, 1 + epsilon_high], which must hold 1, so give numbers from 0 on"
        )
    ratio = bounded_ratio(logprobs - old_logprobs.detach())
    clipped = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, clipped * advantages)


def reinforce_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    gate_low: float = 0.5,
    gate_high: float = 2.0,
) -> Tensor:
    """Policy-gradient loss of each token with a gated importance weight: −g(r)·A·log π, r = π/π_old.

    Definition: g(r) = r where gate_low ≤ r ≤ gate_high, else 0: the token is left out. g(r) is a constant, so that the
    gradient is −g(r) A ∇ log π. Unlike clipping, a token outside is left out whatever the sign of its advantage.
    Direction: with A = log T − log S_old, that of KL(student ‖ teacher).

    Args:
        logprobs: [B, T] of the policy being trained, differentiable.
        old_logprobs: [B, T] of the policy that drew the tokens; treated as constant.
        advantages: [B, T]; treated as constant.
        gate_low: in [0, 1]; 0 leaves no unlikely token out.
        gate_high: ≥ 1; infinity leaves no likely token out.

    Returns: [B, T]; 0 outside the gate. The value means nothing by itself, only its gradient does.
    Raises: ValueError when the gate does not hold r = 1.
    Source: Williams 1992 (REINFORCE); the gate as in IcePop (Ling team 2025) and NeMo-RL.
    Numerics: r is kept within exp(±20). A token outside the gate may have a log-probability of −inf.
    """
    if not 0.0 <= gate_low <= 1.0 <= gate_high:
        raise ValueError(
            f"the gate is [{gate_low}, {gate_high}]; it must be 0 <= gate_low <= 1 <= gate_high, "
            "or tokens of an unchanged policy would be left out"
        )
    ratio = bounded_ratio((logprobs - old_logprobs).detach())
    outside = (ratio < gate_low) | (ratio > gate_high)
    weight = (ratio * advantages.detach()).masked_fill(outside, 0.0)
    return -weight * logprobs.masked_fill(outside, 0.0)


def importance_weights(
    trainer_logprobs: Tensor,
    engine_logprobs: Tensor,
    kind: CorrectionKind = "truncate",
    cap: float = 2.0,
    floor: float = 0.0,
) -> Tensor:
    """Weight of each token for the gap between the trainer's and the rollout engine's probabilities of it.

    Definition: w = exp(log π_trainer − log π_engine), both of the same weights. truncate: min(w, cap). mask: w where
    floor ≤ w ≤ cap, else 0. Both engines agree at w = 1.

    Args:
        trainer_logprobs, engine_logprobs: [B, T] in nats.
        cap: ≥ 1; infinity leaves w as it is.
        floor: in [0, 1]; read by mask only.

    Returns: [B, T] ≥ 0, detached.
    Raises: ValueError when the kind is unknown or 1 is not between floor and cap.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated
        importance sampling); mask as in IcePop (Ling team 2025); both as in TRL's correction of vLLM's tokens.
    Numerics: w is kept within exp(±20).
    """
    check_choice("kind", kind, CorrectionKind)
    if not 0.0 <= floor <= 1.0 <= cap:
        raise ValueError(
            f"floor is {floor} and cap is {cap}; they must be 0 <= floor <= 1 <= cap, "
            "or tokens on which trainer and engine agree would be changed"
        )
    ratio = bounded_ratio((trainer_logprobs - engine_logprobs).detach())
    if kind == "truncate":
        return ratio.clamp(max=cap)
    return ratio.masked_fill((ratio < floor) | (ratio > cap), 0.0)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlEstimator = "k3") -> Tensor:
    """One-sample estimate of KL(policy ‖ reference) from the log-probabilities of the sampled token.

    Definition: with d = log π(y) − log π_ref(y): k1 = d; k2 = d²/2; k3 = exp(−d) + d − 1.
    k1 and k3 are unbiased as *values*, k3 with less variance and never negative. Their autograd gradients are
    not those of the divergence: that of k1 is 0 in expectation, that of k3 belongs to KL(reference ‖ policy). For a
    loss use `kl_penalty`.

    Args: [B, T] each, nats. Returns: [B, T], nats.
    Raises: ValueError when the kind is unknown.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    check_choice("kind", kind, KlEstimator)
    d = logprobs - ref_logprobs
    known = d.isfinite()  # elsewhere no gradient, so that a mask over the values masks it too
    return torch.where(known, _estimate(d.masked_fill(~known, 0.0), kind), _estimate(d.detach(), kind))


def _estimate(d: Tensor, kind: KlEstimator) -> Tensor:
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    return (-d).clamp(max=MAX_LOG_RATIO).exp() + d - 1.0


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: KlEstimator = "k3") -> Tensor:
    """Differentiable one-sample penalty for KL(policy ‖ reference): value of an estimate, gradient of k2.

    On tokens drawn from the policy the expected gradient of k2, d ∇log π, is that of KL(policy ‖ reference);
    the gradient of k3 itself would be that of KL(reference ‖ policy), and that of k1 is 0. The kind therefore
    changes what is logged, never the update.

    Args: [B, T] each, nats; the reference is treated as constant.
    Returns: [B, T], nats, exactly `kl_estimate(..., kind)`; ≥ 0 for k2 and k3.
    Raises: ValueError when the kind is unknown.
    Source: Schulman 2020, "Approximating KL divergence"; the gradient of k2 as in verl's "k3+".
    """
    value = kl_estimate(logprobs, ref_logprobs, kind).detach()
    d = (logprobs - ref_logprobs).detach()
    known = d.isfinite()
    change = (logprobs - logprobs.detach()).masked_fill(~known, 0.0)
    return value + d.masked_fill(~known, 0.0) * change
