"""Means over runs and prompts with their uncertainty: bootstrap over both at once. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4_000
_MANY = 64
"""Resamples drawn at a time, to bound memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its percentile bootstrap interval; `low` and `high` are None where one run without prompts is all."""

    mean: float
    low: float | None
    high: float | None
    num_runs: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def mean_of_runs(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of one figure per run; runs are resampled.

    Raises: ValueError without runs.
    """
    return mean_of_answers([[value] for value in values], confidence=confidence, seed=seed)


def mean_of_answers(answers: Sequence[Sequence[float]], *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of answers [R runs, Q prompts]: every run answered the same prompts in the same order.

    Runs and prompts are both resampled, independently of each other (the pigeonhole bootstrap of Owen, 2007, arXiv
    0712.1111), so that the interval speaks of new runs on new prompts. It is somewhat too wide rather than too narrow.
    A factor with one level is kept as it is: the interval of one run speaks of new prompts only.

    Raises: ValueError without runs or prompts, or for runs with different numbers of prompts.
    """
    table = np.asarray(answers, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError("answers must be a table of runs x prompts, with at least one of each")
    num_runs, num_prompts = table.shape
    if num_runs == num_prompts == 1:
        return Estimate(mean=float(table[0, 0]), low=None, high=None, num_runs=1)
    means = _resampled_means(table, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(mean=float(table.mean()), low=float(low), high=float(high), num_runs=num_runs)


def paired_difference(
    answers: Sequence[Sequence[float]], other: Sequence[Sequence[float]], *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of `answers` − `other`, [R, Q] each: row r of both is the same pair and seed, column q the same prompt.

    Raises: ValueError when the shapes differ.
    """
    first, second = np.asarray(answers, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"answers of shape {first.shape} cannot be paired with those of shape {second.shape}")
    return mean_of_answers((first - second).tolist(), confidence=confidence, seed=seed)


def _resampled_means(table: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    num_runs, num_prompts = table.shape
    means = []
    for start in range(0, RESAMPLES, _MANY):
        count = min(_MANY, RESAMPLES - start)
        runs = _weights(rng, num_runs, count)
        prompts = _weights(rng, num_prompts, count)
        means.append(np.einsum("br,rq,bq->b", runs, table, prompts, optimize=True))
    return np.concatenate(means)


def _weights(rng: np.random.Generator, size: int, count: int) -> NDArray[np.float64]:
    """[count, size]: how often each of `size` was drawn, as a share; all alike where there is only one."""
    return rng.multinomial(size, np.full(size, 1 / size), size=count) / size
