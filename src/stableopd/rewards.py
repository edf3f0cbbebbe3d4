"""Rewards of completions: what a user's function makes of a text and its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stableopd.evaluate import Completion
from stableopd.protocols import RewardFunction


def score_completions(completions: Sequence[Completion], reward: RewardFunction) -> tuple[list[float], int]:
    """Reward of each completion, and how many could not be judged.

    A function that raises, or gives no finite number, costs its completion the reward (0) and is counted: it is a
    user's code on a model's text, and must not end a run of days.
    """
    rewards, failures = [], 0
    for completion in completions:
        try:
            value: object = reward(completion.text, completion.example.answer or "")
            if not isinstance(value, bool | int | float | np.number | np.bool_) or not math.isfinite(float(value)):
                raise TypeError(f"a reward is a finite number, not {value!r}")
            rewards.append(float(value))
        except Exception:
            rewards.append(0.0)
            failures += 1
    return rewards, failures


def reward_figures(rewards: Sequence[float], failures: int) -> dict[str, float]:
    """`reward` and `reward_std` over all completions; with rewards of 0 and 1 alone also the share that is right."""
    values = np.asarray(rewards, dtype=np.float64)
    figures = {"reward": float(values.mean()), "reward_std": float(values.std())}
    if np.isin(values, (0.0, 1.0)).all():
        figures["reward/right_fraction"] = figures["reward"]
    if failures:
        figures["reward/failures"] = float(failures)
    return figures
