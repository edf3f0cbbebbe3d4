"""`stableopd eval`: a model on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
            "math500=copy.parquet; or a .jsonl, .json or .parquet file. May be given several times."
        ),
    ],
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers to each question; without it 32 for AIME and AMC, 1 for others.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the probability sampled from.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Number of tokens sampled from; 0: all.")] = 0,
    max_completion_length: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer, in tokens; without it what the model can read, 4096 at most."),
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
    seed: Annotated[int, typer.Option(min=0, help="Another set of answers.")] = 0,
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
    from dataclasses import replace

    from stableopd.benchmarking.loading import load_benchmark
    from stableopd.benchmarking.results import EvalSettings
    from stableopd.errors import ConfigError, ModelError
    from stableopd.names import is_a_path

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is {dtype!r}; it must be auto, float32, bfloat16 or float16")
    if top_p == 0.0:
        raise ConfigError("--top-p is 0, which leaves nothing to sample from; give more than 0, or --temperature 0")
    template_kwargs = _mapping(chat_template_kwargs)
    if is_a_path(model) and not Path(model).expanduser().is_dir():
        raise ModelError(f"there is no folder {model!r} to take the model from")
    planned = []
    for name in benchmark:  # all of them are looked at before the first answer
        loaded = load_benchmark(
            name, question_column=prompt_column, answer_column=answer_column, num_problems=num_prompts
        )
        settings = EvalSettings(
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
            num_problems=num_prompts,
            question_column=prompt_column,
            answer_column=answer_column,
            batch_size=batch_size,
            device=device,
        )
        planned.append(settings)
        if greedy and temperature:
            planned.append(replace(settings, temperature=0.0, num_samples=1))

    from stableopd.benchmarking.running import evaluate_model
    from stableopd.benchmarking.subject import load_subject
    from stableopd.benchmarking.timed import TimedJudge
    from stableopd.benchmarking.view import print_results, to_json
    from stableopd.console import quiet_libraries
    from stableopd.lines import write_atomically

    quiet_libraries()
    results = []
    with _Bar(Console(stderr=True)) as bar:
        for named in {settings.judge for settings in planned}:
            with TimedJudge(named, setting="--judge") as asked:
                asked.start()
        bar.advance("loading the model", 0, 1)
        subject = load_subject(planned[0])  # they differ in what is asked, not in who is
        for settings in planned:
            results.append(evaluate_model(settings, out, bar.advance, subject=subject))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, to_json(results) + "\n")
    if as_json:
        typer.echo(to_json(results))
    else:
        print_results(Console(), results)


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
