"""Two processes train the run that one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError
from stableopd.preparation import check_processes
from stableopd.toy.models import build_model


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def python(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in one process or under torchrun in several."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port()]
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def launch(settings: dict[str, Any], folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(folder), "num_processes": processes}))
    return python(processes, "-m", "stableopd", "train", str(config))


def assert_two_processes_give_the_run_of_one(
    settings: dict[str, Any], folder: Path, weights: str = "model.safetensors"
) -> None:
    for processes in (1, 2):
        done = launch(settings, folder / f"run{processes}", processes)
        assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run1", "run2")
    )
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if not key.startswith(("step_time", "time/")):
                assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    last = f"checkpoints/step-{settings['max_steps']:06d}/{weights}"
    first, second = (load_file(folder / name / last) for name in ("run1", "run2"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=2e-3, msg=name)
    samples = [(folder / name / "rollouts/step-000001.jsonl").read_text() for name in ("run1", "run2")]
    assert [json.loads(a)["completion"] for a in samples[0].splitlines()] == [
        json.loads(b)["completion"] for b in samples[1].splitlines()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("num_minibatches", [1, 5])
def test_two_processes_give_the_run_of_one(run_settings, tmp_path, num_minibatches):
    """With five updates for six prompts one process has none of its own prompts in some of them."""
    settings = run_settings(max_steps=3, optimizer={"num_minibatches": num_minibatches})
    assert_two_processes_give_the_run_of_one(settings, tmp_path)


@pytest.mark.slow
def test_two_processes_give_the_run_of_one_with_two_teachers_in_a_pipeline(
    run_settings, tmp_path, dataset, checkpoints
):
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "routed.jsonl"
    path.write_text("".join(json.dumps({**row, "who": "ab"[n % 3 == 0]}) + "\n" for n, row in enumerate(rows)))
    settings = run_settings(
        max_steps=4,
        data={"path": str(path), "teacher_column": "who"},
        rollout={"pipeline": True},
        objective={"correction": {"kind": "truncate"}},
        evaluation={"every_steps": 3},
        checkpoint={"every_steps": 100},
    )
    del settings["teacher"]
    places = zip("ab", ("teacher", "student"), strict=True)
    settings["teachers"] = {name: {"model_name_or_path": str(checkpoints / place)} for name, place in places}
    assert_two_processes_give_the_run_of_one(settings, tmp_path)


@pytest.mark.slow
def test_two_processes_choose_the_least_certain_tokens_of_both_and_average_over_all_rows(run_settings, tmp_path):
    distill = {"divergence": "jsd", "tokens": {"entropy_fraction": 0.4, "mask_special": True}}
    settings = run_settings(max_steps=3, objective={"distill": distill, "aggregation": "sequence_mean"})
    assert_two_processes_give_the_run_of_one(settings, tmp_path)


@pytest.mark.slow
def test_two_processes_train_the_adapters_that_one_process_trains(run_settings, tmp_path):
    settings = run_settings(max_steps=3, student={"lora": {"r": 2}})
    assert_two_processes_give_the_run_of_one(settings, tmp_path, "adapter_model.safetensors")


@pytest.mark.slow
def test_two_processes_reward_what_one_process_rewards(run_settings, tmp_path):
    """Groups of a prompt's rollouts stay in one process; the mean reward is of all."""
    reward = {"function": "operator:contains"}
    settings = run_settings(max_steps=3, method="grpo", objective={"reward": reward, "aggregation": "sequence_sum"})
    assert_two_processes_give_the_run_of_one(settings, tmp_path)


@pytest.mark.slow
def test_two_processes_decide_alike_and_roll_back_together(run_settings, tmp_path):
    """Thresholds so low that chance crosses them; the alarms then are the same in both runs."""
    low = {
        "baseline_steps": 2, "window": 1, "patience": 1, "length_growth_warning": 1.01, "length_growth_critical": 1.02,
        "truncated_warning": 0.99, "truncation_rise_warning": 0.9, "truncation_rise_critical": 0.9,
    }  # fmt: skip
    settings = run_settings(
        max_steps=6, method="opd", seed=1, checkpoint={"every_steps": 1}, optimizer={"learning_rate": 1e-3},
        health={"actions": "rollback", "tail_chars": 1000, "thresholds": low},
    )  # fmt: skip
    assert_two_processes_give_the_run_of_one(settings, tmp_path)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "alerts.jsonl").read_text().splitlines()]
        for name in ("run1", "run2")
    )
    assert "rollback" in {alert["action"] for alert in one}
    assert [(a["step"], a["rule"], a["action"]) for a in one] == [(a["step"], a["rule"], a["action"]) for a in two]


SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from stableopd import StableOPDConfig, StableOPDTrainer, distributed
from stableopd.toy.models import build_model
from stableopd.toy.tokenizer import build_tokenizer

folder = sys.argv[1]
tokenizer = build_tokenizer()
dist.init_process_group("gloo")
rank = dist.get_rank()

# gradients: of both, of one, of nobody; of several dtypes; larger than a bucket; not contiguous
distributed._BUCKET_ELEMENTS = 7
torch.manual_seed(rank)
shapes = {"both": (2, 3), "first": (2, 2), "second": (3,), "nobody": (2,), "turned": (4, 2), "large": (5, 5)}
parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
parameters["double"] = nn.Parameter(torch.zeros(3, dtype=torch.float64))
for name, parameter in parameters.items():
    if name not in ({"second", "nobody"} if rank == 0 else {"first", "nobody"}):
        parameter.grad = torch.randn_like(parameter)
parameters["turned"].grad = torch.randn(2, 4).T
mine = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
distributed.sum_gradients(list(parameters.values()))
summed = {name: p.grad for name, p in parameters.items()}

# weights and buffers: everybody takes those of the first
layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
layer[1].running_mean.normal_()
layer.to(torch.bfloat16)
own = [array.clone() for array in (*layer.parameters(), *layer.buffers())]
distributed.share_weights(layer)
shared = [*layer.parameters(), *layer.buffers()]

# a student that is drawn anew in each process
student = build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=10 + rank)
settings = json.loads(open(folder + "/settings.json").read())
trainer = StableOPDTrainer(model=student, args=StableOPDConfig(**settings), processing_class=tokenizer)
begun = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
trainer.train()
ended = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
torch.save(
    {"mine": mine, "summed": summed, "own": own, "shared": shared, "begun": begun, "ended": ended,
     "digest": trainer.state.begun_with["student"]},
    f"{folder}/rank{rank}.pt",
)
"""


@pytest.mark.slow
def test_processes_share_the_first_ones_weights_and_the_sum_of_their_gradients(run_settings, tmp_path, tokenizer):
    settings = run_settings(method="stableopd", max_steps=2, evaluation={"path": None})
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(2, str(tmp_path / "script.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))

    assert first["summed"].pop("nobody") is None, "as in a single process: no optimizer decays it"
    assert second["summed"].pop("nobody") is None

    for name, total in first["summed"].items():
        torch.testing.assert_close(second["summed"][name], total, rtol=0, atol=0, msg=name)
        parts = [rank["mine"][name] for rank in (first, second) if name in rank["mine"]]
        torch.testing.assert_close(total, sum(parts, torch.zeros_like(total)), msg=name)
        assert len(parts) == {"first": 1, "second": 1}.get(name, 2)

    assert not torch.equal(first["own"][0], second["own"][0])
    for found, other, own in zip(first["shared"], second["shared"], first["own"], strict=True):
        assert torch.equal(found, own), "the first process keeps its own"
        assert torch.equal(other, own)

    drawn = build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=10)
    assert first["digest"] == second["digest"]
    for name, parameter in drawn.named_parameters():
        assert torch.equal(first["begun"][name], parameter), name
        assert torch.equal(second["begun"][name], parameter), name
        assert torch.equal(first["ended"][name], second["ended"][name]), name
    assert any(not torch.equal(first["ended"][name], first["begun"][name]) for name in first["begun"])


def test_another_number_of_processes_than_asked_for_is_refused():
    with pytest.raises(ConfigError, match="2 processes were asked for and 1"):
        check_processes(Accelerator(cpu=True), StableOPDConfig(num_processes=2))


def test_a_launch_whose_processes_do_not_see_each_other_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        check_processes(accelerator, StableOPDConfig())
