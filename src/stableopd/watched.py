"""What `stableopd watch` follows: a run folder or a growing file of rollouts, as snapshots of all that was read so far.

A source is asked again and again and reads only what was appended. It never writes, and never needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from stableopd.health import judge_run
from stableopd.health.history import MEAN_LENGTH, TRUNCATION, is_number
from stableopd.runfolder import parse_alert, verdict_of
from stableopd.snapshot import CHARACTERS, Kind, Row, Snapshot, add_row, whole_number
from stableopd.tailing import Records
from stableopd.types import Alert
from stableopd.watched_rollouts import RolloutSource

ROLLOUT_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson", ".txt"})
_KEPT = {"step", "step_time", MEAN_LENGTH, CHARACTERS, TRUNCATION}
_KEPT |= {"completions/max_length", "reward"}
_KEPT_AREAS = ("eval/", "health/", "controller/")
_BY_POSITION = "_from_"
"""Figures by position in the completion are many, and no alert is about them."""


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
        self._metrics = Records(folder / "metrics.jsonl")
        self._alert_lines = Records(folder / "alerts.jsonl")
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
        step = whole_number(record.get("step"))
        if step is None:
            return False
        add_row(self._rows, {key: float(value) for key, value in record.items() if _is_kept(key, value)})
        return True

    def _take_alert(self, record: Mapping[str, Any]) -> bool:
        step = whole_number(record.get("step"))
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
        before = self._max_steps
        self._max_steps = whole_number(config.get("max_steps")) if isinstance(config, dict) else None
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
