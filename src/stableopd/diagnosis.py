"""What is said of somebody's rollouts, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from stableopd.health.verdict import Status
from stableopd.rollout_figures import Sample, StepFigures, Unit
from stableopd.rollout_files import Broken
from stableopd.types import Alert, Severity

FORMAT_VERSION = 1


class Point(NamedTuple):
    """One step, or as many as are taken together where there are very many."""

    step: int | None
    last_step: int | None
    figures: StepFigures
    """Of the rollouts that were read."""
    own: Mapping[str, float] | None
    """The run's own figures, of all rollouts that there were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """Figures of one step, or of several from `step` to `last_step`."""

    step: int | None
    last_step: int | None
    num_rollouts: int
    """Rollouts that were read; the run's own figures are of all that there were."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All that is said of one run."""

    name: str
    formats: Mapping[str, int]
    """Files by format."""
    num_rollouts: int
    length_unit: Unit
    status: Status
    severity: Severity
    step: int | None
    """When the trouble began."""
    headline: str
    reasons: tuple[str, ...]
    cause: str | None
    advice: str | None
    alerts: tuple[Alert, ...]
    steps: tuple[StepRow, ...]
    figures: StepRow
    """Of all steps together."""
    samples: tuple[Sample, ...]
    num_broken: int
    broken: tuple[Broken, ...]
    """The first of them."""
    notes: tuple[str, ...]
    """What the figures cannot tell, and how they were made."""
    points: tuple[Point, ...] = field(default=(), repr=False)
    """What `rows` is made of."""
    rewards_are_accuracy: bool = False

    @property
    def healthy(self) -> bool:
        return self.status == "healthy"

    def rows(self, most: int) -> list[StepRow]:
        """The steps in at most `most` rows, each over as many steps as the others."""
        size = max(math.ceil(len(self.points) / most), 1)
        return [
            row_of(self.points[at : at + size], self.length_unit, self.rewards_are_accuracy)
            for at in range(0, len(self.points), size)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "healthy": self.healthy,
            "formats": dict(self.formats),
            "num_rollouts": self.num_rollouts,
            "length_unit": self.length_unit,
            "verdict": {
                "status": self.status, "severity": self.severity, "step": self.step, "headline": self.headline,
                "reasons": list(self.reasons), "cause": self.cause, "advice": self.advice,
            },
            "alerts": [_finite(alert.to_json()) for alert in self.alerts],
            "figures": _row_json(self.figures),
            "steps": [_row_json(row) for row in self.steps],
            "samples": [_sample_json(sample) for sample in self.samples],
            "broken": {"count": self.num_broken, "first": [_broken_json(broken) for broken in self.broken]},
            "notes": list(self.notes),
        }  # fmt: skip


def row_of(points: Sequence[Point], unit: Unit, rewards_are_accuracy: bool) -> StepRow:
    """The points together: rollouts counted together, the run's own figures as means, extremes as extremes."""
    together = StepFigures()
    for point in points:
        together.merge(point.figures)
    metrics = together.metrics(unit, rewards_are_accuracy=rewards_are_accuracy)
    own: dict[str, list[float]] = {}
    for point in points:
        for key, value in (point.own or {}).items():
            own.setdefault(key, []).append(value)
    pick: dict[str, Callable[[list[float]], float]] = {"completions/max_length": max, "completions/min_length": min}
    metrics |= {
        key: pick[key](values) if key in pick else math.fsum(values) / len(values) for key, values in own.items()
    }
    steps = [step for point in points for step in point[:2] if step is not None]
    return StepRow(
        step=min(steps, default=None), last_step=max(steps, default=None), num_rollouts=together.num, metrics=metrics
    )


def to_json(diagnoses: Sequence[Diagnosis]) -> str:
    """One JSON document, in ASCII, without NaN."""
    document = {
        "format_version": FORMAT_VERSION,
        "healthy": all(diagnosis.healthy for diagnosis in diagnoses),
        "runs": [diagnosis.to_json() for diagnosis in diagnoses],
    }
    return json.dumps(document, indent=1, allow_nan=False)


def _row_json(row: StepRow) -> dict[str, Any]:
    return {"step": row.step, "last_step": row.last_step, "num_rollouts": row.num_rollouts, **_finite(row.metrics)}


def _sample_json(sample: Sample) -> dict[str, Any]:
    record = asdict(sample)
    place = record.pop("place")
    return {"file": sample.place.source, sample.place.unit: place[2]} | record


def _broken_json(broken: Broken) -> dict[str, Any]:
    return {"file": broken.place.source, broken.place.unit: broken.place.number, "why": broken.why}


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
