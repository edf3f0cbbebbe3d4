"""What the controller decides is done: coefficients, checkpoints, the end of the run, and all of it again on resume."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import get_peft_model_state_dict
from typer.testing import CliRunner

from stableopd.cli import STOPPED, app
from stableopd.config import StableOPDConfig
from stableopd.config_files import dump_config
from stableopd.protocols import Callback
from stableopd.trainer import StableOPDTrainer

FAULT_AT = 5


class Fault(Callback):
    """After one step the student says one character over and over; then it is left alone."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.stop_after = stop_after

    def on_step_end(self, trainer, metrics, alerts):
        if metrics["step"] == FAULT_AT:
            head = trainer.student.get_output_embeddings().weight
            norm = trainer.student.model.norm.weight
            with torch.no_grad():
                norm.zero_()  # all logits alike
                norm[0] = 50.0
                head[:, 0] = 0.0
                head[3, 0] = 5.0
                head[4, 0] = -5.0
        if metrics["step"] == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def settings(run_settings):
    def make(**health):
        return run_settings(
            method="opd",
            rollout={"num_prompts": 6, "num_generations": 2, "max_completion_length": 24},
            optimizer={"learning_rate": 1e-4, "micro_batch_tokens": 200},
            health={
                "tail_chars": 1000,
                "thresholds": {
                    "baseline_steps": 3, "window": 1, "patience": 1, "truncated_warning": 0.99,
                    "truncation_rise_warning": 0.8, "truncation_rise_critical": 0.9, "stop_probe_drop_warning": 1.0,
                },
                "controller": {"cooldown_steps": 3, "calm_steps": 3},
                **health,
            },
            max_steps=14,
        )  # fmt: skip

    return make


def run(settings, *, resume=False, stop_after=None):
    trainer = StableOPDTrainer(args=StableOPDConfig(**settings), callbacks=[Fault(stop_after=stop_after)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rows(trainer, name):
    path = trainer.config.run_dir / name
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "step_time"))} for row in found]


def actions(trainer):
    return [
        (alert["step"], alert["action"]) for alert in rows(trainer, "alerts.jsonl") if alert["rule"] == "controller"
    ]


def looping(trainer):
    return {row["step"] for row in rows(trainer, "metrics.jsonl") if row.get("health/loop_token_fraction", 0) > 0.2}


def test_stabilise_puts_gold_and_reference_into_a_plain_opd_run(settings):
    trainer = run(settings(actions="stabilise"))
    first = next(step for step, action in actions(trainer) if action == "raise")
    assert first == FAULT_AT + 1
    for row in rows(trainer, "metrics.jsonl")[1:]:
        with_gold = row["step"] >= first
        assert ("loss/gold" in row) == with_gold
        assert ("reference/kl" in row) == with_gold
        assert (row["controller/gold_coef"] > 0) == with_gold


def test_rollback_puts_back_the_weights_and_optimizer_of_the_checkpoint_and_goes_on(settings):
    trainer = run(settings(actions="rollback"))
    assert actions(trainer)[:2] == [(FAULT_AT + 1, "rollback"), (FAULT_AT + 1, "raise")]
    assert looping(trainer) == {FAULT_AT + 1}, "healthy again from the next step on"
    assert [row["step"] for row in rows(trainer, "metrics.jsonl")] == list(range(15))
    assert "loss" not in rows(trainer, "metrics.jsonl")[FAULT_AT + 1], "the step of the rollback makes no update"
    assert trainer.state.step == 14


def test_a_rollback_puts_back_adapters_too(settings, tmp_path):
    """Thresholds so low that chance crosses them."""

    class Seen(Callback):
        def __init__(self):
            self.adapters = {}

        def on_step_end(self, trainer, metrics, alerts):
            state = get_peft_model_state_dict(trainer.student)
            self.adapters[metrics["step"]] = {name: tensor.clone() for name, tensor in state.items()}

    low = {
        "baseline_steps": 4, "window": 1, "patience": 1, "length_growth_warning": 1.01, "length_growth_critical": 1.02,
        "truncated_warning": 0.99, "truncation_rise_warning": 0.9, "truncation_rise_critical": 0.9,
    }  # fmt: skip
    wanted = settings(actions="rollback", thresholds=low)
    wanted["student"] = {**wanted["student"], "lora": {"r": 2}}
    wanted["checkpoint"] = {"every_steps": 2, "keep_best": False}
    wanted["optimizer"] = {"learning_rate": 1e-2}
    seen = Seen()
    trainer = StableOPDTrainer(args=StableOPDConfig(**wanted), callbacks=[seen])
    trainer.train()
    step, alert = next((a["step"], a) for a in rows(trainer, "alerts.jsonl") if a["action"] == "rollback")
    target = int(re.search(r"of step (\d+)", alert["message"])[1])
    assert target < step - 1
    for name, tensor in seen.adapters[target].items():
        assert torch.equal(tensor, seen.adapters[step][name])
    assert any(not torch.equal(seen.adapters[step - 1][name], tensor) for name, tensor in seen.adapters[target].items())


@pytest.mark.parametrize("stop_after", [FAULT_AT, FAULT_AT + 1, FAULT_AT + 2, 11])
def test_a_run_with_a_rollback_resumes_to_the_same_end(settings, stop_after, tmp_path):
    whole = run(settings(actions="rollback"))
    parts = {**settings(actions="rollback"), "output_dir": str(tmp_path / "parts")}
    with pytest.raises(KeyboardInterrupt):
        run(parts, stop_after=stop_after)
    resumed = run(parts, resume=True)
    for name in ("metrics.jsonl", "alerts.jsonl"):
        assert rows(whole, name) == rows(resumed, name)
    for one, other in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_stop_saves_and_ends_the_run_at_once(settings):
    trainer = run(settings(actions="stop"))
    assert trainer.state.stopped
    assert trainer.state.step == FAULT_AT + 1
    assert actions(trainer) == [(FAULT_AT + 1, "stop")]
    assert (trainer.config.run_dir / "checkpoints" / f"step-{FAULT_AT + 1:06d}").is_dir()
    assert rows(trainer, "metrics.jsonl")[-1]["step"] == FAULT_AT + 1


def test_the_command_line_ends_a_stopped_run_with_status_3_and_goes_on_when_told_to(settings, tmp_path):
    """The levels are such that the very first steps are critical."""
    health = {
        "actions": "stop", "tail_chars": 1, "compression_threshold": 0.01,
        "thresholds": {"baseline_steps": 0, "window": 1, "patience": 1},
    }  # fmt: skip
    config = StableOPDConfig(**{**settings(), "health": health})
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == STOPPED, result.output
    assert "health.actions=stop at step 1" in result.output
    result = CliRunner().invoke(app, ["train", str(path), "health.actions=warn", "--resume"])
    assert result.exit_code == 0, result.output


def test_off_raises_no_alerts_and_warn_does_nothing_else(settings):
    off = run(settings(actions="off"))
    assert not (off.config.run_dir / "alerts.jsonl").exists()
    warn = run({**settings(actions="warn"), "output_dir": str(off.config.run_dir) + "-warn"})
    assert rows(warn, "alerts.jsonl")
    assert rows(off, "metrics.jsonl") == rows(warn, "metrics.jsonl")
    assert not actions(warn)


def test_a_shortened_budget_holds_from_the_second_level_on(settings):
    trainer = run(settings(actions="stabilise", controller={"shorten_budget": True}))
    assert "shorten" in {action for _, action in actions(trainer)}
    after = [row for row in rows(trainer, "metrics.jsonl")[1:] if row["controller/level"] >= 2]
    longest = [row["completions/max_length"] for row in after if row["step"] > FAULT_AT + 1]
    assert longest
    assert max(longest) <= 12


def test_looping_rollouts_have_no_distillation_loss_while_stabilising(settings):
    """After the fault next to all rollouts loop; where all do, nothing is left to distil."""
    kept = run(settings(actions="stabilise"))
    dropped = run(
        {
            **settings(actions="stabilise", controller={"drop_loops": True}),
            "output_dir": str(kept.config.run_dir) + "-dropped",
        }
    )
    assert "drop_loops" in {action for _, action in actions(dropped)}
    first = FAULT_AT + 1
    before, after = (
        [row.get("loss/distill") for row in rows(trainer, "metrics.jsonl") if row["step"] == first]
        for trainer in (kept, dropped)
    )
    assert before != after, "the same rollouts, but for those that loop"


def test_without_gold_in_the_data_only_the_reference_is_raised(settings, tmp_path, dataset):
    bare = tmp_path / "bare.jsonl"
    kept = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    bare.write_text("".join(json.dumps({key: row[key] for key in ("prompt", "answer")}) + "\n" for row in kept))
    trainer = run({**settings(actions="stabilise"), "data": {"path": str(bare)}})
    last = rows(trainer, "metrics.jsonl")[-1]
    assert last["controller/gold_coef"] == 0
    assert last["controller/reference_coef"] > 0
    assert "health/ending_probe" not in last
