"""Divergences over a few candidates at each position: the top-k tokens of teacher, student or both.

Two steps: `candidate_set` says which ids count, `support_divergence` compares the log-probabilities gathered there.
Every set is either renormalised or gets the mass outside as one more outcome. Without either the student could lower
KL(student ‖ teacher) by moving its mass off the set.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stableopd.losses._numerics import (
    IMPOSSIBLE,
    Temperature,
    check_choice,
    check_same_vocabulary,
    check_share,
    jensen_shannon,
    kl,
    log1mexp,
    mixed,
    upcast,
)

SupportKind = Literal["teacher_topk", "student_topk", "intersection", "union", "symmetric_difference"]
DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd", "mixed_kl"]
TailKind = Literal["renormalise", "bucket"]


@torch.no_grad()
def candidate_set(student_logits: Tensor, teacher_logits: Tensor, k: int, kind: SupportKind) -> tuple[Tensor, Tensor]:
    """Candidate ids at each position, and which of them count.

    Definition: with S_k and T_k the k most likely ids of student and teacher: T_k, S_k, S_k ∩ T_k, S_k ∪ T_k, or the
    ids in exactly one of the two.

    Args:
        student_logits, teacher_logits: [..., V], at any temperature: it changes no order. An id of −inf is among
            nobody's most likely ones.
        k: ≥ 1; V where it is larger.

    Returns: ids [..., M] int64 and member [..., M] bool. M is k, and 2k for union and symmetric difference. The
        members are distinct; ids that are no members mean nothing, though each is below V. No gradient.
    Raises: ValueError when the shapes differ, k < 1 or the kind is unknown.
    Source: the names of the sets as in thunlp/OPD and "Revisiting On-Policy Distillation" (arXiv 2603.25562).
    """
    check_same_vocabulary(student_logits, teacher_logits)
    check_choice("kind", kind, SupportKind)
    if k < 1:
        raise ValueError(f"k is {k}; a support needs at least one candidate")
    k = min(k, student_logits.shape[-1])
    if kind == "student_topk":
        return _most_likely(student_logits, k)
    teacher_ids, of_teacher = _most_likely(teacher_logits, k)
    if kind == "teacher_topk":
        return teacher_ids, of_teacher
    student_ids, of_student = _most_likely(student_logits, k)
    shared = of_teacher & _is_among(teacher_ids, student_ids, of_student)
    if kind == "intersection":
        return teacher_ids, shared
    of_student_alone = of_student & ~_is_among(student_ids, teacher_ids, of_teacher)
    first = of_teacher if kind == "union" else of_teacher & ~shared
    return torch.cat([teacher_ids, student_ids], dim=-1), torch.cat([first, of_student_alone], dim=-1)


def support_divergence(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    member: Tensor,
    divergence: DivergenceKind = "reverse_kl",
    tail: TailKind = "renormalise",
    beta: float = 0.5,
    forward_weight: float = 0.5,
) -> Tensor:
    """Divergence of student and teacher over the members of a candidate set, at each position.

    Definition: reverse_kl is KL(student ‖ teacher), forward_kl is KL(teacher ‖ student), mixed_kl is
    w·forward + (1 − w)·reverse, jsd is β KL(T ‖ M) + (1 − β) KL(S ‖ M) with M = β T + (1 − β) S. The two distributions
    are, with tail = "renormalise", both renormalised on the set; with tail = "bucket", the probabilities on the set
    and 1 − their sum for everything outside it.

    Args:
        student_logprobs: [..., M] in nats, over the whole vocabulary, gathered at the candidates. Differentiable.
        teacher_logprobs: [..., M], the same of the teacher; treated as constant.
        member: [..., M] bool; other entries are never read.
        beta: jsd only, the teacher's share, in [0, 1].
        forward_weight: mixed_kl only, the share of the forward direction, in [0, 1].

    Returns: [...] in nats, ≥ 0; 0 with zero gradient where the set is empty. A renormalised set of one gives 0.
    Raises: ValueError when shapes differ, a kind is unknown, or beta or forward_weight is outside [0, 1].
    Source: renormalised reverse KL on the teacher's top-k: Fu et al. 2026, arXiv 2603.25562; the tail as one more
        outcome as in TRL's server distillation.
    Numerics: float32, or float64 for float64 input. A member may be −inf for both, and for one alone where the
        divergence allows it (see `reverse_kl`, `forward_kl`). The mass outside is not taken below 8 ε of the dtype,
        where 1 − Σ is only rounding; a set that holds all the mass gets that much outside, without a gradient. In
        float32 (8 ε = 1e-6) both directions feel this where one side has less than that outside and the other has
        some: log(outside) is cut off at log(8 ε) = −13.9, so that a student with 10% outside and a teacher with
        1e-12 have KL(student ‖ teacher) = 1.08 in place of 2.46.
    Holds: a bucketed divergence is never above that of the whole vocabulary, and does not fall as the set grows.
    """
    _check_candidates(student_logprobs, teacher_logprobs, member)
    check_choice("divergence", divergence, DivergenceKind)
    check_choice("tail", tail, TailKind)
    outcomes = _renormalised if tail == "renormalise" else _with_the_tail
    log_s = outcomes(upcast(student_logprobs, 1.0), member)
    log_t = outcomes(upcast(teacher_logprobs.detach(), 1.0), member)
    if divergence == "reverse_kl":
        return kl(log_s, log_t)
    if divergence == "forward_kl":
        return kl(log_t, log_s)
    if divergence == "mixed_kl":
        check_share("forward_weight", forward_weight, "the share of KL(teacher ‖ student)")
        return mixed(log_s, log_t, forward_weight)
    check_share("beta", beta, "the teacher's share of the mixture")
    return jensen_shannon(log_s, log_t, beta)


def topk_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    kind: SupportKind = "teacher_topk",
    divergence: DivergenceKind = "reverse_kl",
    tail: TailKind = "renormalise",
    beta: float = 0.5,
    forward_weight: float = 0.5,
    temperature: Temperature = 1.0,
) -> Tensor:
    """`support_divergence` on the `candidate_set` of two rows of logits.

    Args: [..., V] each; the teacher is treated as constant. The rest as in the two functions.
    Returns: [...] in nats.
    Raises: ValueError as the two functions do, and when a temperature is not above 0.
    Holds: with k = V and kind = "union" it is the divergence over the whole vocabulary, whatever the tail.
    """
    ids, member = candidate_set(student_logits, teacher_logits, k, kind)
    log_s = _logprobs_at(student_logits, ids, temperature)
    log_t = _logprobs_at(teacher_logits.detach(), ids, temperature)
    return support_divergence(log_s, log_t, member, divergence, tail, beta, forward_weight)


def topk_reverse_kl(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor, temperature: Temperature = 1.0
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
    scores = upcast(student_logits.gather(-1, teacher_topk_ids), temperature)  # renormalising needs no normaliser
    return support_divergence(scores, teacher_topk_logprobs, torch.ones_like(teacher_topk_ids, dtype=torch.bool))


def _most_likely(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = logits.topk(k, dim=-1)
    return top.indices, ~(top.values <= IMPOSSIBLE)  # NaN stays, to be seen


def _is_among(ids: Tensor, others: Tensor, valid: Tensor) -> Tensor:
    """Whether each id occurs among the valid ones of `others` at its position: [..., M] -> [..., M]."""
    ordered = others.masked_fill(~valid, -1).sort(dim=-1).values
    place = torch.searchsorted(ordered, ids).clamp(max=ordered.shape[-1] - 1)
    return ordered.gather(-1, place) == ids


def _logprobs_at(logits: Tensor, ids: Tensor, temperature: Temperature) -> Tensor:
    scaled = upcast(logits, temperature)
    return scaled.gather(-1, ids) - scaled.logsumexp(dim=-1, keepdim=True)


def _renormalised(logprobs: Tensor, member: Tensor) -> Tensor:
    """Log-probabilities on the set alone; −inf elsewhere, and everywhere when there is no mass on the set."""
    possible = member & (logprobs != -torch.inf)
    nothing = ~possible.any(dim=-1, keepdim=True)
    inside = logprobs.masked_fill(~possible, -torch.inf).masked_fill(nothing, 0.0)
    return inside.log_softmax(dim=-1).masked_fill(~possible, -torch.inf)


def _with_the_tail(logprobs: Tensor, member: Tensor) -> Tensor:
    """Log-probabilities on the set, −inf for other candidates, and one more: of everything outside the set."""
    inside = logprobs.masked_fill(~member, -torch.inf)
    nothing = (inside == -torch.inf).all(dim=-1, keepdim=True)
    held = inside.masked_fill(nothing, 0.0).logsumexp(dim=-1, keepdim=True)
    least = 8 * torch.finfo(logprobs.dtype).eps
    outside = log1mexp(held.clamp(max=-least)).masked_fill(nothing, 0.0)
    return torch.cat([inside, outside], dim=-1)


def _check_candidates(student_logprobs: Tensor, teacher_logprobs: Tensor, member: Tensor) -> None:
    if not student_logprobs.shape == teacher_logprobs.shape == member.shape:
        raise ValueError(
            f"student log-probabilities are {tuple(student_logprobs.shape)}, the teacher's "
            f"{tuple(teacher_logprobs.shape)} and the members {tuple(member.shape)}; gather both at the same candidates"
        )
