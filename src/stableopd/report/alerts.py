"""Alerts and actions as the report shows them: taken apart into what was seen, against what, why, and until when."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite

from stableopd.health.monitor import MonitorSettings
from stableopd.health.rules import window_of
from stableopd.runfolder import RunRecord, monitor_settings
from stableopd.types import Alert

MAX_ALERTS = 100
"""Alerts listed per run."""
MAX_MESSAGE = 1_500
"""Characters of a message that are shown."""
CONTROLLER = "controller"
"""The rule of a line that is an action of the controller, not something the monitor saw."""
QUIET = frozenset({"", "none"})
"""What an alert says where nothing was done."""
STAYED_AWAY = 2
"""Measurements in a row on the good side of its threshold after which a signal counts as back."""

_LEVEL = re.compile(r": (?:above|below) the \w{1,20} level of \S{1,40} since step \d{1,12}\.")
"""How the monitor's messages say what a value was held against; the report has columns for that."""
_SHARES = ("_fraction", "_rate", "_ratio", "_share", "accuracy", "avg_at_k", "stop_probe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """An alert and the stretch of steps that it is about."""

    alert: Alert
    start: int
    end: int | None
    """First step at which the signal was back; None where that is not known or has not happened."""
    open: bool
    """Known to last to the end of the log."""

    @property
    def is_action(self) -> bool:
        """Did the software do something?"""
        return self.alert.action not in QUIET

    @property
    def is_controller(self) -> bool:
        return self.alert.rule == CONTROLLER

    @property
    def until(self) -> str:
        if self.end is not None:
            return f", until {self.end}"
        return ", to the end" if self.open else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertRow:
    """One line of the table of alerts, ready to print."""

    step: int
    severity: str
    rule: str
    since: str
    seen: str
    against: str
    cause: str
    remedy: str
    same_as: int | None
    """Step of an earlier alert of the run that had the same cause and remedy."""
    action: str
    by_controller: bool


def episodes(run: RunRecord) -> list[Episode]:
    """Every alert of a run with its stretch, in the order of the file."""
    averaged: dict[str, list[tuple[int, float]]] = {}
    found = []
    for position, alert in enumerate(run.alerts):
        start = max(0, min(alert.since, alert.step))
        if alert.rule == CONTROLLER or not (isfinite(alert.value) and isfinite(alert.threshold)):
            found.append(Episode(alert=alert, start=start, end=None, open=False))
            continue
        if alert.signal not in averaged:
            averaged[alert.signal] = _averaged(run, alert.signal)
        end, ongoing = _end(alert, averaged[alert.signal])
        again = _raised_again(alert, run.alerts[position + 1 :])
        if again is not None and (end is None or again < end):
            end, ongoing = again, False
        found.append(Episode(alert=alert, start=start, end=end, open=ongoing))
    return found


def _averaged(run: RunRecord, signal: str) -> list[tuple[int, float]]:
    """The signal as the monitor looks at it: held-out figures and the longest rollout as they are, others smoothed."""
    points = run.values(signal)
    window = window_of(signal, monitor_settings(run.config) or MonitorSettings())
    values = [value for _, value in points]
    recent = (values[max(0, last + 1 - window) : last + 1] for last in range(len(values)))
    return [(step, sum(part) / len(part)) for (step, _), part in zip(points, recent, strict=True)]


def _end(alert: Alert, points: list[tuple[int, float]]) -> tuple[int | None, bool]:
    """The step at which the signal came back and stayed for a while; and whether it is known never to have."""
    falling = alert.value < alert.threshold
    back, away = None, 0
    later = [(step, value) for step, value in points if step > alert.step]
    for step, value in later:
        good = value >= alert.threshold if falling else value <= alert.threshold
        away = away + 1 if good else 0
        back = step if away == 1 else back
        if away == STAYED_AWAY:
            return back, False
    return None, bool(later) or any(step == alert.step for step, _ in points)


def _raised_again(alert: Alert, later: tuple[Alert, ...]) -> int | None:
    """Since when the same rule raised the same alert anew: the monitor does so only after the first has ended."""
    kind = (alert.rule, alert.signal, alert.severity)
    steps = (max(other.since, alert.step) for other in later if (other.rule, other.signal, other.severity) == kind)
    return next(steps, None)


# ------------------------------------------------------------------------------------ words


def alert_rows(run: RunRecord) -> list[AlertRow]:
    """The first alerts of a run, taken apart for the table."""
    said: dict[tuple[str, str], int] = {}
    return [_row(episode, said) for episode in episodes(run)[:MAX_ALERTS]]


def _row(episode: Episode, said: dict[tuple[str, str], int]) -> AlertRow:
    alert = episode.alert
    seen, cause, remedy = message_parts(shortened(alert.message))
    advice = (cause, remedy)
    before = said.get(advice) if any(advice) else None
    said.setdefault(advice, alert.step)
    return AlertRow(
        step=alert.step,
        severity=alert.severity,
        rule=in_words(alert.rule),
        since="" if episode.is_controller else f"since {episode.start}{episode.until}",
        seen=seen,
        against="" if episode.is_controller else _against(alert),
        cause=cause,
        remedy=remedy,
        same_as=before,
        action=alert.action if episode.is_action else "",
        by_controller=episode.is_controller,
    )


def in_words(rule: str) -> str:
    return rule.replace("_", " ")[:40]


def shortened(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " …"


def message_parts(message: str) -> tuple[str, str, str]:
    """What was seen, the likely cause, and what to do; empty where a message does not say.

    Holds: of a message in other words than the monitor's nothing is lost, all of it was seen.
    """
    body, _, remedy = message.partition("What to do:")
    level = _LEVEL.search(body)
    seen, cause = (body[: level.start()], body[level.end() :]) if level else body.partition("Likely cause:")[::2]
    return _sentence(seen), _sentence(cause.strip().removeprefix("Likely cause:")), _sentence(remedy)


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:]


def _against(alert: Alert) -> str:
    """`12.5% above 10.0%`, by the kind of figure; empty where the alert has no figures."""
    if not (isfinite(alert.value) and isfinite(alert.threshold)):
        return ""
    side = "below" if alert.value < alert.threshold else "above"
    return f"{figure(alert.signal, alert.value)}, {side} {figure(alert.signal, alert.threshold)}"


def figure(signal: str, value: float) -> str:
    return f"{value:.1%}" if signal.endswith(_SHARES) else f"{value:.4g}"
