"""One frame of `stableopd watch`: a snapshot as text that fits the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stableopd.console import STYLES, printable
from stableopd.health.history import LOOPS, MEAN_LENGTH, REPETITION, TRUNCATION
from stableopd.snapshot import CHARACTERS, Snapshot, names_of_evaluations
from stableopd.sparklines import sparkline
from stableopd.types import Alert

VERDICT_STYLES = {"healthy": "bold green", "warning": "bold yellow", "collapsed": "bold red", "unknown": "bold"}
MAX_EVALUATIONS = 2
"""Held-out sets with curves of their own."""
MAX_ALERTS = 5
MAX_ACTIONS = 3
MAX_BRIEF = 2
"""Alerts, and actions, of a brief frame."""
LABEL_WIDTH, FIGURE_WIDTH, START_WIDTH = 17, 9, 15
MIN_CURVE, MAX_CURVE = 8, 60
PACE_STEPS = 20
"""Steps over which the pace is taken."""
QUIET_S = 120.0
"""A run that has written nothing for this long, and for many steps' time, may have stopped."""
QUIET_STEPS = 20
SMALL_SHARE = 0.1
"""A curve of shares reaches at least this high, so that a few per mille do not look like a collapse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curve:
    label: str
    key: str
    form: str
    high: float | None = None
    """The curve begins at 0 and reaches at least this high; None: it spans from its lowest to its highest value."""


def frame(
    snapshot: Snapshot, *, width: int, now: float | None = None, delay_s: float = 0.0, brief: bool = False
) -> RenderableType:
    """Everything worth seeing of a run, at most `width` columns wide.

    Args:
        brief: for terminals of 24 lines: one line an alert and an action, and fewer of them.
        now: seconds since the epoch, for how long ago the last step was; default: the clock.
        delay_s: how long the disk has not answered.
    """
    parts: list[RenderableType] = [_title(snapshot, width)]
    if snapshot.rows or snapshot.problem is None:
        parts += [_verdict(snapshot), _progress(snapshot, time.time() if now is None else now), Text()]
        parts += [_curves(snapshot, width)] if snapshot.rows else []
        parts += list(_events(snapshot, brief))
    parts += [Text(printable(note), style="yellow") for note in _notes(snapshot, delay_s)]
    return Group(*parts)


def _title(snapshot: Snapshot, width: int) -> Text:
    what = "rollouts" if snapshot.kind == "rollouts" else "run"
    return Text(f"{what} {printable(snapshot.name)}", style="bold", no_wrap=True, overflow="ellipsis")


def _verdict(snapshot: Snapshot) -> Text:
    verdict = snapshot.verdict
    standing = len(snapshot.standing)
    raised = f" {standing} alert{'s' * (standing != 1)} still standing." if standing else ""
    style = VERDICT_STYLES["warning" if standing and verdict.status in ("healthy", "unknown") else verdict.status]
    return Text(printable(verdict.headline) + raised, style=style)


def _progress(snapshot: Snapshot, now: float) -> Text:
    step = snapshot.last_step
    if step is None:
        return Text("no step yet", style="dim")
    cells = [f"step {step}" + (f" of {snapshot.max_steps}" if snapshot.max_steps else "")]
    pace = _pace(snapshot)
    if pace is not None:
        cells.append(f"{pace:.2g} s a step" if pace < 10 else f"{_duration(pace)} a step")
    finished = snapshot.max_steps is not None and step >= snapshot.max_steps
    if finished:
        cells.append("finished")
    elif pace is not None and snapshot.max_steps:
        cells.append(f"about {_duration(pace * (snapshot.max_steps - step))} to go")
    text = Text("  ".join(cells))
    if snapshot.modified_at is not None and not finished:
        age = max(0.0, now - snapshot.modified_at)
        quiet = age > max(QUIET_S, QUIET_STEPS * (pace or 0.0))
        words = f"  nothing written for {_duration(age)}: stopped?" if quiet else f"  written {_duration(age)} ago"
        text.append(words, style="yellow" if quiet else "dim")
    return text


def _pace(snapshot: Snapshot) -> float | None:
    """Seconds a step, evaluations and checkpoints left out; None where they were not logged."""
    times = [seconds for _, seconds in snapshot.values("step_time")[-PACE_STEPS:]]
    return median(times) if times else None


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} days"


# ------------------------------------------------------------------------------------ curves


def _curves(snapshot: Snapshot, width: int) -> Table:
    """One line a signal: its name, its curve over the steps, what it is now, and what it was at first."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=LABEL_WIDTH, no_wrap=True, overflow="ellipsis")
    room = width - LABEL_WIDTH - FIGURE_WIDTH - 3
    wide = room - START_WIDTH >= MIN_CURVE
    columns = min(MAX_CURVE, max(1, room - START_WIDTH if wide else room))
    table.add_column(no_wrap=True, width=columns)
    table.add_column(justify="right", no_wrap=True, width=FIGURE_WIDTH)
    if wide:
        table.add_column(no_wrap=True, style="dim", width=START_WIDTH, overflow="ellipsis")
    worst = _severities(snapshot.standing)
    for curve in _wanted(snapshot):
        points = snapshot.values(curve.key)
        if not points:
            continue
        values = [value for _, value in points]
        first, last = (curve.form.format(value) for value in (values[0], values[-1]))
        low, high = (None, None) if curve.high is None else (0.0, max(curve.high, *values))
        drawn = sparkline(_over_steps(points, snapshot, columns), columns, low=low, high=high)
        style = STYLES.get(worst.get(curve.key, ""), "")
        label = Text(curve.label)
        table.add_row(label, Text(drawn, style=style), Text(last, style=style), *([f"{first} at first"] * wide))
    return table


def _wanted(snapshot: Snapshot) -> Iterator[_Curve]:
    yield _Curve(label="mean length", key=MEAN_LENGTH, form="{:,.1f}", high=1.0)
    yield _Curve(label="mean characters", key=CHARACTERS, form="{:,.0f}", high=1.0)
    yield _Curve(label="truncated", key=TRUNCATION, form="{:.1%}", high=SMALL_SHARE)
    yield _Curve(label="in loops", key=LOOPS, form="{:.1%}", high=SMALL_SHARE)
    yield _Curve(label="repetitive", key=REPETITION, form="{:.1%}", high=SMALL_SHARE)
    yield _Curve(label="stop probe", key="health/stop_probe", form="{:.3f}")
    yield _Curve(label="ending probe", key="health/ending_probe", form="{:.3f}")
    yield _Curve(label="reward", key="reward", form="{:+.3f}")
    for name in names_of_evaluations(snapshot.rows)[:MAX_EVALUATIONS]:
        yield _Curve(label=f"acc. {printable(name)}", key=f"eval/{name}/accuracy", form="{:.1%}", high=SMALL_SHARE)
        yield _Curve(label="  greedy", key=f"eval/{name}_greedy/accuracy", form="{:.1%}", high=SMALL_SHARE)
    for name in ("gold_coef", "reference_coef", "level"):
        yield _Curve(label=name.replace("_coef", " coef."), key=f"controller/{name}", form="{:.4g}")


def _over_steps(points: Sequence[tuple[int, float]], snapshot: Snapshot, columns: int) -> list[float]:
    """The values on one axis of steps for all signals, so that one sees which moved first; the last known value holds
    until the next."""
    begin, end = int(snapshot.rows[0]["step"]), int(snapshot.rows[-1]["step"])
    count = min(columns, end - begin + 1)
    cells: list[list[float]] = [[] for _ in range(count)]
    for step, value in points:
        cells[(step - begin) * count // (end - begin + 1)].append(value)
    drawn, last = [], math.nan
    for cell in cells:
        drawn.append(sum(cell) / len(cell) if cell else last)
        last = cell[-1] if cell else last
    return drawn


def _severities(alerts: Sequence[Alert]) -> dict[str, str]:
    """The worst severity of each signal."""
    found: dict[str, str] = {}
    for alert in alerts:
        if found.get(alert.signal) != "critical":
            found[alert.signal] = alert.severity
    return found


# ------------------------------------------------------------------------------------ alerts, actions, notes


def _events(snapshot: Snapshot, brief: bool) -> Iterator[RenderableType]:
    actions = [alert for alert in snapshot.alerts if alert.action != "none"]
    alerts = [alert for alert in snapshot.alerts if alert.action == "none"]
    if not alerts and not actions:
        yield Text("\nno alerts", style="dim")
    if alerts:
        yield Text(f"\nlast alerts of {len(alerts)}, newest first" if len(alerts) > 1 else "\nalert")
    for age, alert in enumerate(reversed(alerts[-(MAX_BRIEF if brief else MAX_ALERTS) :])):
        # The newest in full; of the others what was seen.
        yield _event(alert, f"{alert.severity} {alert.rule}", whole=age == 0 and not brief)
    if actions:
        start = "" if brief else "\n"
        yield Text(f"{start}last actions of {len(actions)}, newest first" if len(actions) > 1 else f"{start}action")
    for alert in reversed(actions[-(MAX_BRIEF if brief else MAX_ACTIONS) :]):
        yield _event(alert, alert.action, whole=False)


def _event(alert: Alert, head: str, *, whole: bool) -> Text:
    message = alert.message if whole else alert.message.split(" Likely cause:")[0]
    text = Text(no_wrap=not whole, overflow="fold" if whole else "ellipsis")
    text.append(f"step {alert.step:>5}  ", style="dim")
    text.append(printable(head), style=STYLES[alert.severity])
    text.append(f": {printable(message)}")
    return text


def _notes(snapshot: Snapshot, delay_s: float) -> Iterator[str]:
    if snapshot.problem:
        yield f"{snapshot.problem}; waiting"
    if delay_s:
        yield f"the disk has not answered for {_duration(delay_s)}"
    if snapshot.restarts:
        times = "once" if snapshot.restarts == 1 else f"{snapshot.restarts} times"
        yield f"the run was begun anew or resumed {times} since this watch began"
    yield from snapshot.notes
