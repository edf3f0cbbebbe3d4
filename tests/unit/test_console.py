"""What a run says in the terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from stableopd.config import StableOPDConfig
from stableopd.console import ConsoleReporter
from stableopd.types import Alert, TrainState


def reporter(**settings):
    console = Console(file=io.StringIO(), width=200)
    trainer = SimpleNamespace(config=StableOPDConfig(**settings), state=TrainState(), engine=SimpleNamespace())
    return ConsoleReporter(console), trainer, console.file


METRICS = {"loss": 0.25, "completions/mean_length": 812.4, "completions/clipped_ratio": 0.07,
           "health/repetition_rate": 0.02, "step_time": 1.5}  # fmt: skip


def test_a_line_has_step_loss_length_truncated_and_repetitive():
    console, trainer, out = reporter()
    console.on_train_begin(trainer)
    console.on_step_end(trainer, {"step": 1, **METRICS}, ())
    line = out.getvalue().splitlines()[-1]
    for words in ("step     1", "loss +0.2500", "length 812.4", "truncated 7%", "repetitive 2%"):
        assert words in line


def test_steps_between_log_lines_are_silent_but_evaluations_and_alerts_are_not():
    console, trainer, out = reporter(logging_steps=10)
    console.on_step_end(trainer, {"step": 3, **METRICS}, ())
    assert out.getvalue() == ""
    console.on_step_end(trainer, {"step": 4, "eval/validation/mean_length": 5.0, "eval/validation/accuracy": 0.5}, ())
    assert "accuracy 50.0%" in out.getvalue()
    alert = Alert(
        rule="loops", severity="critical", signal="health/loop_token_fraction", value=0.4, threshold=0.2, step=5,
        since=4, message="40% of [all] tokens lie in loops",
    )  # fmt: skip
    console.on_step_end(trainer, {"step": 5, **METRICS}, (alert,))
    assert "critical loops: 40% of [all] tokens" in out.getvalue()


def test_cause_and_advice_are_said_once_per_rule():
    console, trainer, out = reporter()
    alert = Alert(
        rule="loops", severity="warning", signal="s", value=1.0, threshold=0.5, step=5, since=4,
        message="Much was seen. Likely cause: loops. What to do: rest.",
    )  # fmt: skip
    for _ in range(2):
        console.on_step_end(trainer, {"step": 5, **METRICS}, (alert,))
    assert out.getvalue().count("Much was seen") == 2
    assert out.getvalue().count("Likely cause") == 1


def test_an_evaluation_that_says_nothing_is_noted_once():
    console, trainer, out = reporter()
    for accuracy in (0.0, 0.0, 0.5):
        console.on_evaluate(trainer, {"eval/validation/accuracy": accuracy})
    console.on_evaluate(trainer, {"eval/validation/mean_length": 3.0})
    assert out.getvalue().count("evaluation.judge") == 1
    assert "'answer'" in out.getvalue()


def test_a_note_is_shown_as_it_stands_and_once():
    console, trainer, out = reporter()
    for _ in range(2):
        console.on_note(trainer, "the function said [bold]KeyError[/]")
    assert out.getvalue() == "note the function said [bold]KeyError[/]\n"


def test_a_judge_that_fails_is_told_of_once_and_before_a_question_about_its_choice():
    console, trainer, out = reporter()
    failed = {"eval/validation/accuracy": 0.0, "eval/validation/judge_failures": 8.0}
    console.on_evaluate(trainer, {**failed, "eval/validation/judge_timeouts": 5.0})
    console.on_evaluate(trainer, {**failed, "eval/validation/judge_timeouts": 5.0})
    told = " ".join(out.getvalue().split())
    assert told.count("gave no verdict on 8 held-out answers") == 1
    assert "(5 took longer than 10 s" in told
    assert "not one held-out answer" not in told
