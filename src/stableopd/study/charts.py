"""The charts of a study, as data for the script that draws those of the run report, too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from stableopd.bootstrap import Estimate
from stableopd.report.charts import PALETTE, Chart, Curve, further_colour
from stableopd.study.cells import reference_arm
from stableopd.study.outcome import Outcome
from stableopd.study.running import StudyRun
from stableopd.study.table import Row, score

BAND = 0.8
"""Share of the runs that lie within the band around a mean curve."""
_ROW_HEIGHT, _LINE_HEIGHT, _CHROME = 26, 15, 70
"""Pixels of a row of a forest plot, of each further line of its label, and of all around the rows."""
_LABEL_WIDTH = 36
"""Characters in a line of a label."""

PANELS: Sequence[tuple[str, str, str, str]] = (
    ("accuracy", "Held-out accuracy, sampled", "share", "Healthy: rises and stays up."),
    ("greedy_accuracy", "Held-out accuracy, greedy", "share", "Loops show here first and deepest."),
    ("greedy_truncation", "Greedy held-out answers cut off", "share", "Healthy: near 0%; a climb is the collapse."),
    ("truncation", "Training rollouts cut off", "share", "Healthy: near 0%."),
    ("length", "Mean length of training rollouts", "tokens", "Healthy: level."),
    ("repeated", "Repeated tokens in training rollouts", "share", "Healthy: low and level."),
    ("stop_probe", "Stop probe", "share", "How surely the student ends golden solutions; falls before lengths grow."),
)


def arm_colours(arms: Sequence[str]) -> list[tuple[str, str]]:
    """One colour per arm, for the light and the dark theme."""
    usual = {"opd": 0, "stableopd": 1, "sft": 2, "grpo": 3}
    taken = {arm: usual[arm] for arm in arms if arm in usual}
    free = iter(place for place in range(len(arms) + len(usual)) if place not in taken.values())
    places = [taken.get(arm) if arm in taken else next(free) for arm in arms]
    return [PALETTE[place] if place < len(PALETTE) else further_colour(place) for place in places if place is not None]


def forests(run: StudyRun, rows: Sequence[Row]) -> list[Chart]:
    """Accuracy of every arm with its interval, one dot per run; and the differences from the arm compared with."""
    arms = run.arms
    numbers = {row.arm: number for number, row in enumerate(rows)}
    scores = {arm: [score(outcome) for outcome in outcomes] for arm, outcomes in arms.items()}
    dots = {arm: [found for found in of_arm if found is not None] for arm, of_arm in scores.items()}
    judged = [row for row in rows if row.accuracy is not None]
    if not judged:
        return []
    charts = [_forest("accuracy", "Accuracy", _ACCURACY, judged, lambda row: row.accuracy, dots, numbers)]
    compared = [row for row in rows if row.difference is not None]
    if compared:
        title = f"Difference from {reference_arm(run.study)}"
        charts.append(_forest("difference", title, _DIFFERENCE, compared, lambda row: row.difference, {}, numbers))
    return charts


_ACCURACY = "Bar: the mean of all runs with its interval. Small dots: single runs."
_DIFFERENCE = (
    "On the same pairs, seeds and prompts. An interval that does not touch 0 is a difference that other runs and other "
    "prompts would very likely show, too."
)


def _forest(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Row],
    pick: Callable[[Row], Estimate | None],
    dots: Mapping[str, Sequence[float]],
    numbers: Mapping[str, int],
) -> Chart:
    labels = [escape(row.arm) for row in rows]
    traces: list[dict[str, Any]] = []
    extent: list[float] = [0.0]
    for place, row in enumerate(rows):
        number = numbers[row.arm]
        traces.append({
            "type": "scatter", "mode": "markers", "x": [round(value, 4) for value in dots.get(row.arm, ())],
            "y": [labels[place]] * len(dots.get(row.arm, ())), "meta": number, "marker": {"size": 5, "opacity": 0.45},
            "hovertemplate": "%{x:.3f}<extra>one run</extra>",
        })  # fmt: skip
        estimate = pick(row)
        if estimate is None:
            continue
        low = estimate.mean if estimate.low is None else estimate.low
        high = estimate.mean if estimate.high is None else estimate.high
        extent += [low, high, *dots.get(row.arm, ())]
        traces.append({
            "type": "scatter", "mode": "markers", "x": [estimate.mean], "y": [labels[place]], "meta": number,
            "marker": {"size": 11, "symbol": "line-ns", "line": {"width": 2}},
            "error_x": {"type": "data", "symmetric": False, "array": [high - estimate.mean],
                        "arrayminus": [estimate.mean - low], "thickness": 3, "width": 0},
            "hovertemplate": "%{x:.3f}<extra>mean</extra>",
        })  # fmt: skip
    shown = [_label(row.arm) for row in rows]
    num_lines = max((len(lines) for lines in shown), default=1)
    widest = max((len(line) for lines in shown for line in lines), default=0)
    margin = 0.03 * (max(extent) - min(extent) or 1.0)
    layout = {
        "xaxis": {"title": {"text": ""}, "range": [min(extent) - margin, max(extent) + margin]},
        "yaxis": {
            "title": {"text": ""}, "type": "category", "categoryarray": labels[::-1], "tickmode": "array",
            "tickvals": labels, "ticktext": ["<br>".join(map(escape, lines)) for lines in shown],
        },
        "margin": {"l": 20 + 7 * widest},
        "hovermode": "closest",
    }  # fmt: skip
    figure = {"data": traces, "layout": layout, "marks": []}
    return Chart(
        id=f"forest-{name}", title=title, caption=caption, curves=(), figure=figure,
        height=_CHROME + (_ROW_HEIGHT + _LINE_HEIGHT * (num_lines - 1)) * len(rows),
    )  # fmt: skip


def _label(arm: str) -> list[str]:
    """The name of an arm in lines that fit, the method first; of what is too long for a line, its two ends."""
    lines: list[str] = []
    for part in arm.split(" "):
        half = _LABEL_WIDTH // 2 - 1
        text = part if len(part) <= _LABEL_WIDTH else f"{part[:half]}…{part[-half:]}"
        if lines and len(lines[-1]) + 1 + len(text) <= _LABEL_WIDTH:
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return lines


def curves(run: StudyRun) -> list[Chart]:
    """Mean curves of every arm, each within the band of most of its runs."""
    charts = []
    for key, title, unit, caption in PANELS:
        traces: list[dict[str, Any]] = []
        last = 0
        for number, (arm, outcomes) in enumerate(run.arms.items()):
            steps, table = _aligned(outcomes, key)
            if steps:
                last = max(last, steps[-1])
                traces += _band(steps, table, number) if len(table) > 1 else []
                traces.append(_mean_curve(arm, steps, table, number, unit))
        if traces:
            share = {"tickformat": ".0%", "range": [-0.02, 1.04]} if unit == "share" else {}
            layout = {
                "xaxis": {"title": {"text": "step"}, "range": [-0.01 * last, 1.01 * last]},
                "yaxis": {"title": {"text": "" if share else unit}, **share},
                "hovermode": "closest",
            }
            figure = {"data": traces, "layout": layout, "marks": []}
            charts.append(Chart(id=f"curve-{key}", title=title, caption=caption, curves=(_LEGEND,), figure=figure))
    return charts


_LEGEND = Curve("", f"mean; band: the middle {BAND:.0%} of the runs")


def _aligned(outcomes: Sequence[Outcome], key: str) -> tuple[list[int], list[list[float]]]:
    """Steps at which every run has a value, and the values [R, steps]."""
    found = [dict(one.curves[key]) for one in outcomes if one.curves.get(key)]
    if not found:
        return [], []
    shared = sorted(set.intersection(*(set(points) for points in found)))
    return shared, [[points[step] for step in shared] for points in found]


def _band(steps: Sequence[int], table: Sequence[Sequence[float]], number: int) -> list[dict[str, Any]]:
    edges = np.quantile(np.asarray(table), [(1 - BAND) / 2, (1 + BAND) / 2], axis=0).round(5).tolist()
    common = {"type": "scatter", "mode": "lines", "x": list(steps), "meta": number, "band": True, "hoverinfo": "skip"}
    return [{**common, "y": edges[0]}, {**common, "y": edges[1], "fill": "tonexty"}]


def _mean_curve(
    arm: str, steps: Sequence[int], table: Sequence[Sequence[float]], number: int, unit: str
) -> dict[str, Any]:
    means = [round(statistics.fmean(column), 5) for column in zip(*table, strict=True)]
    value = "%{y:.1%}" if unit == "share" else "%{y:.4~g}"
    return {
        "type": "scatter", "mode": "lines" if len(means) > 1 else "markers", "x": list(steps), "y": means,
        "meta": number, "name": escape(arm),
        "line": {"dash": "solid"}, "hovertemplate": value + f"<extra>{escape(arm)}</extra>",
    }  # fmt: skip


def heat_maps(run: StudyRun, rows: Sequence[Row]) -> list[Chart]:
    """For every method with a grid of two keys: accuracy, and the share of runs that had collapsed."""
    charts = []
    for method in run.study.methods:
        grid = run.study.grid_of(method)
        if len(grid) != 2:
            continue
        points = {cell.arm: cell.point for cell in run.cells if cell.method == method}
        found = {row.arm: row for row in rows if row.arm in points}
        if not found:
            continue
        accuracy = {arm: row.accuracy.mean for arm, row in found.items() if row.accuracy}
        collapsed = {arm: row.collapsed / row.num_runs for arm, row in found.items()}
        charts += [
            _heat_map(f"{method}-accuracy", f"{method}: accuracy", grid, points, accuracy, ".2f"),
            _heat_map(f"{method}-collapsed", f"{method}: runs that collapsed", grid, points, collapsed, ".0%"),
        ]
    return charts


def _heat_map(
    name: str,
    title: str,
    grid: Mapping[str, Sequence[Any]],
    points: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, float],
    form: str,
) -> Chart:
    (row_key, row_values), (column_key, column_values) = grid.items()
    by_point = {(repr(points[arm][row_key]), repr(points[arm][column_key])): value for arm, value in values.items()}
    table = [[by_point.get((repr(row), repr(column))) for column in column_values] for row in row_values]
    trace = {
        "type": "heatmap", "z": table, "x": [str(value) for value in column_values], "y": [str(v) for v in row_values],
        "zmin": 0, "zmax": 1, "colorscale": "Viridis", "meta": 0, "colorbar": {"thickness": 10},
        "text": [["" if value is None else format(value, form) for value in row] for row in table],
        "texttemplate": "%{text}", "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": escape(column_key)}, "type": "category", "range": [-0.5, len(column_values) - 0.5]},
        "yaxis": {"title": {"text": escape(row_key)}, "type": "category"},
        "hovermode": "closest",
    }
    figure = {"data": [trace], "layout": layout, "marks": []}
    return Chart(id=f"grid-{name}", title=title, caption="", curves=(), figure=figure)
