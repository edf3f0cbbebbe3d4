"""The words world from nothing to a finished run: built small, trained by the real trainer, judged by Math-Verify."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stableopd.config_files import dump_config, load_config
from stableopd.errors import ConfigError
from stableopd.runfolder import read_run
from stableopd.trainer import StableOPDTrainer
from stableopd.words.build import build_tokenizer, train_student, train_teacher
from stableopd.words.pieces import build_pair
from stableopd.words.runs import METHODS, Pair, words_config
from stableopd.words.settings import PRESETS

QUICK = PRESETS["quick"]
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "words.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pytest.importorskip("math_verify")
    folder = tmp_path_factory.mktemp("words") / "pair"
    build_pair(folder, QUICK, teacher_seed=1, student_seed=2)
    return folder


@pytest.fixture(scope="module")
def benchmark_script():
    spec = importlib.util.spec_from_file_location("words_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize("method", ["opd", "stableopd"])
def test_an_ordinary_run_trains_on_it(pair, tmp_path, method):
    config = words_config(Pair.in_folder(pair), QUICK, method, output_dir=tmp_path / method, seed=3)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    StableOPDTrainer(args=load_config(tmp_path / "run.yaml")).train()
    run = read_run(tmp_path / method)
    assert [step for step, _ in run.series("eval/validation/accuracy")] == [0, 2, 4]
    assert not run.series("eval/validation/judge_failures")
    assert max(value for _, value in run.series("completions/max_length")) <= QUICK.run.max_completion_length
    assert bool(run.series("loss/gold")) == (method == "stableopd")


def test_methods_differ_in_their_coefficients_and_folder_only(pair, tmp_path):
    configs = {
        method: words_config(Pair.in_folder(pair), QUICK, method, output_dir=tmp_path / method).model_dump()
        for method in METHODS
    }
    for config in configs.values():
        assert {key for key in config if config[key] != configs["opd"][key]} <= {"method", "objective", "output_dir"}
    with pytest.raises(ConfigError, match="did you mean 'mixture'"):
        words_config(Pair.in_folder(pair), QUICK, "mixtur", output_dir=tmp_path)


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


def test_students_of_the_gpu_preset_have_between_1m_and_20m_parameters():
    from stableopd.words.build import new_model

    tokenizer = build_tokenizer(QUICK)
    for size in (PRESETS["gpu"].teacher.size, PRESETS["gpu"].student.size):
        count = sum(parameter.numel() for parameter in new_model(PRESETS["gpu"], size, tokenizer, 0).parameters())
        assert 1e6 < count < 20e6


def test_arguments_of_the_benchmark_are_checked(benchmark_script, tmp_path, capsys):
    parsed = benchmark_script.parse(["--quick", "--seeds", "2", "--methods", "opd,kl", "--out", str(tmp_path / "w")])
    assert parsed.preset == "quick"
    assert parsed.seeds == [0, 1]
    names = [job.name for job in benchmark_script.jobs_of(parsed, 1)]
    assert names == ["data", "teacher-1", "student-1", "opd, seed 1", "kl, seed 1"]
    assert load_config(tmp_path / "w" / "kl-1.yaml").objective.reference.coef == 0.1
    for wrong in (["--methods", "opd,magic"], ["--seeds", "0"], ["--preset", "tpu"]):
        with pytest.raises(SystemExit) as stopped:
            benchmark_script.parse([*wrong, "--out", str(tmp_path)])
        assert stopped.value.code == 2
    assert "there is no 'magic'" in capsys.readouterr().err


def test_the_benchmark_uses_what_is_there_and_starts_nothing_twice(pair, benchmark_script, tmp_path, capsys):
    arguments = ["--quick", "--methods", "opd", "--out", str(tmp_path)]
    pieces = benchmark_script.jobs_of(benchmark_script.parse(arguments), 0)[:3]
    for job, made in zip(pieces, ("data", "teacher", "student"), strict=True):
        shutil.copytree(pair / made, job.stem)
        job.record.write_text(json.dumps({"digest": job.digest}))
    assert benchmark_script.main(arguments) == 0
    first = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in first if line.startswith("done in")] == ["opd, seed 0"]
    assert json.loads(first[-1])["opd"]["runs"] == 1
    assert benchmark_script.main(arguments) == 0
    again = capsys.readouterr().out.splitlines()
    assert not [line for line in again if line.startswith("done in")]
    assert again[-1] == first[-1]
