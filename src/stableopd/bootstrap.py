"""Means over runs and prompts with their uncertainty: bootstrap over both at once. numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4_000

Answers = Mapping[str, Sequence[Sequence[float]]]
"""By benchmark [R runs, Q prompts]: row r is the same run in all of them, column q the same prompt for all runs."""

Factors = tuple[str, ...]
"""Names of what a run is made of, such as its teacher and its student."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its percentile bootstrap interval; `low` and `high` are None where there is nothing to resample."""

    mean: float
    low: float | None
    high: float | None
    num_runs: int


def mean_of_runs(
    values: Sequence[float], *, factors: Sequence[Factors] | None = None, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of one figure per run; runs are resampled as `mean_of_answers` does. Raises: ValueError without runs."""
    return mean_of_answers({"": [[value] for value in values]}, factors=factors, confidence=confidence, seed=seed)


def mean_of_answers(
    answers: Answers, *, factors: Sequence[Factors] | None = None, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean over benchmarks of the mean over runs and prompts.

    Runs and the prompts of each benchmark are resampled, independently of each other (the pigeonhole bootstrap of Owen,
    2007, arXiv 0712.1111), so that the interval speaks of new runs on new prompts. It errs on the wide side.
    A factor with one level is kept as it is: the interval of a single run speaks of new prompts only.

    Args:
        factors: what each run shares with others, such as (teacher, student): every factor is resampled by itself, so
            that three runs with one student do not count as three students. Without it runs are independent.

    Raises: ValueError without runs or prompts, or for tables of different numbers of runs.
    """
    tables = [np.asarray(table, dtype=np.float64) for table in answers.values()]
    if not tables or any(table.ndim != 2 or table.size == 0 for table in tables):
        raise ValueError("answers must be tables of runs x prompts, with at least one of each")
    if len({len(table) for table in tables}) > 1:
        raise ValueError("every benchmark must have been answered by the same runs")
    mean = float(np.mean([table.mean() for table in tables]))
    num_runs = len(tables[0])
    named = [(str(run),) for run in range(num_runs)] if factors is None else list(factors)
    if len(named) != num_runs or len({len(one) for one in named}) != 1:
        raise ValueError("factors must name the same factors for every run")
    if len(set(named)) == 1 and all(table.shape[1] == 1 for table in tables):
        return Estimate(mean=mean, low=None, high=None, num_runs=num_runs)
    means = _resampled_means(tables, named, np.random.default_rng(seed))
    low, high = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(mean=mean, low=float(low), high=float(high), num_runs=num_runs)


def paired_difference(
    answers: Answers,
    other: Answers,
    *,
    factors: Sequence[Factors] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
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
    return mean_of_answers(differences, factors=factors, confidence=confidence, seed=seed)


def _resampled_means(
    tables: Sequence[NDArray[np.float64]], factors: Sequence[Factors], rng: np.random.Generator
) -> NDArray[np.float64]:
    """[RESAMPLES]: runs are drawn once for all benchmarks, prompts for each; NaN where no run was drawn."""
    runs = np.ones((RESAMPLES, len(factors)))
    for levels in zip(*factors, strict=True):
        names = list(dict.fromkeys(levels))
        runs *= _weights(rng, np.ones(len(names), dtype=np.int64))[:, [names.index(level) for level in levels]]
    total = runs.sum(axis=1, keepdims=True)
    runs = np.divide(runs, total, out=np.full_like(runs, np.nan), where=total > 0)
    means = [_resampled_over_prompts(runs, table, rng) for table in tables]
    return np.mean(means, axis=0)  # type: ignore[no-any-return]


def _resampled_over_prompts(
    runs: NDArray[np.float64], table: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """[RESAMPLES]: means of `table` over its runs with the weights `runs` and over prompts drawn with replacement.

    Prompts that all runs answered alike are drawn together: only their number counts, and of right and wrong answers
    there are few kinds.
    """
    kinds, numbers = np.unique(table, axis=1, return_counts=True)
    return ((runs @ kinds) * _weights(rng, numbers)).sum(axis=1)  # type: ignore[no-any-return]


def _weights(rng: np.random.Generator, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """[RESAMPLES, kinds]: how often each kind was drawn among as many draws as there are things, as a share."""
    total = numbers.sum()
    return rng.multinomial(total, numbers / total, size=RESAMPLES) / total
