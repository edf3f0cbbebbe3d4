"""What a process works on in one step, and how people and files see it: texts, rewards, advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from stableopd.config import HealthConfig
from stableopd.evaluate import Completion
from stableopd.health.signals import is_repetitive
from stableopd.scoring import Scores
from stableopd.types import Example, RolloutBatch, TokenScores


@dataclass(kw_only=True, slots=True)
class StepBatch:
    """One process's share of a step, filled in as the step goes."""

    step: int
    positions: list[int]
    """Of its prompts among all prompts of the step."""
    examples: list[Example]
    rollouts: RolloutBatch | None = None
    scores: TokenScores | None = None
    completions: list[Completion] = field(default_factory=list)
    """The rollouts as text."""
    rewards: list[float] | None = None
    teacher_logprobs: Tensor | None = None
    """[B, T] of the sampled tokens; where the teacher gives its whole distribution, known after the update only."""

    def advantages(self) -> list[np.ndarray] | None:
        """log T − log S of each completion token, without padding; None where the teacher's are not known."""
        if self.rollouts is None or self.teacher_logprobs is None:
            return None
        gap = (self.teacher_logprobs - self.rollouts.sampling_logprobs).float().cpu().numpy()
        return [row[:length] for row, length in zip(gap, self.rollouts.lengths(), strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutView:
    """One rollout of the step, of whatever process."""

    position: int
    completion: Completion
    reward: float | None
    advantages: np.ndarray | None

    def to_json(self, step: int, health: HealthConfig) -> dict[str, Any]:
        """A line of the run folder's rollout files (docs/run_folder.md)."""
        completion = self.completion
        return {
            "step": step,
            "index": completion.example.index,
            "prompt": completion.example.prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": completion.num_tokens,
            "repetitive": completion.finish_reason == "loop"
            or is_repetitive(completion.text, health.tail_chars, health.compression_threshold),
            "answer": completion.example.answer,
            "mean_advantage": None if self.advantages is None else float(self.advantages.mean()),
            "reward": self.reward,
        }


def gather_views(batch: StepBatch) -> list[RolloutView]:
    """The rollouts of all processes, in the order of the step's prompts."""
    assert batch.rollouts is not None
    nothing: list[None] = [None] * len(batch.completions)
    mine = [
        RolloutView(position=batch.positions[index], completion=completion, reward=reward, advantages=row)
        for index, completion, reward, row in zip(
            batch.rollouts.prompt_index,
            batch.completions,
            nothing if batch.rewards is None else batch.rewards,
            batch.advantages() or nothing,
            strict=True,
        )
    ]
    return sorted(gather_object(mine), key=lambda view: view.position)


def overlap(student: Scores, teacher: TokenScores, mask: Tensor) -> dict[str, Tensor]:
    """How alike two models are at each token, [B, T] by metric key, 0 where masked.

    `health/topk_overlap`: |S_k ∩ T_k| / k of their k likeliest tokens. `health/overlap_advantage`: mean of
    log T − log S over the tokens that both have, weighted by S; 0 where they share none. `teacher/entropy`: nats.

    Args: top-k ids and log-probabilities [B, T, K] of both; `mask` [B, T] bool.
    Source: Li et al. 2026, arXiv 2604.13016, track such figures; the weighting is our choice.
    """
    assert student.topk_ids is not None
    assert student.topk_logprobs is not None
    assert teacher.topk_ids is not None
    assert teacher.topk_logprobs is not None
    share, advantage = torch.zeros(mask.shape, device=mask.device), torch.zeros(mask.shape, device=mask.device)
    for row in range(len(mask)):  # a row at a time: all pairs of K by K
        same = student.topk_ids[row, :, :, None] == teacher.topk_ids[row, :, None, :]
        shared = same.any(dim=-1)
        teacher_logprobs = (same * teacher.topk_logprobs[row, :, None, :]).sum(dim=-1)
        p = student.topk_logprobs[row].exp() * shared
        gap = (teacher_logprobs - student.topk_logprobs[row]).masked_fill(~shared, 0.0)
        share[row] = shared.float().mean(dim=-1)
        advantage[row] = (p * gap).sum(dim=-1) / p.sum(dim=-1).clamp(min=torch.finfo(p.dtype).tiny)
    found = {"health/topk_overlap": share * mask, "health/overlap_advantage": advantage * mask}
    return found if teacher.entropy is None else {**found, "teacher/entropy": teacher.entropy * mask}


def all_advantages(views: Sequence[RolloutView]) -> list[np.ndarray] | None:
    """Advantages of every rollout, or None where they are not known."""
    known = [view.advantages for view in views if view.advantages is not None]
    return known if len(known) == len(views) else None
