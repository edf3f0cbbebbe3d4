"""What `stableopd watch` follows: a run folder or a growing file of rollouts, as snapshots of all that was read so far.

A source is asked again and again and reads only what was appended. It never writes, and never needs torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import yaml

from stableopd.diagnose import in_unit
from stableopd.health import HealthMonitor, Verdict, is_repetitive, judge_run, loop_mask
from stableopd.health.history import LOOPS, MEAN_LENGTH, REPETITION, TRUNCATION, is_number
from stableopd.health.monitor import MonitorSettings
from stableopd.health.rules import window_of
from stableopd.health.signals import TRUNCATED_REASONS
from stableopd.rollout_figures import Unit
from stableopd.runfolder import parse_alert, verdict_of
from stableopd.tailing import FileTail
from stableopd.types import Alert

Kind = Literal["run", "rollouts"]
Row = dict[str, float]

ROLLOUT_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson", ".txt"})
TEXT_COLUMNS = ("completion", "text", "output", "response")
LENGTH_COLUMNS = ("num_tokens", "num_completion_tokens", "completion_length", "response_length")
CHARACTERS = "characters/mean_length"
"""Mean length of rollouts whose number of tokens is not told."""
LOT = 64
"""Rollouts that make a step where the lines name none."""
STANDS_STEPS = 20
"""An alert whose value cannot be held against its signal stands for so many steps."""
SAME_SCALE = 0.1

_KEPT = {"step", "step_time", MEAN_LENGTH, CHARACTERS, TRUNCATION}
_KEPT |= {"completions/max_length", "reward"}
_KEPT_AREAS = ("eval/", "health/", "controller/")
_BY_POSITION = "_from_"
"""Figures by position in the completion are many, and no alert is about them."""
_FINISHED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "length", "max_tokens", "max_length", "loop"}
_CUT_OFF = TRUNCATED_REASONS | {"max_tokens", "max_length"}
_WORDS = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\u0e00-\u0eff]|\w+|[^\w\s]")
"""Words; single characters in scripts that put no spaces between them."""


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


class Source(Protocol):
    def poll(self) -> Snapshot:
        """Read what was appended. Raises: OSError when the disk does not give it."""
        ...


class Follower:
    """Follows a path that may not exist yet, and turns into a file or a folder later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kind: Kind | None = None
        self._source: Source | None = None
        self._last: Snapshot | None = None

    def poll(self) -> Snapshot:
        """What is known now. A disk that fails is a `problem` of the snapshot; what was read before stays."""
        try:
            kind = _kind_of(self.path)
            if self._source is None or kind != self._kind:
                self._kind, self._source = kind, _source_of(self.path, kind)
            self._last = self._source.poll()
        except OSError as error:
            problem = f"{error.filename or self.path} cannot be read now: {error.strerror or error}"
            return _with_problem(self._last or _empty(self.path.name, self._kind or "run"), problem)
        return self._last


def _kind_of(path: Path) -> Kind:
    if path.is_dir():
        return "run"
    named_like_rollouts = path.suffix in ROLLOUT_SUFFIXES and path.name not in RunSource.FILES
    return "rollouts" if named_like_rollouts or (path.is_file() and path.name not in RunSource.FILES) else "run"


def _source_of(path: Path, kind: Kind) -> Source:
    if kind == "rollouts":
        return RolloutSource(path)
    return RunSource(path.parent if path.name in RunSource.FILES else path)


def _empty(name: str, kind: Kind) -> Snapshot:
    return Snapshot(name=name, kind=kind, verdict=judge_run(()))


def _with_problem(snapshot: Snapshot, problem: str) -> Snapshot:
    return replace(snapshot, problem=problem, more=False)


# ------------------------------------------------------------------------------------ a run folder


class RunSource:
    """metrics.jsonl, alerts.jsonl and config.yaml of a run folder."""

    FILES = frozenset({"metrics.jsonl", "alerts.jsonl"})

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = _Records(folder / "metrics.jsonl")
        self._alert_lines = _Records(folder / "alerts.jsonl")
        self._rows: list[Row] = []
        self._alerts: list[Alert] = []
        self._config_read_at: tuple[int, int] | None = None
        self._max_steps: int | None = None
        self._version = 0
        self._last: Snapshot | None = None

    def poll(self) -> Snapshot:
        changed = self._metrics.read(self._rows.clear, self._take_row)
        changed |= self._alert_lines.read(self._alerts.clear, self._take_alert)
        changed |= self._read_config()
        problem = None if self._rows else self._why_nothing()
        modified_at = self._metrics.tail.modified_at
        last = self._last
        if last is not None and not changed and (last.problem, last.modified_at) == (problem, modified_at):
            return last
        self._version += changed
        rows = tuple(self._rows)
        self._last = Snapshot(
            name=self.folder.resolve().name,
            kind="run",
            rows=rows,
            alerts=tuple(self._alerts),
            verdict=verdict_of(rows, self._alerts) if changed or last is None else last.verdict,
            max_steps=self._max_steps,
            modified_at=modified_at,
            restarts=self._metrics.restarts,
            problem=problem,
            notes=(*self._metrics.notes(), *self._alert_lines.notes()),
            more=self._metrics.more or self._alert_lines.more,
            version=self._version,
        )
        return self._last

    def _take_row(self, record: Mapping[str, Any]) -> bool:
        step = _whole(record.get("step"))
        if step is None:
            return False
        _add_row(self._rows, {key: float(value) for key, value in record.items() if _is_kept(key, value)})
        return True

    def _take_alert(self, record: Mapping[str, Any]) -> bool:
        step = _whole(record.get("step"))
        if step is None or "message" not in record:
            return False
        self._alerts.append(parse_alert({**record, "step": step}))
        return True

    def _read_config(self) -> bool:
        """Only for how long the run is to go on; a file that is missing or broken says nothing."""
        path = self.folder / "config.yaml"
        try:
            status = path.stat()
            if (status.st_mtime_ns, status.st_size) == self._config_read_at:
                return False
            self._config_read_at = (status.st_mtime_ns, status.st_size)
            config = yaml.safe_load(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, yaml.YAMLError, RecursionError, UnicodeDecodeError):
            return False
        before, self._max_steps = self._max_steps, _whole(config.get("max_steps")) if isinstance(config, dict) else None
        return self._max_steps != before

    def _why_nothing(self) -> str | None:
        if not self.folder.exists():
            return f"{self.folder} does not exist"
        if not self.folder.is_dir():
            return (
                f"{self.folder} is a file, and its name is not that of rollouts ({', '.join(sorted(ROLLOUT_SUFFIXES))})"
            )
        if self._metrics.num_broken:
            return f"no line of {self._metrics.tail.path} is a JSON object with a step"
        if self._config_read_at is None and self._metrics.tail.modified_at is None:
            return f"{self.folder} is not a run folder: there is neither metrics.jsonl nor config.yaml in it"
        return None


def _is_kept(key: str, value: object) -> bool:
    wanted = key in _KEPT or (key.startswith(_KEPT_AREAS) and _BY_POSITION not in key)
    return wanted and is_number(value)


def _add_row(rows: list[Row], row: Row) -> None:
    """A step again is merged into its row; a step back is a run that was resumed, which replaces what followed."""
    while rows and rows[-1]["step"] > row["step"]:
        rows.pop()
    if rows and rows[-1]["step"] == row["step"]:
        rows[-1] = rows[-1] | row
    else:
        rows.append(row)


# ------------------------------------------------------------------------------------ a file of rollouts


@dataclass(kw_only=True, slots=True)
class _Group:
    """The rollouts of one step, as sums: texts are not kept."""

    step: int
    num_rollouts: int = 0
    length: int = 0
    longest: int = 0
    counts_tokens: bool = True
    truncated: int = 0
    tells_truncation: bool = True
    repetitive: int = 0
    words: int = 0
    words_in_loops: int = 0
    rewards: list[float] = field(default_factory=list)

    def row(self) -> Row:
        row: Row = {"step": float(self.step), REPETITION: self.repetitive / self.num_rollouts}
        row[MEAN_LENGTH if self.counts_tokens else CHARACTERS] = self.length / self.num_rollouts
        row[LOOPS] = self.words_in_loops / self.words if self.words else 0.0
        if self.counts_tokens:
            row["completions/max_length"] = float(self.longest)
        if self.tells_truncation:
            row[TRUNCATION] = self.truncated / self.num_rollouts
        if self.rewards:
            row["reward"] = sum(self.rewards) / len(self.rewards)
        return row

    def alerts(self, monitor: HealthMonitor) -> tuple[Alert, ...]:
        """What the monitor says of it. It asks for growth, in whatever unit."""
        row = {MEAN_LENGTH if key == CHARACTERS else key: value for key, value in self.row().items()}
        unit: Unit = "tokens" if self.counts_tokens else "characters"
        return tuple(in_unit(alert, unit) for alert in monitor.judge(self.step, row))


class RolloutSource:
    """JSON Lines, one rollout each, of whatever trainer.

    Columns: the text under one of `TEXT_COLUMNS` (a string, or chat messages); where they are there, `step`, the number
    of tokens, `finish_reason` or `truncated`, `reward` or `score`. Without a step, `LOT` lines make one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = _Records(path)
        self._begin_anew()
        self._quiet = False
        self._version = 0
        self._last: Snapshot | None = None

    def _begin_anew(self) -> None:
        self._rows: list[Row] = []
        self._alerts: list[Alert] = []
        self._monitor = HealthMonitor()
        self._group: _Group | None = None
        self._num_taken = 0

    def poll(self) -> Snapshot:
        changed = self._records.read(self._begin_anew, self._take)
        modified_at = self._records.tail.modified_at
        if not changed and self._last is not None and self._quiet and self._last.modified_at == modified_at:
            return self._last
        # The last step may be in the middle of being written: no alert before nothing more comes.
        self._quiet = not changed
        rows, alerts = list(self._rows), list(self._alerts)
        if self._group is not None:
            _add_row(rows, self._group.row())
            alerts += _look_ahead(self._monitor, self._group) if self._quiet else ()
        self._version += 1
        self._last = Snapshot(
            name=self.path.name,
            kind="rollouts",
            rows=tuple(rows),
            alerts=tuple(alerts),
            verdict=judge_run(rows),
            modified_at=modified_at,
            restarts=self._records.restarts,
            problem=None if rows else self._why_nothing(),
            notes=self._records.notes(),
            more=self._records.more,
            version=self._version,
        )
        return self._last

    def _take(self, record: Mapping[str, Any]) -> bool:
        text = _text_of(record)
        if text is None:
            return False
        step = _whole(record.get("step"))
        step = self._num_taken // LOT + 1 if step is None else step
        self._num_taken += 1
        if self._group is not None and self._group.step != step:
            self._close_group()
        if self._group is None:
            self._group = _Group(step=step)
        _count(self._group, record, text)
        return True

    def _close_group(self) -> None:
        group, self._group = self._group, None
        assert group is not None
        if self._rows and group.step <= self._rows[-1]["step"]:  # resumed: what followed is void, alerts as well
            self._alerts = [alert for alert in self._alerts if alert.step < group.step]
        row = group.row()
        _add_row(self._rows, row)
        self._alerts += group.alerts(self._monitor)

    def _why_nothing(self) -> str | None:
        columns = f"a JSON object with {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}"
        if self._records.tail.modified_at is None:
            return f"{self.path} does not exist"
        if self._records.num_broken:
            return f"no line of {self.path} is a rollout: {columns}"
        return f"{self.path} holds no rollouts"


def _look_ahead(monitor: HealthMonitor, group: _Group) -> tuple[Alert, ...]:
    """Alerts of a step that may not be complete, without the monitor remembering it."""
    other = HealthMonitor()
    other.load_state_dict(monitor.state_dict())
    return group.alerts(other)


def _count(group: _Group, record: Mapping[str, Any], text: str) -> None:
    tokens = next((n for column in LENGTH_COLUMNS if (n := _whole(record.get(column))) is not None), None)
    length = len(text) if tokens is None else tokens
    group.counts_tokens &= tokens is not None
    group.num_rollouts += 1
    group.length += length
    group.longest = max(group.longest, length)
    truncated = _was_truncated(record)
    group.tells_truncation &= truncated is not None
    group.truncated += truncated is True
    group.repetitive += is_repetitive(text)
    words, looping = _words_in_loops(text)
    group.words += words
    group.words_in_loops += looping
    reward = record.get("reward", record.get("score"))
    if is_number(reward):
        group.rewards.append(float(reward))


def _text_of(record: Mapping[str, Any]) -> str | None:
    """The completion; of chat messages the last one's content."""
    for column in TEXT_COLUMNS:
        value = record.get(column)
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            value = value[-1].get("content")
        if isinstance(value, str):
            return value
    return None


def _was_truncated(record: Mapping[str, Any]) -> bool | None:
    """None where the line does not tell."""
    reason, truncated = record.get("finish_reason"), record.get("truncated")
    if isinstance(truncated, bool):
        return truncated
    return reason in _CUT_OFF if isinstance(reason, str) and reason in _FINISHED else None


def _words_in_loops(text: str) -> tuple[int, int]:
    """(words, those of them in exact loops)."""
    ids: dict[str, int] = {}
    words = np.array([ids.setdefault(word, len(ids)) for word in _WORDS.findall(text)], dtype=np.int64)
    return len(words), int(loop_mask(words).sum())


# ------------------------------------------------------------------------------------ lines


class _Records:
    """The JSON objects of a growing file; lines that are none are counted."""

    def __init__(self, path: Path) -> None:
        self.tail = FileTail(path)
        self.restarts = 0
        self.more = False
        self.num_broken = 0
        self._line = 0
        self._broken_line = 0

    def read(self, begin_anew: Callable[[], None], take: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Hand over what was appended; whether there was anything."""
        appended = self.tail.read()
        self.more = appended.more
        if appended.restarted:
            self.restarts += 1
            self.num_broken = self._line = 0
            begin_anew()
        for line in appended.lines:
            self._line += 1
            if line.strip() and not any(take(record) for record in _objects(line)):
                self.num_broken += 1
                self._broken_line = self._line
        return appended.restarted or bool(appended.lines)

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.num_broken:
            lines = "line" if self.num_broken == 1 else "lines"
            notes.append(
                f"{self.num_broken} {lines} of {self.tail.path.name} cannot be used (last: line {self._broken_line})"
            )
        if self.tail.skipped_lines:
            notes.append(f"{self.tail.skipped_lines} overlong lines of {self.tail.path.name} left out")
        return tuple(notes)


def _objects(line: bytes) -> Iterator[Mapping[str, Any]]:
    """The object that the line holds, or nothing."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict):
        yield record


def _whole(value: object) -> int | None:
    """A whole number of at least 0, also one written as 3.0."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and is_number(value)
    return int(value) if usable and value >= 0 and value == value // 1 else None  # type: ignore[operator,arg-type,call-overload]


def names_of_evaluations(rows: Iterable[Row]) -> tuple[str, ...]:
    """Held-out sets in order of appearance; `NAME` and `NAME_greedy` are one."""
    keys = dict.fromkeys(key for row in rows for key in row if key.endswith("/accuracy") and key.startswith("eval/"))
    return tuple(dict.fromkeys(key.split("/", 1)[1].rsplit("/", 1)[0].removesuffix("_greedy") for key in keys))
