"""A growing file of rollouts of whatever trainer, as snapshots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stableopd.diagnose import in_unit
from stableopd.health import HealthMonitor, is_repetitive, judge_run, loop_mask
from stableopd.health.history import LOOPS, MEAN_LENGTH, REPETITION, TRUNCATION, is_number
from stableopd.health.signals import TRUNCATED_REASONS
from stableopd.rollout_figures import Unit
from stableopd.snapshot import CHARACTERS, Row, Snapshot, add_row, whole_number
from stableopd.tailing import Records
from stableopd.types import Alert

TEXT_COLUMNS = ("completion", "text", "output", "response")
LENGTH_COLUMNS = ("num_tokens", "num_completion_tokens", "completion_length", "response_length")
LOT = 64
"""Rollouts that make a step where the lines name none."""
_FINISHED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "length", "max_tokens", "max_length", "loop"}
_CUT_OFF = TRUNCATED_REASONS | {"max_tokens", "max_length"}
_WORDS = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\u0e00-\u0eff]|\w+|[^\w\s]")
"""Words; single characters in scripts that put no spaces between them."""


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
        self._records = Records(path)
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
            add_row(rows, self._group.row())
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
        step = whole_number(record.get("step"))
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
        add_row(self._rows, row)
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
    tokens = next((n for column in LENGTH_COLUMNS if (n := whole_number(record.get(column))) is not None), None)
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
