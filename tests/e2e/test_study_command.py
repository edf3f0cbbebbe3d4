"""`stableopd study` as a user runs it: real models, real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stableopd.study.outcome import read_outcomes

pytestmark = pytest.mark.slow


def study_file(folder: Path, settings: dict, **more) -> Path:
    """Two methods, two seeds, a cold start, on the tiny checkpoints."""
    base = {key: value for key, value in settings.items() if key not in ("method", "output_dir", "seed")}
    study = {
        "base": {**base, "max_steps": 2},
        "cold_start": {"max_steps": 1},
        "methods": {"stableopd": {"lambda_gold": 0.5}, "opd": {}},
        "seeds": [0, 1],
        "final": None,
        "threads": 1,
        "parallel": 2,
        "output_dir": str(folder / "out"),
        **more,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "stableopd", "study", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(checkpoints, dataset, tmp_path_factory):
    """A study of which one method is broken, run once: its folder, its file and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    settings = {
        "student": {"model_name_or_path": str(checkpoints / "student")},
        "teacher": {"model_name_or_path": str(checkpoints / "teacher")},
        "data": {"path": str(dataset / "train.jsonl")},
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_completion_length": 8},
        "evaluation": {
            "path": str(dataset / "validation.jsonl"), "every_steps": 1, "num_prompts": 8,
            "judge": "stableopd.toy.task:judge",
        },
        "health": {"tail_chars": 8, "compression_threshold": 2.2},
    }  # fmt: skip
    (folder / "torn.jsonl").write_text('{"prompt": "12')
    broken = {"method": "opd", "data": {"path": str(folder / "torn.jsonl")}}
    final = {"num_prompts": 10, "num_samples": 2}
    methods = {"stableopd": {}, "opd": {}, "broken": broken}
    path = study_file(folder, settings, methods=methods, seeds=[0], final=final)
    return folder, path, run(path)


def test_methods_are_compared_and_one_that_fails_stops_no_other(finished):
    folder, _, done = finished
    assert done.returncode == 1
    assert "failed run runs/pair/broken/seed-0" in done.stdout
    assert "torn.jsonl" in " ".join(done.stdout.split())
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert sorted(line["arm"] for line in lines) == ["opd", "stableopd"]
    assert all(len(line["answers"]["validation"]) == 10 for line in lines)
    assert lines[0]["benchmarks"] == lines[1]["benchmarks"]
    assert all(0 <= line["figures"]["final_greedy_accuracy"] <= 1 for line in lines)
    page = (folder / "out" / "study.html").read_text()
    assert "1 of 3 runs are missing" in page
    assert "torn.jsonl" in page
    assert "| opd | 1 |" in (folder / "out" / "table.md").read_text()


def test_both_methods_begin_with_the_cold_starts_student(finished):
    folder, _, _ = finished
    (start,) = (folder / "out" / "cold_start").glob("student-*/seed-0/checkpoints/step-000001")
    assert (start / "model.safetensors").exists()
    for method in ("opd", "stableopd"):
        config = yaml.safe_load((folder / "out" / "runs" / "pair" / method / "seed-0" / "config.yaml").read_text())
        assert config["student"]["model_name_or_path"] == str(start)


def test_what_is_finished_is_not_repeated_and_json_alone_goes_to_standard_output(finished):
    folder, path, _ = finished
    before = (folder / "out" / "runs" / "pair" / "opd" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    again = run(path, "--json")
    assert again.returncode == 1
    document = json.loads(again.stdout)
    assert (document["num_finished"], document["num_runs"]) == (2, 3)
    assert {failure["name"]: failure["status"] for failure in document["failures"]} == {
        "run runs/pair/broken/seed-0": "failed",
        "answers runs/pair/broken/seed-0": "skipped",
    }
    assert (folder / "out" / "runs" / "pair" / "opd" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == before


def test_what_cannot_be_read_is_told_before_anything_is_run(finished):
    folder, path, _ = finished
    done = run(path, "base.evaluation.path=absent.jsonl", f"output_dir={folder / 'other'}", "final.judge=no.such:judge")
    assert done.returncode == 2
    assert "evaluation.path: absent.jsonl does not exist" in done.stderr
    assert "final.judge" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "other").exists()


def test_a_result_that_cannot_be_read_fails_alone(finished, tmp_path):
    folder, path, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "results.jsonl").unlink()
    (tmp_path / "out" / "runs" / "pair" / "opd" / "seed-0.answers.json").write_text("[{}]")
    moved = folder.parent / "moved.yaml"
    moved.write_text(path.read_text().replace(str(folder / "out"), str(tmp_path / "out")))
    done = run(moved)
    assert done.returncode == 1
    assert "failed answers runs/pair/opd/seed-0: its result cannot be read" in " ".join(done.stdout.split())
    assert [one.arm for one in read_outcomes(tmp_path / "out" / "results.jsonl")] == ["stableopd"]
    run(moved)
    assert [one.arm for one in read_outcomes(tmp_path / "out" / "results.jsonl")] == ["stableopd", "opd"]


def test_finished_runs_of_other_settings_are_never_mixed_in(finished):
    folder, path, _ = finished
    before = (folder / "out" / "results.jsonl").read_bytes()
    changed = run(path, "base.optimizer.learning_rate=0.5")
    assert changed.returncode == 2
    told = " ".join(changed.stderr.split())
    assert "were made with other settings, stableopd of pair, seed 0 among them (" in told
    assert "(cold_start.optimizer.learning_rate: not set -> 0.5; optimizer.learning_rate: not set -> 0.5)" in told, told
    assert "Traceback" not in changed.stderr
    assert (folder / "out" / "results.jsonl").read_bytes() == before


def test_finished_runs_are_asked_anew_without_being_trained_again(finished, tmp_path):
    folder, path, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    moved = tmp_path / "moved.yaml"
    moved.write_text(path.read_text().replace(str(folder / "out"), str(tmp_path / "out")))
    metrics = tmp_path / "out" / "runs" / "pair" / "opd" / "seed-0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    refused = run(moved, "final.num_prompts=4")
    assert refused.returncode == 2
    assert "(final.--num-prompts: 10 -> 4). Only what they are asked at the end differs: --ask-again" in " ".join(
        refused.stderr.split()
    )
    run(moved, "final.num_prompts=4", "--ask-again")
    found = read_outcomes(tmp_path / "out" / "results.jsonl")
    assert [len(one.answers["validation"]) for one in found] == [4, 4]
    assert metrics.stat().st_mtime_ns == before
    assert run(moved, "final.num_prompts=4", "--report-only").returncode == 1


def test_the_report_alone_runs_nothing(finished):
    folder, path, _ = finished
    (folder / "out" / "study.html").unlink()
    done = run(path, "--report-only", "methods.later={method: opd}")
    assert done.returncode == 1
    assert "missing 2 of 4 runs: broken of pair, seed 0, later of pair, seed 0" in " ".join(done.stdout.split())
    assert (folder / "out" / "study.html").exists()
    assert not (folder / "out" / "runs" / "pair" / "later").exists()


def test_a_study_interrupted_and_then_killed_goes_on_to_the_results_of_one_that_was_not(run_settings, tmp_path):
    settings = run_settings()
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    base = {key: value for key, value in settings.items() if key not in ("method", "output_dir", "seed")}
    methods = {"stableopd": {}, "opd": {}, "sft": {}}
    more = {"seeds": [0], "cold_start": None, "parallel": 1, "base": {**base, "max_steps": 2}, "methods": methods}
    whole, cut = (study_file(tmp_path / name, settings, **more) for name in ("whole", "cut"))
    assert run(whole).returncode == 0
    results = tmp_path / "cut" / "out" / "results.jsonl"
    for number, sign in enumerate((signal.SIGINT, signal.SIGKILL), start=1):
        process = subprocess.Popen(command(cut), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _until(lambda: results.exists() and len(results.read_text().splitlines()) == number)  # noqa: B023
        process.send_signal(sign)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL)
        assert "Traceback" not in stderr
        assert ("the same command goes on" in stderr) == (sign == signal.SIGINT)
    _until(lambda: run(cut).returncode == 0)  # what a kill has orphaned may still be at its steps
    assert _figures(results) == _figures(tmp_path / "whole" / "out" / "results.jsonl")


def _until(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _figures(path: Path) -> dict[str, dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["arm"]: {k: v for k, v in line["figures"].items() if not k.endswith("_s")} for line in lines}


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("methods: {opd: {}}\nmethds: {}", (), "did you mean 'methods'"),
        ("methods: [opd]", (), "methods"),
        ("methods: {opd: {rollout: {temprature: 1}}}", (), "temprature"),
        ("methods: {opd: {}", (), "broken YAML"),
        ("methods: {opd: {}}", ("--seeds", "1,x"), "--seeds"),
        ("methods: {opd: {}}", ("seeds=[-1]",), "error: seeds=[-1] (command line): input should be greater"),
        ("", (), "methods is required and not given"),
        (
            "methods: {opd: {}}\nfinal: null",
            ("output_dir=study.yaml",),
            "study.yaml: file exists. Choose another place",
        ),
    ],
)
def test_a_study_that_cannot_be_read_is_one_message_and_nothing_is_made(tmp_path, content, arguments, words):
    path = tmp_path / "study.yaml"
    path.write_text(content)
    done = subprocess.run(command(path, *arguments), capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["study.yaml"]
