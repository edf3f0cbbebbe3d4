"""The report of a study: one self-contained HTML page, and the same table as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import stableopd
from stableopd.lines import write_atomically
from stableopd.report import page_environment
from stableopd.study.charts import arm_colours, curves, forests, heat_maps
from stableopd.study.outcome import Outcome
from stableopd.study.running import StudyRun
from stableopd.study.table import Row, rows_by_pair, rows_of, score
from stableopd.study.view import BY_BENCHMARK, by_benchmark, cells_of_row, columns, note, shown, warnings


def write_study(run: StudyRun) -> list[Path]:
    """Writes `study.html` and `table.md` into the study's folder; their paths. Nothing without a finished run."""
    if not run.outcomes:
        return []
    paths = [run.study.folder / "study.html", run.study.folder / "table.md"]
    for path, text in zip(paths, (render_study(run), markdown(run)), strict=True):
        write_atomically(path, text)
    return paths


def render_study(run: StudyRun) -> str:
    """The HTML of the report."""
    rows = rows_of(run)
    arms = [row.arm for row in rows]
    drawn = {"forests": forests(run, rows), "grids": heat_maps(run, rows), "curves": curves(run)}
    page = page_environment().get_template("study.html.j2")
    return page.render(
        headline=headline(run, rows),
        arms=arms,
        colours=arm_colours(arms),
        columns=columns(run),
        rows=_numbered(rows, arms),
        pairs={pair: _numbered(of_pair, arms) for pair, of_pair in rows_by_pair(run).items()},
        benchmarks=by_benchmark(rows),
        health=_health(run, arms),
        runs=_runs(run.outcomes, arms),
        failures=run.failures,
        note=note(run),
        warnings=warnings(run),
        settings=yaml.safe_dump(run.study.model_dump(mode="json", exclude_unset=True), sort_keys=False),
        charts={chart.id: chart.figure for charts in drawn.values() for chart in charts},
        plotly=Markup(get_plotlyjs()),
        version=stableopd.__version__,
        **drawn,
    )


def headline(run: StudyRun, rows: Sequence[Row]) -> str:
    """What came out, in one sentence."""
    judged = [row for row in rows if row.accuracy]
    if not judged:
        return f"{len(run.outcomes)} of {len(run.cells)} runs, without a measure of accuracy"
    highest = max(_mean(row) for row in judged)
    first = [row for row in judged if _mean(row) == highest]
    if len(first) == len(judged) > 1:
        text = f"all methods end at {highest}"
    elif len(first) > 1:
        text = f"{', '.join(row.arm for row in first)} end highest, at {highest}"
    else:
        num_runs = first[0].num_runs
        text = f"{first[0].arm} ends highest, at {shown(first[0].accuracy)} over {num_runs} run{'s'[: num_runs > 1]}"
    collapsed = [f"{row.arm} {row.collapsed} of {row.num_runs}" for row in rows if row.collapsed]
    text += f"; collapsed: {', '.join(collapsed)}" if collapsed else "; no run collapsed"
    text += _lost_greedily(run, rows)
    text = f"{run.study.part} alone: {text}" if run.study.part else text
    missing = len(run.cells) - len(run.outcomes)
    return text + (f" ({missing} of {len(run.cells)} runs are missing)" if missing else "")


def _lost_greedily(run: StudyRun, rows: Sequence[Row]) -> str:
    """Runs whose sampled accuracy held while most greedy answers ran into the limit: no collapse, and not healthy."""
    told = []
    for row in rows:
        held = [outcome for outcome in run.arms.get(row.arm, ()) if not outcome.figures.get("collapsed")]
        lost = sum(any(value > 0.5 for _, value in outcome.curves.get("greedy_truncation", ())) for outcome in held)
        told += [f"{row.arm} {lost} of {row.num_runs}"] if lost else []
    return f"; most greedy answers cut off for a while: {', '.join(told)}" if told else ""


def _mean(row: Row) -> str:
    """The accuracy as it is shown, by which methods that cannot be told apart are equal."""
    return "" if row.accuracy is None else f"{row.accuracy.mean:.3f}"


def markdown(run: StudyRun) -> str:
    """The tables as Markdown, for a document."""
    of_all = rows_of(run)
    parts = [f"# {_in_markdown(headline(run, of_all))}\n"]
    for title, rows in (("All pairs", of_all), *rows_by_pair(run).items()):
        names = columns(run)
        lines = [" | ".join(names), " | ".join("---" for _ in names)]
        lines += [" | ".join(_in_markdown(cell) for cell in cells_of_row(row)) for row in rows]
        parts.append(f"## {_in_markdown(title)}\n\n" + "".join(f"| {line} |\n" for line in lines))
    if benchmarks := by_benchmark(of_all):
        names, lines = benchmarks[0], [" | ".join(map(_in_markdown, row)) for row in benchmarks[1]]
        table = [" | ".join(map(_in_markdown, names)), " | ".join("---" for _ in names), *lines]
        parts.append(f"## {BY_BENCHMARK.capitalize()}\n\n" + "".join(f"| {line} |\n" for line in table))
    told = [f"{_in_markdown(one)}.\n" for one in [note(run), *warnings(run)]]
    return "\n".join([*parts, *told])


def _in_markdown(cell: str) -> str:
    """Names may hold anything that a YAML file does; a viewer must show it, not obey it."""
    return escape(cell, quote=False).replace("|", "\\|")


def _numbered(rows: Sequence[Row], arms: Sequence[str]) -> list[dict[str, Any]]:
    return [{"number": arms.index(row.arm), "cells": cells_of_row(row)} for row in rows]


def _health(run: StudyRun, arms: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "number": arms.index(arm), "cells": _health_cells(outcomes)} for arm, outcomes in run.arms.items()
    ]


def _health_cells(outcomes: Sequence[Outcome]) -> list[str]:
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    begun = sorted(int(o.figures["collapse_step"]) for o in outcomes if "collapse_step" in o.figures)

    def most(key: str) -> str:
        values = [outcome.figures[key] for outcome in outcomes if key in outcome.figures]
        return f"{statistics.fmean(values):.0%}" if values else ""

    def a_run(key: str) -> str:
        return f"{statistics.fmean(outcome.figures.get(key, 0.0) for outcome in outcomes):.1f}"

    return [
        ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()),
        ", ".join(map(str, begun)),
        most("worst_truncation"),
        most("worst_repeated"),
        a_run("critical_alerts"),
        a_run("actions"),
    ]


def _runs(outcomes: Sequence[Outcome], arms: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "number": arms.index(one.arm), "arm": one.arm, "pair": one.pair, "seed": one.seed,
            "score": "" if (found := score(one)) is None else f"{found:.3f}",
            "verdict": one.verdict, "headline": one.headline,
        }
        for one in outcomes
    ]  # fmt: skip
