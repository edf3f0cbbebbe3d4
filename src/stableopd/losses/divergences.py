"""Divergences of student and teacher over the whole vocabulary, exact, at each position.

Logits are [B, T, V], or [..., V] with any leading axes; results are [B, T], or [...]. A temperature is a number, or
a tensor that broadcasts to the leading axes.
"""

from __future__ import annotations

from torch import Tensor

from stableopd.losses._numerics import (
    Temperature,
    check_same_vocabulary,
    check_share,
    expectation,
    jensen_shannon,
    kl,
    mixed,
    upcast,
)


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Log-probability of each given token under softmax(logits / temperature).

    Args:
        logits: [B, T, V].
        token_ids: [B, T] int64, each below V.
        temperature: > 0, the one that the tokens were drawn with.

    Returns: [B, T] in nats, float32 (float64 for float64 logits).
    Raises: ValueError when a temperature is not above 0 or does not fit the positions.
    """
    scaled = upcast(logits, temperature)
    picked = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return picked - scaled.logsumexp(dim=-1)


def token_entropy(logits: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) at each position: [B, T, V] -> [B, T] in nats.

    Numerics: entries of −inf count nothing, in the gradient too.
    """
    log_p = upcast(logits, temperature).log_softmax(dim=-1)
    return -expectation(log_p, log_p)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """KL(student ‖ teacher) over the whole vocabulary at each position, exact.

    Definition: Σ_v S(v) (log S(v) − log T(v)), both at `temperature`.
    Direction: mode-seeking; the student is drawn to what the teacher finds likely.
    Args: [B, T, V] each. A vocabulary entry may be −inf in both, and in the student alone.
    Returns: [B, T] in nats, ≥ 0; infinite where the teacher forbids what the student allows. Gradients flow into
        both arguments that require them.
    Raises: ValueError when the shapes differ or a temperature is not above 0.
    """
    return kl(*_logprobs_of_both(student_logits, teacher_logits, temperature))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """KL(teacher ‖ student) over the whole vocabulary at each position, exact.

    Definition: Σ_v T(v) (log T(v) − log S(v)), both at `temperature`.
    Direction: mode-covering; the student must allow all that the teacher finds likely.
    Args: [B, T, V] each. A vocabulary entry may be −inf in both, and in the teacher alone.
    Returns: [B, T] in nats, ≥ 0; infinite where the student forbids what the teacher allows.
    Raises: ValueError when the shapes differ or a temperature is not above 0.
    """
    log_s, log_t = _logprobs_of_both(student_logits, teacher_logits, temperature)
    return kl(log_t, log_s)


def mixed_kl(
    student_logits: Tensor, teacher_logits: Tensor, forward_weight: float = 0.5, temperature: Temperature = 1.0
) -> Tensor:
    """Both directions of the divergence over the whole vocabulary at each position, weighed, exact.

    Definition: w · KL(teacher ‖ student) + (1 − w) · KL(student ‖ teacher), w = `forward_weight`.
    Direction: from mode-seeking at w = 0 (`reverse_kl`) to mode-covering at w = 1 (`forward_kl`).

    Args:
        student_logits, teacher_logits: [B, T, V]. An entry may be −inf in both; in one alone only where the direction
            that forbids it has weight 0.
        forward_weight: in [0, 1].

    Returns: [B, T] in nats, ≥ 0. A direction with weight 0 is not computed.
    Raises: ValueError when the shapes differ, forward_weight is outside [0, 1] or a temperature is not above 0.
    """
    check_share("forward_weight", forward_weight, "the share of KL(teacher ‖ student)")
    return mixed(*_logprobs_of_both(student_logits, teacher_logits, temperature), forward_weight)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: Temperature = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence over the whole vocabulary at each position, exact.

    Definition: with M = β·T + (1 − β)·S: β KL(T ‖ M) + (1 − β) KL(S ‖ M). Continuous in β: it is 0 at β = 0 and at
    β = 1. For the limits of jsd/β and jsd/(1 − β) use `forward_kl` and `reverse_kl`.
    Direction: between both; nearer KL(teacher ‖ student) for small β, nearer KL(student ‖ teacher) for large β.

    Args:
        student_logits, teacher_logits: [B, T, V]. Either may be −inf anywhere.
        beta: weight of the teacher, in [0, 1].

    Returns: [B, T] in nats, in [0, log 2] up to rounding.
    Raises: ValueError when the shapes differ, beta is outside [0, 1] or a temperature is not above 0.
    Source: Agarwal et al. 2024, arXiv 2306.13649, eq. 1, with its endpoints left continuous.
    """
    check_share("beta", beta, "the teacher's share of the mixture")
    return jensen_shannon(*_logprobs_of_both(student_logits, teacher_logits, temperature), beta)


def _logprobs_of_both(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature
) -> tuple[Tensor, Tensor]:
    check_same_vocabulary(student_logits, teacher_logits)
    student, teacher = upcast(student_logits, temperature), upcast(teacher_logits, temperature)
    return student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
