"""Settings of runs as the report shows them: flat, in words, and compared with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableopd.runfolder import RunRecord

ALIASES = {"objective.gold.coef": "lambda_gold", "objective.reference.coef": "beta_kl"}
_PLAIN = "sampled_reverse_kl"
"""The divergence of plain OPD, which goes without saying."""
STEERING = ("stabilise", "rollback", "stop")
"""What `health.actions` says where a controller may change the run."""
NOT_COMPARED = ("output_dir", "logging", "run_name")
"""Settings that differ between any two runs and change nothing in them."""


def method(config: Mapping[str, Any]) -> str:
    """Method and coefficients: `stableopd · distill 1 (reverse_kl) · gold 1 · reference 0.3`.

    A controller that may change the run is named too: what it does is as good as a setting.
    """
    flat = flatten(config)
    terms = [str(flat.get("method", "method unknown"))]
    for term in ("distill", "gold", "reference", "reward"):
        key = f"objective.{term}.coef"
        coef = flat.get(key, flat.get(ALIASES.get(key, key)))
        divergence = flat.get(f"objective.{term}.divergence", _PLAIN)
        if coef is not None:
            terms.append(f"{term} {show(coef)}" + ("" if divergence == _PLAIN else f" ({divergence})"))
    if (actions := flat.get("health.actions")) in STEERING:
        terms.append(f"actions {actions}")
    return " · ".join(terms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A setting, and its value in each run."""

    key: str
    values: tuple[str, ...]


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Settings that are not the same in all runs, by dotted key."""
    flats = [flatten(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for flat in flats for key in flat):
        values = tuple(show(flat[key]) if key in flat else "(unset)" for flat in flats)
        if len(set(values)) > 1 and not key.startswith(NOT_COMPARED):
            rows.append(Difference(key=key, values=values))
    return rows


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted key."""
    return dict(_leaves(config, ""))


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def show(value: Any) -> str:
    """A setting as one would write it: 1 for 1.0, true for True, none for None."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
