"""Two processes train the run that one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError
from stableopd.preparation import check_processes


def launch(settings: dict, folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(folder), "num_processes": processes}))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29613"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "stableopd", "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("num_minibatches", [1, 5])
def test_two_processes_give_the_run_of_one(run_settings, tmp_path, num_minibatches):
    """With five updates for six prompts one process has none of its own prompts in some of them."""
    settings = run_settings(max_steps=3, optimizer={"num_minibatches": num_minibatches})
    for processes in (1, 2):
        done = launch(settings, tmp_path / f"run{processes}", processes)
        assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run1", "run2")
    )
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if not key.startswith(("step_time", "time/")):
                assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    weights = [load_file(tmp_path / name / "checkpoints/step-000003/model.safetensors") for name in ("run1", "run2")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=2e-3, msg=name)
    samples = [(tmp_path / name / "rollouts/step-000001.jsonl").read_text() for name in ("run1", "run2")]
    assert [json.loads(a)["completion"] for a in samples[0].splitlines()] == [
        json.loads(b)["completion"] for b in samples[1].splitlines()
    ]


def test_another_number_of_processes_than_asked_for_is_refused():
    with pytest.raises(ConfigError, match="2 processes were asked for and 1"):
        check_processes(Accelerator(cpu=True), StableOPDConfig(num_processes=2))


def test_a_launch_whose_processes_do_not_see_each_other_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        check_processes(accelerator, StableOPDConfig())
