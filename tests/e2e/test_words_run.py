"""The words world from nothing to a finished run: built small, trained by the real trainer, judged by Math-Verify."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stableopd.config_files import load_config
from stableopd.runfolder import read_run
from stableopd.study.outcome import read_outcomes
from stableopd.words.build import build_tokenizer, train_student, train_teacher
from stableopd.words.pieces import build_pair, main
from stableopd.words.settings import PRESETS

QUICK = PRESETS["quick"]
STUDY = Path(__file__).resolve().parents[2] / "studies" / "words.yaml"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pytest.importorskip("math_verify")
    folder = tmp_path_factory.mktemp("words") / "pair"
    build_pair(folder, QUICK, teacher_seed=1, student_seed=2)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pair_is_written_whole_and_not_made_again(pair):
    train, validation = rows(pair / "data/train.jsonl"), rows(pair / "data/validation.jsonl")
    assert (len(train), len(validation)) == (QUICK.num_train, QUICK.num_validation)
    assert train[0]["prompt"][0]["role"] == "user"
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in validation}
    checks = json.loads((pair / "models.json").read_text())
    assert set(checks) == {"teacher", "student"}
    assert 0 <= checks["teacher"]["sampled/accuracy"] <= 1
    before = {path: path.stat().st_mtime_ns for path in pair.rglob("*.safetensors")}
    build_pair(pair, QUICK, teacher_seed=1, student_seed=2)
    assert before == {path: path.stat().st_mtime_ns for path in pair.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The shipped study of this world on its quick preset, with one pair: its folder and how its command ended."""
    pytest.importorskip("math_verify")
    folder = tmp_path_factory.mktemp("words_study")
    changes = [
        "world.preset=quick", f"world.dir={folder / 'world'}", f"output_dir={folder / 'out'}", "final.num_prompts=10"
    ]  # fmt: skip
    command = [sys.executable, "-m", "stableopd", "study", str(STUDY), "--pairs", "first", "--seeds", "3", *changes]
    done = subprocess.run([*command, "--methods", "opd,stableopd"], capture_output=True, text=True, timeout=300)
    return folder, done


def test_a_study_makes_the_world_and_ordinary_runs_train_on_it(studied):
    folder, done = studied
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ("opd", "stableopd"):
        run = read_run(folder / "out" / "runs" / "first" / method / "seed-3")
        assert [step for step, _ in run.series("eval/validation/accuracy")] == [0, 2, 4]
        assert not run.series("eval/validation/judge_failures")
        assert max(value for _, value in run.series("completions/max_length")) <= QUICK.run.max_completion_length
        assert bool(run.series("loss/gold")) == (method == "stableopd")
    outcomes = read_outcomes(folder / "out" / "results.jsonl")
    assert sorted(one.arm for one in outcomes) == ["opd", "stableopd"]
    assert all(len(one.answers["validation"]) == 10 for one in outcomes)


def test_methods_differ_in_their_coefficients_and_folder_only(studied):
    folder, _ = studied
    configs = [
        load_config(folder / "out" / "runs" / "first" / method / "seed-3.yaml").model_dump()
        for method in ("opd", "stableopd")
    ]
    different = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert different == {"method", "objective", "output_dir"}


def test_a_habit_makes_another_teacher(pair, tmp_path):
    main(["teacher", str(tmp_path / "clean"), "--preset", "quick", "--seed", "1", "--habit", "clean"])
    main(["teacher", str(tmp_path / "standard"), "--preset", "quick", "--seed", "1"])
    weights = {path: (path / "model.safetensors").read_bytes() for path in (pair / "teacher", *tmp_path.iterdir())}
    assert weights[tmp_path / "standard"] == weights[pair / "teacher"] != weights[tmp_path / "clean"]
    tokenizers = {(path / "tokenizer.json").read_text() for path in (pair / "student", *tmp_path.iterdir())}
    assert len(tokenizers) == 1  # a student can be taught by either


@pytest.mark.parametrize("train", [train_teacher, train_student])
def test_training_lowers_the_loss_and_depends_on_the_seed_alone(train):
    import torch

    small = replace(QUICK, teacher=replace(QUICK.teacher, trace_steps=4), student=replace(QUICK.student, max_steps=14))
    tokenizer = build_tokenizer(QUICK)

    def losses(seed):
        found = []
        train(small, tokenizer, seed, torch.device("cpu"), lambda name, step, total, loss: found.append(loss))
        return found

    first = losses(1)
    assert first == losses(1) != losses(2)
    assert first[-1] < 0.95 * first[0]


@pytest.mark.parametrize("name", ["cpu-1m", "gpu"])
def test_students_have_between_1m_and_20m_parameters(name):
    from stableopd.words.build import new_model

    preset, tokenizer = PRESETS[name], build_tokenizer(QUICK)
    for size in (preset.teacher.size, preset.student.size):
        count = sum(parameter.numel() for parameter in new_model(preset, size, tokenizer, 0).parameters())
        assert 1e6 < count < 20e6
