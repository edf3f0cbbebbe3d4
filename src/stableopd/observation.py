"""What a process works on in one step, and how people and files see it: texts, rewards, advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor

from stableopd.config import HealthConfig
from stableopd.evaluate import Completion
from stableopd.health.signals import is_repetitive
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


def all_advantages(views: Sequence[RolloutView]) -> list[np.ndarray] | None:
    """Advantages of every rollout, or None where they are not known."""
    known = [view.advantages for view in views if view.advantages is not None]
    return known if len(known) == len(views) else None
