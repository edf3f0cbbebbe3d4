"""The examples of docs/integrations.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")


def example(section: str, number: int = 0) -> str:
    """A code block of a section, word for word."""
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", body, re.DOTALL)[number]


def batch(looping: int) -> SimpleNamespace:
    """32 rollouts, some of which loop until the budget ends."""
    rows = [list(range(row, row + 40)) for row in range(32 - looping)] + [[1, 2, 3] * 40] * looping
    reasons = ["stop"] * (32 - looping) + ["length"] * looping
    return SimpleNamespace(lengths=[len(row) for row in rows], finish_reasons=reasons, token_ids=rows)


def test_the_loop_of_ones_own_prints_what_is_wrong(capsys):
    exec(example("Your own loop"), {"rollouts": [batch(0)] * 8})
    assert capsys.readouterr().out == ""
    exec(example("Your own loop"), {"rollouts": [batch(0)] * 8 + [batch(24)] * 4})
    assert "of all tokens lie in exact loops" in capsys.readouterr().out


def test_the_loop_of_ones_own_takes_five_lines():
    code = example("Your own loop").split("\n\n", 1)[1]
    assert len(code.strip().splitlines()) == 5


def test_the_example_for_grpo_runs(make_model, tokenizer, train_dataset, arguments, tmp_path):
    trl = pytest.importorskip("trl")

    def accuracy(completions, **_):
        return [float("1" in completion) for completion in completions]

    make_model(0.6).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(str(tmp_path / "model"))
    names = {
        "GRPOTrainer": trl.GRPOTrainer,
        "model": str(tmp_path / "model"),
        "accuracy": accuracy,
        "args": trl.GRPOConfig(**{**arguments, "max_steps": 2, "num_generations": 8}),
        "train_dataset": train_dataset,
    }
    exec(example("TRL"), names)
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].state.log_history[0]["health/loop_token_fraction"] >= 0.0
    assert names["health"].monitor.state_dict()["history"]["series"]["completions/accuracy"]["recent"]


def test_the_example_for_distillation_runs(make_model, tokenizer, train_dataset, arguments, tmp_path):
    trl = pytest.importorskip("trl")
    make_model(0.6).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(str(tmp_path / "model"))
    names = {
        "DistillationTrainer": trl.DistillationTrainer,
        "model": str(tmp_path / "model"),
        "teacher": str(tmp_path / "model"),
        "args": trl.DistillationConfig(**{**arguments, "max_steps": 2}),
        "train_dataset": train_dataset,
    }
    exec(example("TRL", 1), names)
    assert names["trainer"].state.global_step == 2
    assert len(names["health"].monitor.state_dict()["history"]["series"]["completions/mean_length"]["recent"]) == 2


def test_the_module_for_slime_runs():
    names: dict = {}
    exec(example("slime"), names)
    assert names["log_rollout_data"].__self__.monitor.settings.max_expected_length == 8192
