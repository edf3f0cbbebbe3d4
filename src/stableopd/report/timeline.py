"""The timeline: alerts and actions above the curves that they are about, on one axis of steps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

from stableopd.health.monitor import SEVERITIES
from stableopd.report.alerts import CONTROLLER, Episode, episodes, in_words, shortened
from stableopd.report.charts import (
    SHOW_MARKERS_UP_TO,
    Chart,
    Curve,
    accuracy_key,
    main_evaluation,
    step_axis,
    thin,
    trouble_marks,
)
from stableopd.report.samples import printable
from stableopd.runfolder import RunRecord

MAX_POINTS = 500
"""Points drawn per curve of the timeline: it is about 1,300 pixels wide at most."""
MAX_BARS = 150
"""Alerts drawn per run; of more the gravest."""
MAX_LANES = 10
"""Rules with a lane of their own; further ones share the last."""
MAX_LABELLED = 8
"""Up to so many actions, of a few runs, have their names beside them; more are told by hovering."""
ROOMY, MOST = 4, 20
"""Runs whose bars a lane holds easily; a lane grows with each further one, up to the second figure."""
LINE_CHARS = 52
"""Width of a message at the pointer: narrow enough for a telephone."""

LANE_HEIGHT, RUN_HEIGHT, ROW_HEIGHT, TITLE_HEIGHT, EDGES = 38, 6, 96, 25, 48
"""Pixels: of a rule's lane, of each run in it beyond the first few, of a row of curves, of its title, of margins."""

# Height of the bar in its lane, and its opacity.
WEIGHT = {"info": (0.3, 0.4), "warning": (0.6, 0.55), "critical": (1.0, 0.95)}
STROKES = {"solid": "——", "dash": "- - -", "dot": "· · ·"}
ACTIONS, OTHERS = "actions taken", "other rules"
_RULES = ("loops", "repetition", "truncation", "length_growth", "length_over_expected", "stop_probe", "ending_probe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One strip of curves."""

    title: str
    curves: tuple[Curve, ...]
    share: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One alert to be drawn: which run and lane, from where to where, what the pointer says."""

    run: int
    lane: int
    episode: Episode


def timeline_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """One figure: a lane per rule, then length, truncation, loops, accuracy and coefficients, as far as they are known.

    None without alerts when nothing of the rollouts was logged either.
    """
    rows = [row for row in _rows(runs) if _used(row, runs)]
    stretches = [_gravest(episodes(run)) for run in runs]
    if not any(stretches) and all(row.title.startswith("Accuracy") for row in rows):
        return None
    lanes = _lanes(stretches)
    lane_height = LANE_HEIGHT + RUN_HEIGHT * max(0, min(len(runs), MOST) - ROOMY)
    height = len(lanes) * lane_height + len(rows) * (ROW_HEIGHT + TITLE_HEIGHT) + EDGES
    layout: dict[str, Any] = {"xaxis": step_axis(runs), "annotations": []}
    traces: list[dict[str, Any]] = []
    inner = height - EDGES
    top = 1.0
    if lanes:
        bottom = top - len(lanes) * lane_height / inner
        layout["yaxis"] = _lanes_axis(len(lanes), bottom, top)
        layout["annotations"] += [_words(in_words(lane), -place - 0.02, "y") for place, lane in enumerate(lanes)]
        traces += _bars(runs, stretches, lanes)
        top = bottom
    for number, row in enumerate(rows, start=2):
        bottom = top - (ROW_HEIGHT + TITLE_HEIGHT) / inner
        layout[f"yaxis{number}"] = _row_axis(row, max(bottom, 0.0), top - TITLE_HEIGHT / inner)
        layout["annotations"].append(_words(_title(row, runs), top - 0.9 * TITLE_HEIGHT / inner, "paper"))
        traces += _curves(row, f"y{number}", runs)
        top = bottom
    layout["xaxis"] |= {"anchor": f"y{len(rows) + 1}" if rows else "y", "domain": [0, 1]}
    return Chart(
        id="timeline",
        title="Alerts and actions over the curves",
        caption="Bars: alerts, from the first step beyond the threshold until the signal was back (read off the "
        "curves; where that cannot be told, until the alert was raised). Diamonds: what the software did. "
        "Point at a bar or a diamond for its message.",
        curves=(),
        figure={"data": traces, "layout": layout | {"hovermode": "closest"}, "marks": trouble_marks(runs)},
        height=height,
    )


def _rows(runs: Sequence[RunRecord]) -> list[Row]:
    name = main_evaluation(runs)
    held_out = (
        (Curve(accuracy_key(runs, name), "sampled"), Curve(accuracy_key(runs, name, greedy=True), "greedy", "dash"))
        if name
        else ()
    )
    return [
        Row(
            title="Length, tokens",
            curves=(
                Curve("completions/mean_length", "mean"),
                Curve("completions/length_p90", "90% quantile", "dash"),
            ),
        ),
        Row(title="Truncated share", curves=(Curve("completions/clipped_ratio", "truncated"),), share=True),
        Row(
            title="Share of tokens in loops",
            curves=(
                Curve("health/loop_token_fraction", "exact"),
                Curve("health/near_loop_token_fraction", "near", "dash"),
            ),
            share=True,
        ),
        Row(
            title="Accuracy",
            curves=(*held_out, Curve("completions/accuracy", "training rollouts", "dot")),
            share=True,
        ),
        Row(
            title="Probability of golden endings",
            curves=(Curve("health/ending_probe", "last four tokens"),),
            share=True,
        ),
        Row(title="Gold coefficient", curves=(Curve("controller/gold_coef", "gold", shape="hv"),)),
        Row(title="Reference coefficient", curves=(Curve("controller/reference_coef", "reference", shape="hv"),)),
    ]


def _used(row: Row, runs: Sequence[RunRecord]) -> list[Curve]:
    return [curve for curve in row.curves if any(run.values(curve.key) for run in runs)]


def _title(row: Row, runs: Sequence[RunRecord]) -> str:
    """The strip's subject, and which line is which where there are several."""
    used = _used(row, runs)
    key = ", ".join(f"{STROKES[curve.dash]} {curve.label}" for curve in used)
    return f"{row.title}: {key}" if len(used) > 1 else row.title


# ------------------------------------------------------------------------------------ alerts


def _gravest(found: list[Episode]) -> list[Episode]:
    """The episodes to draw, in their order: actions and critical alerts before the others."""
    ranked = sorted(found, key=lambda e: (not e.is_action, -SEVERITIES.index(e.alert.severity)))
    kept = {id(episode) for episode in ranked[:MAX_BARS]}
    return [episode for episode in found if id(episode) in kept]


def _lanes(stretches: Sequence[Sequence[Episode]]) -> list[str]:
    """A lane for what was done, then one a rule, the monitor's own in the order of how late they come."""
    everything = [episode for found in stretches for episode in found]
    rules = dict.fromkeys(episode.alert.rule for episode in everything if episode.alert.rule != CONTROLLER)
    own = [rule for rule in _RULES if rule in rules] + [rule for rule in rules if rule not in _RULES]
    lanes = own if len(own) <= MAX_LANES else [*own[: MAX_LANES - 1], OTHERS]
    return [*([ACTIONS] if any(episode.is_action for episode in everything) else []), *lanes]


def _bars(
    runs: Sequence[RunRecord], stretches: Sequence[Sequence[Episode]], lanes: Sequence[str]
) -> list[dict[str, Any]]:
    traces = []
    places = {lane: place for place, lane in enumerate(lanes)}
    num_actions = sum(episode.is_action for found in stretches for episode in found)
    named = num_actions <= MAX_LABELLED and len(runs) <= ROOMY
    for number, found in enumerate(stretches):
        bars = [
            Bar(run=number, lane=places.get(episode.alert.rule, len(lanes) - 1), episode=episode)
            for episode in found
            if episode.alert.rule != CONTROLLER
        ]
        for severity in SEVERITIES:
            if chosen := [bar for bar in bars if bar.episode.alert.severity == severity]:
                traces.append(_bar_trace(chosen, severity, runs))
        if actions := [episode for episode in found if episode.is_action]:
            traces.append(_action_trace(actions, number, runs, named=named))
    return traces


def _bar_trace(bars: Sequence[Bar], severity: str, runs: Sequence[RunRecord]) -> dict[str, Any]:
    share, opacity = WEIGHT[severity]
    last = max((run.last_step or 0 for run in runs), default=0)
    shortest = max(0.006 * last, 0.1)
    ends = [_end_of(bar, runs) for bar in bars]
    return {
        "type": "bar",
        "orientation": "h",
        "base": [bar.episode.start for bar in bars],
        "x": [max(end - bar.episode.start, shortest) for bar, end in zip(bars, ends, strict=True)],
        "y": [-bar.lane - _offset(bar.run, len(runs)) for bar in bars],
        "width": [share * 0.5 / len(runs) for _ in bars],
        "opacity": opacity,
        "meta": bars[0].run,
        "hoverinfo": "text",
        "hovertext": [hover_text(runs[bar.run].name, bar.episode) for bar in bars],
        "textposition": "none",
        "name": f"alerts-{severity}",
    }


def _end_of(bar: Bar, runs: Sequence[RunRecord]) -> int:
    episode = bar.episode
    if episode.end is not None:
        return episode.end
    return max(episode.alert.step, (runs[bar.run].last_step or 0) if episode.open else episode.alert.step)


def _offset(run: int, num_runs: int) -> float:
    """How far below the top of its lane a run's bar lies, in lanes: the words come first, the runs in turn below."""
    return 0.42 + 0.5 * (run + 0.5) / num_runs


def _action_trace(actions: Sequence[Episode], run: int, runs: Sequence[RunRecord], *, named: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text" if named else "markers",
        "x": [episode.alert.step for episode in actions],
        "y": [-_offset(run, len(runs)) for _ in actions],
        "text": ["\u00a0" + escape(printable(in_words(label)[:16])) if named else "" for label in _labels(actions)],
        "textposition": "middle right",
        "textfont": {"size": 11},
        "marker": {"symbol": "diamond", "size": 10},
        "meta": run,
        "hoverinfo": "text",
        "hovertext": [hover_text(runs[run].name, episode) for episode in actions],
        "name": "actions",
    }


def _labels(actions: Sequence[Episode]) -> list[str]:
    """The action of each, and nothing where an earlier one of the same step is written already."""
    steps: set[int] = set()
    labels = []
    for episode in actions:
        labels.append("" if episode.alert.step in steps else episode.alert.action)
        steps.add(episode.alert.step)
    return labels


def hover_text(run: str, episode: Episode) -> str:
    """What the pointer says at an alert: short lines, nothing in them that Plotly takes for markup."""
    alert = episode.alert
    head = f"{run} · {in_words(alert.rule)}, {alert.severity}, step {alert.step}"
    action = f"Action: {alert.action}" if episode.is_action else ""
    stretch = "" if episode.is_controller else f"Since step {episode.start}{episode.until}"
    lines = [
        line
        for part in (head, stretch, shortened(alert.message), action)
        for line in textwrap.wrap(printable(part), LINE_CHARS)
    ]
    first, *rest = (escape(line) for line in lines)
    return "<br>".join([f"<b>{first}</b>", *rest])


# ------------------------------------------------------------------------------------ curves


def _curves(row: Row, axis: str, runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    drawn = [(curve, number, run.series(curve.key)) for curve in row.curves for number, run in enumerate(runs)]
    return [
        _curve(curve, number, f"{runs[number].name} · {curve.label}", points, axis, share=row.share)
        for curve, number, points in drawn
        if any(isfinite(y) for _, y in points)
    ]


def _curve(
    curve: Curve, run: int, name: str, points: list[tuple[int, float]], axis: str, *, share: bool
) -> dict[str, Any]:
    points = thin(points, MAX_POINTS)
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(points) <= SHOW_MARKERS_UP_TO else "lines",
        "x": [step for step, _ in points],
        "y": [float(f"{y:.5g}") if isfinite(y) else None for _, y in points],
        "yaxis": axis,
        "name": escape(printable(name)),
        "line": {"dash": curve.dash, "shape": curve.shape},
        "meta": run,
        "hovertemplate": "step %{x}: " + ("%{y:.1%}" if share else "%{y:.4~g}"),
    }


def _lanes_axis(lanes: int, bottom: float, top: float) -> dict[str, Any]:
    return {
        "domain": [bottom, top],
        "range": [-lanes, 0],
        "showticklabels": False,
        "title": {"text": ""},
        "tickvals": [-place for place in range(1, lanes)],
        "fixedrange": True,
    }


def _row_axis(row: Row, bottom: float, top: float) -> dict[str, Any]:
    share = {"tickformat": ".0%"} if row.share else {}
    return {"domain": [bottom, top], "title": {"text": ""}, "nticks": 4, "rangemode": "tozero", **share}


def _words(text: str, y: float, yref: str) -> dict[str, Any]:
    place = {"xref": "paper", "yref": yref, "x": 0, "y": y, "xanchor": "left"}
    return (
        place
        | {"yanchor": "top" if yref == "y" else "bottom", "align": "left", "text": escape(printable(text))}
        | {"showarrow": False}
    )
