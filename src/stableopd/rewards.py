"""Rewards of completions: what a user's function makes of a text and its answer."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence

import numpy as np

from stableopd.errors import TrainingError
from stableopd.evaluate import Completion
from stableopd.protocols import RewardFunction

_LONGEST_LINE = 300


def score_completions(completions: Sequence[Completion], reward: RewardFunction) -> tuple[list[float], list[str]]:
    """Reward of each completion, and for each that could not be judged one line that says why.

    A function that raises, or gives no finite number, costs its completion the reward (0) and is counted: it is a
    user's code on a model's text, and must not end a run of days.
    """
    rewards: list[float] = []
    failures: list[str] = []
    for completion in completions:
        try:
            value: object = reward(completion.text, completion.example.answer or "")
            if not isinstance(value, bool | int | float | np.number | np.bool_) or not math.isfinite(float(value)):
                raise TypeError(f"a reward is a finite number, not {value!r}")
            rewards.append(float(value))
        except (Exception, SystemExit) as error:
            rewards.append(0.0)
            failures.append(_in_a_line(error))
    return rewards, failures


def _in_a_line(error: BaseException) -> str:
    """The error as Python names it, fit for a terminal: it may quote what a model wrote."""
    text = traceback.format_exception_only(error)[-1].strip()  # also for an error whose own text cannot be had
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def reward_figures(rewards: Sequence[float], failures: int) -> dict[str, float]:
    """`reward` and `reward_std` over all completions; with rewards of 0 and 1 alone also the share that is right."""
    values = np.asarray(rewards, dtype=np.float64)
    figures = {"reward": float(values.mean()), "reward_std": float(values.std())}
    figures["reward/failed_fraction"] = failures / len(rewards)
    if np.isin(values, (0.0, 1.0)).all():
        figures["reward/right_fraction"] = figures["reward"]
    if failures:
        figures["reward/failures"] = float(failures)
    return figures


def check_rewards(step: int, failures: Sequence[str], num_rewards: int, function: str) -> None:
    """Raises: TrainingError when not one completion of the run's first step could be judged."""
    if step == 1 and failures and len(failures) == num_rewards:
        raise TrainingError(
            f"objective.reward.function {function!r} failed on all {num_rewards} completions of the first step, so "
            f"there is nothing to learn from. It is called with (completion, answer), two texts, and must return a "
            f"finite number. The first failure: {failures[0]}"
        )


def reward_note(step: int, failures: Sequence[str], num_rewards: int, function: str) -> str:
    """What is said once of a reward function that fails now and then."""
    return (
        f"the reward function {function!r} failed on {len(failures)} of {num_rewards} completions of step "
        f"{step}, which count 0 (metric reward/failures). The first failure: {failures[0]}"
    )
