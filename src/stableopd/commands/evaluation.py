"""`stableopd eval`: a model on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from stableopd.commands.options import options_named

if TYPE_CHECKING:
    from stableopd.benchmarking.results import EvalResult, EvalSettings

EPILOG = (
    "Examples: [bold]stableopd eval runs/first --benchmark math500[/], [bold]stableopd eval Qwen/Qwen2.5-Math-1.5B "
    "--benchmark aime24 --benchmark aime25[/], [bold]stableopd eval runs/first --benchmark heldout.jsonl --samples 8 "
    "--judge my.package:judge[/]"
)


def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, a run folder (its last checkpoint), or a hub id.")
    ],
    benchmark: Annotated[
        list[str],
        typer.Option(
            help="math500, aime24, aime25, amc, minerva, olympiadbench, gsm8k; a local copy of one as "
            "math500=copy.parquet; a .jsonl, .json or .parquet file, a folder of them, or a dataset on the hub. May be "
            "given several times."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Split of a benchmark that is a folder or a dataset on the hub of one's own.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000, help="Answers to each question; without it 32 for AIME and AMC, 1 for others."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the probability sampled from.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Number of tokens sampled from; 0: all.")] = 0,
    max_completion_length: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000_000, help="Longest answer, in tokens; without it what the model can read, 4096 at most."
        ),
    ] = None,
    stop_strings: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="An answer also ends when it holds this. May be given several times."),
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(
            min=0, max=2**31 - 1, metavar="N", help="An answer also ends with this token. May be given several times."
        ),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Also answer each question once greedily.")] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            help="math (Math-Verify), exact (the whole answer), or package.module:function of (completion, answer). "
            "Without it math for the benchmarks by name, exact for files."
        ),
    ] = None,
    judge_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer; later it is wrong.")] = 10.0,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="The first so many questions.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of the question.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column of the answer.")] = None,
    chat: Annotated[bool, typer.Option(help="Put questions into the chat template, where there is one.")] = True,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="For the chat template, as '{\"enable_thinking\": false}'.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Another set of answers.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; without it a GPU where there is one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at a time; changes speed alone.")] = 64,
    out: Annotated[Path, typer.Option(help="Where answers and results are kept and found again.")] = Path("evals"),
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the JSON document to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Ask a model the questions of benchmarks: accuracy, avg@k, pass@k, maj@k with intervals, length, truncation.

    Answers are kept: what was generated once is not generated again, and an evaluation that was stopped goes on.
    """
    from stableopd.benchmarking.loading import load_benchmarks
    from stableopd.benchmarking.registry import spec_of
    from stableopd.benchmarking.results import EvalSettings
    from stableopd.benchmarking.view import to_json
    from stableopd.errors import ConfigError, ModelError
    from stableopd.lines import write_atomically
    from stableopd.names import is_a_path

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is {dtype!r}; it must be auto, float32, bfloat16 or float16")
    _check_numbers(temperature, top_p, judge_timeout)
    if "" in (stop_strings or []):
        raise ConfigError("--stop-strings is empty, and every text holds that; leave it out")
    template_kwargs = _mapping(chat_template_kwargs)
    if is_a_path(model) and not Path(model).expanduser().is_dir():
        raise ModelError(f"there is no folder {model!r} to take the model from")
    if split is not None and all(spec_of(name) and not Path(name).exists() for name in benchmark):
        raise ConfigError(f"--split is {split!r}, but the registry's benchmarks have splits of their own; leave it out")
    _check_places(out, output)
    with options_named({"Rename the column": "Name the column with --prompt-column or --answer-column"}):
        found = load_benchmarks(  # all of them are looked at before the first answer
            benchmark,
            split=split,
            question_column=prompt_column,
            answer_column=answer_column,
            num_problems=num_prompts,
        )
    planned = [
        EvalSettings(
            model=model,
            benchmark=name,
            revision=revision,
            num_samples=samples or (loaded.num_samples if temperature else 1),  # greedy answers are all the same
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_completion_length=max_completion_length,
            seed=seed,
            judge=judge or ("math" if loaded.is_registered else "exact"),
            judge_timeout_s=judge_timeout,
            dtype=dtype,  # type: ignore[arg-type]
            chat=chat,
            chat_template_kwargs=template_kwargs,
            stop_strings=tuple(stop_strings or ()),
            stop_token_ids=tuple(stop_token_ids or ()),
            split=split,
            num_problems=num_prompts,
            question_column=prompt_column,
            answer_column=answer_column,
            batch_size=batch_size,
            device=device,
        )
        for name, loaded in zip(benchmark, found, strict=True)
    ]
    results = _asked(_with_greedy(planned) if greedy and temperature else planned, out)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, to_json(results) + "\n")
    _tell(results, as_json=as_json)


def _with_greedy(planned: Sequence[EvalSettings]) -> list[EvalSettings]:
    """Each of them, and then the same greedily."""
    from dataclasses import replace

    return [one for settings in planned for one in (settings, replace(settings, temperature=0.0, num_samples=1))]


def _asked(planned: Sequence[EvalSettings], out: Path) -> list[EvalResult]:
    """The results, in their order; the judges are tried before the model is loaded."""
    from stableopd.benchmarking.running import evaluate_model
    from stableopd.benchmarking.subject import load_subject
    from stableopd.benchmarking.timed import TimedJudge
    from stableopd.console import quiet_libraries

    quiet_libraries()
    with _Bar(Console(stderr=True)) as bar:
        for named in {settings.judge for settings in planned}:
            with TimedJudge(named, setting="--judge") as asked:
                asked.start()
        bar.advance("loading the model", 0, 1)
        subject = load_subject(planned[0])  # they differ in what is asked, not in who is
        return [evaluate_model(settings, out, bar.advance, subject=subject) for settings in planned]


def _tell(results: Sequence[EvalResult], *, as_json: bool) -> None:
    """Raises: typer.Exit with status 1 when a benchmark has no verdict at all."""
    from stableopd.benchmarking.view import print_results, printable, to_json

    if as_json:
        typer.echo(to_json(results))
    else:
        print_results(Console(), results)
    unjudged = [result for result in results if not result.is_judged]
    for result in unjudged:
        message = (
            f"{result.benchmark}: the judge {result.settings.judge} gave no verdict on any answer; 0% says nothing. "
            f"The first time: {printable(result.failure_message)}. Mend it and give the command again: the answers are "
            "kept"
        )
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    if unjudged:
        raise typer.Exit(1)


def _check_numbers(temperature: float, top_p: float, judge_timeout: float) -> None:
    """Raises: ConfigError for figures that are none, or with which nothing can be sampled or judged."""
    import math

    from stableopd.errors import ConfigError
    from stableopd.sections import COLDEST, LONGEST_JUDGEMENT_S

    if temperature != 0.0 and not COLDEST <= temperature < math.inf:
        raise ConfigError(f"--temperature is {temperature:g}; it must be 0, which is greedy, or {COLDEST:g} and more")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(
            f"--top-p is {top_p:g}, which leaves nothing to sample from; it must be more than 0 and at most 1. For the "
            "likeliest tokens alone: --temperature 0"
        )
    if not judge_timeout <= LONGEST_JUDGEMENT_S:
        raise ConfigError(
            f"--judge-timeout is {judge_timeout:g}; it must be at most {LONGEST_JUDGEMENT_S:,.0f} seconds"
        )


def _check_places(out: Path, output: Path | None) -> None:
    """Raises: ConfigError where answers or the document could not be written, before they have cost hours."""
    from stableopd.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; answers and results need a folder. Choose another one")
    _check_writable("--out", out, out)
    if output is None:
        return
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give the name of a file, such as {output / 'result.json'}")
    if output.exists() and not output.is_file():
        raise ConfigError(f"--output {output} is no file to be replaced; --json writes to standard output")
    if out.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"--output {output} would lie where the folder of --out {out} is to be; give another name")
    _check_writable("--output", output, output.parent)


def _check_writable(option: str, given: Path, folder: Path) -> None:
    """Makes a nameless file in the folder, or where it will be made."""
    from tempfile import TemporaryFile

    from stableopd.errors import ConfigError

    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {given} cannot be written: {nearest}: {(error.strerror or str(error)).lower()}. Choose another "
            "place, or see to what is there and its permissions"
        ) from error


def _mapping(given: str | None) -> dict[str, Any]:
    import json

    from stableopd.errors import ConfigError

    try:
        found = json.loads(given or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"--chat-template-kwargs is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--chat-template-kwargs is {given}; it must be a JSON object")
    return found


class _Bar:
    """Progress of the evaluation under way; nothing where standard error is no terminal."""

    def __init__(self, console: Console) -> None:
        from stableopd.console import progress_bar

        self._bar = progress_bar(console) if console.is_terminal else None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        if self._bar:
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, what: str, done: int, total: int) -> None:
        if self._bar:
            self._bar.update(self._task, description=what, completed=done, total=total)
