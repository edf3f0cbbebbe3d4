"""The collapse in one picture: runs over each other, for a README or a slide. matplotlib is imported when used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from stableopd.report.charts import accuracy_key, colour_groups, colours, main_evaluation
from stableopd.report.text import headline
from stableopd.runfolder import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
SIZE = (10.4, 6.6)
ENTRIES_PER_ROW = 3
INK, MUTED, GRID = "#1b2028", "#59626e", "#e4e7ec"


def write_collapse_picture(runs: Sequence[RunRecord], output: str | Path) -> Path:
    """The path of a PNG with held-out accuracy, greedy truncation, rollout length and repeated tokens.

    Panels without data say so. Written whole or not at all.
    Raises: ValueError without runs.
    """
    if not runs:
        raise ValueError("a picture needs at least one run")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.tmp")
    _draw(runs).savefig(aside, format="png", dpi=DPI)
    os.replace(aside, output)
    return output


def _draw(runs: Sequence[RunRecord]) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10.5, "axes.edgecolor": MUTED, "text.parse_math": False}):
        figure = Figure(figsize=SIZE, facecolor="white")
        entries = _legend_entries(runs)
        title = fill(headline(runs), 88, max_lines=3, placeholder=" …")
        figure.text(0.02, 0.975, title, fontsize=14, fontweight="bold", color=INK, va="top", linespacing=1.3)
        top = 0.925 - 0.048 * title.count("\n")
        _add_legend(figure, entries, top)
        axes = figure.subplots(2, 2, sharex=True)
        figure.subplots_adjust(
            left=0.065,
            right=0.985,
            bottom=0.08,
            top=top - 0.055 - 0.04 * -(-len(entries) // ENTRIES_PER_ROW),
            hspace=0.3,
            wspace=0.14,
        )
        _fill_panels(axes.flat, runs)
    return figure


def _fill_panels(axes: Sequence[Axes], runs: Sequence[RunRecord]) -> None:
    name = main_evaluation(runs)
    accuracy, truncation, length, repeated = axes
    outcome = [(accuracy_key(runs, name), "-"), (accuracy_key(runs, name, greedy=True), "--")] if name else []
    _panel(accuracy, "Held-out accuracy (solid: sampled, dashed: greedy)", runs, outcome, share=True)
    cut_off = [(f"eval/{name}_greedy/truncation_rate", "--")] if name else []
    _panel(truncation, "Greedy held-out answers cut off at the limit", runs, cut_off, share=True)
    _panel(length, "Training rollouts: mean length, tokens", runs, [("completions/mean_length", "-")])
    _panel(repeated, "Training rollouts: repeated tokens", runs, [(_repeated_key(runs), "-")], share=True)
    for lower in (length, repeated):
        lower.set_xlabel("training step", color=MUTED)


def _repeated_key(runs: Sequence[RunRecord]) -> str:
    keys = ("health/repeated_token_fraction", "health/loop_token_fraction", "health/repetition_rate")
    return next((key for key in keys if any(run.values(key) for run in runs)), keys[0])


def _panel(
    axes: Axes, title: str, runs: Sequence[RunRecord], lines: Sequence[tuple[str, str]], *, share: bool = False
) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=7)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, length=3, labelbottom=True)
    for run, (colour, _) in zip(runs, colours(runs), strict=True):
        for key, style in lines:
            axes.plot(*_columns(run.series(key)), style, color=colour, linewidth=2, dash_capstyle="round")
        if run.verdict.status == "collapsed":
            axes.axvline(run.verdict.step or 0, color=colour, linewidth=1, linestyle=":", alpha=0.8)
    if share:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        axes.set_ylim(bottom=0)
    if not any(run.values(key) for run in runs for key, _ in lines):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _legend_entries(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Colour by label; runs that share a colour share a label."""
    groups = colour_groups(runs)
    labels = [f"{group} ({groups.count(group)} runs)" if groups.count(group) > 1 else group for group in groups]
    return {label: colour for label, (colour, _) in zip(labels, colours(runs), strict=True)}


def _add_legend(figure: Figure, entries: Mapping[str, str], top: float) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in entries.items()],
        loc="upper left",
        bbox_to_anchor=(0.012, top),
        ncols=min(len(entries), ENTRIES_PER_ROW),
        frameon=False,
        fontsize=11.5,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.8,
    )
