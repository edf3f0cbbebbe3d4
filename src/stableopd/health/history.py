"""What a run's signals were like at its start and are like now: what the alarm rules compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

if TYPE_CHECKING:
    from stableopd.health.monitor import MonitorSettings

MEAN_LENGTH = "completions/mean_length"
MAX_LENGTH = "completions/max_length"
TRUNCATION = "completions/clipped_ratio"
ACCURACY = "completions/accuracy"
REPETITION = "health/repetition_rate"
LOOPS = "health/loop_token_fraction"
STOP_PROBE = "health/stop_probe"
ENDING_PROBE = "health/ending_probe"
ENDING_DRIFT = "health/ending_drift"
"""The monitor's own: how far the ending probe has sunk (CUSUM)."""
SKIPPED = "skipped_updates"
SKIPPED_WITHOUT_TOKENS = "skipped_updates/no_tokens"
FAILED_REWARDS = "reward/failed_fraction"
NEAR_LOOPS = "health/near_loop_token_fraction"
LENGTH_DRIFT = "health/length_drift"
"""The monitor's own: how far the mean length has grown (CUSUM)."""
TRACKED = (MEAN_LENGTH, TRUNCATION, ACCURACY, REPETITION, LOOPS, NEAR_LOOPS, STOP_PROBE, ENDING_PROBE)


@dataclass(kw_only=True, slots=True)
class Series:
    """The first values of a signal (its baseline), the last ones (its window), and how far it has drifted (CUSUM)."""

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    drift: float = 0.0
    """Sum of the signal's relative change from its baseline, to the bad side, beyond a slack a step; never below 0."""

    def push(self, value: float, settings: MonitorSettings, drift: _Drift | None) -> None:
        if len(self.first) < settings.baseline_steps:
            self.first.append(value)
        elif drift and (start := _mean(self.first)):
            change = (value / start - 1) * drift.bad_side - drift.slack
            # Bounded, since a long alarm must not take as long to end.
            self.drift = min(max(self.drift + change, 0.0), 2 * drift.warning)
        self.recent = [*self.recent, value][-settings.window :]


class _Drift(NamedTuple):
    """What counts as drift of a signal."""

    bad_side: int
    """1 where growing is bad, −1 where falling is."""
    slack: float
    warning: float


@dataclass(kw_only=True, slots=True)
class EvalSeries:
    """The first, highest and last value of a held-out figure."""

    first: float
    best: float
    last: float
    num: int = 1
    """How often it was measured."""


class History:
    """What the run's signals were like at its start and are like now."""

    def __init__(self, settings: MonitorSettings) -> None:
        self.settings = settings
        self.series: dict[str, Series] = {}
        self.evals: dict[str, EvalSeries] = {}
        self._drifts = {
            ENDING_PROBE: _Drift(-1, settings.ending_slack, settings.ending_drift_warning),
            MEAN_LENGTH: _Drift(1, settings.length_slack, settings.length_drift_warning),
        }

    def push(self, metrics: Mapping[str, float]) -> None:
        for key, figure in metrics.items():
            if not is_number(figure):
                continue
            value = float(figure)
            if key in TRACKED:
                self.series.setdefault(key, Series()).push(value, self.settings, self._drifts.get(key))
            elif key.startswith("eval/") and key.endswith(("/accuracy", "/truncation_rate", "/repetition_rate")):
                before = self.evals.get(key, EvalSeries(first=value, best=value, last=value, num=0))
                best = max(before.best, value)
                self.evals[key] = EvalSeries(first=before.first, best=best, last=value, num=before.num + 1)

    def now(self, key: str) -> float | None:
        """Mean of the last `window` steps; None if never measured."""
        series = self.series.get(key)
        return _mean(series.recent) if series else None

    def baseline(self, key: str) -> float | None:
        """Mean of the first `baseline_steps` steps; None until they are complete."""
        series = self.series.get(key)
        complete = series and series.first and len(series.first) == self.settings.baseline_steps
        return _mean(series.first) if series and complete else None

    def drift(self, key: str) -> float:
        """How far a signal has drifted; see `Series.drift`."""
        return self.series[key].drift if key in self.series else 0.0

    def drift_warning(self, key: str) -> float:
        return self._drifts[key].warning

    def derived(self) -> dict[str, float]:
        """Figures that the history makes of those that it is given, by metric key."""
        pairs = ((ENDING_DRIFT, ENDING_PROBE), (LENGTH_DRIFT, MEAN_LENGTH))
        return {name: self.drift(key) for name, key in pairs if self.baseline(key)}

    def eval_truncation(self, name: str) -> float | None:
        """Last truncation rate on a held-out set, of greedy decoding where there is some."""
        for key in (f"eval/{name}_greedy/truncation_rate", f"eval/{name}/truncation_rate"):
            if key in self.evals:
                return self.evals[key].last
        return None

    def repeats_more(self, name: str) -> bool:
        """Whether answers on a held-out set have become repetitive, however they are decoded."""
        keys = (f"eval/{name}/repetition_rate", f"eval/{name}_greedy/repetition_rate")
        found = [self.evals[key] for key in keys if key in self.evals]
        return any(series.last > series.first + self.settings.repetition_warning for series in found)

    def to_json(self) -> dict[str, Any]:
        return {
            "series": {key: asdict(series) for key, series in self.series.items()},
            "evals": {key: asdict(series) for key, series in self.evals.items()},
        }

    def load_json(self, state: Mapping[str, Any]) -> None:
        self.series = {
            key: Series(**{**s, "first": [*s["first"]], "recent": [*s["recent"]]}) for key, s in state["series"].items()
        }
        self.evals = {key: EvalSeries(**series) for key, series in state["evals"].items()}


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a metric is a finite number; None, texts and NaN are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
