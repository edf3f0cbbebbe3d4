"""Which losses an objective puts on the tokens of a micro-batch.

Weights are final here: coefficient, aggregation and denominator are in them (see `weighted`), so that the loss of an
update is the plain sum over micro-batches and processes of Σ weight · loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from stableopd.fused import DivergenceTerm, SampledTerm, SupportTerm, Term
from stableopd.losses import aggregation_weights, clipped_policy_loss, kl_penalty, reinforce_loss
from stableopd.objective import DistillConfig, ObjectiveConfig
from stableopd.rows import TrainingRows

TERMS = ("distill", "reward", "reference", "gold")
TEACHER, REFERENCE = "teacher", "reference"


def coefficients(objective: ObjectiveConfig) -> dict[str, float]:
    """The active terms, and what each is multiplied by."""
    reward = objective.reward.coef if objective.has_reward_term else 0.0
    found = {
        "distill": objective.distill.coef,
        "reward": reward,
        "reference": objective.reference.coef,
        "gold": objective.gold.coef,
    }
    return {name: coef for name, coef in found.items() if coef > 0}


def token_weights(
    rows: TrainingRows, objective: ObjectiveConfig, sequence_length: int
) -> dict[str, tuple[Tensor, float]]:
    """Per active term: weights [B, T] of the tokens, and these rows' share of the term's denominator.

    What a token's weight is beyond 0 or 1 multiplies its loss and leaves the denominator alone, except in the gold
    term, which is the mean over Σ weight.
    """
    found: dict[str, tuple[Tensor, float]] = {}
    for name in coefficients(objective):
        weight: Tensor = getattr(rows, f"{name}_weight")
        if name == "gold":
            found[name] = weight, float(weight.double().sum())
            continue
        length = objective.sequence_sum_length or sequence_length
        counted, share = aggregation_weights(weight > 0, objective.aggregation, length)
        found[name] = counted * weight, share
    return found


def weighted(
    rows: TrainingRows,
    weights: Mapping[str, tuple[Tensor, float]],
    denominators: Mapping[str, float],
    coefs: Mapping[str, float],
) -> TrainingRows:
    """The rows with final weights: coefficient · weight / denominator."""
    final = {
        f"{name}_weight": weight * (coefs[name] / denominators[name]) if denominators[name] > 0 else weight * 0.0
        for name, (weight, _) in weights.items()
    }
    return replace(rows, **final)  # type: ignore[arg-type]


def gold_terms(rows: TrainingRows) -> list[Term]:
    """Likelihood of the golden solutions."""
    return [SampledTerm(name="gold", weight=_packed(rows, rows.gold_weight), loss=lambda logprobs, at, _: -logprobs)]


def rollout_terms(rows: TrainingRows, objective: ObjectiveConfig) -> list[Term]:
    """The terms on rollouts: distillation, reward, reference."""
    active = coefficients(objective)
    terms: list[Term] = []
    if "distill" in active:
        terms.append(_distill_term(rows, objective.distill))
    if "reward" in active:
        terms.append(_policy_term("reward", rows, rows.reward_weight, rows.reward_advantages, objective.distill))
    if "reference" in active:
        terms.append(_reference_term(rows, objective))
    return terms


def _distill_term(rows: TrainingRows, settings: DistillConfig) -> Term:
    weight = _packed(rows, rows.distill_weight)
    if settings.is_policy_gradient:
        return _policy_term("distill", rows, rows.distill_weight, rows.advantages, settings)
    if settings.is_sampled:
        teacher = _packed(rows, rows.teacher_logprobs)
        kind = settings.estimator
        assert kind in ("k2", "k3")
        return SampledTerm(
            name="distill", weight=weight, loss=lambda logprobs, at, _: kl_penalty(logprobs, teacher[at], kind)
        )
    shape = {"divergence": settings.divergence, "beta": settings.beta, "forward_weight": settings.forward_weight}
    if settings.support == "full":
        return DivergenceTerm(name="distill", weight=weight, other=TEACHER, **shape)  # type: ignore[arg-type]
    if settings.needs_topk:
        assert rows.topk_ids is not None
        assert rows.topk_logprobs is not None
        known = {"ids": _packed(rows, rows.topk_ids), "logprobs": _packed(rows, rows.topk_logprobs)}
        return SupportTerm(name="distill", weight=weight, tail=settings.tail, **known, **shape)  # type: ignore[arg-type]
    return SupportTerm(
        name="distill",
        weight=weight,
        other=TEACHER,
        kind=settings.support,  # type: ignore[arg-type]
        k=settings.topk,
        tail=settings.tail,
        **shape,  # type: ignore[arg-type]
    )


def _policy_term(name: str, rows: TrainingRows, weight: Tensor, advantages: Tensor, settings: DistillConfig) -> Term:
    old, worth = _packed(rows, rows.old_logprobs), _packed(rows, advantages)

    def clipped(logprobs: Tensor, at: slice, _: Tensor | None) -> Tensor:
        return clipped_policy_loss(logprobs, old[at], worth[at], settings.epsilon_low, settings.epsilon_high)

    def gated(logprobs: Tensor, at: slice, _: Tensor | None) -> Tensor:
        return reinforce_loss(logprobs, old[at], worth[at], settings.gate_low, settings.gate_high)

    loss = gated if settings.estimator == "reinforce" else clipped
    return SampledTerm(name=name, weight=_packed(rows, weight), loss=loss)


def _reference_term(rows: TrainingRows, objective: ObjectiveConfig) -> Term:
    weight, kind = _packed(rows, rows.reference_weight), objective.reference.estimator
    if kind == "exact":
        return DivergenceTerm(name="reference", weight=weight, other=REFERENCE, divergence="reverse_kl")

    def penalty(logprobs: Tensor, at: slice, others: Tensor | None) -> Tensor:
        assert others is not None
        return kl_penalty(logprobs, others, kind)

    return SampledTerm(name="reference", weight=weight, loss=penalty, other=REFERENCE)


def rollout_figures(
    rows: TrainingRows, logprobs: Tensor, entropy: Tensor, settings: DistillConfig
) -> dict[str, Tensor]:
    """Figures [n] for the log: entropy, gap to the policy that drew the tokens, share outside the clip."""
    log_ratio = logprobs - _packed(rows, rows.old_logprobs)
    ratio = log_ratio.exp()
    outside = (ratio < 1 - settings.epsilon_low) | (ratio > 1 + settings.epsilon_high)
    return {
        "entropy": entropy,
        "sampling/logprob_gap": log_ratio.abs(),
        "clip_ratio/region_mean": outside.to(log_ratio.dtype),
    }


def _packed(rows: TrainingRows, array: Tensor) -> Tensor:
    """[B, T, ...] -> [n, ...]: the completion tokens, row after row, without padding."""
    return array[rows.completion_mask]
