"""Judges a whole run from its `metrics.jsonl`: healthy, warning, collapsed, or unknown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stableopd.health.history import LOOPS, REPETITION, SKIPPED, TRUNCATION, is_number
from stableopd.health.rules import NEVER_STOPS

Status = Literal["healthy", "warning", "collapsed", "unknown"]

ACCURACY_DROP = 0.15
EVAL_TRUNCATION = 0.5
TRUNCATION_RISE = 0.3
REPEATED = 0.1
MOSTLY_SKIPPED = 0.5
"""Share of a run's updates that were not made, above which it cannot be called healthy."""
SPAN = 5
"""Steps over which training signals are averaged; also the run's start, which they are compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a run."""

    status: Status
    step: int | None
    """When the trouble began; None if there was none."""
    headline: str
    reasons: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return self.status == "healthy"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finding:
    """What one look at the run gave: when it began, until when it lasted (None: to the end)."""

    status: Status
    step: int | None = None
    until: int | None = None
    what: str = ""
    reason: str
    accuracy_lost: bool = False
    """Held-out accuracy is below its best at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    step: int
    value: float
    best: float
    truncation: float | None = None

    @property
    def fell(self) -> bool:
        return self.value < self.best - ACCURACY_DROP

    @property
    def collapsed(self) -> bool:
        return self.fell and self.truncation is not None and self.truncation > EVAL_TRUNCATION


def judge_run(rows: Iterable[Mapping[str, Any]]) -> Verdict:
    """Verdict on one run, from the rows of its metrics file.

    Definition, with evaluation: collapsed = held-out accuracy more than 0.15 below its running best while
    greedy truncation (sampled where nothing is decoded greedily) is above 0.5. Without: training truncation
    more than 0.3 above its start while repetition rate or loop fraction is above 0.1, as means of 5 steps.
    A run whose accuracy has come back by its end (whose training signals have, without evaluation) is a
    warning, and the headline says that it recovered. Training signals that collapse while held-out
    accuracy keeps up are a warning. A run most of whose updates were skipped is a warning at best.

    Rows may come in any order, lack keys, or hold values that are not numbers; of two rows with the same
    step the later one's values hold.
    """
    by_step = _by_step(rows)
    held_out = [finding for name in _eval_names(by_step) if (finding := _judge_evaluation(by_step, name))]
    training = _judge_training(by_step)
    accuracy_kept = held_out and not any(finding.accuracy_lost for finding in held_out)
    if training and training.status == "collapsed" and accuracy_kept:
        # Held-out accuracy has the last word on whether anything was lost.
        training = _Finding(status="warning", step=training.step, what=training.what, reason=training.reason)
    updates = _judge_updates(by_step)
    findings = [*held_out, *([training] if training else []), *([updates] if updates else [])]
    if not findings:
        return Verdict(
            status="unknown",
            step=None,
            headline=f"Too little to judge: this takes two evaluations, or more than {SPAN} steps with {TRUNCATION}.",
        )
    return _sum_up(findings)


def collapse_step(rows: Iterable[Mapping[str, Any]], name: str) -> int | None:
    """First step at which a run had collapsed on the held-out set `name`, whether or not it recovered; None if never.

    Collapsed: accuracy more than 0.15 below its running best while greedy truncation (sampled where nothing is decoded
    greedily) is above 0.5.
    """
    return next((point.step for point in _points(_by_step(rows), name) if point.collapsed), None)


def collapsed_at_end(rows: Iterable[Mapping[str, Any]], name: str) -> bool:
    """Whether a run that had collapsed on `name` was still more than 0.15 below its best at its last evaluation."""
    points = _points(_by_step(rows), name)
    return any(point.collapsed for point in points) and points[-1].fell


def _sum_up(findings: list[_Finding]) -> Verdict:
    order: tuple[Status, ...] = ("healthy", "warning", "collapsed")
    status = max((finding.status for finding in findings), key=order.index)
    reasons = tuple(finding.reason for finding in findings)
    if status == "healthy":
        return Verdict(status=status, step=None, headline="Healthy: no sign of collapse.", reasons=reasons)
    # A collapse that was overcome says more about the run than any other warning.
    worst = [finding for finding in findings if finding.status == status]
    first = min(worst, key=lambda finding: (finding.until is None, finding.step or 0))
    if status == "collapsed":
        headline = f"Collapsed at step {first.step} and did not recover: {first.what}."
    elif first.until is not None:
        headline = f"Collapsed at step {first.step} and recovered by step {first.until}: {first.what}."
    else:
        headline = f"Warning from step {first.step}: {first.what}."
    return Verdict(status=status, step=first.step, headline=headline, reasons=reasons)


# ------------------------------------------------------------------------------------ evaluation


def _judge_evaluation(by_step: dict[int, dict[str, float]], name: str) -> _Finding | None:
    points = _points(by_step, name)
    if len(points) < 2:
        return None
    first, last = points[0], points[-1]
    top = max(points, key=lambda point: point.value)
    reason = f"{name}: accuracy {first.value:.3f} at step {first.step}, {top.value:.3f} at best (step {top.step}), "
    reason += f"{last.value:.3f} at the end"
    reason += "." if last.truncation is None else f" with {last.truncation:.0%} truncated."
    fallen = [point for point in points if point.fell]
    collapsed = [point for point in fallen if point.collapsed]
    if not fallen or not (collapsed or last.fell):
        return _judge_greedy(by_step, name, reason)
    begin = (collapsed or fallen)[0]
    what = f"{name} accuracy fell from {begin.best:.2f} to {min(point.value for point in fallen):.2f}"
    if collapsed:
        what += " while answers ran into the length limit"
    elif last.truncation is not None:
        what += ", but answers still end"
    if last.fell:
        status: Status = "collapsed" if collapsed else "warning"
        return _Finding(status=status, step=begin.step, what=what, reason=reason, accuracy_lost=True)
    until = next(point.step for point in points if point.step > fallen[-1].step)
    return _Finding(status="warning", step=begin.step, until=until, what=what, reason=reason)


def _judge_greedy(by_step: dict[int, dict[str, float]], name: str, reason: str) -> _Finding:
    """Sampled accuracy held; greedy decoding may loop already."""
    points = _points(by_step, f"{name}_greedy")
    greedy = [point for point in points if point.collapsed]
    if not greedy:
        return _Finding(status="healthy", reason=reason)
    until = next((point.step for point in points if point.step > greedy[-1].step), None)
    if until is None:
        what = (
            f"{name} answers decoded greedily have collapsed (accuracy {greedy[-1].value:.2f}), sampled ones have not"
        )
    else:
        lowest = min(point.value for point in greedy)
        what = (
            f"{name} answers decoded greedily ran into the length limit (accuracy {lowest:.2f}), sampled ones did not"
        )
    return _Finding(status="warning", step=greedy[0].step, until=until, what=what, reason=reason)


def _points(by_step: dict[int, dict[str, float]], name: str) -> list[_Point]:
    points: list[_Point] = []
    for step, row in by_step.items():
        value = row.get(f"eval/{name}/accuracy")
        if value is None:
            continue
        best = max(value, points[-1].best if points else value)
        sampled = row.get(f"eval/{name}/truncation_rate")
        truncation = row.get(f"eval/{name}_greedy/truncation_rate", sampled)
        points.append(_Point(step=step, value=value, best=best, truncation=truncation))
    return points


def _eval_names(by_step: dict[int, dict[str, float]]) -> list[str]:
    """Held-out sets, in order of appearance; `X_greedy` belongs to X where there is an X."""
    keys = dict.fromkeys(key for row in by_step.values() for key in row)
    names = [match[1] for key in keys if (match := re.fullmatch(r"eval/(.+)/accuracy", key))]
    return [name for name in names if name.removesuffix("_greedy") == name or name.removesuffix("_greedy") not in names]


# ------------------------------------------------------------------------------------ training


def _judge_training(by_step: dict[int, dict[str, float]]) -> _Finding | None:
    rows = [(step, row) for step, row in by_step.items() if TRUNCATION in row]
    if len(rows) <= SPAN:
        return None
    truncation = _rolling([row[TRUNCATION] for _, row in rows])
    repeated = _rolling([max(row.get(REPETITION, 0.0), row.get(LOOPS, 0.0)) for _, row in rows])
    start, steps = truncation[0], [step for step, _ in rows[SPAN - 1 :]]
    risen = [rate > start + min(TRUNCATION_RISE, (1 - start) / 2) for rate in truncation]
    inflated = [up and share > REPEATED for up, share in zip(risen, repeated, strict=True)]
    reason = f"Training: {start:.0%} truncated at the start, {max(truncation):.0%} at most, "
    reason += f"{truncation[-1]:.0%} at the end; up to {max(repeated):.0%} repetition."
    if any(inflated):
        what = f"training truncation rose from {start:.0%} to {max(truncation):.0%} together with repetition"
        return _lasting(inflated, steps, what, reason)
    if any(risen):
        what = f"training truncation rose from {start:.0%} to {max(truncation):.0%}, with no repetition seen"
        return _Finding(status="warning", step=steps[risen.index(True)], what=what, reason=reason)
    if start > NEVER_STOPS:
        what = "hardly any rollout ever stopped by itself; check the end tokens of student and teacher"
        return _Finding(status="warning", step=rows[0][0], what=what, reason=reason)
    return _Finding(status="healthy", reason=reason)


def _judge_updates(by_step: dict[int, dict[str, float]]) -> _Finding | None:
    """Says something only of a run that was hardly trained at all."""
    skipped = {step: row[SKIPPED] for step, row in by_step.items() if SKIPPED in row}
    share = sum(skipped.values()) / len(skipped) if skipped else 0.0
    if share <= MOSTLY_SKIPPED:
        return None
    what = f"{share:.0%} of the updates were not made, so the student is much as it was"
    reason = f"Updates: {share:.0%} skipped ({SKIPPED})."
    return _Finding(
        status="warning", step=next(s for s, value in skipped.items() if value > 0), what=what, reason=reason
    )


def _lasting(flags: list[bool], steps: list[int], what: str, reason: str) -> _Finding:
    """Collapsed if the flag is up at the end, a warning that says until when otherwise."""
    begin = steps[flags.index(True)]
    if flags[-1]:
        return _Finding(status="collapsed", step=begin, what=what, reason=reason)
    last = len(flags) - 1 - flags[::-1].index(True)
    return _Finding(status="warning", step=begin, until=steps[last + 1], what=what, reason=reason)


def _rolling(values: list[float]) -> list[float]:
    return [sum(values[end - SPAN : end]) / SPAN for end in range(SPAN, len(values) + 1)]


def _by_step(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Finite figures by step, in the order of the steps."""
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        step = row.get("step") if isinstance(row, Mapping) else None
        if is_number(step):
            merged.setdefault(int(step), {}).update(
                {key: float(value) for key, value in row.items() if is_number(value)}
            )
    return dict(sorted(merged.items()))
