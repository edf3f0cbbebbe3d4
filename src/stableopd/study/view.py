"""The table of a study in the terminal and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stableopd.bootstrap import Estimate
from stableopd.study.cells import reference_arm
from stableopd.study.running import StudyRun
from stableopd.study.table import Row, rows_by_pair, rows_of

COLUMNS: Sequence[tuple[str, Sequence[str]]] = (
    ("best", ("best_accuracy",)),
    ("late", ("late_accuracy",)),
    ("greedy", ("final_greedy_accuracy", "greedy_accuracy")),
    ("cut off", ("final_greedy_truncation", "greedy_truncation")),
)
"""Titles, and the figures to show under them: the first that there is."""

_WIDE = 120
"""Characters in a line from which on the table shows all columns."""


def print_study(console: Console, run: StudyRun) -> None:
    """One table over all pairs, one for each pair where there are several, and what failed."""
    if not run.outcomes:
        console.print("no run of this study has finished yet")
    tables = _tables(run)
    for title, rows in tables:
        console.print(_table(title, columns(run), rows, narrow=console.width < _WIDE))
    if benchmarks := by_benchmark(tables[0][1] if tables else []):
        names, lines = benchmarks
        table = Table(title=BY_BENCHMARK, title_justify="left", box=SIMPLE_HEAD)
        for name in names:
            table.add_column(escape(name), overflow="fold")
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    if run.outcomes:
        console.print(f"[dim]{escape(note(run))}[/]", highlight=False)
        for told in warnings(run):
            console.print(f"[bold yellow]note[/] {escape(told)}", highlight=False)
    for failure in run.failures:
        console.print(f"[bold red]{failure.status}[/] {escape(failure.job.name)}: {escape(failure.why)}")
    if run.missing and not run.failures:
        first = ", ".join(f"{cell.arm} of {cell.pair}, seed {cell.seed}" for cell in run.missing[:3])
        more = ", ..." if len(run.missing) > 3 else ""
        console.print(f"[bold red]missing[/] {len(run.missing)} of {len(run.cells)} runs: {escape(first)}{more}")


def note(run: StudyRun) -> str:
    """What the columns of the table mean."""
    share = f"{run.study.confidence:.0%}"
    asked = any(outcome.answers for outcome in run.outcomes)
    what = "answers to the final benchmark" if asked else "late accuracy of the runs"
    over = "pairs, seeds and prompts" if asked else "pairs and seeds"
    base, late = reference_arm(run.study), f"{run.study.late_fraction:.0%}"
    return (
        f"accuracy: {what}, with {share} bootstrap intervals over {over}; difference from {base} on the "
        f"same {over}; better: runs that beat their twin there; best, late: highest evaluation of "
        f"the run, mean of those in its last {late}; greedy, cut off: accuracy of greedy answers at the end (to the "
        "final benchmark, where it was answered greedily) and the share that ran into the limit; collapsed: held-out "
        "accuracy fell by more than 0.15 while more than half of the greedy answers were cut off (in brackets: it had "
        "not come back by the end)"
    )


def warnings(run: StudyRun) -> list[str]:
    """What a reader of the table must know: answers without a verdict, and prompts that are not the same for all."""
    told = []
    unjudged = {
        arm: sum(one.figures.get("judge_failures", 0.0) for one in outcomes) for arm, outcomes in run.arms.items()
    }
    if any(unjudged.values()):
        counts = ", ".join(f"{arm} {count:.0f}" for arm, count in unjudged.items() if count)
        told.append(f"the judge gave no verdict on some final answers, which count as wrong: {counts}")
    prompts = {tuple(sorted(outcome.benchmarks.items())) for outcome in run.outcomes}
    if len(prompts) > 1:
        told.append("not all runs answered the same final prompts: those that did not are compared run by run")
    return told


def to_json(run: StudyRun) -> str:
    """Tables and failures as one JSON document."""
    document: dict[str, Any] = {
        "compared_with": reference_arm(run.study),
        "all_pairs": [asdict(row) for row in rows_of(run)],
        "by_pair": {pair: [asdict(row) for row in rows] for pair, rows in rows_by_pair(run).items()},
        "warnings": warnings(run),
        "num_runs": len(run.cells),
        "num_finished": len(run.outcomes),
        "missing": [{"arm": cell.arm, "pair": cell.pair, "seed": cell.seed} for cell in run.missing],
        "failures": [{"name": f.job.name, "status": f.status, "why": f.why} for f in run.failures],
    }
    return json.dumps(document, indent=2, allow_nan=False)


def _tables(run: StudyRun) -> list[tuple[str, list[Row]]]:
    whole = f"{len(run.outcomes)} of {len(run.cells)} runs"
    return [(whole, rows_of(run)), *rows_by_pair(run).items()] if run.outcomes else []


BY_BENCHMARK = "accuracy, benchmark by benchmark"


def by_benchmark(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    """Names of the columns and rows of a table of each benchmark by itself; None where there are not several."""
    names = list(dict.fromkeys(name for row in rows for name in row.by_benchmark))
    if not names:
        return None
    return ["method", *names], [[row.arm, *(shown(row.by_benchmark.get(name)) for name in names)] for row in rows]


def columns(run: StudyRun) -> list[str]:
    """Names of the columns, as `cells_of_row` fills them."""
    method = run.study.reference_method
    against = f"against {method}" + ("" if reference_arm(run.study) == method else ", first point")
    return ["method", "runs", "accuracy", against, "better", *(label for label, _ in COLUMNS), "collapsed"]


def _table(title: str, names: Sequence[str], rows: Sequence[Row], *, narrow: bool) -> Table:
    """`narrow` puts intervals below their means, and leaves out what table.md tells as well."""
    padding = (0, 0) if narrow else (0, 1)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=padding, collapse_padding=True)
    left_out = {"best", "late"} if narrow else set()
    for name in names:
        if name not in left_out:
            table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for row in rows:
        cells = [cell for name, cell in zip(names, cells_of_row(row), strict=True) if name not in left_out]
        table.add_row(*(escape(_narrowed(cell) if narrow else cell) for cell in cells))
    return table


def _narrowed(cell: str) -> str:
    """`0.712 [0.690, 0.731]` as `0.712` above `[.690,.731]`."""
    mean, bracket, interval = cell.partition(" [")
    return mean if not bracket else f"{mean}\n[{re.sub(r'(?<![0-9])0[.]', '.', interval.replace(' ', ''))}"


def cells_of_row(row: Row) -> list[str]:
    """A row of the table as text."""
    compared = row.difference is not None
    return [
        row.arm,
        str(row.num_runs),
        shown(row.accuracy),
        shown(row.difference, signed=True) if compared else "",
        f"{row.better}/{row.paired}" if compared else "",
        *(next((f"{row.means[key]:.3f}" for key in keys if key in row.means), "") for _, keys in COLUMNS),
        f"{row.collapsed}" + (f" ({row.collapsed_at_end})" if row.collapsed or row.collapsed_at_end else ""),
    ]


def shown(estimate: Estimate | None, *, signed: bool = False) -> str:
    """`0.712 [0.690, 0.731]`."""
    if estimate is None:
        return ""
    mean, low, high = (
        None if value is None else format(round(value, 3) + 0.0, "+.3f" if signed else ".3f")  # + 0.0: no minus zero
        for value in (estimate.mean, estimate.low, estimate.high)
    )
    return f"{mean}" if low is None or high is None else f"{mean} [{low}, {high}]"
