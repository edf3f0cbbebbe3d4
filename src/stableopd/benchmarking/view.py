"""A finished evaluation in the terminal, and several as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stableopd.benchmarking.results import EvalResult, Figure


def print_results(console: Console, results: Sequence[EvalResult]) -> None:
    """A table for each benchmark: figures with intervals, and what could not be judged."""
    for result in results:
        console.print(_table(result))
        console.print(f"[dim]{escape(_sampling(result))}[/]", highlight=False)
        for kind, what in (("timeout", "ran out of time"), ("error", "raised or crashed")):
            count = result.failures(kind)
            if count:
                console.print(
                    f"[yellow]the judge {what} on {count} answer{'s' if count > 1 else ''}: counted as wrong[/]"
                )
        if result.failure_message:
            console.print(f"[yellow]the first of them: {escape(printable(result.failure_message))}[/]", highlight=False)
    sampled = [result for result in results if result.settings.temperature]
    greedy = [result for result in results if not result.settings.temperature]
    for several, how in ((sampled, ""), (greedy, ", greedy")):
        if len(several) > 1:
            mean = sum(result.accuracy.value for result in several) / len(several)
            console.print(f"mean of {len(several)} benchmarks{how}: [bold]{mean:.1%}[/]", highlight=False)


def to_json(results: Sequence[EvalResult]) -> str:
    """One document: a list of results, each as it is stored."""
    return json.dumps([result.to_json() for result in results], ensure_ascii=False, allow_nan=False)


def printable(message: str) -> str:
    """On one line, and without what a terminal would take for a command."""
    return "".join(one if one.isprintable() else "\ufffd" for one in " ".join(message.split()))


def _table(result: EvalResult) -> Table:
    how = "" if result.settings.temperature else ", greedy"
    table = Table(title=f"{escape(result.benchmark)}, {len(result.prompts)} questions{how}", title_justify="left")
    for column in ("", "mean", "95% interval"):
        table.add_column(column, justify="left" if not column else "right")
    for name, figure in result.figures.items():
        form = "{:.1f}" if name == "length" else "{:.1%}"
        table.add_row(name.replace("_", " "), form.format(figure.value), _interval(figure, form))
    table.add_row("longest", str(result.max_length), "")
    return table


def _interval(figure: Figure, form: str) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{form.format(figure.low)} to {form.format(figure.high)}"


def _sampling(result: EvalResult) -> str:
    settings = result.settings
    how = "greedy" if not settings.temperature else f"T = {settings.temperature:g}, top-p {settings.top_p:g}"
    speed = f", {result.num_tokens:,} tokens"
    if result.generation_s:
        speed += f" in {result.generation_s:.0f} s"
    return (
        f"{settings.model}: {how}, at most {settings.max_completion_length} tokens, seed {settings.seed}, judge "
        f"{settings.judge}{speed}"
    )
