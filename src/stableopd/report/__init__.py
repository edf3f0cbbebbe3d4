"""Run folders side by side in one self-contained HTML file. Reads files, never the trainer; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import stableopd
from stableopd.errors import RunFolderError
from stableopd.recorder import write_atomically
from stableopd.report.alerts import AlertRow, alert_rows
from stableopd.report.charts import Chart, colours, first_screen, mechanism_charts, sections
from stableopd.report.loops import RunLoops, run_loops
from stableopd.report.positions import MAX_RUNS, position_charts
from stableopd.report.samples import ShownSample, printable, shown_samples
from stableopd.report.settings import differences, flatten, show
from stableopd.report.text import answers, cards, headline
from stableopd.report.timeline import timeline_chart
from stableopd.runfolder import RunRecord, read_runs


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDetails:
    """What the report tells of one run beyond its curves."""

    number: int
    name: str
    path: str
    alerts: list[AlertRow]
    num_alerts: int
    samples: list[ShownSample]
    config_yaml: str
    environment: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The page's part about the collapse itself; what no run has figures for is None or empty."""

    timeline: Chart | None
    mechanism: list[Chart]
    positions: list[Chart]
    loops: list[RunLoops]
    num_left_out: int
    """Runs beyond those that have a heat map."""

    @property
    def charts(self) -> list[Chart]:
        return [*([self.timeline] if self.timeline else []), *self.mechanism, *self.positions]


def write_report(run_paths: Sequence[str | Path], output: str | Path) -> Path:
    """The path of one HTML file that compares the runs and needs nothing else, not even a network.

    Written whole or not at all: a report that was there before stays until the new one is complete.
    Raises: RunFolderError when a path is no run folder or a file in it is broken; ValueError without runs.
    """
    if not run_paths:
        raise ValueError("a report needs at least one run folder")
    output = Path(output)
    if output.is_dir() or (output.exists() and output.suffix not in (".html", ".htm")):
        raise RunFolderError(f"{output} is not an HTML file and is left as it is; name the report with -o NAME.html")
    html = render_report(read_runs(run_paths))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, html)
    return output


def render_report(runs: Sequence[RunRecord]) -> str:
    """The HTML of the report."""
    top, below, health = first_screen(runs), sections(runs), _health(runs)
    page = page_environment().get_template("report.html.j2")
    return page.render(
        headline=headline(runs),
        answers=answers(runs),
        cards=cards(runs),
        first_screen=top,
        health=health,
        sections=below,
        differences=differences(runs),
        runs=[_details(number, run) for number, run in enumerate(runs)],
        colours=colours(runs),
        charts=_figures([*top, *health.charts, *(chart for section in below for chart in section.charts)]),
        plotly=Markup(get_plotlyjs()),
        version=stableopd.__version__,
    )


def page_environment() -> Environment:
    """The templates of pages, in which everything is escaped and shown in printable characters."""
    environment = Environment(
        loader=PackageLoader("stableopd"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _printable_text(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _figures(charts: Sequence[Chart]) -> dict[str, Any]:
    return {chart.id: chart.figure for chart in charts}


def _health(runs: Sequence[RunRecord]) -> Health:
    return Health(
        timeline=timeline_chart(runs),
        mechanism=mechanism_charts(runs),
        positions=position_charts(runs),
        loops=[found for number, run in enumerate(runs) if (found := run_loops(number, run))],
        num_left_out=max(0, len(runs) - MAX_RUNS),
    )


def _details(number: int, run: RunRecord) -> RunDetails:
    return RunDetails(
        number=number,
        name=run.name,
        path=str(run.path),
        alerts=alert_rows(run),
        num_alerts=len(run.alerts),
        samples=shown_samples(run),
        config_yaml=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        environment=[(key, show(value)) for key, value in flatten(run.environment).items()],
    )
