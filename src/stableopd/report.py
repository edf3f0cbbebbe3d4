"""Run folders side by side in one self-contained HTML file. Reads files, never the trainer; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stableopd import __version__
from stableopd.recorder import write_atomically
from stableopd.report_charts import Chart, Section, first_screen, sections
from stableopd.report_samples import ShownSample, printable, shown_samples
from stableopd.report_text import cards, differences, flatten, headline, show, what_helped, why
from stableopd.runfolder import RunRecord, read_runs
from stableopd.types import Alert

MAX_ALERTS = 100
"""Alerts listed per run."""

METHOD_COLOURS = {"opd": 0, "stableopd": 1, "sft": 2, "grpo": 3}
"""Place in the palette of each method's first run; further runs take what is free."""
PALETTE = (
    ("#d1495b", "#ff7a85"),  # light theme, dark theme: Paul Tol's and Okabe-Ito's hues, tuned for contrast
    ("#0072b2", "#56b4e9"),
    ("#b07900", "#f0c24b"),
    ("#8a4f9e", "#d49ae6"),
    ("#00806a", "#35d0b0"),
    ("#5b6470", "#aeb8c4"),
    ("#a3461c", "#ff9f6b"),
    ("#3f51b5", "#9fa8ff"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDetails:
    """What the report tells of one run beyond its curves."""

    number: int
    name: str
    path: str
    alerts: tuple[Alert, ...]
    num_alerts: int
    samples: list[ShownSample]
    config_yaml: str
    environment: list[tuple[str, str]]


def write_report(run_paths: Sequence[str | Path], output: str | Path) -> Path:
    """The path of one HTML file that compares the runs and needs nothing else, not even a network.

    Written whole or not at all: a report that was there before stays until the new one is complete.
    Raises: RunFolderError when a path is no run folder or a file in it is broken; ValueError without runs.
    """
    if not run_paths:
        raise ValueError("a report needs at least one run folder")
    output = Path(output)
    html = render_report(read_runs(run_paths))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, html)
    return output


def render_report(runs: Sequence[RunRecord]) -> str:
    """The HTML of the report."""
    top, below = first_screen(runs), sections(runs)
    page = _environment().get_template("report.html.j2")
    html = page.render(
        headline=headline(runs),
        why=why(runs),
        what_helped=what_helped(runs),
        cards=cards(runs),
        first_screen=top,
        sections=below,
        differences=differences(runs),
        runs=[_details(number, run) for number, run in enumerate(runs)],
        colours=colours(runs),
        charts=_figures(top, below),
        plotly=Markup(get_plotlyjs()),
        version=__version__,
    )
    return printable(html)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("stableopd"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _figures(top: Sequence[Chart], below: Sequence[Section]) -> dict[str, Any]:
    charts = [*top, *(chart for section in below for chart in section.charts)]
    return {chart.id: chart.figure for chart in charts}


def _details(number: int, run: RunRecord) -> RunDetails:
    return RunDetails(
        number=number,
        name=run.name,
        path=str(run.path),
        alerts=run.alerts[:MAX_ALERTS],
        num_alerts=len(run.alerts),
        samples=shown_samples(run),
        config_yaml=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        environment=[(key, show(value)) for key, value in flatten(run.environment).items()],
    )


def colours(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """One colour per run for the light and one for the dark theme; the usual methods get the usual ones."""
    chosen: dict[int, int] = {}
    for number, run in enumerate(runs):
        place = METHOD_COLOURS.get(str(run.config.get("method")))
        if place is not None and place not in chosen.values():
            chosen[number] = place
    free = (place for place in count() if place not in set(chosen.values()))
    places = [chosen[number] if number in chosen else next(free) for number in range(len(runs))]
    return [PALETTE[place] if place < len(PALETTE) else _further_colour(place) for place in places]


def _further_colour(place: int) -> tuple[str, str]:
    hue = place * 137.508 % 360
    return f"hsl({hue:.0f} 65% 38%)", f"hsl({hue:.0f} 75% 70%)"
