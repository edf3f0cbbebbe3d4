"""`stableopd study`: methods x seeds (x a grid), one table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from stableopd.study.config import StudyConfig
    from stableopd.study.jobs import Ended, Job

EPILOG = (
    "Examples: [bold]stableopd study studies/toy-main.yaml --seeds 901[/], [bold]stableopd study study.yaml "
    "parallel=2[/]. After a crash or an interrupt: the same command again."
)


def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="What is compared; see docs/studies.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over it: parallel=2, base.max_steps=50."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds in place of the file's: 0,1,2.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods of the file: opd,stableopd.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Only these pairs.")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing: table and report of what there is.")
    ] = False,
    ask_again: Annotated[
        bool,
        typer.Option("--ask-again", help="Ask finished runs anew of which only `final` has changed; train none again."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The table as one JSON document on standard output.")] = False,
) -> None:
    """Run methods x seeds (x a grid of settings) and compare them: means, confidence intervals, paired differences.

    Every run is an ordinary `stableopd train`. Runs that are finished are not repeated, a failed one stops no other.

    Exit status: 0 all runs are there, 1 some failed or are missing, 2 bad input.
    """
    from stableopd.errors import InterruptedWorkError
    from stableopd.study.config import load_study
    from stableopd.study.report import write_study
    from stableopd.study.running import existing, run_study
    from stableopd.study.view import print_study, to_json

    given = tuple(overrides or [])
    if seeds is not None:
        given += (f"seeds={_seed_list(seeds)}",)
    settings = load_study(config, given).only(_names(methods), _names(pairs))
    console = Console(stderr=as_json)
    if report_only:
        found = existing(settings)
    else:
        try:
            with _Progress(console, settings) as progress:
                found = run_study(settings, progress.ended, progress.active, progress.total, ask_again=ask_again)
        except KeyboardInterrupt:
            raise InterruptedWorkError(
                f"stopped; finished runs are in {settings.folder}, and the same command goes on from there"
            ) from None
    paths = write_study(found)
    if as_json:
        typer.echo(to_json(found))
    else:
        print_study(console, found)
        if paths:
            console.print(f"wrote {escape(', '.join(map(str, paths)))}", highlight=False)
    raise typer.Exit(1 if found.failures or found.missing else 0)


def _seed_list(text: str) -> str:
    from stableopd.errors import ConfigError

    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--seeds is {text!r}; it must be numbers with commas between them, such as 0,1,2")
    return f"[{text}]"


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


class _Progress:
    """A bar over all jobs on a terminal; a line per job elsewhere."""

    def __init__(self, console: Console, study: StudyConfig) -> None:
        from stableopd.console import progress_bar

        self.console, self.study = console, study
        self._bar = progress_bar(console) if console.is_terminal else None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        if self._bar:
            self._task = self._bar.add_task("study", total=None)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def total(self, num_jobs: int) -> None:
        self.console.print(f"[bold]study[/]  {num_jobs} things to make  ->  {escape(str(self.study.folder))}")
        if self._bar:
            self._bar.update(self._task, total=num_jobs)

    def active(self, jobs: Sequence[Job]) -> None:
        if self._bar:
            self._bar.update(self._task, description=escape(", ".join(job.name for job in jobs)) or "study")

    def ended(self, ended: Ended) -> None:
        if self._bar and ended.fresh:
            self._bar.advance(self._task)
        if ended.status != "done":
            self.console.print(
                f"[bold red]{ended.status}[/] {escape(ended.job.name)}: {escape(ended.why.splitlines()[0])}"
            )
        elif ended.fresh:
            self.console.print(f"made {escape(ended.job.name)} in {ended.seconds:.0f} s", highlight=False)
