"""What a monitor beside another trainer leaves on disk: metrics.jsonl and alerts.jsonl, as in our run folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stableopd.health.history import is_number
from stableopd.lines import append_line, keep_until
from stableopd.types import Alert

logger = logging.getLogger("stableopd")

METRICS = "metrics.jsonl"
ALERTS = "alerts.jsonl"


class Journal:
    """The two files in one folder, which is made. `stableopd report FOLDER` reads them (docs/run_folder.md)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Start anew. Files of an earlier run in the same folder are set aside as `*.previous.jsonl`."""
        for name in (METRICS, ALERTS):
            path = self.folder / name
            if path.exists():
                path.replace(path.with_suffix(".previous.jsonl"))

    def go_on_after(self, step: int) -> None:
        """Drop what was noted of later steps, since they are about to be repeated."""
        for name in (METRICS, ALERTS):
            keep_until(self.folder / name, step)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics so far, in their order."""
        path = self.folder / METRICS
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a row of metrics; what is not a finite number is left out."""
        figures = {key: float(value) for key, value in metrics.items() if key != "step" and is_number(value)}
        if figures:
            append_line(self.folder / METRICS, {"step": step, **figures})

    def note_alerts(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            append_line(self.folder / ALERTS, alert.to_json())


def announce(alerts: Iterable[Alert]) -> None:
    """Say each alert once, through the standard library's logging (to stderr, unless the program says otherwise)."""
    for alert in alerts:
        logger.warning("health: %s at step %d: %s", alert.severity, alert.step, alert.message)
