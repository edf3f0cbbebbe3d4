"""The `stableopd` command. Each subcommand reads its input, calls one function, and prints."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from stableopd.errors import StableOPDError

app = typer.Typer(
    name="stableopd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="On-policy distillation that does not collapse: train, watch and explain.\n\n"
    "Start with [bold]stableopd demo[/]: it trains a small world on this machine, in which plain OPD collapses "
    "and StableOPD does not.",
)

BAD_INPUT = 2
INTERRUPTED = 130


@app.command(
    epilog="Example: [bold]stableopd demo --out demo[/], then open demo/report.html. A quick look: "
    "[bold]stableopd demo --quick[/]"
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold another demo.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Another teacher, student and prompt order.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every part in about a minute; too short to promise a collapse.")
    ] = False,
    world: Annotated[
        str, typer.Option(help="t4 (part of the gold is terse) or a (all gold shows its working).")
    ] = "t4",
    teacher: Annotated[
        str, typer.Option(help="The teacher's re-check habit: standard, moderate or clean.")
    ] = "standard",
    terse: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of golden solutions that are answer-only.")
    ] = None,
    gold_pool: Annotated[
        int | None, typer.Option(min=1, help="Draw gold from so many solutions instead of one per prompt.")
    ] = None,
) -> None:
    """Watch plain OPD collapse and StableOPD hold, on small models trained here and now."""
    from stableopd.toy.demo import DemoSettings, run_demo

    settings = DemoSettings(
        out=out, seed=seed, quick=quick, world=world, teacher=teacher, terse_fraction=terse, gold_pool=gold_pool
    )
    try:
        run_demo(settings, Console())
    except KeyboardInterrupt:
        _interrupted(f"stopped; {out} is half made: remove it, or choose another folder with --out")


@app.command(
    epilog="Example: [bold]stableopd train run.yaml optimizer.learning_rate=2e-6 lambda_gold=0.5[/]. "
    "After a crash: the same command with [bold]--resume[/]"
)
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="YAML configuration; see recipes/ for examples.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over it, such as optimizer.learning_rate=1e-6."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
) -> None:
    """Train one student: SFT, OPD or StableOPD, or any sum of their terms."""
    from stableopd.config_files import load_config
    from stableopd.recorder import check_run_folder

    settings = load_config(config, overrides or [])
    check_run_folder(settings.run_dir, resume=resume)
    from stableopd.console import ConsoleReporter, quiet_libraries, spinner
    from stableopd.trainer import StableOPDTrainer

    quiet_libraries()
    console = Console(soft_wrap=True)

    with spinner(console, "loading student, teacher and data"):
        trainer = StableOPDTrainer(args=settings)
    if trainer.accelerator.is_main_process:
        trainer.callbacks.append(ConsoleReporter(console))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        _interrupted(
            "stopped; go on with: " + shlex.join(["stableopd", "train", str(config), *(overrides or []), "--resume"])
        )
    finally:
        for callback in trainer.callbacks:
            if isinstance(callback, ConsoleReporter):
                callback.close()
    if trainer.accelerator.is_main_process:
        console.print(f"done. Look at it: stableopd report {escape(str(settings.run_dir))}", highlight=False)


@app.command(epilog="Example: [bold]stableopd report runs/opd runs/stableopd -o compare.html[/]")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, laid over each other.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; default: report.html in the first run folder.")
    ] = None,
) -> None:
    """Make one self-contained HTML page of run folders: verdict, curves, rollouts, configuration."""
    from stableopd.report import write_report

    path = write_report(runs, output or runs[0] / "report.html")
    Console().print(f"wrote {escape(str(path))}", highlight=False)


@app.command(
    epilog="Example: [bold]stableopd watch runs/first[/]; for a script: [bold]stableopd watch runs/first --once[/]"
)
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a growing file of rollouts (JSON Lines).")],
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="Print one frame; exit with 0 if healthy, 1 if not, 2 if there is nothing to show."
        ),
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Follow a run in the terminal: verdict, curves, alerts and actions. Ctrl-C ends it; the run goes on."""
    from stableopd.watch import follow, show_once

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without block characters shows question marks
    console = Console(highlight=False)
    if once:
        sys.exit(show_once(run, console))
    follow(run, console, interval_s=interval)


def _version(wanted: bool) -> None:
    if wanted:
        from stableopd import __version__

        typer.echo(f"stableopd {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _stop_as_on_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors made for users become one message on stderr and exit status 2."""
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal or a scheduler's stop must not leave children behind
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), _stop_as_on_interrupt)
    try:
        app(prog_name="stableopd")
    except StableOPDError as error:
        _complain(str(error))
        sys.exit(BAD_INPUT)
    except OSError as error:  # a full disk, a folder that may not be written, a file in place of a folder
        _complain(str(error) or repr(error))
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        _interrupted("stopped")


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def _interrupted(message: str) -> Any:
    Console(stderr=True, soft_wrap=True).print(escape(message), highlight=False)
    sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
