"""`stableopd data`: makes and cleans the data of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from stableopd.commands.options import options_named

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make prompts and golden solutions, and remove prompts that benchmarks ask.\n\n"
    "Each command writes a data card with counts and digests beside its files, and overwrites nothing.",
)

OnRows = Callable[[int], None]
Choose = Literal["shortest", "first", "random"]


@app.command(
    epilog="Example: [bold]stableopd data openr1 --out data --tokenizer Qwen/Qwen2.5-Math-1.5B[/]. Stopped half-way, "
    "the same command goes on"
)
def openr1(
    out: Annotated[
        Path, typer.Option(help="Folder to write: cold_start.jsonl, opd.jsonl, heldout.jsonl, README.md, card.json.")
    ],
    tokenizer: Annotated[str, typer.Option(help="The student, a folder or a hub id: its tokenizer counts lengths.")],
    source: Annotated[
        str,
        typer.Option(
            help="The dataset: a hub id, with a colon before its configuration, a .parquet or .jsonl file, or a "
            "folder of them."
        ),
    ] = "open-r1/OpenR1-Math-220k:default",
    max_gold_tokens: Annotated[int, typer.Option(min=1, help="Longer generations are dropped.")] = 8192,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer prompts are dropped, chat template and instruction included.")
    ] = None,
    cold_start_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of prompts for cold start; default: the paper's 33 of 46.")
    ] = None,
    num_cold_start: Annotated[
        int | None,
        typer.Option(min=0, help="So many prompts for cold start (or all that are not held out), in place of a share."),
    ] = None,
    num_heldout: Annotated[
        int, typer.Option(min=0, help="Prompts kept aside to evaluate on during training, a tenth of all at most.")
    ] = 500,
    judge: Annotated[
        Literal["stored", "math"],
        typer.Option(help="What is right: the dataset's own verdict (correctness_math_verify), or Math-Verify now."),
    ] = "stored",
    choose: Annotated[Choose, typer.Option(help="Which fit generation becomes gold.")] = "shortest",
    prompt_format: Annotated[
        Literal["chat", "text"], typer.Option(help="Prompts as chat messages, or as plain text.")
    ] = "chat",
    instruction: Annotated[
        str | None, typer.Option(help="Line behind each problem; default: step by step, answer in \\boxed; '': none.")
    ] = None,
    duplicates: Annotated[
        Literal["first", "keep"], typer.Option(help="Rows with the same prompt: the first that has gold, or all.")
    ] = "first",
    tail_chars: Annotated[
        int, typer.Option(min=1, help="Characters at the end in which repetition is looked for.")
    ] = 10_000,
    compression_threshold: Annotated[
        float, typer.Option(min=1, help="An end that zlib compresses more often than this is repetitive.")
    ] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of --choose random.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first so many rows.")] = None,
) -> None:
    """Make the paper's data from OpenR1-Math-220k: one golden solution per prompt, split for cold start and OPD.

    Dropped are generations that are not complete, truncated, too long, repetitive or wrong, and prompts that have no
    other. The part of a prompt follows from its text alone.
    """
    from stableopd.benchmarking.registry import INSTRUCTION
    from stableopd.console import quiet_libraries, spinner
    from stableopd.curation.openr1 import COLUMNS, PAPER_COLD_START_FRACTION, Recipe
    from stableopd.curation.parts import make_parts
    from stableopd.curation.screening import Screening
    from stableopd.curation.sources import open_source
    from stableopd.errors import ConfigError
    from stableopd.model_config import ModelConfig
    from stableopd.models import load_tokenizer

    if cold_start_fraction is not None and num_cold_start is not None:
        raise ConfigError("--cold-start-fraction and --num-cold-start are both given; give one of them")
    quiet_libraries()
    recipe = Recipe(
        screening=Screening(
            max_gold_tokens=max_gold_tokens, tail_chars=tail_chars, compression_threshold=compression_threshold
        ),
        judge=judge,
        choose=choose,
        seed=seed,
        cold_start_fraction=PAPER_COLD_START_FRACTION if cold_start_fraction is None else cold_start_fraction,
        num_cold_start=num_cold_start,
        num_heldout=num_heldout,
        prompt_format=prompt_format,
        instruction=INSTRUCTION if instruction is None else instruction,
        max_prompt_tokens=max_prompt_tokens,
        duplicates=duplicates,
        limit=limit,
    )
    console = Console(soft_wrap=True)
    renamed = {"student.model_name_or_path": "--tokenizer"}
    with spinner(console, "opening source and tokenizer"), options_named(renamed):
        counter = load_tokenizer(ModelConfig(model_name_or_path=tokenizer), "student")
        rows = open_source(source, columns=COLUMNS)
        total = rows.num_rows()
    with (
        _judge("math" if judge == "math" else None) as judging,
        _all_cores(),
        _bar(_least(total, limit), "rows") as on_rows,
    ):
        names = {"dataset": source, "tokenizer": tokenizer}
        card = make_parts(rows, counter, recipe, out, judge=judging, names=names, on_rows=on_rows)
    _print_card(console, card, out)


@app.command(
    epilog="Examples: [bold]stableopd data gold --teacher Qwen/Qwen2.5-Math-7B-Instruct --data data/opd.jsonl --out "
    "data/opd-teacher.jsonl[/], [bold]stableopd data gold run.yaml --out gold.jsonl --samples 8[/]"
)
def gold(
    out: Annotated[Path, typer.Option(help="File to write (.jsonl); the card goes beside it.")],
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="Its teacher, data, rollout, evaluation.judge and seed are used."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over it, as with train.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher: a folder or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="Prompts with answers.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Most completions for a prompt.")] = 4,
    choose: Annotated[
        Choose, typer.Option(help="first: stop at a prompt's first fit completion; the others draw all, then choose.")
    ] = "first",
    max_completion_length: Annotated[int | None, typer.Option(min=1, help="Budget of a completion, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of the draws.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="math (Math-Verify), exact, or package.module:function; default: math.")
    ] = None,
    gold_prefix: Annotated[
        str, typer.Option(help="Put before each solution: what the teacher's template opens with, such as <think>.")
    ] = "",
    batch_prompts: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 256,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws.")] = None,
) -> None:
    """Draw golden solutions from the teacher: up to so many completions per prompt, of which a right one is kept.

    Completions that are truncated, repetitive or wrong are not. Stopped half-way, the same command goes on.
    """
    from stableopd.config_files import config_of, load_config
    from stableopd.console import quiet_libraries, spinner
    from stableopd.curation.gold import prepare_gold
    from stableopd.curation.sampling import Rejection
    from stableopd.errors import ConfigError

    given = list(overrides or [])
    path = config
    if config is not None and "=" in config and not Path(config).exists():
        path, given = None, [config, *given]
    if path is None and judge is None:
        judge = "math"
    if temperature == 0:
        raise ConfigError(
            "--temperature is 0, at which all completions of a prompt are the same, and one that is wrong has no other "
            "to replace it. Give a temperature above 0, such as 0.6"
        )
    if teacher is not None:  # in place of all that the configuration says of whose gold it would be
        given += ["teachers={}", "teacher.server_url=null", "data.teacher_column=null"]
    for key, value in (
        ("teacher.model_name_or_path", teacher),
        ("data.path", data),
        ("rollout.max_completion_length", max_completion_length),
        ("rollout.temperature", temperature),
        ("evaluation.judge", judge),
        ("seed", seed),
    ):
        if value is not None:
            given.append(f"{key}={json.dumps(value)}")
    settings = load_config(path, given) if path is not None else config_of(["method=opd", *given])
    rejection = Rejection(
        num_samples=samples,
        choose=choose,
        tail_chars=settings.health.tail_chars,
        compression_threshold=settings.health.compression_threshold,
        batch_prompts=batch_prompts,
    )
    quiet_libraries()
    console = Console(soft_wrap=True)
    with spinner(console, "loading teacher and data"):
        work = prepare_gold(settings, rejection, out, gold_prefix=gold_prefix)
    with _bar(work.num_prompts, "prompts") as on_prompts:
        card = work.run(on_prompts)
    _print_card(console, card, out)


@app.command(
    epilog="Example: [bold]stableopd data decontaminate data/opd.jsonl --against math500 --against aime24 -o "
    "data/opd-clean.jsonl[/]"
)
def decontaminate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Prompts: .jsonl or .parquet.")],
    against: Annotated[
        list[str], typer.Option(help="A benchmark by name, or a .jsonl or .parquet file of prompts; can be repeated.")
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="File to write, with the suffix of FILE; card and removed rows beside."),
    ],
    ngram: Annotated[int, typer.Option(min=1, help="So many words in a row in common are too many.")] = 13,
    min_ngram: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Shorter prompts match as a whole inside another, down to so many words; default: 8, or --ngram.",
        ),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of FILE; default: problem where there is one, else prompt.")
    ] = None,
) -> None:
    """Remove prompts that share a stretch of words with a benchmark's prompt."""
    from stableopd.console import spinner
    from stableopd.curation.decontaminate import decontaminate as run
    from stableopd.curation.overlap import MIN_NGRAM, OverlapIndex
    from stableopd.errors import ConfigError

    if min_ngram is not None and min_ngram > ngram:
        raise ConfigError(f"--min-ngram is {min_ngram}, more than --ngram {ngram}. Lower it")
    from stableopd.benchmarking.loading import benchmark_prompts

    console = Console(soft_wrap=True)
    with spinner(console, "reading benchmarks"), options_named({"data.path": "--against"}):
        benchmarks = {name: benchmark_prompts(name) for name in dict.fromkeys(against)}
        index = OverlapIndex(
            benchmarks, ngram=ngram, min_ngram=min(MIN_NGRAM, ngram) if min_ngram is None else min_ngram
        )
    numbers = {name: len(prompts) for name, prompts in benchmarks.items()}
    with _bar(None, "rows") as on_rows:
        card = run(file, output, index, benchmarks=numbers, column=prompt_column, on_rows=on_rows)
    _print_card(console, card, output)


@contextmanager
def _judge(name: str | None) -> Iterator[Any]:
    """A judge in a process of its own, which is ended when it hangs; None for no name."""
    from stableopd.benchmarking.timed import TimedJudge

    if name is None:
        yield None
        return
    with TimedJudge(name, setting="--judge") as judge:
        judge.start()
        yield judge


@contextmanager
def _all_cores() -> Iterator[None]:
    """Tokenizers may use several threads, as counting tokens is nearly all of the work, and nothing forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


@contextmanager
def _bar(total: int | None, unit: str) -> Iterator[OnRows]:
    """A bar on a terminal, nothing elsewhere; the function it gives is told how many are done."""
    from stableopd.console import progress_bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    with progress_bar(console) as progress:
        task = progress.add_task(unit, total=total)
        yield lambda done: progress.update(task, completed=done)


def _least(total: int | None, limit: int | None) -> int | None:
    known = [number for number in (total, limit) if number is not None]
    return min(known) if known else None


def _print_card(console: Console, card: dict[str, Any], out: Path) -> None:
    for group, figures in card["counts"].items():
        shown = "  ".join(f"{name} {number:,}" for name, number in figures.items())
        console.print(f"[bold]{escape(group)}[/]  {escape(shown)}", highlight=False)
    for name, figures in card["outputs"].items():
        console.print(f"{escape(name)}: {figures['rows']:,} rows", highlight=False)
    console.print(f"wrote {escape(str(out))}", highlight=False)
