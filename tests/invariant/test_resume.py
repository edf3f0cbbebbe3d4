"""N steps equal k steps and a resume, bit for bit; a kill at any instant leaves a folder that resumes."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stableopd.checkpoint import checkpoints_in
from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError, RunFolderError
from stableopd.models import digest_of_weights
from stableopd.protocols import Callback
from stableopd.trainer import StableOPDTrainer

TIMES = ("step_time", "time/")


class StopHere(Exception):  # noqa: N818 - not an error
    pass


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer, metrics, alerts):
        if metrics["step"] == self.step:
            raise StopHere


def train(settings, folder, *, stop_after=None, resume=False):
    config = StableOPDConfig(**{**settings, "output_dir": str(folder)})
    trainer = StableOPDTrainer(args=config, callbacks=[StopAfter(stop_after)] if stop_after else [])
    if stop_after:
        with pytest.raises(StopHere):
            trainer.train(resume_from_checkpoint=resume)
    else:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def records(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


WEIGHTS = ("model.safetensors", "optimizer.safetensors")
REWARD = "operator:contains"
"""(completion, answer): the answer's digit stands in it somewhere, which chance brings about."""


def assert_same_run(left: Path, right: Path, last_step: int, parts: tuple[str, ...] = WEIGHTS) -> None:
    for name in ("metrics.jsonl", "alerts.jsonl"):
        assert records(left / name) == records(right / name), name
    assert [row["step"] for row in records(left / "metrics.jsonl")] == list(range(last_step + 1))
    for file in sorted((left / "rollouts").iterdir()):
        assert file.read_text() == (right / "rollouts" / file.name).read_text()
    name = f"step-{last_step:06d}"
    for part in parts:
        one, other = (load_file(run / "checkpoints" / name / part) for run in (left, right))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), part
    states = [json.loads((run / "checkpoints" / name / "trainer_state.json").read_text()) for run in (left, right)]
    assert states[0] == states[1]
    assert states[0]["monitor"], "the monitor's state is part of it"


@pytest.mark.parametrize("method", ["stableopd", "sft"])
@pytest.mark.parametrize("stop_after", [2, 3])
def test_resuming_gives_the_run_that_was_never_stopped(run_settings, tmp_path, method, stop_after):
    settings = run_settings(method=method, max_steps=5)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "parts", stop_after=stop_after)
    resumed = train(settings, tmp_path / "parts", resume=True)
    assert resumed.state.step == 5
    if method == "sft":
        assert not list((tmp_path / "whole" / "rollouts").iterdir())
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 5)


def test_the_same_settings_give_the_same_run_and_another_seed_another(run_settings, tmp_path):
    settings = run_settings(max_steps=2)
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        train({**settings, "seed": seed}, tmp_path / name)
    assert_same_run(tmp_path / "one", tmp_path / "two", 2)
    assert records(tmp_path / "one" / "metrics.jsonl") != records(tmp_path / "three" / "metrics.jsonl")


def test_a_run_stopped_before_its_first_checkpoint_starts_over(run_settings, tmp_path):
    settings = run_settings(max_steps=2)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "parts", stop_after=1)
    assert not checkpoints_in(tmp_path / "parts" / "checkpoints")[1:]
    train(settings, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 2)


def test_a_torn_line_and_half_written_checkpoints_are_cleared_away(run_settings, tmp_path):
    settings = run_settings(max_steps=4)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "parts", stop_after=3)
    folder = tmp_path / "parts"
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "los\xe2\x82')
    (folder / "checkpoints" / ".new-step-000004").mkdir()
    (folder / "checkpoints" / ".new-step-000004" / "model.safetensors").write_text("half")
    train(settings, folder, resume=True)
    assert_same_run(tmp_path / "whole", folder, 4)
    assert not list((folder / "checkpoints").glob(".*"))


def test_an_existing_run_is_not_written_into_without_resume(run_settings, tmp_path):
    settings = run_settings(max_steps=1)
    train(settings, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="--resume"):
        train(settings, tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_does_not_go_on_under_another_configuration(run_settings, tmp_path):
    settings = run_settings(max_steps=1)
    train(settings, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"rollout.temperature: 1.0 -> 0.5"):
        train(run_settings(max_steps=1, rollout={"temperature": 0.5}), tmp_path / "run", resume=True)


def test_a_finished_run_can_still_be_told_to_merge_its_adapters(run_settings, tmp_path):
    lora = {"r": 2}
    train(run_settings(max_steps=2, student={"lora": lora}), tmp_path / "run")
    assert not (tmp_path / "run" / "merged").exists()
    before = records(tmp_path / "run" / "metrics.jsonl")
    train(run_settings(max_steps=2, student={"lora": {**lora, "merge": True}}), tmp_path / "run", resume=True)
    assert records(tmp_path / "run" / "metrics.jsonl") == before
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert not any("lora" in name for name in merged)
    with pytest.raises(ConfigError, match=r"student.lora.r: 2 -> 3"):
        train(run_settings(max_steps=2, student={"lora": {"r": 3, "merge": True}}), tmp_path / "run", resume=True)


def test_a_run_whose_log_is_gone_goes_on_and_says_so(run_settings, tmp_path):
    class Notes(Callback):
        said: list[str] = []  # noqa: RUF012

        def on_note(self, trainer, text):
            self.said.append(text)

    settings = {**run_settings(max_steps=4), "output_dir": str(tmp_path / "run")}
    train(settings, tmp_path / "run", stop_after=3)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    StableOPDTrainer(args=StableOPDConfig(**settings), callbacks=[Notes()]).train(resume_from_checkpoint=True)
    (note,) = Notes.said
    assert "metrics.jsonl is gone: the run goes on from step-000002" in note
    assert [row["step"] for row in records(tmp_path / "run" / "metrics.jsonl")] == [3, 4]
    StableOPDTrainer(args=StableOPDConfig(**settings), callbacks=[Notes()]).train(resume_from_checkpoint=True)
    assert len(Notes.said) == 1


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("foreign", ["metrics.jsonl", "thesis.txt", "rollouts/step-abc.jsonl"])
def test_a_folder_that_is_no_run_is_not_resumed_into(run_settings, tmp_path, foreign):
    path = tmp_path / "theirs" / foreign
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}\n')
    (tmp_path / "theirs" / "other.txt").write_text("theirs")
    before = tree(tmp_path / "theirs")
    with pytest.raises(RunFolderError, match="not a run folder"):
        train(run_settings(), tmp_path / "theirs", resume=True)
    assert tree(tmp_path / "theirs") == before


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(run_settings, tmp_path):
    settings = run_settings(max_steps=4)
    train(settings, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = records(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(RunFolderError, match="checkpoints are gone"):
        train(settings, tmp_path / "run", resume=True)
    assert records(tmp_path / "run" / "metrics.jsonl") == before


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(run_settings, tmp_path, file):
    settings = run_settings(max_steps=2)
    train(settings, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000002" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RunFolderError, match=r"step-000002 is damaged .* checkpoint before it"):
        train(settings, tmp_path / "run", resume=True)


def test_other_weights_or_data_under_the_same_names_are_noticed(run_settings, tmp_path, dataset):
    data = tmp_path / "train.jsonl"
    data.write_text((dataset / "train.jsonl").read_text())
    settings = run_settings(max_steps=2, data={"path": str(data)})
    train(settings, tmp_path / "run")
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    trainer = StableOPDTrainer(
        args=StableOPDConfig(**{**settings, "output_dir": str(tmp_path / "run"), "max_steps": 3})
    )
    for _ in range(2):
        with pytest.raises(RunFolderError, match="another dataset"):
            trainer.train(resume_from_checkpoint=True)
    assert trainer.state.step == 0


def test_the_reference_of_a_resumed_run_cannot_be_the_trained_student(run_settings, tmp_path):
    settings = {**run_settings(max_steps=2), "output_dir": str(tmp_path / "run")}
    first = StableOPDTrainer(args=StableOPDConfig(**settings))
    first.train()
    second = StableOPDTrainer(model=first.student, args=StableOPDConfig(**{**settings, "max_steps": 3}))
    with pytest.raises(RunFolderError, match="another student"):
        second.train(resume_from_checkpoint=True)


def test_the_digest_of_weights_is_of_their_bits_and_of_all_of_them():
    weights = torch.nn.Linear(700, 900)
    digest = digest_of_weights(weights)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert digest_of_weights(weights) == digest
    torch.set_num_threads(threads)
    with torch.no_grad():
        weights.bias[17] = torch.nextafter(weights.bias[17], torch.tensor(9.0))
    assert digest_of_weights(weights) != digest


def test_a_refused_resume_leaves_the_folder_free(run_settings, tmp_path):
    settings = run_settings(max_steps=2)
    train(settings, tmp_path / "run")
    refused = StableOPDTrainer(args=StableOPDConfig(**{**settings, "seed": 9, "output_dir": str(tmp_path / "run")}))
    with pytest.raises(ConfigError):
        refused.train(resume_from_checkpoint=True)
    train({**settings, "max_steps": 3}, tmp_path / "run", resume=True)
    del refused


def test_a_decaying_learning_rate_ties_the_run_to_its_number_of_steps(run_settings, tmp_path):
    settings = run_settings(max_steps=2, optimizer={"schedule": "linear"})
    train(settings, tmp_path / "run")
    with pytest.raises(ConfigError, match="max_steps: 2 -> 3"):
        train({**settings, "max_steps": 3}, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"lora": {"r": 2}}},
        {"optimizer": {"num_epochs": 2, "schedule": "cosine", "warmup_steps": 2}},
        {"objective": {"reference": {"estimator": "k3"}}, "rollout": {"temperature": 0.7, "top_p": 0.9}},
        {"objective": {"distill": {"divergence": "jsd", "tokens": {"entropy_fraction": 0.5}}}},
        {"objective": {"distill": {"divergence": "reverse_kl", "support": "teacher_topk", "topk": 4}}},
        {
            "method": "grpo", "objective": {"correction": {"kind": "truncate"}, "reward": {"function": REWARD}},
            "student": {"lora": {"r": 2}},
        },
    ],
    ids=["lora", "epochs and schedule", "k3 and top-p", "whole vocabulary", "top-k", "reward and lora"],
)  # fmt: skip
def test_every_kind_of_run_resumes_to_the_bit(run_settings, tmp_path, changes):
    settings = run_settings(max_steps=5, **changes)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "parts", stop_after=3)
    train(settings, tmp_path / "parts", resume=True)
    parts = ("adapter_model.safetensors", "optimizer.safetensors") if "student" in changes else WEIGHTS
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 5, parts)


WRITES = ("os.fsync", "pathlib.Path.rename", "pathlib.Path.replace", "pathlib.Path.unlink", "shutil.rmtree")


def die_at_write(number: int) -> None:
    """From now on the process ends, as by kill -9, at the `number`-th write that is meant to be atomic."""
    left = [number]

    def dying(original):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return original(*arguments, **options)

        return call

    for name in WRITES:
        module_name, _, attribute = name.rpartition(".")
        owner = pathlib.Path if module_name == "pathlib.Path" else sys.modules[module_name]
        setattr(owner, attribute, dying(getattr(owner, attribute)))


@pytest.mark.slow
def test_killed_at_any_write_it_resumes_to_the_same_run(run_settings, tmp_path):
    """Every checkpoint, rename, flush and deletion of a run is once the last thing that it does."""
    settings = run_settings(max_steps=3, checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": False})
    train(settings, tmp_path / "whole")
    number = died = 0
    while True:
        number += 1
        folder = tmp_path / f"killed{number}"
        child = os.fork()
        if child == 0:
            die_at_write(number)
            with contextlib.suppress(BaseException):
                StableOPDTrainer(args=StableOPDConfig(**{**settings, "output_dir": str(folder)})).train()
                os._exit(0)
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), "the run failed instead of dying"
        if status == 0:
            break
        died += 1
        train(settings, folder, resume=True)
        assert_same_run(tmp_path / "whole", folder, 3)
        shutil.rmtree(folder)
    assert died > 20


def test_a_folder_that_another_process_writes_is_refused(run_settings, tmp_path):
    config = StableOPDConfig(**run_settings(max_steps=1))
    first = StableOPDTrainer(args=config)
    first._open_run_folder(resume=False)
    with pytest.raises(RunFolderError, match="another process"):
        StableOPDTrainer(args=config).train(resume_from_checkpoint=True)
    first.logbook.close()


def test_rotation_keeps_the_last_ones_and_the_best(run_settings, tmp_path):
    class PretendAccuracy(StableOPDTrainer):
        def evaluate(self):
            return {"eval/validation/accuracy": 1.0 - abs(len(self.seen) - 2) * 0.1 if not self.seen.append(0) else 0}

        seen: list = []  # noqa: RUF012

    settings = run_settings(max_steps=6, checkpoint={"every_steps": 1, "keep_last": 2}, evaluation={"every_steps": 1})
    trainer = PretendAccuracy(args=StableOPDConfig(**settings))
    trainer.train()
    kept = [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")]
    assert trainer.state.best_step == 1
    assert kept == ["step-000001", "step-000005", "step-000006"]


def test_a_checkpoint_loads_as_an_ordinary_model_and_is_the_student(run_settings, tmp_path):
    trainer = train(run_settings(max_steps=2), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000002"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in trainer.student.named_parameters():
        assert torch.equal(parameter, dict(loaded.named_parameters())[name]), name
    assert AutoTokenizer.from_pretrained(path).get_vocab() == trainer.tokenizer.get_vocab()
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert not suffixes & {".pt", ".bin", ".pkl", ".pth"}, "no pickles"


@pytest.mark.slow
def test_killed_at_random_instants_it_still_ends_as_the_run_that_was_never_killed(run_settings, tmp_path):
    settings = run_settings(max_steps=6, checkpoint={"every_steps": 1, "keep_last": 1})
    train(settings, tmp_path / "whole")
    folder = tmp_path / "killed"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    command = [sys.executable, "-m", "stableopd", "train", str(config), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for lines in (1, 3, 4, 6):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(records_or_nothing(folder / "metrics.jsonl")) < lines:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", folder, 6)


def records_or_nothing(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []
