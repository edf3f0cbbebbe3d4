"""The charts of the report: what is drawn, and in one sentence what a healthy run looks like.

A chart is plain data: lists of points by run, turned into Plotly figures by the script in the page,
which also owns colours and theme. Solid, dashed and dotted always mean the same within one chart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from html import escape
from itertools import count
from math import isfinite
from typing import Any

from stableopd.report.settings import method
from stableopd.runfolder import RunRecord

MAX_POINTS = 1200
"""Points drawn per curve; a longer one keeps the lowest and highest point of every stretch."""
SHOW_MARKERS_UP_TO = 60


METHOD_COLOURS = {"opd": 0, "stableopd": 1, "sft": 2, "grpo": 3}
"""Place in the palette of each method's first run; further runs take what is free."""
MAX_OWN_COLOURS = 5
"""Up to so many runs each have a colour of their own."""
# Light theme, dark theme. The hues of Okabe and Ito, whose order colour-blind readers can tell apart.
PALETTE = (
    ("#d1495b", "#ff7a85"),
    ("#0072b2", "#56b4e9"),
    ("#b07900", "#f0c24b"),
    ("#8a4f9e", "#d49ae6"),
    ("#00806a", "#35d0b0"),
    ("#5b6470", "#aeb8c4"),
    ("#5f8700", "#b8dc50"),
    ("#3f51b5", "#9fa8ff"),
)


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric, drawn once per run."""

    key: str
    label: str
    dash: str = "solid"
    shape: str = "linear"
    """How points are joined; "hv" for what stays as it is until it is changed."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart to be: several metrics on one axis."""

    title: str
    caption: str
    curves: tuple[Curve, ...]
    unit: str = ""
    """Label of the y axis; "share" draws it as percent from 0 to 100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A panel with the runs' data in it."""

    id: str
    title: str
    caption: str
    curves: tuple[Curve, ...]
    """Those that hold data in at least one run."""
    figure: dict[str, Any]
    height: int | None = None
    """Pixels; None for the usual height."""
    run: int | None = None
    """The run that it is about where it is about one; hidden together with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    title: str
    charts: tuple[Chart, ...]


def colours(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """One colour per run for the light and one for the dark theme; the usual methods get the usual ones.

    Of many runs, those with the same method and coefficients (seeds, mostly) share one.
    """
    groups = colour_groups(runs)
    chosen: dict[str, int] = {}
    for run, group in zip(runs, groups, strict=True):
        place = METHOD_COLOURS.get(str(run.config.get("method")))
        if place is not None and place not in chosen.values():
            chosen.setdefault(group, place)
    free = (place for place in count() if place not in chosen.values())
    for group in groups:
        if group not in chosen:
            chosen[group] = next(free)
    places = [chosen[group] for group in groups]
    return [PALETTE[place] if place < len(PALETTE) else further_colour(place) for place in places]


def colour_groups(runs: Sequence[RunRecord]) -> list[str]:
    """For each run the name of those that it shares its colour with: its own, or what is done in all of them."""
    names = [run.name for run in runs]
    return names if len(runs) <= MAX_OWN_COLOURS else [method(run.config) for run in runs]


def further_colour(place: int) -> tuple[str, str]:
    """Hues a golden angle apart, so that neighbours differ."""
    hue = (0.47 + place * 0.381966) % 1.0
    shades = (hls_to_rgb(hue, lightness, 0.6) for lightness in (0.36, 0.7))
    light, dark = ("#" + "".join(f"{round(255 * channel):02x}" for channel in shade) for shade in shades)
    return light, dark


def main_evaluation(runs: Iterable[RunRecord]) -> str | None:
    """The held-out set to judge by: the one that most runs have; the first of those."""
    names = [name for run in runs for name in run.evaluations]
    return max(dict.fromkeys(names), key=names.count, default=None)


def accuracy_key(runs: Iterable[RunRecord], name: str, *, greedy: bool = False) -> str:
    """`eval/NAME/accuracy`, or the mean over samples where only that was logged."""
    prefix = f"eval/{name}{'_greedy' if greedy else ''}"
    keys = (f"{prefix}/accuracy", f"{prefix}/avg_at_k")
    runs = tuple(runs)
    return next((key for key in keys if any(run.values(key) for run in runs)), keys[0])


def first_screen(runs: Sequence[RunRecord]) -> list[Chart]:
    """The two charts that answer the question, one above the other; of training where nothing was held out."""
    name = main_evaluation(runs)
    outcome = _accuracy(runs, name) if name else LENGTH
    charts = [_chart(f"first-{i}", panel, runs) for i, panel in enumerate((outcome, _truncation(name)))]
    return [chart for chart in charts if chart]


def sections(runs: Sequence[RunRecord]) -> list[Section]:
    """All charts, by subject; a chart without data in any run is left out, and so is a section without charts."""
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    main = main_evaluation(runs)
    layout = {
        "Lengths, truncation and repetition": [LENGTH, _truncation(main), REPETITION],
        "Held-out evaluation": [panel for name in names for panel in (_accuracy(runs, name), _held_out_length(name))],
        "Loss terms": LOSSES,
        "Divergence and optimisation": OPTIMISATION,
        "Time": [TIME],
    }
    found = []
    for number, (title, panels) in enumerate(layout.items()):
        charts = [_chart(f"chart-{number}-{i}", panel, runs) for i, panel in enumerate(panels)]
        if kept := tuple(chart for chart in charts if chart):
            found.append(Section(title=title, charts=kept))
    return found


def mechanism_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """What repetition weighs in the update, and why it pays: the second term of the paper's decomposition."""
    charts = [_chart(f"mechanism-{i}", panel, runs) for i, panel in enumerate(MECHANISM)]
    return [chart for chart in charts if chart]


def _chart(chart_id: str, panel: Panel, runs: Sequence[RunRecord]) -> Chart | None:
    data = [(curve, number, run.series(curve.key)) for curve in panel.curves for number, run in enumerate(runs)]
    data = [(curve, number, points) for curve, number, points in data if any(isfinite(y) for _, y in points)]
    if not data:
        return None
    used = tuple(dict.fromkeys(curve for curve, _, _ in data))
    traces = [_trace(curve, number, runs[number].name, points, panel.unit) for curve, number, points in data]
    figure = {"data": traces, "layout": _layout(panel, runs), "marks": trouble_marks(runs)}
    return Chart(id=chart_id, title=panel.title, caption=panel.caption, curves=used, figure=figure)


def _trace(curve: Curve, number: int, run: str, points: list[tuple[int, float]], unit: str) -> dict[str, Any]:
    points = thin(points)
    value = "%{y:.1%}" if unit == "share" else "%{y:.4~g}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(points) <= SHOW_MARKERS_UP_TO else "lines",
        "x": [step for step, _ in points],
        "y": [y if isfinite(y) else None for _, y in points],
        "name": escape(f"{run} · {curve.label}"),
        "line": {"dash": curve.dash, "shape": curve.shape},
        "meta": number,
        "hovertemplate": value,
    }


def _layout(panel: Panel, runs: Sequence[RunRecord]) -> dict[str, Any]:
    share = {"tickformat": ".0%", "range": [-0.02, 1.04]} if panel.unit == "share" else {}
    return {"xaxis": step_axis(runs), "yaxis": {"title": {"text": "" if share else panel.unit}, **share}}


def step_axis(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The axis of steps, the same in every chart."""
    last = max((run.last_step or 0 for run in runs), default=0)
    whole_steps = {"dtick": 1} if last <= 5 else {}
    return {"title": {"text": "step"}, "range": [-0.01 * last, max(1, 1.01 * last)], **whole_steps}


def trouble_marks(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A vertical line where a run's trouble began."""
    return [
        {"run": number, "step": run.verdict.step, "text": f"{run.verdict.status}, step {run.verdict.step}"}
        for number, run in enumerate(runs)
        if run.verdict.step is not None and run.verdict.status in ("warning", "collapsed")
    ]


def thin(points: list[tuple[int, float]], limit: int = MAX_POINTS) -> list[tuple[int, float]]:
    """At most `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return points
    width = -(-2 * len(points) // limit)
    kept = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        finite = [point for point in stretch if isfinite(point[1])] or stretch[:1]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept.extend(sorted(ends, key=lambda p: p[0]))
    return kept


def _accuracy(runs: Sequence[RunRecord], name: str) -> Panel:
    return Panel(
        f"Accuracy on held-out prompts ({name})",
        "Healthy: both curves rise and stay up. Greedy answers fall first and deepest when a student begins to loop.",
        (
            Curve(accuracy_key(runs, name), "sampled"),
            Curve(accuracy_key(runs, name, greedy=True), "greedy", "dash"),
        ),
        "share",
    )


def _truncation(name: str | None) -> Panel:
    return Panel(
        "Answers cut off at the length limit",
        "Healthy: close to 0%. A sudden climb, in training and on held-out prompts together, is the collapse.",
        (
            Curve("completions/clipped_ratio", "training rollouts"),
            Curve(f"eval/{name}_greedy/truncation_rate", "held-out, greedy", "dash"),
            Curve(f"eval/{name}/truncation_rate", "held-out, sampled", "dot"),
        ),
        "share",
    )


def _held_out_length(name: str) -> Panel:
    return Panel(
        f"Length of held-out answers ({name})",
        "Healthy: about level. Held-out answers grow together with the training rollouts when a student collapses.",
        (
            Curve(f"eval/{name}/mean_length", "sampled, mean"),
            Curve(f"eval/{name}_greedy/mean_length", "greedy, mean", "dash"),
        ),
        "tokens",
    )


LENGTH = Panel(
    "Length of training rollouts",
    "Healthy: level, or slowly drifting. The 90% quantile climbs first; the mean follows it to the limit.",
    (
        Curve("completions/mean_length", "mean"),
        Curve("completions/length_p90", "90% quantile", "dash"),
    ),
    "tokens",
)
REPETITION = Panel(
    "Repetition in training rollouts",
    "Healthy: close to 0%. Repeated tokens spread first; a rollout is repetitive once its whole tail is a loop.",
    (
        Curve("health/repetition_rate", "repetitive rollouts"),
        Curve("health/repeated_token_fraction", "repeated tokens", "dash"),
        Curve("health/loop_token_fraction", "tokens in loops", "dot"),
    ),
    "share",
)
REPEATED_ADVANTAGE = Panel(
    "Advantage of repeated tokens",
    "Repeats are easy to predict, so the teacher rates them higher (dashed above solid) even in a healthy run: "
    "harmless while they are rare, the engine of the collapse once they are many.",
    (
        Curve("health/advantage_fresh", "other tokens"),
        Curve("health/advantage_repeated", "repeated tokens", "dash"),
    ),
    "nats per token",
)
LOOP_ADVANTAGE = Panel(
    "Advantage of tokens in loops",
    "The same for tokens in exact loops. Healthy runs hold few or none, so there the dashed curve has gaps or jumps.",
    (
        Curve("health/advantage_other", "other tokens"),
        Curve("health/advantage_loop", "tokens in loops", "dash"),
    ),
    "nats per token",
)
LOOP_WEIGHT = Panel(
    "Weight of loops in the update",
    "An update is a sum over the states in loops and over all others. Healthy: both curves near 0%. As the solid one "
    "grows, each update makes loops likelier, which makes it grow further. It may stay below the dashed one: a token "
    "in a loop is hardly faulted, so it weighs less.",
    (
        Curve("health/loop_update_share", "share of the update (of all |advantage|)"),
        Curve("health/loop_token_fraction", "share of tokens", "dash"),
    ),
    "share",
)
REPEATED_WEIGHT = Panel(
    "Weight of repeated tokens in the update",
    "The same for tokens that end a phrase seen before in the same rollout. Healthy: low and level. "
    "It grows earlier than the weight of loops, but honest quotation counts too.",
    (
        Curve("health/repeated_update_share", "share of the update (of all |advantage|)"),
        Curve("health/repeated_token_fraction", "share of tokens", "dash"),
    ),
    "share",
)
STOP_PROBE = Panel(
    "Stop probe",
    "How surely the student ends golden solutions: the end token after the whole, and their last four tokens. Healthy: "
    "level. A fall of the latter comes before lengths grow.",
    (
        Curve("health/ending_probe", "last four tokens"),
        Curve("health/stop_probe", "end token", "dash"),
    ),
    "share",
)
MECHANISM = [LOOP_WEIGHT, LOOP_ADVANTAGE, REPEATED_WEIGHT, REPEATED_ADVANTAGE, STOP_PROBE]
LOSSES = [
    Panel(
        "Total loss", "Healthy: falls or stays level; it can look fine in a collapse.", (Curve("loss", "all terms"),)
    ),
    Panel(
        "Distillation term",
        "Healthy: shrinks as student and teacher agree. A quick drop may only mean that both agree on loops.",
        (Curve("loss/distill", "distill"),),
    ),
    Panel(
        "Gold term",
        "Healthy: falls. Loss on complete golden solutions, which keep teaching the student how to stop.",
        (Curve("loss/gold", "gold"),),
    ),
    Panel(
        "Reference term",
        "Healthy: grows a little, then levels off. It holds the student near the model it started from.",
        (Curve("loss/reference", "reference"),),
    ),
    Panel("Reward term", "Healthy: drifts without jumps.", (Curve("loss/reward", "reward"),)),
]
OPTIMISATION = [
    Panel(
        "KL(student ‖ teacher)",
        "Healthy: falls smoothly. It falls in a collapse too, so it is no sign of health by itself.",
        (Curve("teacher/reverse_kl", "on rollouts"),),
        "nats per token",
    ),
    Panel(
        "KL(student ‖ reference)",
        "Healthy: levels off. Unbounded growth means that the student drifts far from where it started.",
        (Curve("reference/kl", "on rollouts"),),
        "nats per token",
    ),
    Panel(
        "Entropy of the student",
        "Healthy: declines slowly. A sharp fall goes with loops, where the next token is certain.",
        (Curve("entropy", "on rollouts"),),
        "nats per token",
    ),
    Panel(
        "Gradient norm",
        "Healthy: steady, with single spikes. A lasting rise marks the step where the rollouts change.",
        (Curve("grad_norm", "before clipping"),),
    ),
]
TIME = Panel(
    "Seconds per step, by phase",
    "Healthy: level. Long rollouts cost time: generation grows first when lengths inflate.",
    (
        Curve("time/rollout_s", "rollouts"),
        Curve("time/teacher_s", "teacher", "dash"),
        Curve("time/update_s", "update", "dot"),
    ),
    "seconds",
)
