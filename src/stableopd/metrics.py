"""Where a step's figures go: files in the run folder, trackers, and the clock that times the phases."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator


class Stopwatch:
    """Seconds spent in each named phase of a step: `time/NAME_s`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        phases = {f"time/{name}_s": seconds for name, seconds in self._phases.items()}
        return {"step_time": time.perf_counter() - self._start, **phases}


class TrackerSink:
    """Sends metrics to accelerate's trackers (TensorBoard, W&B, Trackio, ...)."""

    def __init__(self, accelerator: Accelerator, project: str, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
        accelerator.init_trackers(project, config=plain)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._accelerator.log({key: value for key, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._accelerator.end_training()


def mean_of(figures: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the updates of a step that have it."""
    names = sorted({name for record in figures for name in record})
    present = {name: [record[name] for record in figures if name in record] for name in names}
    return {name: sum(values) / len(values) for name, values in present.items()}
