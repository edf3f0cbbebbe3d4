"""`stableopd demo`: a world made on the spot, in which plain OPD collapses and StableOPD does not.

The models, data and configurations are written to disk first; the two runs are then ordinary
`stableopd train` processes, side by side. Whatever the demo shows can be done again by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.config import StableOPDConfig
from stableopd.config_files import dump_config
from stableopd.console import progress_bar, quiet_libraries
from stableopd.errors import ConfigError, RunFolderError, StableOPDError
from stableopd.lines import write_lines
from stableopd.plots import write_collapse_picture
from stableopd.report import write_report
from stableopd.runfolder import RunRecord, read_run
from stableopd.sparklines import sparkline
from stableopd.toy.build import (
    StudentRecipe,
    TeacherRecipe,
    held_out_prompts,
    prompt_example,
    train_student,
    train_teacher,
    training_prompts,
)
from stableopd.toy.habits import HABITS
from stableopd.toy.learning import Progress, engine_of, held_out_figures
from stableopd.toy.task import COMPRESSION_THRESHOLD, JUDGE, TAIL_CHARS, World, answer, gold, judge, prompt_text
from stableopd.toy.tokenizer import build_tokenizer

METHODS = ("opd", "stableopd")
MAX_COMPLETION_LENGTH = 80
LAMBDA_GOLD, BETA_KL = 3.0, 0.1
"""StableOPD's coefficients here. With lambda_gold = 1 some students loop for a while before they recover."""

TOKENIZER = build_tokenizer()
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo builds."""

    out: Path
    seed: int = 0
    quick: bool = False
    world: str = "t4"
    teacher: str = "standard"
    terse_fraction: float | None = None
    gold_pool: int | None = None
    """Number of golden solutions to draw from; None: one for every prompt."""

    def build_world(self) -> World:
        """Raises: ConfigError for a world or a teacher that does not exist."""
        worlds = {"t4": World.t4, "a": World.a}
        for name, value, known in (("world", self.world, worlds), ("teacher", self.teacher, HABITS)):
            if value not in known:
                raise ConfigError(f"--{name} is {value!r}; it must be one of {', '.join(known)}")
        world = worlds[self.world]().with_teacher(self.teacher)
        return world if self.terse_fraction is None else replace(world, terse_fraction=self.terse_fraction)

    @property
    def teacher_recipe(self) -> TeacherRecipe:
        return TeacherRecipe(verification_steps=60, trace_steps=120) if self.quick else TeacherRecipe()

    @property
    def student_recipe(self) -> StudentRecipe:
        return StudentRecipe(copying_steps=80, max_steps=120) if self.quick else StudentRecipe()


def run_demo(settings: DemoSettings, console: Console) -> None:
    """Build the world, run OPD and StableOPD side by side, compare, and write report and picture.

    Raises: ConfigError or RunFolderError before anything is written; StableOPDError when a run fails.
    """
    world = settings.build_world()
    out = settings.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(
            f"{out} already holds something; choose another folder with --out (make demo OUT=...), or remove it first"
        )
    start = time.perf_counter()
    quiet_libraries()
    console.print(
        "[bold]stableopd demo[/]: a teacher that likes to re-check its work, a student that learns from it on its own "
        "rollouts.\nThe same student is trained twice, with the same prompts and seed: plain OPD, and StableOPD.\n"
    )
    with one_thread(), _progress(console) as progress:
        teacher = train_teacher(world, TOKENIZER, settings.seed, settings.teacher_recipe, progress)
        student = train_student(world, TOKENIZER, settings.seed, settings.student_recipe, progress)
    checks = write_world(settings, world, teacher, student)
    _show_checks(checks, console)
    run_side_by_side(settings, console)
    runs = [read_run(out / method) for method in METHODS]
    report = write_report([out / method for method in METHODS], out / "report.html")
    write_collapse_picture(runs, out / "collapse.png")
    _compare(runs, settings, console)
    console.print(
        f"\n{time.perf_counter() - start:.0f} s. Look at [bold]{escape(str(report))}[/] and "
        f"[bold]{escape(str(out / 'collapse.png'))}[/].\nOnce more by hand: stableopd train "
        f"{escape(str(out / 'stableopd.yaml'))} seed=1 output_dir={escape(str(out / 'again'))}",
        highlight=False,
    )


# ---------------------------------------------------------------------- the world


def write_world(
    settings: DemoSettings, world: World, teacher: nn.Module, student: nn.Module
) -> dict[str, dict[str, float]]:
    """Write `teacher/`, `student/`, `data/` and `models.json`; return what the models can do before distillation."""
    checks = {}
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(settings.out / name)  # type: ignore[operator]
        TOKENIZER.save_pretrained(str(settings.out / name))
        with one_thread():
            checks[name] = check_model(model, TOKENIZER, world)
    write_data(settings, world)
    (settings.out / "models.json").write_text(json.dumps(checks, indent=2) + "\n")
    return checks


def check_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World, num_prompts: int = 500
) -> dict[str, float]:
    """Accuracy and truncation on held-out prompts: at temperature 1 (how the teacher speaks) and greedily."""
    examples = [
        replace(prompt_example(prompt, tokenizer, index), answer=answer(prompt))
        for index, prompt in enumerate(held_out_prompts(world)[:num_prompts])
    ]
    return held_out_figures(
        engine_of(model, tokenizer),
        tokenizer,
        examples,
        judge=judge,
        max_new_tokens=world.max_trace_tokens,
        tail_chars=TAIL_CHARS,
        compression_threshold=COMPRESSION_THRESHOLD,
    )


def write_data(settings: DemoSettings, world: World) -> None:
    """Prompts to train on and held-out ones, each with its golden solution and answer; the gold pool, if any."""
    data = settings.out / "data"
    data.mkdir(parents=True)
    train = training_prompts(world)
    write_lines(data / "train.jsonl", (_row(world, prompt) for prompt in train))
    write_lines(data / "validation.jsonl", (_row(world, prompt) for prompt in held_out_prompts(world)))
    if settings.gold_pool:
        size = min(settings.gold_pool, len(train))
        chosen = np.random.default_rng(settings.seed).choice(len(train), size, replace=False)
        write_lines(data / "gold_pool.jsonl", (_row(world, train[i]) for i in chosen))


def demo_config(settings: DemoSettings, method: str) -> StableOPDConfig:
    """The run that the demo makes of a method; everything but `method` and `output_dir` is shared."""
    out, quick = settings.out, settings.quick
    data: dict[str, Any] = {"path": str(out / "data" / "train.jsonl")}
    if settings.gold_pool:
        data["gold_path"] = str(out / "data" / "gold_pool.jsonl")
    stabilised = {"lambda_gold": LAMBDA_GOLD, "beta_kl": BETA_KL} if method == "stableopd" else {}
    return StableOPDConfig(
        method=method,
        **stabilised,
        student={"model_name_or_path": str(out / "student"), "attn_implementation": "eager"},
        teacher={"model_name_or_path": str(out / "teacher"), "attn_implementation": "eager"},
        data=data,
        rollout={"num_prompts": 64, "num_generations": 4, "max_completion_length": MAX_COMPLETION_LENGTH},
        optimizer={"learning_rate": 6e-4, "beta2": 0.99, "num_minibatches": 2, "micro_batch_tokens": 8192},
        health={"tail_chars": TAIL_CHARS, "compression_threshold": COMPRESSION_THRESHOLD},
        evaluation={
            "path": str(out / "data" / "validation.jsonl"),
            "every_steps": 5,
            "num_prompts": 100 if quick else 400,
            "judge": JUDGE,
        },
        checkpoint={"every_steps": 10 if quick else 50},
        logging={"every_steps": 5, "rollouts_every_steps": 5},
        seed=settings.seed,
        max_steps=20 if quick else 100,
        output_dir=str(out / method),
    )


def _write_config(settings: DemoSettings, method: str) -> Path:
    path = settings.out / f"{method}.yaml"
    path.write_text(dump_config(demo_config(settings, method)))
    return path


def _row(world: World, prompt: str) -> dict[str, str]:
    return {"prompt": prompt_text(prompt), "gold": gold(world, prompt), "answer": answer(prompt)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    with progress_bar(console) as bar:
        tasks: dict[str, Any] = {}

        def advance(name: str, step: int, total: int, loss: float) -> None:
            if name not in tasks:
                if not console.is_terminal:
                    console.print(f"training the {name}", highlight=False)
                tasks[name] = bar.add_task("", total=total)
            bar.update(tasks[name], completed=step, description=f"training the {name}, loss {loss:.3f}")

        yield advance


def _show_checks(checks: Mapping[str, Mapping[str, float]], console: Console) -> None:
    table = Table(title="Held-out prompts, before distillation", title_justify="left")
    for column in ("", "right (T = 1)", "cut off", "right (greedy)", "cut off", "length"):
        table.add_column(column, justify="left" if not column else "right")
    for name, check in checks.items():
        rates = ("sampled/accuracy", "sampled/truncation_rate", "greedy/accuracy", "greedy/truncation_rate")
        table.add_row(name, *(f"{check[key]:.1%}" for key in rates), f"{check['sampled/mean_length']:.1f}")
    console.print(table)
    if checks["teacher"]["greedy/truncation_rate"] > 0.05:
        console.print("[dim]This teacher itself loops on some prompts when decoded greedily.[/]")


# ---------------------------------------------------------------------- the runs


def run_side_by_side(settings: DemoSettings, console: Console) -> None:
    """Train with every method at once, each in a process and on a thread of its own, and show how they do.

    Raises: StableOPDError with the end of its log when a run fails.
    """
    out = settings.out
    configs = [_write_config(settings, method) for method in METHODS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    logs = {config.stem: out / f"{config.stem}.log" for config in configs}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for config in configs:
            with logs[config.stem].open("wb") as log:
                command = [sys.executable, "-m", "stableopd", "train", str(config)]
                processes[config.stem] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
        _follow(processes, out, console)
        failed = [name for name, process in processes.items() if process.returncode not in (None, 0)]
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()
    for name in failed:
        tail = "\n".join(logs[name].read_text(errors="replace").splitlines()[-15:])
        status = processes[name].returncode
        raise StableOPDError(f"the {name} run ended with status {status}; see {logs[name]}\n{tail}")


def _follow(processes: Mapping[str, subprocess.Popen[bytes]], out: Path, console: Console) -> None:
    tails = {name: _Tail(out / name / "metrics.jsonl") for name in processes}
    if console.is_terminal:
        with Live(_live_table(tails, console.width), console=console, refresh_per_second=4) as live:
            for _ in _while_running(processes, tails):
                live.update(_live_table(tails, console.width))
        return
    shown: dict[str, int] = {}
    for _ in _while_running(processes, tails):
        for name, tail in tails.items():
            for row in tail.evaluations:
                if row["step"] > shown.get(name, -1):
                    shown[name] = row["step"]
                    console.print(_plain_line(name, row), highlight=False, soft_wrap=True)


def _while_running(processes: Mapping[str, subprocess.Popen[bytes]], tails: Mapping[str, _Tail]) -> Iterator[None]:
    """Once per poll, and once more when all have ended; a failed run ends the wait."""
    while True:
        codes = [process.poll() for process in processes.values()]
        for tail in tails.values():
            tail.read()
        yield
        if None not in codes or any(codes):
            return
        time.sleep(_POLL_S)


class _Tail:
    """The rows of a growing metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.rows: list[dict[str, Any]] = []

    def read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self.rows += [json.loads(line) for line in whole.splitlines()]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval/validation/accuracy" in row]


_NARROW = 110
_COLUMNS = (
    ("length", "completions/mean_length", "{:.1f}"),
    ("cut off", "completions/clipped_ratio", "{:.0%}"),
    ("repetitive", "health/repetition_rate", "{:.0%}"),
    ("loops", "health/loop_token_fraction", "{:.0%}"),
    ("accuracy", "eval/validation/accuracy", "{:.0%}"),
    ("greedy", "eval/validation_greedy/accuracy", "{:.0%}"),
    ("greedy cut off", "eval/validation_greedy/truncation_rate", "{:.0%}"),
)


_NARROW_COLUMNS = ("length", "cut off", "accuracy")


def _live_table(tails: Mapping[str, _Tail], width: int) -> Table:
    """One row a run; a narrow terminal gets fewer figures beside the curve of greedy accuracy."""
    narrow = width < _NARROW
    columns = [column for column in _COLUMNS if not narrow or column[0] in _NARROW_COLUMNS]
    table = Table(title="Training side by side", title_justify="left")
    table.add_column("run", no_wrap=True, min_width=len("stableopd"))
    table.add_column("step", justify="right", no_wrap=True)
    for label, _, _ in columns:
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("greedy accuracy", min_width=21, no_wrap=True)
    for name, tail in tails.items():
        latest: dict[str, Any] = {}
        for row in tail.rows:
            latest |= row
        curve = [row["eval/validation_greedy/accuracy"] for row in tail.evaluations]
        cells = [form.format(latest[key]) if latest.get(key) is not None else "" for _, key, form in columns]
        table.add_row(
            name, str(latest.get("step", "")), *cells, sparkline(curve, max(len(curve), 1), low=0.0, high=1.0)
        )
    return table


def _plain_line(name: str, row: Mapping[str, Any]) -> str:
    cells = [f"{label} {form.format(row[key])}" for label, key, form in _COLUMNS if row.get(key) is not None]
    return f"{name:>9}  step {row['step']:>3}  " + "  ".join(cells)


def _compare(runs: Sequence[RunRecord], settings: DemoSettings, console: Console) -> None:
    table = Table(title="Held-out accuracy, after distillation", title_justify="left")
    for column in ("run", "best", "end", "greedy best", "end", "cut off", "verdict"):
        table.add_column(column, justify="left" if column in ("run", "verdict") else "right")
    for run in runs:
        accuracy = [value for _, value in run.series("eval/validation/accuracy")]
        greedy = [value for _, value in run.series("eval/validation_greedy/accuracy")]
        truncated = [value for _, value in run.series("eval/validation_greedy/truncation_rate")]
        colour = {"healthy": "green", "collapsed": "red"}.get(run.verdict.status, "yellow")
        cells = (max(accuracy), accuracy[-1], max(greedy), greedy[-1], truncated[-1])
        table.add_row(run.name, *(f"{cell:.1%}" for cell in cells), f"[{colour}]{run.verdict.status}[/]")
    console.print(table)
    for run in runs:
        console.print(f"[bold]{run.name}[/]: {escape(run.verdict.headline)}", highlight=False)
    if settings.quick:
        console.print("[dim]--quick is too short to promise a collapse; leave it out to see one.[/]")
