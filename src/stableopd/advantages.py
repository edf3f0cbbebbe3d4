"""What the rollouts of a step are worth, token by token: advantages, and which tokens count.

Worked out once for the whole step, before it is cut into updates, from what engine, teacher, judge and (where
asked for) the student itself say about the rollouts. Nothing here is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableopd.health.loops import loop_mask
from stableopd.health.monitor import MonitorSettings
from stableopd.losses import (
    clamp_advantages,
    compress_advantages,
    discounted_advantages,
    group_advantages,
    high_entropy_mask,
    importance_weights,
    prefix_weights,
    sampled_reverse_kl,
    special_token_mask,
    truncation_weights,
)
from stableopd.objective import CorrectionConfig, ObjectiveConfig
from stableopd.scoring import Scores
from stableopd.types import RolloutBatch, TokenScores

GatherTensors = Callable[[Tensor], list[Tensor]]
"""The same array of every process, by rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSignals:
    """[B, T] arrays about the completion tokens of a `RolloutBatch`, 0 where masked."""

    old_logprobs: Tensor
    """Of the policy that drew the tokens: the engine's, or the trainer's own where the gap is corrected."""
    advantages: Tensor
    """Of the distillation term, shaped."""
    reward_advantages: Tensor
    distill_weight: Tensor
    """What each token's distillation loss is multiplied by; 0 leaves it out."""


def rollout_signals(
    rollouts: RolloutBatch,
    scores: TokenScores | None,
    objective: ObjectiveConfig,
    *,
    rewards: Tensor | None = None,
    student_scores: Scores | None = None,
    special_ids: Collection[int] = (),
    gather: GatherTensors = lambda array: [array],
    rank: int = 0,
) -> RolloutSignals:
    """Advantages and weights of all completion tokens.

    Args:
        scores: the teacher's; None where no teacher is needed.
        rewards: [B] of the rollouts; needed when the objective has a reward.
        student_scores: the student's own, needed when `objective.needs_student_scores`.
        special_ids: what `tokens.mask_special` leaves out.
        gather: collects an array from every process, `rank` being this one's place in the list: which tokens are
            the least certain is asked of all rollouts of the step.
    """
    mask = rollouts.completion_mask
    corrected = objective.correction.kind != "none"
    assert student_scores is not None or not objective.needs_student_scores
    old = rollouts.sampling_logprobs
    importance = torch.ones_like(old)
    if corrected and student_scores is not None:
        old = student_scores.logprobs
        settings = objective.correction
        assert settings.kind != "none"
        importance = importance_weights(old, rollouts.sampling_logprobs, settings.kind, settings.cap, settings.floor)
    reward_advantages = _reward_advantages(rollouts, rewards, objective)
    advantages = _distill_advantages(old, scores, mask, objective, reward_advantages)
    return RolloutSignals(
        old_logprobs=old,
        advantages=advantages * importance * mask,
        reward_advantages=reward_advantages * importance * mask,
        distill_weight=_token_weights(rollouts, objective, student_scores, special_ids, gather, rank),
    )


def _distill_advantages(
    old_logprobs: Tensor, scores: TokenScores | None, mask: Tensor, objective: ObjectiveConfig, rewards: Tensor
) -> Tensor:
    """log T − log S_old, then clamp, logarithm, discount, weight of the prefix, reward: in this order."""
    if scores is None or scores.sampled_logprobs is None or not objective.distill.is_policy_gradient:
        return torch.zeros_like(old_logprobs)
    settings = objective.distill.advantage
    advantages = -sampled_reverse_kl(old_logprobs, scores.sampled_logprobs)
    if settings.clamp is not None:
        advantages = clamp_advantages(advantages, settings.clamp)
    if settings.log_compress:
        advantages = compress_advantages(advantages)
    if settings.gamma > 0:
        advantages = discounted_advantages(advantages, mask, settings.gamma)
    if settings.prefix_gamma > 0:
        advantages = advantages * prefix_weights(advantages, mask, settings.prefix_gamma)
    if objective.needs_rewards and objective.reward.add_to_advantage:
        advantages = advantages + objective.reward.coef / objective.distill.coef * rewards
    return advantages


def corrected_tokens(trainer_logprobs: Tensor, engine_logprobs: Tensor, settings: CorrectionConfig) -> Tensor:
    """[B, T] bool: tokens whose ratio the correction cuts (`truncate`) or leaves out (`mask`)."""
    if settings.kind == "none":
        return torch.zeros_like(trainer_logprobs, dtype=torch.bool)
    weights = importance_weights(trainer_logprobs, engine_logprobs, settings.kind, settings.cap, settings.floor)
    return weights != importance_weights(trainer_logprobs, engine_logprobs, "truncate", cap=torch.inf)


def without_loops(signals: RolloutSignals, rollouts: RolloutBatch, settings: MonitorSettings) -> RolloutSignals:
    """The signals with no distillation weight on rollouts that hold an exact loop, or were ended in one."""
    loop = (settings.loop_max_period, settings.loop_min_repeats, settings.loop_min_tokens)
    fresh = [
        reason != "loop" and not loop_mask(ids, *loop).any()
        for ids, reason in zip(rollouts.completions(), rollouts.finish_reason, strict=True)
    ]
    keep = torch.tensor(fresh, device=signals.distill_weight.device)
    return replace(signals, distill_weight=signals.distill_weight * keep[:, None])


def _reward_advantages(rollouts: RolloutBatch, rewards: Tensor | None, objective: ObjectiveConfig) -> Tensor:
    if rewards is None:
        return torch.zeros_like(rollouts.sampling_logprobs)
    per_row = group_advantages(rewards, rollouts.prompt_index, objective.reward.scale)
    return per_row[:, None].to(rollouts.sampling_logprobs) * rollouts.completion_mask


def _token_weights(
    rollouts: RolloutBatch,
    objective: ObjectiveConfig,
    student_scores: Scores | None,
    special_ids: Collection[int],
    gather: GatherTensors,
    rank: int,
) -> Tensor:
    settings, mask = objective.distill.tokens, rollouts.completion_mask
    kept = mask
    if settings.mask_special:
        kept = kept & ~special_token_mask(rollouts.completion_ids, special_ids)
    if settings.mask_repeated:
        kept = kept & ~_in_loops(rollouts)
    if settings.entropy_fraction < 1:
        assert student_scores is not None
        assert student_scores.entropy is not None
        kept = _least_certain(student_scores.entropy, kept, settings.entropy_fraction, gather, rank)
    rows = truncation_weights(rollouts.finish_reason, settings.truncated_weight, mask.device)
    return kept * rows[:, None]


def _in_loops(rollouts: RolloutBatch) -> Tensor:
    """[B, T] bool: tokens that lie in an exact loop."""
    found = torch.zeros_like(rollouts.completion_mask)
    for row, ids in enumerate(rollouts.completions()):
        found[row, : len(ids)] = torch.from_numpy(loop_mask(ids)).to(found.device)
    return found


def _least_certain(entropy: Tensor, mask: Tensor, fraction: float, gather: GatherTensors, rank: int) -> Tensor:
    """The mask cut to the given share of the tokens of all processes, those of the highest entropy."""
    everyone = gather(entropy[mask])
    values = torch.cat(everyone)[None]
    chosen = high_entropy_mask(values, torch.ones_like(values, dtype=torch.bool), fraction)[0]
    start = sum(len(array) for array in everyone[:rank])
    return torch.zeros_like(mask).masked_scatter(mask, chosen[start : start + len(everyone[rank])])
