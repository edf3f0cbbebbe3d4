"""An examination in the terminal and as JSON. What models and data say is shown, and none of it is obeyed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stableopd.console import printable
from stableopd.doctor.examination import Examination
from stableopd.doctor.findings import Finding

STYLES = {"fatal": "bold red", "problem": "bold yellow", "note": "cyan"}


def exit_code(examination: Examination) -> int:
    """0 where there are notes at most, 1 where something is a problem or fatal."""
    return int(not examination.healthy)


def to_json(examination: Examination) -> str:
    return json.dumps(_finite(examination.to_json()), ensure_ascii=False, allow_nan=False, indent=2)


def print_examination(console: Console, examination: Examination) -> None:
    """Table of findings, figures of behaviour and cost, and the verdict in one line."""
    for line in examination.looked_at:
        console.print(Text(printable(line), style="dim"), soft_wrap=True)
    if examination.findings:
        console.print()
        console.print(_table(examination.findings))
    for title, figures in (("behaviour", examination.figures), ("estimate", _figures_of(examination.estimate))):
        if figures:
            console.print(_figures(title, figures))
    for line in (*_assumed(examination.estimate), *examination.left_out):
        console.print(Text(printable(line), style="dim"), soft_wrap=True)
    text, style = verdict(examination)
    console.print()
    console.print(Text(text, style=style), soft_wrap=True)


def verdict(examination: Examination) -> tuple[str, str]:
    """One line that says whether to start, and its style."""
    fatal, problems = examination.count("fatal"), examination.count("problem")
    if fatal:
        more = f", and {_number(problems, 'problem')}" if problems else ""
        return f"Do not start: {_number(fatal, 'fatal finding')}{more}.", STYLES["fatal"]
    if problems:
        return f"Can start, but mend {_number(problems, 'problem')} first.", STYLES["problem"]
    return "Nothing stands in the way of this run.", "bold green"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column("danger", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("what was found", ratio=3, overflow="fold")
    table.add_column("what to do", ratio=2, overflow="fold")
    for finding in findings:
        what = Text(printable(finding.summary))
        if finding.evidence:
            what.append("\n" + printable(finding.evidence), style="dim")
        danger = Text(finding.danger, style=STYLES[finding.danger])
        table.add_row(danger, Text(finding.check), what, Text(printable(finding.remedy)))
    return table


def _figures(title: str, figures: Mapping[str, Any]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(title, overflow="fold")
    table.add_column("", justify="right", overflow="fold")
    for name, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        table.add_row(Text(printable(name)), Text(printable(shown)))
    return table


def _figures_of(estimate: Any) -> dict[str, Any]:
    """The plain fields of an estimate; what is not known is left out."""
    if not is_dataclass(estimate) or isinstance(estimate, type):
        return {}
    return {name: value for name, value in asdict(estimate).items() if isinstance(value, int | float | str)}


def _assumed(estimate: Any) -> list[str]:
    """The parts of the memory and what the estimate rests on, in dim lines below it."""
    if estimate is None:
        return []
    gib = {name: size / 2**30 for name, size in estimate.memory.parts().items()}
    parts = ", ".join(
        f"{name} {size:.2g}" for name, size in sorted(gib.items(), key=lambda one: -one[1]) if size > 1e-3
    )
    return [f"GiB: {parts}", *estimate.assumptions]


def _finite(value: Any) -> Any:
    """The same with null for figures that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
