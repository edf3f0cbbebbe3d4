"""All that is known of a run or a file of rollouts that is followed, at one moment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stableopd.health import Verdict
from stableopd.health.history import is_number
from stableopd.health.monitor import MonitorSettings
from stableopd.health.rules import window_of
from stableopd.types import Alert

Kind = Literal["run", "rollouts"]
Row = dict[str, float]

CHARACTERS = "characters/mean_length"
"""Mean length of rollouts whose number of tokens is not told."""
STANDS_STEPS = 20
"""An alert whose value cannot be held against its signal stands for so many steps."""
SAME_SCALE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that is known of what is followed."""

    name: str
    kind: Kind
    rows: tuple[Row, ...] = ()
    """Figures by step, in order of step; only those that are shown or judged."""
    alerts: tuple[Alert, ...] = ()
    verdict: Verdict
    max_steps: int | None = None
    modified_at: float | None = None
    """When the file was last written to, seconds since the epoch."""
    restarts: int = 0
    """How often the file began anew while it was followed."""
    problem: str | None = None
    """Why there is nothing to show, or nothing new."""
    notes: tuple[str, ...] = ()
    more: bool = False
    """There is more to read at once."""
    version: int = 0
    """Changes whenever anything was read."""

    @property
    def last_step(self) -> int | None:
        return int(self.rows[-1]["step"]) if self.rows else None

    def values(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has the figure."""
        return [(int(row["step"]), row[key]) for row in self.rows if key in row]

    @property
    def standing(self) -> tuple[Alert, ...]:
        """Warnings and worse whose signal is still beyond the threshold: of each rule and signal the newest. What the
        controller did does not count."""
        raised = (alert for alert in self.alerts if alert.severity != "info" and alert.rule != "controller")
        newest = {(alert.rule, alert.signal): alert for alert in raised}
        return tuple(alert for alert in newest.values() if self._still_beyond(alert))

    def _still_beyond(self, alert: Alert) -> bool:
        points = self.values(alert.signal)
        then = _recent(points, alert.signal, until=alert.step)
        now = _recent(points, alert.signal, until=self.last_step or alert.step)
        if then is None or now is None or not math.isclose(then, alert.value, rel_tol=SAME_SCALE, abs_tol=1e-3):
            # The alert's value is a figure made from the signal, such as a fall: it cannot be held against it.
            return (self.last_step or alert.step) - alert.step <= STANDS_STEPS
        return now < alert.threshold if alert.value < alert.threshold else now > alert.threshold


def _recent(points: Sequence[tuple[int, float]], signal: str, *, until: int) -> float | None:
    """What the monitor looks at: the mean of the last steps, of held-out figures and drifts the last one."""
    values = [value for step, value in points if step <= until][-window_of(signal, MonitorSettings()) :]
    return sum(values) / len(values) if values else None


def add_row(rows: list[Row], row: Row) -> None:
    """A step again is merged into its row; a step back is a run that was resumed, which replaces what followed."""
    while rows and rows[-1]["step"] > row["step"]:
        rows.pop()
    if rows and rows[-1]["step"] == row["step"]:
        rows[-1] = rows[-1] | row
    else:
        rows.append(row)


def names_of_evaluations(rows: Iterable[Row]) -> tuple[str, ...]:
    """Held-out sets in order of appearance; `NAME` and `NAME_greedy` are one."""
    keys = dict.fromkeys(key for row in rows for key in row if key.endswith("/accuracy") and key.startswith("eval/"))
    return tuple(dict.fromkeys(key.split("/", 1)[1].rsplit("/", 1)[0].removesuffix("_greedy") for key in keys))


def whole_number(value: object) -> int | None:
    """A whole number of at least 0, also one written as 3.0."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and is_number(value)
    return int(value) if usable and value >= 0 and value == value // 1 else None  # type: ignore[operator,arg-type,call-overload]
