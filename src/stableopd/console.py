"""What a run shows in the terminal: a bar on terminals, plain lines in files, alerts as they come."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stableopd.protocols import Callback
from stableopd.types import Alert

STYLES = {"info": "cyan", "warning": "yellow", "critical": "bold red"}


class ConsoleReporter(Callback):
    """One line per logged step: loss, length, truncated, repetitive, accuracy; alerts in full."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._phase, self._tokens = "", 0
        self._explained: set[str] = set()

    def on_train_begin(self, trainer: Any) -> None:
        config, state = trainer.config, trainer.state
        resumed = f", from step {state.step}" if state.step else ""
        self.console.print(
            f"[bold]{config.method}[/]  {config.max_steps} steps of {config.rollout.num_prompts} prompts{resumed}"
            f"  ->  {escape(str(config.run_dir))}"
        )
        if state.step >= config.max_steps:
            self._hint(f"the run is already at step {state.step}; raise max_steps to go on")
        if self.console.is_terminal:
            self._progress = progress_bar(self.console)
            self._task = self._progress.add_task(config.method, total=config.max_steps, completed=state.step)
            self._progress.start()
            trainer.engine.on_tokens = self._count_tokens

    def on_phase(self, trainer: Any, step: int, phase: str) -> None:
        self._phase, self._tokens = f"step {step}: {phase}", 0
        self._describe()

    def _count_tokens(self, num_tokens: int) -> None:
        self._tokens += num_tokens
        self._describe(f", {self._tokens:,} tokens")

    def _describe(self, detail: str = "") -> None:
        if self._progress:
            self._progress.update(self._task, description=self._phase + detail)

    def on_step_end(self, trainer: Any, metrics: Mapping[str, float], alerts: Sequence[Alert]) -> None:
        step = int(metrics["step"])
        name = trainer.config.evaluation.name
        has_eval = f"eval/{name}/mean_length" in metrics
        if has_eval or step % trainer.config.logging.every_steps == 0 or step == trainer.config.max_steps:
            self.console.print(_line(step, metrics, name), highlight=False)
        for alert in alerts:
            print_alert(self.console, alert, brief=alert.rule in self._explained)
            self._explained.add(alert.rule)
        if self._progress:
            self._progress.update(self._task, completed=step)

    def on_evaluate(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        settings = trainer.config.evaluation
        accuracy = metrics.get(f"eval/{settings.name}/accuracy")
        if accuracy is None:
            self._hint(
                f"accuracy is not measured: no held-out row has the column {trainer.config.data.answer_column!r}"
            )
        elif failures := metrics.get(f"eval/{settings.name}/judge_failures"):
            timeouts = metrics.get(f"eval/{settings.name}/judge_timeouts", 0.0)
            self._hint(
                f"the judge {settings.judge} gave no verdict on {failures:.0f} held-out answers, which count as wrong "
                f"({timeouts:.0f} took longer than {settings.judge_timeout_s:g} s, the others raised or crashed); see "
                "evaluation.judge, and eval/*/judge_failures in metrics.jsonl"
            )
        elif accuracy == 0.0:
            self._hint("not one held-out answer was judged right; if that surprises you, look at evaluation.judge")

    def on_note(self, trainer: Any, text: str) -> None:
        self._hint(text)

    def _hint(self, text: str) -> None:
        if text not in self._explained:
            self._explained.add(text)
            self.console.print(f"[yellow]note[/] {escape(text)}", highlight=False)

    def on_save(self, trainer: Any, path: str) -> None:
        self.console.print(f"[dim]saved {escape(path)}[/]", highlight=False)

    def on_train_end(self, trainer: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def spinner(console: Console, text: str) -> Iterator[None]:
    """Says what is going on for as long as it takes; a plain line where there is no terminal."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, highlight=False)
        yield


def printable(text: str) -> str:
    """One line of text that cannot steer a terminal: control, invisible and unassigned characters become U+FFFD."""
    joined = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(character).startswith("C") else character for character in joined)


def quiet_libraries() -> None:
    """Keep loading bars and advice of other libraries out of our own output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_alert(console: Console, alert: Alert, *, brief: bool = False) -> None:
    """The alert in full, or only what was seen: cause and advice are the same each time."""
    message = alert.message.split(" Likely cause:")[0] if brief else alert.message
    console.print(f"[{STYLES[alert.severity]}]{alert.severity}[/] {alert.rule}: {escape(message)}", highlight=False)


def _line(step: int, metrics: Mapping[str, float], name: str) -> str:
    cells = [f"step {step:>5}"]
    for label, key, form in (
        ("loss", "loss", "{:+.4f}"),
        ("length", "completions/mean_length", "{:.1f}"),
        ("longest", "completions/max_length", "{:.0f}"),
        ("truncated", "completions/clipped_ratio", "{:.0%}"),
        ("repetitive", "health/repetition_rate", "{:.0%}"),
        ("in loops", "health/loop_token_fraction", "{:.0%}"),
        ("accuracy", f"eval/{name}/accuracy", "[bold]{:.1%}[/]"),
        ("greedy", f"eval/{name}_greedy/accuracy", "[bold]{:.1%}[/]"),
        ("greedy truncated", f"eval/{name}_greedy/truncation_rate", "{:.0%}"),
        ("s", "step_time", "{:.2f}"),
    ):
        if key in metrics:
            cells.append(f"{label} {form.format(metrics[key])}")
    return "  ".join(cells)
