"""The `stableopd` command. Each subcommand reads its input, calls one function, and prints."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from stableopd.commands import evaluation
from stableopd.commands import study as study_command
from stableopd.commands.data import app as data_app
from stableopd.errors import ConfigError, InterruptedWorkError, StableOPDError

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

app.add_typer(data_app, name="data")

BAD_INPUT = 2
STOPPED = 3
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
        str, typer.Option(help="The teacher's re-check habit: standard, moderate, clean or restless.")
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
    from stableopd.distributed import leave
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
    leave()
    if trainer.state.stopped:
        if trainer.accelerator.is_main_process:
            _complain(
                f"the run was stopped by health.actions={settings.health.actions} at step {trainer.state.step}; a "
                f"checkpoint is saved. Why: the end of {settings.run_dir / 'alerts.jsonl'}. To go on all the same: "
                "--resume health.actions=warn"
            )
        sys.exit(STOPPED)
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
    epilog="Example: [bold]stableopd diagnose runs/first[/], [bold]stableopd diagnose out/completions "
    "--max-length 4096[/]"
)
def diagnose(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Rollouts of any trainer: run folders, TRL's completions, verl's and slime's dumps, JSON Lines, text. "
            "Each folder is one run; all files together are one.",
        ),
    ],
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length budget, in tokens (characters where token counts are unknown): tells what was truncated "
            "where the files do not say how a completion ended.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    format: Annotated[
        str | None, typer.Option(help="run, trl, verl, slime, jsonl or text; told from the content without it.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a broken line instead of skipping it.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Worst samples to show.")] = 3,
) -> None:
    """Say how healthy rollouts are: table by step, verdict, cause, worst samples.

    Exit status: 0 healthy, 1 not healthy, 2 bad input.
    """
    from stableopd.diagnose import diagnose_sources
    from stableopd.diagnose_view import exit_code, print_diagnosis, reading_bar
    from stableopd.diagnosis import to_json
    from stableopd.rollout_files import checked_format, find_sources

    sources = find_sources(paths, checked_format(format))
    with reading_bar(sum(file.size for source in sources for file in source.files)) as advance:
        found = diagnose_sources(sources, max_length=max_length, strict=strict, num_samples=samples, advance=advance)
    if as_json:
        typer.echo(to_json(found))
    else:
        console = Console()
        for diagnosis in found:
            print_diagnosis(console, diagnosis)
    raise typer.Exit(exit_code(found))


@app.command(
    epilog="Examples: [bold]stableopd doctor run.yaml[/], [bold]stableopd doctor run.yaml --quick "
    "rollout.max_completion_length=2048[/], [bold]stableopd doctor --student Qwen/Qwen2.5-1.5B --teacher "
    "Qwen/Qwen2.5-7B-Instruct --data data/opd.jsonl[/]"
)
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml]", help="The configuration that is about to be trained.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over it, as with train."),
    ] = None,
    student: Annotated[str | None, typer.Option(help="Student: a folder or a hub id.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher: a folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Prompts, with gold and answers where there are.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Load no weights: tokenizers, configurations and data alone.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that the student answers.")] = 16,
    hardware: Annotated[
        str, typer.Option(help="What the estimate is for, such as h100x4; auto: this machine.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the student's answers.")] = 0,
) -> None:
    """Say what is wrong with a student, a teacher and their data before a step is paid for, and what to do.

    A CONFIG.yaml, or --student and --teacher (plain OPD is then assumed).

    Exit status: 0 notes at most, 1 something is a problem or fatal, 2 bad input.
    """
    from stableopd.config_files import config_of, load_config
    from stableopd.console import quiet_libraries, spinner

    given = list(overrides or [])
    path = config
    if config is not None and "=" in config and not Path(config).exists():
        path, given = None, [config, *given]
    for key, value in (
        ("student.model_name_or_path", student),
        ("teacher.model_name_or_path", teacher),
        ("data.path", data),
    ):
        if value is not None:
            given.append(f"{key}={json.dumps(value)}")
    if path is None and student is None:
        raise ConfigError("there is nothing to look at: give a CONFIG.yaml, or --student and --teacher")
    settings = load_config(path, given) if path is not None else config_of(["method=opd", *given])

    from stableopd.doctor.examination import examine
    from stableopd.doctor.view import exit_code, print_examination, to_json

    quiet_libraries()
    progress = Console(stderr=True)
    with spinner(progress, "looking") if progress.is_terminal else nullcontext():
        found = examine(settings, quick=quick, num_prompts=prompts, hardware=hardware, seed=seed, assumed=path is None)
    if as_json:
        typer.echo(to_json(found))
    else:
        print_examination(Console(), found)
    raise typer.Exit(exit_code(found))


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


app.command(name="eval", epilog=evaluation.EPILOG)(evaluation.evaluate_command)
app.command(name="study", epilog=study_command.EPILOG)(study_command.study)


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


class _ToldAndStopped(SystemExit):
    """The end of an interrupted command that has said so."""


def main() -> None:
    """Entry point: errors made for users become one message on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode shows question marks, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal or a scheduler's stop must not leave children behind
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), _stop_as_on_interrupt)
    try:
        app(prog_name="stableopd")
    except InterruptedWorkError as stop:
        _interrupted(str(stop))
    except StableOPDError as error:
        _complain(str(error))
        sys.exit(BAD_INPUT)
    except OSError as error:  # a full disk, a folder that may not be written, a file in place of a folder
        _complain(_in_words(error))
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        _interrupted("stopped")
    except _ToldAndStopped:
        raise
    except SystemExit as ended:  # typer turns an interrupt outside the commands' own care into a silent exit
        if ended.code == INTERRUPTED:
            _interrupted("stopped")
        raise


def _in_words(error: OSError) -> str:
    """An error of the operating system without its number, and with what can be done."""
    if error.strerror is None:
        return str(error) or repr(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror.lower()}. Choose another place, or see to what is there and its permissions"


def _complain(message: str) -> None:
    message = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", message)  # names of files may hold terminal escapes
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def _interrupted(message: str) -> Any:
    Console(stderr=True, soft_wrap=True).print(escape(message), highlight=False)
    raise _ToldAndStopped(INTERRUPTED)


if __name__ == "__main__":
    main()
