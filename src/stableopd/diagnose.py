"""What became of somebody's rollouts: figures by step, a verdict with cause and advice, the worst samples.

Reads rollout files as a stream, in memory that does not grow with them. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from stableopd.diagnosis import Diagnosis, Point, row_of
from stableopd.errors import ConfigError, DataError
from stableopd.health.causes import INFLATION
from stableopd.health.history import LENGTH_DRIFT, TRACKED, is_number
from stableopd.health.monitor import SEVERITIES, HealthMonitor, MonitorSettings
from stableopd.health.verdict import Status, Verdict, judge_run
from stableopd.reading import Place
from stableopd.rollout_figures import RolloutFigures, StepFigures, Unit
from stableopd.rollout_files import Advance, Broken, Format, RolloutFile, Source, find_sources
from stableopd.runfolder import monitor_settings
from stableopd.types import Alert, Severity

MIN_ROLLOUTS = 32
"""Steps with fewer rollouts are judged together with the next ones: shares of a few rollouts mean little."""
MIN_POINTS = 12
"""But not so many of them that fewer points than this are left."""
FEW_BROKEN = 10
"""More broken lines than this, and than whole ones, are no rollouts to be judged."""
MAX_NAMED = 20
"""Broken lines that are named; all are counted."""
MAX_LEFT_OUT = 5
"""Files without rollouts that are named."""

_NOT_HEALTH = re.compile(r"time/|step_time|.*_from_\d+$")
"""Metrics of a run folder that no verdict needs."""


def diagnose(
    paths: Sequence[str | Path],
    *,
    max_length: int | None = None,
    format: Format | None = None,
    strict: bool = False,
    num_samples: int = 3,
    advance: Advance = lambda _: None,
) -> list[Diagnosis]:
    """One diagnosis for each folder among the paths, and one for all files among them together.

    Args: max_length is the length budget in tokens (characters where token counts are not known): it tells what was
    truncated where the files do not. format: of every file; None tells it from their content. strict refuses a broken
    line instead of skipping it. advance is told of so many more bytes read.
    Raises: DataError for what is not there, holds no rollouts or (strict) has a broken line;
    MissingDependencyError where a format needs a package that is not installed.
    """
    return diagnose_sources(
        find_sources(paths, format),
        max_length=max_length,
        strict=strict,
        num_samples=num_samples,
        advance=advance,
    )


def diagnose_sources(
    sources: Sequence[Source],
    *,
    max_length: int | None = None,
    strict: bool = False,
    num_samples: int = 3,
    advance: Advance = lambda _: None,
) -> list[Diagnosis]:
    """`diagnose`, of sources that have been found already."""
    if max_length is not None and max_length < 1:
        raise ConfigError(f"--max-length must be at least 1, got {max_length}. Give the length budget of the rollouts")
    return [_Reading(source, strict, max_length, num_samples, advance).diagnosis() for source in sources]


class _Reading:
    """Reads one source from end to end."""

    def __init__(
        self, source: Source, strict: bool, max_length: int | None, num_samples: int, advance: Advance
    ) -> None:
        self.source, self.strict, self.advance = source, strict, advance
        self.num_broken, self.broken = 0, list[Broken]()
        self.settings = _settings_of(source.run_folder) or MonitorSettings()
        self.own_rows = self._own_rows() if source.run_folder else {}
        self.figures = RolloutFigures(settings=self.settings, max_length=max_length, num_samples=num_samples)
        for file in source.files:
            self._read(file)
        if not self.figures.num_rollouts and not self.own_rows:
            raise DataError(self._nothing())
        if self.num_broken > max(FEW_BROKEN, self.figures.num_rollouts + len(self.own_rows)):
            raise DataError(
                f"{self.source.name}: {self.num_broken} lines are broken and {self.figures.num_rollouts} are not, too "
                f"few to judge by; the first of them: {self.broken[0]}. Correct the file, or name its format with "
                "--format"
            )

    def _read(self, file: RolloutFile) -> None:
        for item in file.read(self.advance):
            if isinstance(item, Broken):
                self._note_broken(item)
            else:
                self.figures.add(item)

    def _note_broken(self, broken: Broken) -> None:
        if self.strict:
            raise DataError(f"{broken}. Correct or remove it, or leave --strict away to have it skipped")
        self.num_broken += 1
        if len(self.broken) < MAX_NAMED:
            self.broken.append(broken)

    def _nothing(self) -> str:
        if not self.broken:
            return f"{self.source.name} holds no rollouts: it is empty. Give files with one completion a line or row"
        return (
            f"{self.source.name} holds no rollout that can be read: {self.num_broken} broken, the first of them "
            f"{self.broken[0]}. Correct the files, or name their format with --format"
        )

    def _own_rows(self) -> dict[int, dict[str, float]]:
        """The rows of the run's metrics.jsonl by step; a step back is a resumed run, which replaces what followed."""
        assert self.source.run_folder is not None
        path, rows = self.source.run_folder / "metrics.jsonl", dict[int, dict[str, float]]()
        last_step = 0
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = line
            if row is None:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                self._note_broken(Broken(Place(str(path), "line", number), "it is not a JSON object with a step"))
                continue
            if row["step"] < last_step:
                rows = {step: before for step, before in rows.items() if step <= row["step"]}
            last_step = row["step"]
            figures = {
                key: float(value) for key, value in row.items() if is_number(value) and not _NOT_HEALTH.match(key)
            }
            figures.pop("step", None)
            rows.setdefault(row["step"], {}).update(figures)
        return rows

    # -------------------------------------------------------------------------------- judging

    def diagnosis(self) -> Diagnosis:
        figures, unit = self.figures, self.unit
        points = self._points()
        verdict, alerts, notes = _judge(self._judged(), self.settings, unit)
        stepless = all(point.step is None for point in points)
        alerts = tuple(_without_step(alert) for alert in alerts) if stepless else alerts
        alarming = [alert for alert in alerts if _counts(alert, verdict)]
        top = max(alarming, key=lambda alert: (SEVERITIES.index(alert.severity), alert.step), default=None)
        status, severity = _status(verdict, top)
        told_by_alert = top is not None and verdict.status in ("healthy", "unknown")
        cause, advice = _cause_and_advice(top, status)
        return Diagnosis(
            name=self.source.name,
            formats=Counter(file.format for file in self.source.files),
            num_rollouts=figures.num_rollouts,
            length_unit=unit,
            status=status,
            severity=severity,
            step=None if stepless else min(alert.since for alert in alarming) if told_by_alert else verdict.step,
            headline=_alert_headline(alarming, stepless) if told_by_alert else _headline(verdict, status),
            reasons=verdict.reasons if verdict.status != "unknown" else (),
            cause=cause,
            advice=advice,
            alerts=alerts,
            steps=tuple(row_of([point], unit, figures.rewards_are_accuracy) for point in points),
            figures=row_of(points, unit, figures.rewards_are_accuracy),
            samples=figures.samples(),
            num_broken=self.num_broken,
            broken=tuple(self.broken),
            notes=(*notes, *self._notes()),
            points=tuple(points),
            rewards_are_accuracy=figures.rewards_are_accuracy,
        )

    @property
    def unit(self) -> Unit:
        return "tokens" if self.own_rows else self.figures.unit

    def _points(self) -> list[Point]:
        """The steps in order, rollouts without one last."""
        read, own, width = self.figures.steps, self.own_rows, self.figures.width
        known = sorted({step for step in read if step is not None} | {step for step, row in own.items() if row})
        points = [
            Point(step, step + width - 1 if step in read else step, read.get(step, StepFigures()), own.get(step))
            for step in known
        ]
        return [*points, Point(None, None, read[None], None)] if None in read else points

    def _judged(self) -> list[dict[str, Any]]:
        """Rows of metrics for the monitor: the run's own of whole batches, or steps until they have enough rollouts."""
        if self.own_rows:
            return [{"step": step, **row} for step, row in self.own_rows.items()]
        rows = self._judged_rows(min(MIN_ROLLOUTS, self.figures.num_rollouts // MIN_POINTS))
        return rows if len(rows) > self.settings.baseline_steps else self._judged_rows(MIN_ROLLOUTS)

    def _judged_rows(self, enough: int) -> list[dict[str, Any]]:
        rows, gathered, waiting = [], list[Point](), 0
        points = self._points()
        points = [point for point in points if point.step is not None] or points
        for at, point in enumerate(points):
            gathered.append(point)
            waiting += point.figures.num
            if waiting >= enough or at == len(points) - 1:
                row = row_of(gathered, self.unit, self.figures.rewards_are_accuracy)
                rows.append({**row.metrics, "step": row.step or 0})
                gathered, waiting = [], 0
        return rows

    def _notes(self) -> list[str]:
        figures, total = self.figures, self.figures.total()
        notes = list(self.source.left_out[:MAX_LEFT_OUT])
        if (more := len(self.source.left_out) - MAX_LEFT_OUT) > 0:
            notes.append(f"{more:,} more files were left out")
        if self.own_rows:
            notes.append(
                f"figures of {len(self.own_rows)} steps are the run's own, of whole batches (metrics.jsonl); samples "
                f"are of the {figures.num_rollouts:,} rollouts that it kept"
            )
        elif figures.num_rollouts:
            notes += [*self._notes_on_endings(total), *self._notes_on_repetition(total)]
        if figures.without_step:
            notes.append(f"{figures.without_step:,} rollouts have no step and are taken as one")
        if figures.width > 1:
            notes.append(f"there are very many steps: figures are of {figures.width} steps together")
        return notes

    def _notes_on_endings(self, total: StepFigures) -> list[str]:
        figures, notes = self.figures, list[str]()
        if figures.guessed:
            # Each rollout counts by tokens where it has them.
            unit = "tokens" if total.tokens.num == total.num else "characters" if not total.tokens.num else "units"
            notes.append(
                f"{figures.guessed:,} of {total.num:,} rollouts do not say how they ended: those of "
                f"{figures.max_length:,} {unit} or more count as truncated"
            )
        elif total.reasons < total.num:
            left = "truncation is left out" if not total.reasons else "they are left out of the truncated share"
            notes.append(
                f"{total.num - total.reasons:,} of {total.num:,} rollouts do not say how they ended: {left}. "
                "Give their budget with --max-length"
            )
            if figures.at_longest > max(1, total.num // 20):
                notes.append(f"{figures.at_longest:,} rollouts have exactly {total.tokens.max:,} tokens: the budget?")
        return notes

    def _notes_on_repetition(self, total: StepFigures) -> list[str]:
        tail, notes = self.settings.tail_chars, list[str]()
        if figures := self.figures.num_rollouts - self.figures.with_ids:
            notes.append(
                f"{figures:,} rollouts have no token ids: their loops are found in pieces of text (words; single "
                "digits, marks, and characters of scripts without spaces)"
            )
        if total.texts and total.characters.max <= tail:
            notes.append(
                f"no completion is longer than {tail:,} characters, so by definition none is repetitive: go by loops"
            )
        return notes


def _judge(
    rows: Sequence[Mapping[str, Any]], settings: MonitorSettings, unit: Unit
) -> tuple[Verdict, tuple[Alert, ...], list[str]]:
    """The verdict on the rows, the alerts that a monitor would have raised, and what was not possible."""
    notes = []
    measured = [row for row in rows if any(is_number(row.get(key)) for key in TRACKED)]
    if len(measured) <= settings.baseline_steps:
        # There is no start to compare with: only levels can be judged.
        settings = MonitorSettings(
            **{spec.name: getattr(settings, spec.name) for spec in fields(settings)}
            | {"baseline_steps": 0, "patience": 1, "window": 1}
        )
        notes.append(
            "there are too few steps, or too few rollouts in them, to compare with a start: levels are judged, growth "
            "is not"
        )
    monitor, alerts = HealthMonitor(settings), list[Alert]()
    for row in rows:
        alerts += monitor.judge(int(row["step"]), {key: value for key, value in row.items() if key != "step"})
    return judge_run(rows), tuple(in_unit(alert, unit) for alert in alerts), notes


def in_unit(alert: Alert, unit: Unit) -> Alert:
    """The monitor counts in tokens; where lengths are in characters its sentence has to say so."""
    if unit == "tokens" or not (alert.signal.endswith("_length") or alert.signal == LENGTH_DRIFT):
        return alert
    return Alert(**asdict(alert) | {"message": alert.message.replace(" tokens", " characters", 1)})


def _without_step(alert: Alert) -> Alert:
    """Rollouts without steps are judged as step 0, of which the sentence shall not speak."""
    return Alert(**asdict(alert) | {"message": alert.message.replace(" since step 0", "", 1)})


def _counts(alert: Alert, verdict: Verdict) -> bool:
    """Whether an alert makes a run unhealthy; in hindsight a dip of a noisy evaluation does not."""
    passing = alert.severity == "warning" and re.fullmatch(r"eval/.+/accuracy", alert.signal) and verdict.healthy
    return alert.severity != "info" and not passing


def _status(verdict: Verdict, top: Alert | None) -> tuple[Status, Severity]:
    if verdict.status == "collapsed":
        return "collapsed", "critical"
    if top is not None:
        return "warning", top.severity
    if verdict.status == "warning":
        return "warning", "warning"
    return "healthy", "info"


def _headline(verdict: Verdict, status: Status) -> str:
    return "Healthy: nothing that the monitor looks at is out of bounds." if status == "healthy" else verdict.headline


def _alert_headline(alarming: Sequence[Alert], stepless: bool) -> str:
    """What was seen, of the worst rules; each in the words of its last and worst alert."""
    last = {alert.rule: alert for alert in sorted(alarming, key=lambda alert: SEVERITIES.index(alert.severity))}
    worst = max(last.values(), key=lambda alert: (SEVERITIES.index(alert.severity), -alert.since))
    start = "" if stepless else f" from step {worst.since}"
    return f"{worst.severity.capitalize()}{start}: {seen(worst)}"


def seen(alert: Alert) -> str:
    """What an alert saw and what it was held against, without cause and advice."""
    return _parts(alert.message)[0]


def _parts(message: str) -> tuple[str, str, str]:
    """What an alert's message says was seen, the likely cause, what to do; empty where it does not say."""
    found = re.match(r"(.*? level of \S+?(?: since step -?\d+)?\.)(?: (.*))?$", message, re.DOTALL)
    what, rest = (found[1], found[2] or "") if found else (message, "")
    cause, _, advice = rest.partition("What to do: ")
    return what, cause.strip().removeprefix("Likely cause: "), advice.strip()


def _cause_and_advice(top: Alert | None, status: Status) -> tuple[str | None, str | None]:
    if status == "healthy":
        return None, None
    rest = INFLATION.advice if status == "collapsed" else INFLATION.remedy
    _, cause, advice = _parts(top.message if top else f"level of 0. {rest}")
    return cause or None, advice or None


def _settings_of(folder: Path | None) -> MonitorSettings | None:
    """The thresholds that the run itself was watched with; None where its config.yaml does not tell."""
    path = folder / "config.yaml" if folder else None
    if path is None or not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None
    return monitor_settings(config) if isinstance(config, dict) else None
