"""The table of a study: one row for each method (and point of its grid), with uncertainty and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stableopd.bootstrap import Answers, Estimate, mean_of_answers, mean_of_runs, paired_difference
from stableopd.study.cells import reference_arm
from stableopd.study.outcome import Outcome
from stableopd.study.running import StudyRun

MEANS = (
    "final_greedy_accuracy",
    "final_greedy_truncation",
    "late_accuracy",
    "best_accuracy",
    "end_accuracy",
    "greedy_accuracy",
    "greedy_truncation",
    "worst_truncation",
    "end_length",
)
"""Figures whose plain mean over runs is shown beside the first column."""


_ROUNDING = 1e-9
"""Runs that differ by less are equally good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method, over all of its runs."""

    arm: str
    num_runs: int
    accuracy: Estimate | None
    """Of the answers to the final benchmarks where there are some, else the late accuracy of the runs."""
    difference: Estimate | None
    """From the method compared with, on the same pairs, seeds and prompts; None for that method itself."""
    better: int
    """Runs that did better than the same pair and seed of the method compared with."""
    paired: int
    collapsed: int
    """Runs that had collapsed at some evaluation, whether or not they recovered."""
    collapsed_at_end: int
    """Those of them whose accuracy was still more than 0.15 below its best at their end."""
    by_benchmark: dict[str, Estimate]
    """The accuracy on each final benchmark by itself, where there are several that all of its runs answered."""
    means: dict[str, float]
    seconds: float


def rows_of(run: StudyRun) -> list[Row]:
    """A row for every arm of the study that has results, in the order of the configuration."""
    arms = run.arms
    base = arms.get(reference_arm(run.study), [])
    return [_row(arm, outcomes, base, run.study.confidence) for arm, outcomes in arms.items()]


def rows_by_pair(run: StudyRun) -> dict[str, list[Row]]:
    """The same table for each pair by itself, where there are several."""
    pairs = list(dict.fromkeys(outcome.pair for outcome in run.outcomes))
    if len(pairs) < 2:
        return {}
    tables = {}
    for pair in pairs:
        of_pair = {arm: [one for one in outcomes if one.pair == pair] for arm, outcomes in run.arms.items()}
        arms = {arm: outcomes for arm, outcomes in of_pair.items() if outcomes}
        base = arms.get(reference_arm(run.study), [])
        tables[pair] = [_row(arm, outcomes, base, run.study.confidence) for arm, outcomes in arms.items()]
    return tables


def _row(arm: str, outcomes: Sequence[Outcome], base: Sequence[Outcome], confidence: float) -> Row:
    twins = _paired(outcomes, base)
    collapsed = [outcome for outcome in outcomes if outcome.figures.get("collapsed", 0.0) > 0]
    return Row(
        arm=arm,
        num_runs=len(outcomes),
        accuracy=_accuracy(outcomes, confidence),
        difference=_difference(twins, confidence) if base and base[0].arm != arm else None,
        better=sum(twin.gain > _ROUNDING for twin in twins),
        paired=len(twins),
        collapsed=len(collapsed),
        collapsed_at_end=sum(outcome.figures.get("collapsed_at_end", 0.0) > 0 for outcome in collapsed),
        by_benchmark=_by_benchmark(outcomes, confidence),
        means={name: statistics.fmean(values) for name in MEANS if (values := _values(outcomes, name))},
        seconds=statistics.fmean(_values(outcomes, "step_time_s") or [0.0]),
    )


def score(outcome: Outcome) -> float | None:
    """What a run is judged by: its answers, averaged over benchmarks, or its late accuracy; None without either."""
    if outcome.answers:
        return statistics.fmean(statistics.fmean(answers) for answers in outcome.answers.values())
    return outcome.figures.get("late_accuracy")


def _values(outcomes: Sequence[Outcome], name: str) -> list[float]:
    return [outcome.figures[name] for outcome in outcomes if name in outcome.figures]


def _accuracy(outcomes: Sequence[Outcome], confidence: float) -> Estimate | None:
    if _same_prompts(outcomes):
        return mean_of_answers(_tables(outcomes), factors=_factors(outcomes), confidence=confidence)
    judged = [(outcome, found) for outcome in outcomes if (found := score(outcome)) is not None]
    if not judged:
        return None
    runs, scores = zip(*judged, strict=True)
    return mean_of_runs(scores, factors=_factors(runs), confidence=confidence)


def _by_benchmark(outcomes: Sequence[Outcome], confidence: float) -> dict[str, Estimate]:
    if not _same_prompts(outcomes) or len(outcomes[0].answers) < 2:
        return {}
    factors = _factors(outcomes)
    return {
        name: mean_of_answers({name: table}, factors=factors, confidence=confidence)
        for name, table in _tables(outcomes).items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Twins:
    """A run and that of the method compared with, of the same pair and seed."""

    one: Outcome
    other: Outcome
    gain: float


def _paired(outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> list[_Twins]:
    """Runs that can be compared: both are there, and both have a score."""
    others = {(outcome.pair, outcome.seed): outcome for outcome in base}
    found = []
    for one in outcomes:
        other = others.get((one.pair, one.seed))
        ours, theirs = score(one), score(other) if other else None
        if other is not None and ours is not None and theirs is not None:
            found.append(_Twins(one=one, other=other, gain=ours - theirs))
    return found


def _difference(twins: Sequence[_Twins], confidence: float) -> Estimate | None:
    if not twins:
        return None
    first, second = [twin.one for twin in twins], [twin.other for twin in twins]
    if _same_prompts([*first, *second]):
        return paired_difference(_tables(first), _tables(second), factors=_factors(first), confidence=confidence)
    return mean_of_runs([twin.gain for twin in twins], factors=_factors(first), confidence=confidence)


def _factors(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Runs of one pair share their teacher, those of one seed their student and the order of prompts."""
    return [(outcome.pair, str(outcome.seed)) for outcome in outcomes]


def _tables(outcomes: Sequence[Outcome]) -> Answers:
    return {name: [outcome.answers[name] for outcome in outcomes] for name in outcomes[0].answers}


def _same_prompts(outcomes: Sequence[Outcome]) -> bool:
    """Whether all of them answered the same benchmarks."""
    kinds = {(tuple(one.benchmarks.items()), tuple(map(len, one.answers.values()))) for one in outcomes}
    return bool(outcomes[0].answers) and len(kinds) == 1
