"""Runs of TRL's own trainers, watched."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from transformers import PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from stableopd.health import HealthMonitor, MonitorSettings
from stableopd.integrations import HealthCallback
from stableopd.runfolder import read_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def looping(completion_ids, **_):
    """Rewards a token that is the one before it, which is how a student learns to loop."""
    return [float(sum(a == b for a, b in pairwise(ids))) for ids in completion_ids]


def right(completions, **_):
    return [float("1" in completion) for completion in completions]


class Recorder(TrainerCallback):
    """What a tracker would be given, and the monitor's state after each step."""

    def __init__(self, health=None):
        self.logs, self.states, self.health = [], {}, health

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))

    def on_train_begin(self, args, state, control, **_):
        self.on_save(args, state, control)

    def on_save(self, args, state, control, **_):
        if self.health is not None:
            self.states[state.global_step] = self.health.monitor.state_dict()


@pytest.fixture
def grpo(arguments, make_model, tokenizer, train_dataset):
    def trainer(health, *reward_funcs, callbacks=(), eval_dataset=None, **changes):
        dataset = changes.pop("train_dataset", train_dataset)
        processing_class = changes.pop("processing_class", tokenizer)
        settings = {**arguments, "num_generations": 8, "beta": 0.0, **changes}
        made = GRPOTrainer(
            model=make_model(0.6, digit=0.5),
            reward_funcs=list(reward_funcs) or [looping, health.reward],
            args=GRPOConfig(**settings),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*([health] if health else []), *callbacks],
        )
        made.remove_callback(PrinterCallback)
        return made

    return trainer


@pytest.fixture
def distillation(arguments, make_model, tokenizer, train_dataset):
    def trainer(health, teacher, **changes):
        made = DistillationTrainer(
            model=make_model(0.4),
            teacher_model=teacher,
            args=DistillationConfig(**{**arguments, "beta": 1.0, **changes}),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=[health],
        )
        made.remove_callback(PrinterCallback)
        return made

    return trainer


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged_steps(health: HealthCallback) -> int:
    """How many times a mean length has been judged; needs a long window."""
    return len(health.monitor.state_dict()["history"]["series"]["completions/mean_length"]["recent"])


# ------------------------------------------------------------------------------------ alerts


def test_a_student_of_grpo_that_learns_to_loop_raises_alerts_for_truncation_and_loops(grpo, settings, caplog):
    health = HealthCallback(settings)
    trainer = grpo(health)
    with caplog.at_level(logging.WARNING, logger="stableopd"):
        trainer.train()
    assert trainer.state.global_step == 40
    critical = {alert.rule for alert in health.alerts if alert.severity == "critical"}
    assert {"truncation", "loops", "repetition"} <= critical
    assert [record.getMessage() for record in caplog.records if record.name == "stableopd"] == [
        f"health: {alert.severity} at step {alert.step}: {alert.message}" for alert in health.alerts
    ]
    loops = [row["health/loop_token_fraction"] for row in trainer.state.log_history if "loss" in row]
    assert loops[0] < 0.05 < 0.5 < loops[-1]


def test_a_run_stops_after_the_step_whose_alert_is_severe_enough(grpo, settings):
    health = HealthCallback(settings, stop_on="critical")
    trainer = grpo(health)
    trainer.train()
    last = health.alerts[-1]
    assert (last.severity, last.action, last.step) == ("critical", "stop", trainer.state.global_step)
    assert trainer.state.global_step < 20
    assert all(alert.action == "none" for alert in health.alerts if alert.severity == "warning")


def test_a_healthy_run_of_grpo_goes_to_its_end_without_an_alert(grpo, settings):
    health = HealthCallback(settings, stop_on="warning")
    trainer = grpo(health, right, health.reward, learning_rate=1e-5)
    trainer.train()
    assert trainer.state.global_step == 40
    assert health.alerts == []


def test_a_student_whose_teacher_never_ends_stops_early_with_checkpoints(distillation, make_model, settings):
    health = HealthCallback(settings, save_on="warning", stop_on="critical")
    trainer = distillation(health, make_model(-2.0, digit=1.0, seed=2))
    trainer.train()
    assert trainer.state.global_step < 20
    assert {alert.action for alert in health.alerts} == {"save", "stop"}
    saved = {int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*")}
    assert saved == {alert.step for alert in health.alerts}


def test_a_student_whose_teacher_ends_in_time_is_left_alone(distillation, make_model, settings):
    health = HealthCallback(settings, save_on="warning", stop_on="warning")
    trainer = distillation(health, make_model(0.4, seed=2))
    trainer.train()
    assert trainer.state.global_step == 40
    assert health.alerts == []
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_growing_length_is_no_alarm_where_accuracy_grows(distillation, settings):
    """The rule by itself, as the trainer's logs would drive it."""
    health = HealthCallback(settings, train_accuracy="rewards/right/mean")
    ignorant = HealthCallback(settings)
    for step in range(1, 16):
        logs = {
            "loss": 1.0,
            "completions/mean_length": 10.0 + 2 * step,
            "completions/clipped_ratio": 0.0,
            "rewards/right/mean": 0.3 + 0.02 * step,
        }
        for callback in (health, ignorant):
            alerts = callback.monitor.judge(step, callback._figures_of_logs(logs))
            callback.alerts += alerts
    assert health.alerts == []
    assert {alert.rule for alert in ignorant.alerts} == {"length_drift", "length_growth"}


# ------------------------------------------------------------------------------------ what is seen


def test_the_figures_are_those_of_all_completions_and_agree_with_trls_own(grpo, settings, tokenizer):
    seen = {}

    def witness(completions, completion_ids, trainer_state, **_):
        seen.setdefault(trainer_state.global_step + 1, []).extend(zip(completions, completion_ids, strict=True))
        return [None] * len(completions)

    health = HealthCallback(settings)
    trainer = grpo(health, looping, health.reward, witness, max_steps=12)
    trainer.train()
    rows = {row["step"]: row for row in read_run(trainer.args.output_dir).metrics}
    logged = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert sorted(seen) == sorted(rows) == list(range(1, 13))
    for step, rollouts in seen.items():
        texts, ids = zip(*rollouts, strict=True)
        assert len(texts) == 32
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)  # as TRL has it
        reasons = ["stop" if row[-1] in ends else "length" for row in ids]
        expected = HealthMonitor(settings).observe(
            step, lengths=[len(row) for row in ids], finish_reasons=reasons, texts=texts, token_ids=ids
        )
        for key, value in expected.metrics.items():
            assert rows[step][key] == pytest.approx(value, rel=1e-6), key
            if key in logged[step]:
                assert logged[step][key] == pytest.approx(value, rel=1e-6), key
        assert logged[step]["rewards/health/mean"] == 0.0


def test_the_reward_function_and_the_callback_change_nothing_in_what_is_learnt(grpo, settings):
    weights = []
    for watched in (False, True):
        health = HealthCallback(settings) if watched else None
        trainer = grpo(health, looping, *([health.reward] if health else []), max_steps=5)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_conversations_are_measured_like_text(grpo, settings, tokenizer, train_dataset):
    from copy import deepcopy

    speaking = deepcopy(tokenizer)
    speaking.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    talk = train_dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    runs = []
    for changes in ({}, {"processing_class": speaking, "train_dataset": talk}):
        trainer = grpo(HealthCallback(settings), max_steps=25, **changes)
        trainer.train()
        runs.append(read_run(trainer.args.output_dir).metrics)
    assert runs[0][-1]["health/repetition_rate"] > 0
    for text, messages in zip(*runs, strict=True):
        health = {key for key in text if key.startswith("health/")}
        assert {key: messages[key] for key in health} == {key: text[key] for key in health}


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "calls", "judged"),
    [(2, 2, 1, 6, 6), (2, 4, 1, 3, 3), (4, 2, 1, 12, 6), (2, 2, 2, 3, 3)],
    ids=["one generation a step", "one for two steps", "two a step", "each used twice"],
)
def test_a_step_is_judged_once_however_generations_and_steps_fall_together(
    grpo, accumulation, per_generation, iterations, calls, judged
):
    health = HealthCallback(MonitorSettings(window=100, baseline_steps=100))
    called = []

    def count(completions, **_):
        called.append(len(completions))
        return [0.0] * len(completions)

    grpo(
        health,
        looping,
        health.reward,
        count,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        max_steps=6,
    ).train()
    assert called == [16 * per_generation] * calls
    assert judged_steps(health) == judged


def test_with_the_reward_function_every_step_is_judged_without_it_every_log_line(grpo, distillation, make_model):
    settings = MonitorSettings(window=100, baseline_steps=100)
    with_reward, without = HealthCallback(settings), HealthCallback(settings)
    grpo(with_reward, max_steps=6, logging_steps=3).train()
    distillation(without, make_model(0.4, seed=2), max_steps=6, logging_steps=3).train()
    assert judged_steps(with_reward) == 6
    assert judged_steps(without) == 2


def test_evaluation_is_held_out_accuracy_and_never_a_step_of_training(grpo, train_dataset):
    health = HealthCallback(MonitorSettings(window=100, baseline_steps=100), eval_accuracy="eval_rewards/right/mean")
    trainer = grpo(
        health,
        right,
        health.reward,
        eval_dataset=train_dataset.select(range(8)),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        eval_on_start=True,
        max_steps=4,
    )
    trainer.train()
    assert judged_steps(health) == 4
    rows = {row["step"]: row for row in read_run(trainer.args.output_dir).metrics}
    for row in trainer.state.log_history:
        if "loss" in row:
            assert rows[row["step"]]["completions/mean_length"] == pytest.approx(row["completions/mean_length"])
    evaluated = [row for row in trainer.state.log_history if "eval_rewards/right/mean" in row]
    held_out = health.monitor.state_dict()["history"]["evals"]["eval/held_out/accuracy"]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    assert held_out["last"] == evaluated[-1]["eval_rewards/right/mean"]
    assert held_out["first"] == evaluated[0]["eval_rewards/right/mean"]
    assert read_run(trainer.args.output_dir).evaluations == ("held_out",)


# ------------------------------------------------------------------------------------ logs and files


def test_the_logs_count_alerts_and_trackers_see_it_when_the_callback_is_attached(grpo, settings):
    health, tracker = HealthCallback(settings), Recorder()
    trainer = grpo(None, looping, health.reward, callbacks=[tracker], max_steps=12)
    health.attach(trainer)
    trainer.train()
    for rows in (tracker.logs, trainer.state.log_history):
        assert sum(row["health/alerts"] for row in rows) == len(health.alerts) > 0
        assert max(row["health/severity"] for row in rows) == 2.0


def test_the_files_make_a_run_folder_that_the_report_reads(grpo, settings, tmp_path):
    from stableopd.report import write_report

    health = HealthCallback(settings)
    trainer = grpo(health, max_steps=12)
    trainer.train()
    run = read_run(trainer.args.output_dir)
    assert list(run.alerts) == health.alerts
    assert [row["step"] for row in run.metrics] == list(range(1, 13))
    assert run.metrics[-1]["loss"] == trainer.state.log_history[-2]["loss"]
    write_report([trainer.args.output_dir], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert health.alerts[0].message.split(":")[0] in page


def test_files_of_an_earlier_run_are_set_aside_and_none_are_written_where_none_are_wanted(grpo, settings):
    health = HealthCallback(settings)
    trainer = grpo(health, max_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    earlier = (folder / "metrics.jsonl").read_text()
    grpo(HealthCallback(settings, files=False), max_steps=1).train()
    assert (folder / "metrics.jsonl").read_text() == earlier
    grpo(HealthCallback(settings), max_steps=1).train()
    assert (folder / "metrics.previous.jsonl").read_text() == earlier
    assert {row["step"] for row in lines(folder / "metrics.jsonl")} == {1}


# ------------------------------------------------------------------------------------ resuming


def test_a_resumed_run_goes_on_with_the_state_of_its_checkpoint_and_cuts_its_files(grpo, settings):
    health = HealthCallback(settings)
    first = Recorder(health)
    trainer = grpo(health, callbacks=[first], max_steps=12, save_strategy="steps", save_steps=6, save_only_model=False)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    early = [row for row in lines(folder / "metrics.jsonl") if row["step"] <= 6]
    again = HealthCallback(settings)
    second = Recorder(again)
    trainer = grpo(again, callbacks=[second], max_steps=8, save_strategy="steps", save_steps=6)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert first.states[6]["history"]["series"]["completions/mean_length"]["first"]
    assert second.states[6] == first.states[6]
    rows = lines(folder / "metrics.jsonl")
    assert [row for row in rows if row["step"] <= 6] == early
    assert max(row["step"] for row in rows) == 8


def test_restoring_callbacks_through_the_trainer_keeps_the_reward_function_and_the_state(grpo, settings):
    """transformers can replace callbacks by new ones on resume; one that forgot its reward function would be blind."""
    health = HealthCallback(settings)
    trainer = grpo(health, max_steps=6, save_strategy="steps", save_steps=3)
    trainer.train()
    again = HealthCallback(MonitorSettings(window=100, baseline_steps=100))
    trainer = grpo(again, max_steps=6, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3"))
    assert again in trainer.callback_handler.callbacks
    assert judged_steps(again) == 6


def test_a_checkpoint_without_health_state_begins_anew_and_says_so(grpo, settings, caplog):
    trainer = grpo(None, looping, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    health = HealthCallback(settings)
    trainer = grpo(health, max_steps=4, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING, logger="stableopd"):
        trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert "no health state: what comes now is compared with step 3 on" in caplog.text
    assert (
        "stableopd_health"
        in json.loads((Path(trainer.args.output_dir) / "checkpoint-4" / "trainer_state.json").read_text())[
            "stateful_callbacks"
        ]
    )


# ------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_judge_the_completions_of_both_and_stop_together(tmp_path):
    script = Path(__file__).with_name("grpo_on_two_processes.py")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    finished = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["world_size"] == 2
    assert first["alerts"] == second["alerts"]
    assert first["state"] == second["state"]
    assert first["stopped_at"] == second["stopped_at"] == first["alerts"][-1]["step"]
    assert first["seen"] != second["seen"]
    rows = {row["step"]: row for row in read_run(tmp_path / "run").metrics}
    for step, mine in first["seen"].items():
        both = [*mine, *second["seen"][step]]
        expected = HealthMonitor(MonitorSettings(tail_chars=20, compression_threshold=1.8, loop_min_tokens=8)).observe(
            int(step),
            lengths=[len(ids) for ids in both],
            finish_reasons=["stop" if ids[-1] in first["ends"] else "length" for ids in both],
            token_ids=both,
        )
        for key, value in expected.metrics.items():
            assert rows[int(step)][key] == pytest.approx(value, rel=1e-6), key
    assert finished.stderr.count("health: critical") == 1
