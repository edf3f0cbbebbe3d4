"""Where in the sequence the drift began: figures by step and by position in the completion, as heat maps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import fmean
from typing import Any

from stableopd.report.charts import Chart, step_axis
from stableopd.runfolder import RunRecord

MAX_RUNS = 6
"""Runs with a heat map of their own; of more the first."""
MAX_COLUMNS = 200
"""Columns of a heat map; of a longer run each is the mean of some steps."""
MAX_BANDS = 24
"""Bands of positions drawn: enough for 64 million tokens."""
START_STEPS = 5
"""Columns at the start and at the end that a sentence compares."""
BAND_HEIGHT, MIN_HEIGHT, TITLE_HEIGHT, EDGES = 17, 64, 26, 48
"""Pixels: of a band, of a map at least, of the words above each map, of the margins."""
NOTABLE = 0.02
"""A band's gain in the update below this is not worth a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One figure by position."""

    stem: str
    title: str
    share: bool


MEASURES = (
    Measure(stem="update_share", title="Share of the update", share=True),
    Measure(stem="advantage", title="Mean advantage, nats per token", share=False),
    Measure(stem="token_fraction", title="Share of tokens", share=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """One measure of one run: a row per band of positions, a column per stretch of steps."""

    measure: Measure
    bounds: tuple[int, ...]
    steps: tuple[float, ...]
    """Middle of each stretch."""
    values: tuple[tuple[float | None, ...], ...]
    """By band, then by stretch; None where nothing was measured."""


def position_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """A figure per run, its maps one below the other; the colours mean the same in all of them."""
    shown = runs[:MAX_RUNS]
    bounds = tuple(sorted({bound for run in shown for bound in bounds_of(run)})[:MAX_BANDS])
    grids = {number: found for number, run in enumerate(shown) if (found := _grids(run, bounds))}
    scales = {measure.stem: _scale(measure, [g for found in grids.values() for g in found]) for measure in MEASURES}
    return [_chart(number, runs, found, scales) for number, found in grids.items()]


def bounds_of(run: RunRecord) -> set[int]:
    """First positions of the bands that the run logged."""
    keys = {key for row in run.metrics for key in row if key.startswith("health/")}
    stems = "|".join(measure.stem for measure in MEASURES)
    return {int(match[1]) for key in keys if (match := re.fullmatch(rf"health/(?:{stems})_from_(\d{{1,9}})", key))}


def _grids(run: RunRecord, bounds: tuple[int, ...]) -> list[Grid]:
    found = [_grid(run, measure, bounds) for measure in MEASURES]
    return [grid for grid in found if grid.steps]


def _grid(run: RunRecord, measure: Measure, bounds: tuple[int, ...]) -> Grid:
    by_band = [dict(run.values(f"health/{measure.stem}_from_{bound}")) for bound in bounds]
    steps = sorted({step for band in by_band for step in band})
    width = max(1, -(-len(steps) // MAX_COLUMNS))
    stretches = [steps[start : start + width] for start in range(0, len(steps), width)]
    return Grid(
        measure=measure,
        bounds=bounds,
        steps=tuple(fmean(stretch) for stretch in stretches),
        values=tuple(tuple(_mean(band, stretch, measure) for stretch in stretches) for band in by_band),
    )


def _mean(band: dict[int, float], stretch: Sequence[int], measure: Measure) -> float | None:
    """Over the steps that measured it; a share that was left out because no rollout got so far is 0 there."""
    values = [band[step] for step in stretch if step in band]
    if measure.share:
        return sum(values) / len(stretch)
    return fmean(values) if values else None


def _scale(measure: Measure, grids: Sequence[Grid]) -> tuple[float, float]:
    """Ends of the colours, shared by all runs; a few wild values do not bleach the rest."""
    values = sorted(
        value
        for grid in grids
        if grid.measure == measure
        for band in grid.values
        for value in band
        if value is not None
    )
    if not values:
        return (0.0, 1.0)
    low, high = values[int(0.02 * (len(values) - 1))], values[int(0.98 * (len(values) - 1))]
    low = 0.0 if measure.share else low
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


# ------------------------------------------------------------------------------------ the figure


def _chart(
    number: int, runs: Sequence[RunRecord], grids: Sequence[Grid], scales: dict[str, tuple[float, float]]
) -> Chart:
    map_height = max(MIN_HEIGHT, BAND_HEIGHT * len(grids[0].bounds))
    height = len(grids) * (map_height + TITLE_HEIGHT) + EDGES
    inner = height - EDGES
    layout: dict[str, Any] = {"xaxis": step_axis(runs), "annotations": [], "hovermode": "closest"}
    traces, top = [], 1.0
    for place, grid in enumerate(grids, start=1):
        bottom = max(0.0, top - (map_height + TITLE_HEIGHT) / inner)
        ceiling = top - TITLE_HEIGHT / inner
        layout["yaxis" if place == 1 else f"yaxis{place}"] = {
            "domain": [bottom, ceiling],
            "title": {"text": ""},
            "type": "category",
            "fixedrange": True,
        }
        layout["annotations"].append(_words(grid.measure.title, ceiling))
        traces.append(_trace(grid, number, "y" if place == 1 else f"y{place}", scales, (bottom, ceiling)))
        top = bottom
    layout["xaxis"] |= {"anchor": "y" if len(grids) == 1 else f"y{len(grids)}", "domain": [0, 1]}
    return Chart(
        id=f"positions-{number}",
        title=f"{runs[number].name}: step by position in the completion",
        caption=gain_in_words(grids),
        curves=(),
        figure={"data": traces, "layout": layout, "marks": _own_mark(number, runs[number])},
        height=height,
        run=number,
    )


def _trace(
    grid: Grid, run: int, axis: str, scales: dict[str, tuple[float, float]], domain: tuple[float, float]
) -> dict[str, Any]:
    low, high = scales[grid.measure.stem]
    value = "%{z:.1%}" if grid.measure.share else "%{z:.3f} nats"
    return {
        "type": "heatmap",
        "x": [round(step, 1) for step in grid.steps],
        "y": bands(grid.bounds),
        "z": [[None if value is None else float(f"{value:.4g}") for value in band] for band in grid.values],
        "yaxis": axis,
        "zmin": low,
        "zmax": high,
        "colorscale": "Viridis",
        "hoverongaps": False,
        "colorbar": {
            "y": sum(domain) / 2,
            "len": domain[1] - domain[0],
            "thickness": 9,
            "outlinewidth": 0,
            "nticks": 4,
            **({"tickformat": ".0%"} if grid.measure.share else {}),
        },
        "meta": run,
        "hovertemplate": f"step %{{x}}, tokens %{{y}}: {value}<extra></extra>",
    }


def bands(bounds: Sequence[int]) -> list[str]:
    """`0–15`, `16–31`, ..., `64+`: which tokens each band holds, counted from 0."""
    return [f"{low}–{high - 1}" for low, high in pairwise(bounds)] + [f"{low}+" for low in bounds[-1:]]


def _own_mark(number: int, run: RunRecord) -> list[dict[str, Any]]:
    if run.verdict.step is None or run.verdict.status not in ("warning", "collapsed"):
        return []
    return [{"run": number, "step": run.verdict.step, "text": "", "above": True}]


def _words(text: str, y: float) -> dict[str, Any]:
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": y, "xanchor": "left", "yanchor": "bottom"}
    return place | {"align": "left", "text": text, "showarrow": False}


def gain_in_words(grids: Sequence[Grid]) -> str:
    """Which band gained most in the update between the start of the run and its end."""
    grid = next((grid for grid in grids if grid.measure.stem == "update_share"), None)
    if grid is None or len(grid.steps) < 2 * START_STEPS:
        return "Bright bands that widen with the steps are where the update goes."
    ends = [(_level(band[:START_STEPS]), _level(band[-START_STEPS:])) for band in grid.values]
    gained, place = max((last - first, place) for place, (first, last) in enumerate(ends))
    if gained < NOTABLE:
        return "The update lies where it lay at the start: no band of positions gained 2 points or more."
    first, last = ends[place]
    return (
        f"Tokens {bands(grid.bounds)[place]} gained most: {first:.0%} of the update at the start (to step "
        f"{grid.steps[START_STEPS - 1]:.0f}), {last:.0%} at the end (from step {grid.steps[-START_STEPS]:.0f})."
    )


def _level(values: Sequence[float | None]) -> float:
    """Mean of a share; where nothing got so far it is 0."""
    return fmean(value if value is not None and isfinite(value) else 0.0 for value in values)
