"""Means over runs and prompts with their uncertainty: bootstrap over both at once. numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4_000

Answers = Mapping[str, Sequence[Sequence[float]]]
"""By benchmark [R runs, Q prompts]: row r is the same run in all of them, column q the same prompt for all runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its percentile bootstrap interval; `low` and `high` are None where there is nothing to resample."""

    mean: float
    low: float | None
    high: float | None
    num_runs: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def mean_of_runs(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of one figure per run; runs are resampled. Raises: ValueError without runs."""
    return mean_of_answers({"": [[value] for value in values]}, confidence=confidence, seed=seed)


def mean_of_answers(answers: Answers, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean over benchmarks of the mean over runs and prompts.

    Runs and the prompts of each benchmark are resampled, independently of each other (the pigeonhole bootstrap of Owen,
    2007, arXiv 0712.1111), so that the interval speaks of new runs on new prompts. It errs on the wide side.
    A factor with one level is kept as it is: the interval of a single run speaks of new prompts only.

    Raises: ValueError without runs or prompts, or for tables of different numbers of runs.
    """
    tables = [np.asarray(table, dtype=np.float64) for table in answers.values()]
    if not tables or any(table.ndim != 2 or table.size == 0 for table in tables):
        raise ValueError("answers must be tables of runs x prompts, with at least one of each")
    if len({len(table) for table in tables}) > 1:
        raise ValueError("every benchmark must have been answered by the same runs")
    mean = float(np.mean([table.mean() for table in tables]))
    num_runs = len(tables[0])
    if num_runs == 1 and all(table.shape[1] == 1 for table in tables):
        return Estimate(mean=mean, low=None, high=None, num_runs=1)
    means = _resampled_means(tables, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(mean=mean, low=float(low), high=float(high), num_runs=num_runs)


def paired_difference(answers: Answers, other: Answers, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of `answers` − `other`: row r of both is the same pair and seed, column q the same prompt.

    Raises: ValueError when benchmarks or shapes differ.
    """
    if answers.keys() != other.keys():
        raise ValueError(f"the benchmarks differ: {', '.join(answers)} and {', '.join(other)}")
    differences = {}
    for name, table in answers.items():
        first, second = np.asarray(table, dtype=np.float64), np.asarray(other[name], dtype=np.float64)
        if first.shape != second.shape:
            raise ValueError(f"{name}: answers of shape {first.shape} cannot be paired with those of {second.shape}")
        differences[name] = (first - second).tolist()
    return mean_of_answers(differences, confidence=confidence, seed=seed)


def _resampled_means(tables: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    """[RESAMPLES]: runs are drawn once for all benchmarks, prompts for each."""
    runs = _weights(rng, len(tables[0]))
    means = [((runs @ table) * _weights(rng, table.shape[1])).sum(axis=1) for table in tables]
    return np.mean(means, axis=0)  # type: ignore[no-any-return]


def _weights(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """[RESAMPLES, size]: how often each of `size` was drawn, as a share."""
    return rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES) / size
