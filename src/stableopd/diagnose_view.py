"""A diagnosis in the terminal. All that a model wrote is shown as it is, and none of it is obeyed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stableopd.console import STYLES
from stableopd.diagnose import seen
from stableopd.diagnosis import Diagnosis, StepRow
from stableopd.rollout_figures import Sample
from stableopd.rollout_files import Advance
from stableopd.sparklines import sparkline

MAX_ROWS = 20
MAX_COLUMNS = 60
"""Steps of a sparkline."""
MAX_BROKEN = 10
STATUS_STYLES = {"healthy": "bold green", "warning": "bold yellow", "collapsed": "bold red", "unknown": "bold"}
ENDINGS = {
    "stop": "ended by itself",
    "length": "cut off at the length limit",
    "loop": "cut short while looping",
    "abort": "aborted",
    None: "ending unknown",
}

_SHARE: Callable[[float], str] = lambda share: f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"  # noqa: E731
_NUMBER: Callable[[float], str] = lambda number: f"{number:,.0f}" if abs(number) >= 100 else f"{number:.1f}"  # noqa: E731
_REWARD: Callable[[float], str] = lambda reward: f"{reward:+.3f}"  # noqa: E731

SIGNALS: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("length", "completions/mean_length", _NUMBER, False),
    ("p90", "completions/length_p90", _NUMBER, False),
    ("max", "completions/max_length", _NUMBER, False),
    ("trunc.", "completions/clipped_ratio", _SHARE, True),
    ("repet.", "health/repetition_rate", _SHARE, True),
    ("loops", "health/loop_token_fraction", _SHARE, True),
    ("near", "health/near_loop_token_fraction", _SHARE, True),
    ("acc.", "completions/accuracy", _SHARE, True),
    ("reward", "reward", _REWARD, False),
)
"""Heading, metric key, form, whether it is a share."""
DRAWN = {
    "length": "mean length",
    "trunc.": "truncated",
    "repet.": "repetitive",
    "loops": "in loops",
    "acc.": "accuracy",
    "held-out": "held-out accuracy",
}
"""What is drawn as a curve, with its full name."""


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Curves and table by step, the verdict with cause and advice, the worst samples, what is not known."""
    formats = ", ".join(f"{count} {name}" for name, count in diagnosis.formats.items())
    console.print(Text(printable(diagnosis.name), style="bold"), f"({formats}; {diagnosis.num_rollouts:,} rollouts)",
                  highlight=False)  # fmt: skip
    if len(diagnosis.points) > 1:
        console.print(_curves(diagnosis.rows(max(min(MAX_COLUMNS, console.width - 50), 10)), diagnosis.length_unit))
    console.print(_table(diagnosis))
    _print_verdict(console, diagnosis)
    for number, sample in enumerate(diagnosis.samples, start=1):
        console.print(_sample_text(number, sample), soft_wrap=True, highlight=False)
    _print_broken(console, diagnosis)
    for note in diagnosis.notes:
        console.print(Text.assemble(("note ", "dim"), (printable(note), "dim")), soft_wrap=True, highlight=False)


def printable(text: str) -> str:
    """The text on one line: line breaks as ↵, control characters as their pictures or U+FFFD.

    Terminal escapes, marks that turn the direction of writing, and lone surrogates do no harm any more.
    """
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", " ")
    text = re.sub(r"[\x00-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(r"[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", "\ufffd", text)


# ------------------------------------------------------------------------------------ figures


def _signals(rows: Sequence[StepRow]) -> list[tuple[str, str, Callable[[float], str], bool]]:
    """Those that some row has; held-out accuracy where the run has measured it."""
    keys = dict.fromkeys(key for row in rows for key in row.metrics)
    if all(row.metrics.get("reward") == row.metrics.get("completions/accuracy") for row in rows):
        keys.pop("reward", None)
    held_out = [key for key in keys if re.fullmatch(r"eval/.+/accuracy", key) and not key.endswith("_greedy/accuracy")]
    extra = [("held-out", held_out[0], _SHARE, True)] if held_out else []
    return [signal for signal in (*SIGNALS, *extra) if signal[1] in keys]


def _curves(rows: Sequence[StepRow], unit_of_length: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    for heading, key, form, is_share in _signals(rows):
        values = [row.metrics[key] for row in rows if key in row.metrics]
        if heading in DRAWN:
            top = 1.0 if is_share else max(max(values), 1e-9)  # from 0, so that noise looks like noise
            curve = sparkline([row.metrics.get(key, math.nan) for row in rows], len(rows), low=0.0, high=top)
            unit = f" ({unit_of_length})" if heading == "length" else ""
            grid.add_row(DRAWN[heading] + unit, curve, f"{form(values[0])} → {form(values[-1])}")
    return grid


def _table(diagnosis: Diagnosis) -> Table:
    rows = diagnosis.rows(MAX_ROWS)
    signals = _signals(rows)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("steps" if len(diagnosis.points) > len(rows) else "step", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading, *_ in signals:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [form(row.metrics[key]) if key in row.metrics else "–" for _, key, form, _ in signals]
        table.add_row(_steps(row), f"{row.num_rollouts:,}", *cells)
    return table


def _steps(row: StepRow) -> str:
    if row.step is None:
        return "–"
    return str(row.step) if row.step == row.last_step else f"{row.step}–{row.last_step}"


# ------------------------------------------------------------------------------------ words


def _print_verdict(console: Console, diagnosis: Diagnosis) -> None:
    console.print()
    style = STATUS_STYLES[diagnosis.status] if diagnosis.severity != "critical" else STYLES["critical"]
    console.print(Text(printable(diagnosis.headline), style=style), soft_wrap=True)
    for label, text in (("likely cause", diagnosis.cause), ("what to do", diagnosis.advice)):
        if text:
            console.print(Text.assemble((f"{label}: ", "bold"), printable(text)), soft_wrap=True)
    for reason in diagnosis.reasons:
        console.print(Text(printable(reason), style="dim"), soft_wrap=True)
    for alert in {alert.rule: alert for alert in diagnosis.alerts}.values():
        line = Text.assemble((alert.severity, STYLES[alert.severity]), f" {alert.rule}: {printable(seen(alert))}")
        console.print(line, soft_wrap=True)
    console.print()


def _sample_text(number: int, sample: Sample) -> Text:
    length = (
        f"{sample.num_tokens:,} tokens" if sample.num_tokens is not None else f"{sample.num_characters:,} characters"
    )
    facts = [
        printable(str(sample.place)),
        *([f"step {sample.step}"] if sample.step is not None else []),
        length,
        ENDINGS[sample.finish_reason],
        f"{_SHARE(sample.loop_fraction)} in loops",
        *(["repetitive"] if sample.repetitive else []),
    ]
    text = Text.assemble((f"worst {number}", "bold"), "  ", ", ".join(facts), "\n")
    if sample.prompt:
        text.append(f"  prompt  {printable(sample.prompt)}\n", style="dim")
    text.append("  ")
    text.append(printable(sample.before))
    if sample.loop:
        loop = sample.loop
        text.append("⟦", style="bold red")
        text.append(printable(loop.text), style="red")
        text.append(f"⟧ × {loop.num_repeats:.1f}", style="bold red")
        text.append(" " + printable(sample.after) if sample.after.strip() else ", to the end")
        text.append(f"\n  loop    starts at {loop.unit[:-1]} {loop.start:,}, period {loop.period:,}, "
                    f"{loop.num_repeats:.1f} repeats, ends at {loop.end:,}", style="dim")  # fmt: skip
    text.append("\n")
    return text


def _print_broken(console: Console, diagnosis: Diagnosis) -> None:
    for broken in diagnosis.broken[:MAX_BROKEN]:
        console.print(Text.assemble(("skipped ", "yellow"), printable(str(broken))), soft_wrap=True, highlight=False)
    if diagnosis.num_broken > MAX_BROKEN:
        console.print(Text(f"skipped {diagnosis.num_broken:,} in all", style="yellow"))


@contextmanager
def reading_bar(total: int) -> Iterator[Advance]:
    """A bar of bytes on stderr while files are read; nothing where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def exit_code(diagnoses: Sequence[Diagnosis]) -> int:
    """0 where all are healthy, 1 where one is not."""
    return int(not all(diagnosis.healthy for diagnosis in diagnoses))
