"""Reading run folders: what a run left on disk, as records. Never writes, never needs torch.

A run may have been killed at any instant, so every file but the folder itself may be missing, and
the last line of a file may be torn. Rollouts can be gigabytes: only a few lines of a few steps are read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from math import isfinite, nan
from pathlib import Path
from typing import Any

import yaml

from stableopd.errors import RunFolderError
from stableopd.health.monitor import MonitorSettings
from stableopd.health.verdict import Status, Verdict, judge_run
from stableopd.types import Alert

ROLLOUTS_PER_STEP = 3
"""Rollouts kept of each sampled step."""
ROLLOUTS_SCANNED = 64
"""Lines looked at in one rollout file to choose those from."""

CONTENTS = (
    "A run folder holds config.yaml and metrics.jsonl, and beside them environment.json, alerts.jsonl, "
    "rollouts/step-*.jsonl and checkpoints/."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion of the student, as text."""

    prompt: str
    completion: str
    finish_reason: str
    num_tokens: int | None = None
    mean_advantage: float | None = None
    answer: str | None = None
    repetitive: bool = False

    @property
    def failed(self) -> bool:
        """Did it run out of budget, get cut as a loop, or end in repetition?"""
        return self.repetitive or self.finish_reason in ("length", "loop")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSample:
    """A few rollouts of one step, and which step that is: first, middle, worst or last."""

    step: int
    label: str
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """All that a report needs to know of a run."""

    name: str
    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    """One row per step, in order of step; keys may come and go."""
    alerts: tuple[Alert, ...]
    rollouts: tuple[RolloutSample, ...]
    verdict: Verdict

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that holds a number under the key; NaN and infinities come as NaN."""
        return [
            (row["step"], float(value) if isfinite(value) else nan)
            for row in self.metrics
            if isinstance(value := row.get(key), int | float) and not isinstance(value, bool)
        ]

    def values(self, key: str) -> list[tuple[int, float]]:
        """The finite part of `series`."""
        return [(step, value) for step, value in self.series(key) if isfinite(value)]

    @property
    def evaluations(self) -> tuple[str, ...]:
        """Names of the held-out sets, in order of appearance; `NAME` and `NAME_greedy` are one."""
        keys = dict.fromkeys(key for row in self.metrics for key in row)
        names = (match[1].removesuffix("_greedy") for key in keys if (match := re.fullmatch(r"eval/(.+)/\w+", key)))
        return tuple(dict.fromkeys(names))

    @property
    def last_step(self) -> int | None:
        return self.metrics[-1]["step"] if self.metrics else None


def read_run(path: str | Path) -> RunRecord:
    """The record of one run folder.

    Raises: RunFolderError when the path is no run folder, or when a line that is not the last of its
        file is broken (a torn last line is what a killed run leaves, and is left out).
    """
    folder = Path(path)
    _require_run_folder(folder)
    metrics = tuple(_rows_by_step(_read_lines(folder / "metrics.jsonl", required=("step",))))
    alerts = _read_lines(folder / "alerts.jsonl", required=("step", "message"))
    found = tuple(parse_alert(record) for record in alerts)
    return RunRecord(
        name=folder.resolve().name,
        path=folder,
        config=_read_config(folder / "config.yaml"),
        environment=_read_environment(folder / "environment.json"),
        metrics=metrics,
        alerts=found,
        rollouts=tuple(_sample_rollouts(folder / "rollouts", metrics)),
        verdict=verdict_of(metrics, found),
    )


def verdict_of(metrics: Sequence[Mapping[str, Any]], alerts: Sequence[Alert]) -> Verdict:
    """`judge_run`, and that the run was stopped where its controller did so and it did not go on."""
    verdict = judge_run(metrics)
    last = max((step for row in metrics if isinstance(step := row.get("step"), int | float)), default=0)
    stops = [a for a in alerts if a.rule == "controller" and a.action == "stop" and a.step >= last]
    if not stops or verdict.status == "collapsed":
        return verdict
    status: Status = "warning"
    headline = f"Stopped by the controller at step {stops[-1].step}. {stops[-1].message}"
    return replace(verdict, status=status, step=stops[-1].step, headline=headline)


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """The records of several run folders, in the order given, under names that differ.

    Runs that share a name get as much of their path in front as it takes to tell them apart.
    """
    runs = [read_run(path) for path in paths]
    return [replace(run, name=name) for run, name in zip(runs, _distinct_names(runs), strict=True)]


def rollout_steps(run: RunRecord, limit: int) -> list[int]:
    """Up to `limit` steps whose rollouts were saved, spread over the run, the one that had gone furthest among them."""
    steps = sorted(_rollout_files(run.path / "rollouts"))
    if len(steps) <= limit:
        return steps
    chosen = {steps[round(place * (len(steps) - 1) / max(1, limit - 1))] for place in range(limit)}
    damage = {row["step"]: _damage(row) for row in run.metrics}
    worst = max(steps, key=lambda step: damage.get(step, 0.0))
    if worst not in chosen and limit > 2:
        chosen.remove(min(sorted(chosen)[1:-1], key=lambda step: abs(step - worst)))
        chosen.add(worst)
    return sorted(chosen)


def read_rollouts(run: RunRecord, step: int) -> list[Rollout]:
    """The first rollouts that were saved of a step. Raises: RunFolderError as `read_run`."""
    path = _rollout_files(run.path / "rollouts").get(step)
    lines = _iter_lines(path, required=("completion",)) if path else iter(())
    return [_rollout(record) for record in islice(lines, ROLLOUTS_SCANNED)]


def _require_run_folder(folder: Path) -> None:
    if not folder.exists():
        raise RunFolderError(f"{folder} does not exist. Give the path of a run folder. {CONTENTS}")
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a run folder. {CONTENTS}")
    if (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file():
        return
    inside = sorted(child.parent for child in folder.glob("*/metrics.jsonl"))
    hint = f" Did you mean {', '.join(map(str, inside[:4]))}?" if inside else ""
    raise RunFolderError(
        f"{folder} is not a run folder: neither metrics.jsonl nor config.yaml is in it. {CONTENTS}{hint}"
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RunFolderError(f"{where}: broken YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(config or {}, dict):
        raise RunFolderError(f"{path}: a configuration is a mapping of keys to values, not {type(config).__name__}")
    return config or {}


def monitor_settings(config: Mapping[str, Any]) -> MonitorSettings | None:
    """The thresholds that a run was watched with; None where its configuration does not tell."""
    health = config.get("health")
    if not isinstance(health, Mapping):
        return None
    thresholds = health.get("thresholds")
    known = {**health, **(thresholds if isinstance(thresholds, Mapping) else {})}
    try:
        return MonitorSettings(**{s.name: known[s.name] for s in fields(MonitorSettings) if s.name in known})
    except (TypeError, ValueError):
        return None


def _read_environment(path: Path) -> dict[str, Any]:
    """Written once, in one go: a file that cannot be parsed is a torn one, and as good as none."""
    record = _parse(path.read_bytes()) if path.is_file() else None
    return record if isinstance(record, dict) else {}


def _parse(line: bytes) -> Any:
    """The JSON value of a line, None when it is broken."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _iter_lines(path: Path, required: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Records of a JSON Lines file, one at a time; a broken one is an error unless it is the last."""
    broken: int | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if broken is not None:
                raise RunFolderError(
                    f"{path}:{broken}: broken line: not a JSON object with {', '.join(map(repr, required))}. "
                    "Only the last line of a file may be torn. Mend or delete this one."
                )
            record = _parse(line)
            if _is_record(record, required):
                yield record
            else:
                broken = number


def _is_record(record: Any, required: Sequence[str]) -> bool:
    if not isinstance(record, dict) or any(key not in record for key in required):
        return False
    step = record.get("step", 0)
    return isinstance(step, int) and not isinstance(step, bool)


def _read_lines(path: Path, *, required: Sequence[str]) -> list[dict[str, Any]]:
    return list(_iter_lines(path, required)) if path.is_file() else []


def _rows_by_step(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step. Lines of one step are merged; a step back is a resumed run, which replaces what followed."""
    rows: list[dict[str, Any]] = []
    for record in records:
        while rows and rows[-1]["step"] > record["step"]:
            rows.pop()
        if rows and rows[-1]["step"] == record["step"]:
            rows[-1] = rows[-1] | record
        else:
            rows.append(record)
    return rows


def parse_alert(record: Mapping[str, Any]) -> Alert:
    """A line of alerts.jsonl, which holds at least a step and a message."""
    severity = record.get("severity")
    return Alert(
        rule=str(record.get("rule", "")),
        severity=severity if severity in ("info", "warning", "critical") else "warning",
        signal=str(record.get("signal", "")),
        value=_number(record.get("value"), nan),
        threshold=_number(record.get("threshold"), nan),
        step=record["step"],
        since=int(_number(record.get("since"), record["step"])),
        message=str(record["message"]),
        cause=str(record.get("cause") or ""),
        action=str(record.get("action") or "none"),
    )


def _number(value: Any, default: float) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return value if usable else default


def _sample_rollouts(folder: Path, metrics: Sequence[Mapping[str, Any]]) -> Iterator[RolloutSample]:
    files = _rollout_files(folder)
    for step, label in _chosen_steps(sorted(files), metrics):
        rollouts = _choose_rollouts(files[step], failing=label == "worst")
        if rollouts:
            yield RolloutSample(step=step, label=label, rollouts=rollouts)


def _rollout_files(folder: Path) -> dict[int, Path]:
    return {step: path for path in folder.glob("step-*.jsonl") if (step := _step_of(path)) is not None}


def _step_of(path: Path) -> int | None:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else None


def _chosen_steps(steps: Sequence[int], metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """First, middle, worst and last of the steps with rollouts, in order, each at most once."""
    if not steps:
        return []
    damage = {row["step"]: _damage(row) for row in metrics}
    chosen = {steps[len(steps) // 2]: "middle", steps[-1]: "last", steps[0]: "first"}
    worst = max(steps, key=lambda step: damage.get(step, 0.0))
    if damage.get(worst, 0.0) > 0.0:
        chosen[worst] = "worst"
    return sorted(chosen.items())


def _damage(row: Mapping[str, Any]) -> float:
    """How far a step's rollouts had gone: truncated share, repetitive share and repeated tokens together."""
    keys = ("completions/clipped_ratio", "health/repetition_rate", "health/repeated_token_fraction")
    return sum(_number(row.get(key), 0.0) for key in keys)


def _choose_rollouts(path: Path, *, failing: bool) -> tuple[Rollout, ...]:
    """The first few rollouts of a file, of different prompts where possible; the failed ones first if asked for."""
    lines = islice(_iter_lines(path, required=("completion",)), ROLLOUTS_SCANNED)
    rollouts = [_rollout(record) for record in lines]
    seen: Counter[str] = Counter()
    ranked = []
    for position, rollout in enumerate(rollouts):
        ranked.append((failing and not rollout.failed, seen[rollout.prompt], position))
        seen[rollout.prompt] += 1
    return tuple(rollouts[position] for *_, position in sorted(ranked)[:ROLLOUTS_PER_STEP])


def _rollout(record: Mapping[str, Any]) -> Rollout:
    tokens, advantage, answer = (record.get(key) for key in ("num_tokens", "mean_advantage", "answer"))
    return Rollout(
        prompt=str(record.get("prompt", "")),
        completion=str(record["completion"]),
        finish_reason=str(record.get("finish_reason", "unknown")),
        num_tokens=tokens if isinstance(tokens, int) else None,
        mean_advantage=advantage if isinstance(advantage, int | float) and isfinite(advantage) else None,
        answer=None if answer is None else str(answer),
        repetitive=record.get("repetitive") is True,
    )


def _distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """Folder names, with as many parents in front as tell them apart; the same folder again is numbered."""
    parts = [run.path.resolve().parts for run in runs]
    depth = dict.fromkeys(parts, 1)
    names = {folder: folder[-1] for folder in depth}
    while clashes := [folder for folder in names if list(names.values()).count(names[folder]) > 1]:
        for folder in clashes:
            depth[folder] += 1
            names[folder] = "/".join(folder[-depth[folder] :])
    seen: Counter[tuple[str, ...]] = Counter()
    distinct = []
    for folder in parts:
        seen[folder] += 1
        distinct.append(names[folder] + (f" ({seen[folder]})" if seen[folder] > 1 else ""))
    return distinct
