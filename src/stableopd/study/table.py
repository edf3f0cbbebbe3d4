"""The table of a study: one row for each method (and point of its grid), with uncertainty and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stableopd.bootstrap import Answers, Estimate, mean_of_answers, mean_of_runs, paired_difference
from stableopd.study.config import StudyConfig
from stableopd.study.outcome import Outcome, by_arm
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method, over all of its runs."""

    arm: str
    num_runs: int
    accuracy: Estimate | None
    """Answers to the final benchmark where there are some, else the late accuracy of the runs."""
    difference: Estimate | None
    """From the method compared with, on the same pairs, seeds and prompts; None for that method itself."""
    better: int
    """Runs that did better than the same pair and seed of the method compared with."""
    paired: int
    collapsed: int
    """Runs that had collapsed at some evaluation, whether or not they recovered."""
    collapsed_at_end: int
    means: dict[str, float]
    seconds: float


def rows_of(run: StudyRun) -> list[Row]:
    """A row for every arm of the study that has results, in the order of the configuration."""
    arms = by_arm(run.outcomes)
    base = _base(run.study, arms)
    return [_row(arm, outcomes, base, run.study.confidence) for arm, outcomes in arms.items()]


def rows_by_pair(run: StudyRun) -> dict[str, list[Row]]:
    """The same table for each pair by itself, where there are several."""
    pairs = list(dict.fromkeys(outcome.pair for outcome in run.outcomes))
    if len(pairs) < 2:
        return {}
    tables = {}
    for pair in pairs:
        arms = by_arm(outcome for outcome in run.outcomes if outcome.pair == pair)
        base = _base(run.study, arms)
        tables[pair] = [_row(arm, outcomes, base, run.study.confidence) for arm, outcomes in arms.items()]
    return tables


def _base(study: StudyConfig, arms: dict[str, list[Outcome]]) -> list[Outcome]:
    """Runs of the method that the others are compared with; of its first point where it has a grid."""
    name = study.reference_method
    arm = next((arm for arm in arms if arm == name or arm.startswith(f"{name} ")), None)
    return arms[arm] if arm else []


def _row(arm: str, outcomes: Sequence[Outcome], base: Sequence[Outcome], confidence: float) -> Row:
    differences = _paired(outcomes, base)
    return Row(
        arm=arm,
        num_runs=len(outcomes),
        accuracy=_accuracy(outcomes, confidence),
        difference=_difference(differences, confidence) if base and base[0].arm != arm else None,
        better=sum(score(one) > score(other) for one, other in differences),
        paired=len(differences),
        collapsed=sum(outcome.figures.get("collapsed", 0.0) > 0 for outcome in outcomes),
        collapsed_at_end=sum(outcome.verdict == "collapsed" for outcome in outcomes),
        means={name: statistics.fmean(values) for name in MEANS if (values := _values(outcomes, name))},
        seconds=statistics.fmean(_values(outcomes, "step_time_s") or [0.0]),
    )


def score(outcome: Outcome) -> float:
    """What a run is judged by: the mean over benchmarks of its answers, or its late accuracy where it has none."""
    if outcome.answers:
        return statistics.fmean(statistics.fmean(answers) for answers in outcome.answers.values())
    return outcome.figures.get("late_accuracy", float("nan"))


def _values(outcomes: Sequence[Outcome], name: str) -> list[float]:
    return [outcome.figures[name] for outcome in outcomes if name in outcome.figures]


def _accuracy(outcomes: Sequence[Outcome], confidence: float) -> Estimate | None:
    if _same_prompts(outcomes):
        return mean_of_answers(_tables(outcomes), factors=_factors(outcomes), confidence=confidence)
    judged = [outcome for outcome in outcomes if "late_accuracy" in outcome.figures]
    late = [outcome.figures["late_accuracy"] for outcome in judged]
    return mean_of_runs(late, factors=_factors(judged), confidence=confidence) if late else None


def _paired(outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    others = {(outcome.pair, outcome.seed): outcome for outcome in base}
    return [(one, others[one.pair, one.seed]) for one in outcomes if (one.pair, one.seed) in others]


def _difference(pairs: Sequence[tuple[Outcome, Outcome]], confidence: float) -> Estimate | None:
    if not pairs:
        return None
    if _same_prompts([outcome for pair in pairs for outcome in pair]):
        first, second = zip(*pairs, strict=True)
        return paired_difference(_tables(first), _tables(second), factors=_factors(first), confidence=confidence)
    differences = [score(one) - score(other) for one, other in pairs]
    return mean_of_runs(differences, factors=_factors([one for one, _ in pairs]), confidence=confidence)


def _factors(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Runs of one pair share their teacher, those of one seed their student and the order of prompts."""
    return [(outcome.pair, str(outcome.seed)) for outcome in outcomes]


def _tables(outcomes: Sequence[Outcome]) -> Answers:
    return {name: [outcome.answers[name] for outcome in outcomes] for name in outcomes[0].answers}


def _same_prompts(outcomes: Sequence[Outcome]) -> bool:
    """Whether all of them answered the same benchmarks."""
    first = outcomes[0]
    return bool(first.answers) and all(outcome.benchmarks == first.benchmarks for outcome in outcomes)
