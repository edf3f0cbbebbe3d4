"""Whole runs under every kind of objective: what they log, what they learn, what they leave behind."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stableopd import StableOPDConfig, StableOPDTrainer
from stableopd.errors import DataError, TrainingError
from stableopd.heads import LinearHead
from stableopd.protocols import Callback
from stableopd.toy.models import build_model
from stableopd.types import Alert

OBJECTIVES = {
    "clipped": {},
    "reinforce": {"estimator": "reinforce", "advantage": {"clamp": 2.0, "gamma": 0.5}},
    "k2": {"estimator": "k2"},
    "k3": {"estimator": "k3"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "forward_kl": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "mixed_kl": {"divergence": "mixed_kl"},
    "teacher_topk": {"divergence": "reverse_kl", "support": "teacher_topk", "topk": 4},
    "student_topk": {"divergence": "jsd", "support": "student_topk", "topk": 4, "tail": "bucket"},
    "intersection": {"divergence": "forward_kl", "support": "intersection", "topk": 9},
    "union": {"divergence": "mixed_kl", "support": "union", "topk": 4, "tail": "bucket"},
    "symmetric_difference": {"divergence": "reverse_kl", "support": "symmetric_difference", "topk": 4},
}


@pytest.fixture
def run(run_settings, tokenizer, tmp_path):
    """Trains and gives the trainer and its metrics; the teacher is wider and deeper, its vocabulary padded."""
    count = iter(range(99))

    def run(*, wide_teacher: bool = True, **changes):
        folder = tmp_path / f"run{next(count)}"
        settings = run_settings(**{"max_steps": 2, "evaluation": {"path": None}, **changes})
        teacher = build_model(num_layers=2, hidden_size=24, num_heads=2, tokenizer=tokenizer, seed=2)
        torch.manual_seed(9)
        teacher.resize_token_embeddings(len(tokenizer) + 7, mean_resizing=False)
        trainer = StableOPDTrainer(
            teacher_model=teacher if wide_teacher else None,
            args=StableOPDConfig(**{**settings, "output_dir": str(folder)}),
        )
        trainer.train()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return trainer, [json.loads(line) for line in lines]

    return run


@pytest.fixture
def rewards(tmp_path, monkeypatch) -> str:
    """Name of a reward function in a module of the user's: the share of a completion that is the digit 7."""
    (tmp_path / "my_rewards.py").write_text(
        "def sevens(completion, answer):\n    return completion.count('7') / max(1, len(completion))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rewards:sevens"


# ---------------------------------------------------------------- divergences


def test_every_divergence_trains_and_tells_the_same_of_the_rollouts_of_the_untrained_student(run):
    """The first step's rollouts are the same ones, so whatever the loss sees of the teacher, the figures are."""
    expected = None
    for name, distill in OBJECTIVES.items():
        trainer, metrics = run(method="opd", objective={"distill": distill})
        for row in metrics:
            for key in ("loss", "loss/distill", "teacher/reverse_kl", "health/advantage_other", "entropy", "grad_norm"):
                assert math.isfinite(row[key]), f"{name}: {key}"
            assert row["skipped_updates"] == 0, name
            assert row["sampling/logprob_gap"] < 1e-4, name
            assert row["grad_norm"] > 0, name
        assert isinstance(trainer.teacher.head, LinearHead)
        assert trainer.teacher.head.weight.shape[0] > trainer.teacher.head.vocab_size, "padded"
        first = {key: metrics[0][key] for key in ("teacher/reverse_kl", "health/advantage_other")}
        expected = expected or first
        assert first == pytest.approx(expected, rel=1e-4), name
    assert abs(expected["teacher/reverse_kl"]) > 0.1


@pytest.mark.parametrize("name", ["clipped", "jsd", "teacher_topk", "union"])
def test_rollouts_in_the_run_folder_tell_the_mean_advantage_whatever_the_loss(run, name):
    trainer, _ = run(method="opd", max_steps=1, objective={"distill": OBJECTIVES[name]})
    lines = (trainer.config.run_dir / "rollouts" / "step-000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 4
    assert all(isinstance(row["mean_advantage"], float) and row["mean_advantage"] != 0 for row in rows)


@pytest.mark.parametrize("name", ["reverse_kl", "teacher_topk", "union", "k2"])
def test_distillation_brings_the_student_nearer_to_its_teacher(run, name):
    """The divergence at the student's own states falls, whichever way it is taken."""
    _, metrics = run(
        method="opd", max_steps=25, objective={"distill": OBJECTIVES[name]}, logging={"rollouts_every_steps": 100},
        checkpoint={"every_steps": 100}, rollout={"num_prompts": 6, "num_generations": 4},
    )  # fmt: skip
    kl = [row["teacher/reverse_kl"] for row in metrics]
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])


def test_sets_larger_than_the_vocabulary_are_all_of_it(run):
    """The default of 32 candidates in a vocabulary of 17: the run is that of the whole vocabulary."""
    _, expected = run(method="opd", objective={"distill": {"divergence": "reverse_kl"}})
    for support in ("teacher_topk", "student_topk", "intersection", "union"):
        _, metrics = run(method="opd", objective={"distill": {"divergence": "reverse_kl", "support": support}})
        for row, other in zip(metrics, expected, strict=True):
            for key in ("loss/distill", "grad_norm", "teacher/reverse_kl"):
                assert row[key] == pytest.approx(other[key], rel=1e-3), support


@pytest.mark.parametrize("method", ["opd", "stableopd"])
@pytest.mark.parametrize("name", ["clipped", "reverse_kl", "union"])
def test_when_every_rollout_is_cut_off_and_dropped_the_figures_are_still_those_of_the_rollouts(run, method, name):
    """A collapse: nothing is left to distil, the gold term goes on, and what is logged must not be made up."""
    rows = {}
    for weight in (0.0, 1.0):
        _, metrics = run(
            method=method, max_steps=1, rollout={"max_completion_length": 2},
            objective={"distill": {**OBJECTIVES[name], "tokens": {"truncated_weight": weight}}},
        )  # fmt: skip
        rows[weight] = metrics[0]
    assert rows[0.0]["completions/clipped_ratio"] == 1.0
    assert rows[0.0]["skipped_updates"] == rows[0.0]["skipped_updates/no_tokens"] == (method == "opd")
    assert rows[1.0]["skipped_updates/no_tokens"] == 0
    for key in ("teacher/reverse_kl", "health/advantage_other"):
        assert rows[0.0][key] == pytest.approx(rows[1.0][key], rel=1e-4), key
    assert ("loss/gold" in rows[0.0]) == (method == "stableopd")


def test_all_of_the_finer_settings_together_train(run, rewards):
    _, metrics = run(
        method="stableopd",
        objective={
            "distill": {
                "advantage": {"clamp": 5.0, "log_compress": True, "gamma": 0.5, "prefix_gamma": 0.5},
                "tokens": {
                    "mask_special": True, "mask_repeated": True, "entropy_fraction": 0.5, "truncated_weight": 0.5
                },
            },
            "reward": {"coef": 0.5, "function": rewards, "add_to_advantage": True},
            "correction": {"kind": "mask", "cap": 1.5, "floor": 0.5},
            "reference": {"estimator": "k3"},
            "aggregation": "sequence_mean",
        },
    )  # fmt: skip
    for row in metrics:
        assert row["skipped_updates"] == 0
        assert all(math.isfinite(row[key]) for key in ("loss/distill", "loss/gold", "loss/reference", "reward"))
        assert "loss/reward" not in row, "it is part of the advantage"
        assert row["sampling/logprob_gap"] < 1e-4
        assert row["sampling/corrected_fraction"] == 0


def test_special_tokens_that_are_masked_are_not_the_ones_that_end_an_answer(run, tokenizer):
    trainer, _ = run(method="opd", max_steps=1)
    assert trainer.special_ids == {tokenizer.pad_token_id}
    assert tokenizer.eos_token_id in trainer.engine.end_token_ids


# ---------------------------------------------------------------- rewards


def test_grpo_learns_what_a_users_function_rewards(run, rewards):
    trainer, metrics = run(
        method="grpo", max_steps=30, wide_teacher=False, optimizer={"learning_rate": 2e-2, "num_minibatches": 1},
        rollout={"num_prompts": 6, "num_generations": 8, "max_completion_length": 8},
        objective={"reward": {"function": rewards}}, checkpoint={"every_steps": 100},
    )  # fmt: skip
    reward = [row["reward"] for row in metrics]
    assert trainer.teacher is None
    assert "teacher/reverse_kl" not in metrics[0]
    assert "loss/distill" not in metrics[0]
    assert sum(reward[:3]) / 3 < 0.2
    assert sum(reward[-3:]) / 3 > 0.6
    lines = (trainer.config.run_dir / "rollouts" / "step-000030.jsonl").read_text().splitlines()
    assert all(row["reward"] == row["completion"].count("7") / len(row["completion"]) for row in map(json.loads, lines))


def test_a_correction_that_leaves_out_nearly_everything_is_seen(run):
    """No ratio of two computations is exactly 1."""
    _, metrics = run(method="opd", objective={"correction": {"kind": "mask", "cap": 1.0, "floor": 1.0}})
    assert all(row["sampling/corrected_fraction"] > 0.3 for row in metrics)
    _, metrics = run(method="opd", max_steps=1)
    assert "sampling/corrected_fraction" not in metrics[0]


def test_a_reward_beside_the_distillation_is_a_term_of_its_own(run, rewards):
    _, metrics = run(method="opd", objective={"reward": {"coef": 0.5, "function": rewards}})
    for row in metrics:
        parts = row["loss/distill"] + 0.5 * row["loss/reward"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4, abs=1e-6)
        assert 0 <= row["reward"] <= 1


def test_data_without_answers_is_refused_before_anything_is_written_when_a_reward_is_on(
    run_settings, dataset, tmp_path
):
    lines = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "no_answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"], "gold": row["gold"]}) + "\n" for row in lines))
    settings = run_settings(method="grpo", data={"path": str(path)}, evaluation={"path": None})
    with pytest.raises(DataError, match=r"no answers to reward: no row has a column 'answer'.*data.answer_column"):
        StableOPDTrainer(args=StableOPDConfig(**settings))
    assert not Path(settings["output_dir"]).exists()
    without = run_settings(method="opd", data={"path": str(path)}, evaluation={"path": None}, max_steps=1)
    assert StableOPDTrainer(args=StableOPDConfig(**without)).train().step == 1, "answers are for rewards alone"


@pytest.fixture
def failing(tmp_path, monkeypatch) -> str:
    """Name of a reward function that is right for so many calls and then always raises."""
    (tmp_path / "failing_rewards.py").write_text(
        "calls = []\n"
        "def failing(completion, answer):\n"
        "    calls.append(completion)\n"
        "    if len(calls) > GOOD:\n"
        "        raise KeyError('score')\n"
        "    return float(len(calls) % 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "failing_rewards", raising=False)
    return "failing_rewards:failing"


def test_a_function_that_fails_from_the_start_ends_the_run_with_its_own_words(run, failing):
    importlib.import_module("failing_rewards").GOOD = 0
    with pytest.raises(TrainingError, match=r"failing_rewards:failing' failed on all 12 .* KeyError: 'score'"):
        run(method="grpo", objective={"reward": {"function": failing}})


def test_a_function_that_fails_later_is_noted_once_and_raises_an_alarm(run_settings, tmp_path, failing):
    importlib.import_module("failing_rewards").GOOD = 10

    class Notes(Callback):
        said: list[str] = []  # noqa: RUF012
        alerts: list[Alert] = []  # noqa: RUF012

        def on_note(self, trainer, text):
            self.said.append(text)

        def on_step_end(self, trainer, metrics, alerts):
            self.alerts.extend(alerts)

    settings = run_settings(method="grpo", max_steps=3, objective={"reward": {"function": failing}})
    StableOPDTrainer(args=StableOPDConfig(**settings), callbacks=[Notes()]).train()
    (note,) = Notes.said
    assert "failed on 2 of 12 completions of step 1" in note
    assert "KeyError: 'score'" in note
    found = [(alert.step, alert.severity) for alert in Notes.alerts if alert.rule == "reward_failures"]
    assert found == [(2, "critical")]


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def prompt_ids(tokenizer):
    return torch.tensor([tokenizer("1234:1360;y=0")["input_ids"]])


@pytest.mark.parametrize("method", ["opd", "stableopd", "grpo"])
def test_adapters_are_merged_at_the_end_into_a_model_that_is_the_adapted_student(
    run, rewards, checkpoints, prompt_ids, method
):
    trainer, metrics = run(
        method=method, student={"lora": {"r": 4, "merge": True}}, objective={"reward": {"function": rewards}}
    )
    assert all(row["grad_norm"] > 0 for row in metrics)
    with torch.no_grad():
        adapted = trainer.student.eval()(prompt_ids).logits
        merged = AutoModelForCausalLM.from_pretrained(trainer.config.run_dir / "merged")(prompt_ids).logits
        base = AutoModelForCausalLM.from_pretrained(checkpoints / "student")(prompt_ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - base).norm() > 0.01 * base.norm(), "two steps of training change something"
    names = {file.name for file in (trainer.config.run_dir / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)


def test_a_merged_model_loads_where_neither_peft_nor_this_package_is(run, tmp_path, prompt_ids):
    trainer, _ = run(method="opd", max_steps=1, student={"lora": {"r": 4}, "attn_implementation": "sdpa"})
    assert trainer.updater.student.packs, "its attention has been replaced by one that others do not know"
    trainer.save_model(tmp_path / "whole", merge_adapters=True)
    script = (
        "import sys, torch\n"
        "sys.modules['peft'] = sys.modules['stableopd'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.tensor(eval(sys.argv[2]))).logits.detach(), sys.argv[3])\n"
    )
    arguments = [str(tmp_path / "whole"), str(prompt_ids.tolist()), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = trainer.student.eval()(prompt_ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


def test_saving_leaves_the_student_with_its_adapters_and_writes_them_alone_unless_asked(run, tmp_path, prompt_ids):
    trainer, _ = run(method="opd", max_steps=1, student={"lora": {"r": 4}})
    assert not (trainer.config.run_dir / "merged").exists()
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    trainer.save_model(tmp_path / "merged", merge_adapters=True)
    trainer.save_model(tmp_path / "adapters")
    after = dict(trainer.student.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "adapters" / "adapter_config.json").exists()
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_student_without_adapters_is_saved_whole_when_merging_is_asked_for(run, tmp_path, prompt_ids):
    trainer, _ = run(method="opd", max_steps=1)
    trainer.save_model(tmp_path / "saved", merge_adapters=True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(saved(prompt_ids).logits, trainer.student.eval()(prompt_ids).logits)


@pytest.mark.parametrize("distill", [{}, {"divergence": "reverse_kl", "support": "teacher_topk", "topk": 3}])
def test_the_likeliest_tokens_of_student_and_teacher_are_compared_where_asked_for(run_settings, distill):
    settings = run_settings(objective={"distill": distill}, max_steps=1)
    settings["health"] = {**settings["health"], "overlap_topk": 5}
    trainer = StableOPDTrainer(args=StableOPDConfig(**settings))
    trainer.train()
    row = json.loads((trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["health/topk_overlap"] < 1
    assert row["teacher/entropy"] > 0
    assert row["teacher/logprob"] - row["sampling/logprob"] == pytest.approx(-row["teacher/reverse_kl"], abs=1e-5)
