"""The commands as a user types them: real processes, real files, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from transformers import AutoModelForCausalLM

from stableopd import cli
from stableopd.toy.models import build_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def stableopd(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stableopd", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def invoke(monkeypatch, capfd):
    """The same command in this process, where starting Python and torch anew would be most of the work."""

    def invoke(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["stableopd", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(list(arguments), exited.value.code or 0, out, err)

    return invoke


@pytest.fixture
def config(run_settings, tmp_path):
    def config(**changes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run_settings(**changes)))
        return path

    return config


def test_train_then_report(config, tmp_path):
    done = stableopd("train", config(max_steps=3), "lambda_gold=0.5")
    assert done.returncode == 0, done.stderr
    assert "step     3" in done.stdout
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    wanted = {
        "loss", "loss/distill", "loss/gold", "loss/reference", "grad_norm", "learning_rate", "entropy", "num_tokens",
        "step_time", "time/rollout_s", "time/teacher_s", "time/update_s", "completions/mean_length",
        "completions/max_length", "completions/clipped_ratio", "health/repetition_rate", "health/loop_token_fraction",
        "teacher/reverse_kl", "reference/kl", "sampling/logprob_gap",
    }  # fmt: skip
    assert wanted <= rows[1].keys()
    assert rows[1]["loss"] == pytest.approx(
        rows[1]["loss/distill"] + 0.5 * rows[1]["loss/gold"] + 0.3 * rows[1]["loss/reference"], rel=1e-5
    )
    assert "eval/validation_greedy/truncation_rate" in rows[2]
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["gold"]["coef"] == 0.5
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]
    line = json.loads((run / "rollouts" / "step-000002.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "completion", "finish_reason", "num_tokens"} <= line.keys()
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000003")

    again = stableopd("train", config(max_steps=3), "lambda_gold=0.5")
    assert again.returncode == 2
    assert "--resume" in again.stderr
    made = stableopd("report", run, "-o", tmp_path / "page.html")
    assert made.returncode == 0, made.stderr
    assert "<html" in (tmp_path / "page.html").read_text().lower()


@pytest.mark.parametrize("method", ["opd", "sft"])
def test_the_other_methods_train_too(invoke, config, tmp_path, method):
    done = invoke("train", config(method=method, max_steps=1))
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert ("loss/distill" in row, "loss/gold" in row) == (method == "opd", method == "sft")


def test_sft_needs_no_teacher(invoke, config):
    done = invoke("train", config(method="sft", max_steps=1, teacher={"model_name_or_path": None}))
    assert done.returncode == 0, done.stderr


def broken_json(tmp_path, config):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "1:", "gold": ";y=1$"}\n{"prompt": \n')
    return config(data={"path": str(path)}), ["broken.jsonl", "line 2"]


def empty_data(tmp_path, config):
    (tmp_path / "empty.jsonl").write_text("\n")
    return config(data={"path": str(tmp_path / "empty.jsonl")}), ["empty.jsonl"]


def missing_data(tmp_path, config):
    return config(data={"path": str(tmp_path / "absent.jsonl")}), ["absent.jsonl"]


def missing_student(tmp_path, config):
    return config(student={"model_name_or_path": str(tmp_path / "nobody")}), ["student", "nobody"]


def student_is_no_model(tmp_path, config):
    return config(student={"model_name_or_path": str(tmp_path)}), ["student"]


def no_gold(tmp_path, config):
    path = tmp_path / "nogold.jsonl"
    path.write_text('{"prompt": "12:", "answer": "3"}\n' * 8)
    return config(data={"path": str(path)}), ["gold", "objective.gold.coef"]


def long_prompt(tmp_path, config):
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "12:", "gold": ";y=3"}\n' * 6 + json.dumps({"prompt": "1" * 300, "gold": "2"}) + "\n")
    return config(data={"path": str(path)}), ["long.jsonl", "line 7", "300"]


def too_few_prompts(tmp_path, config):
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "12:", "gold": ";y=3"}\n' * 2)
    return config(data={"path": str(path)}), ["rollout.num_prompts"]


def budget_over_context(tmp_path, config):
    return config(rollout={"max_completion_length": 4000}), ["max_completion_length", "256"]


def other_vocabulary(tmp_path, config):
    folder = tmp_path / "stranger"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate("_$=wy;:9876543210")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), eos_token="$", pad_token="_"
    )
    build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return config(teacher={"model_name_or_path": str(folder)}), ["vocabular", "teacher"]


def tokenizer_without_eos(tmp_path, config):
    folder = tmp_path / "endless"
    from stableopd.toy.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    model = build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=1)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(folder))
    return config(student={"model_name_or_path": str(folder)}), ["end"]


def truncated_student(tmp_path, config):
    folder = tmp_path / "cut"
    shutil.copytree(yaml.safe_load(config().read_text())["student"]["model_name_or_path"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    return config(student={"model_name_or_path": str(folder)}), ["student", "cut"]


def half_precision_student(tmp_path, config):
    return config(student={"dtype": "float16"}), ["float16", "optimizer.bf16"]


def short_sighted_teacher(tmp_path, config):
    folder = tmp_path / "short"
    from stableopd.toy.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    model = build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=1, max_positions=14)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return config(teacher={"model_name_or_path": str(folder)}), ["line 1", "prompt"]


def missing_evaluation(tmp_path, config):
    return config(evaluation={"path": str(tmp_path / "absent.jsonl")}), ["evaluation.path", "absent.jsonl"]


def missing_gold_pool(tmp_path, config):
    return config(data={"gold_path": str(tmp_path / "absent.jsonl")}), ["data.gold_path", "absent.jsonl"]


def endless_name(tmp_path, config):
    return config(output_dir=str(tmp_path / ("x" * 300))), ["too long"]


def unknown_judge(tmp_path, config):
    return config(evaluation={"judge": "nowhere.to:be_found"}), ["evaluation.judge", "nowhere"]


def output_is_a_file(tmp_path, config):
    (tmp_path / "taken").write_text("mine")
    return config(output_dir=str(tmp_path / "taken")), ["taken"]


@pytest.mark.parametrize(
    "case",
    [
        broken_json, empty_data, missing_data, missing_student, student_is_no_model, no_gold, long_prompt,
        too_few_prompts, budget_over_context, other_vocabulary, tokenizer_without_eos, unknown_judge, output_is_a_file,
        truncated_student, half_precision_student, short_sighted_teacher, missing_evaluation, missing_gold_pool,
        endless_name,
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(invoke, tmp_path, config, case):
    path, expected = case(tmp_path, config)
    before = sorted(tmp_path.rglob("*"))
    done = invoke("train", path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for words in expected:
        assert words in done.stderr
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "absent.yaml"], "absent.yaml"),
        (["report", "absent"], "absent"),
        (["watch", "absent", "--once"], "absent"),
        (["watch", "absent", "--interval", "0"], "interval"),
        (["train"], "CONFIG"),
        (["nonsense"], "nonsense"),
        (["demo", "--world", "t9", "--out", "never"], "t9"),
        (["demo", "--teacher", "angry", "--out", "never"], "angry"),
    ],
)
def test_wrong_commands_exit_2_with_a_message(invoke, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_demo_leaves_an_occupied_folder_alone(invoke, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = invoke("demo", "--quick", "--out", tmp_path)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["report"], ["watch"]])
def test_help_teaches_with_an_example(invoke, command):
    done = invoke(*command, "--help")
    assert done.returncode == 0
    assert not command or "Example: stableopd" in done.stdout


def test_a_report_never_replaces_a_file_that_is_not_a_page(invoke, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    done = invoke("report", tmp_path, "-o", tmp_path / "metrics.jsonl")
    assert done.returncode == 2
    assert "left as it is" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step"')


def test_version_is_told(invoke):
    assert invoke("--version").stdout.startswith("stableopd 0.")


def test_an_interrupt_while_things_are_loaded_is_told_too(config, invoke, tmp_path, monkeypatch):
    (tmp_path / "interrupted_judge.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = invoke("train", config(), "evaluation.judge=interrupted_judge:judge")
    assert done.returncode == 130
    assert done.stderr == "stopped\n"
    assert not (tmp_path / "run").exists()


def test_an_attention_that_there_is_not_is_blamed_on_its_setting(config, invoke):
    done = invoke("train", config(), "student.attn_implementation=bogus")
    assert done.returncode == 2
    assert "student.attn_implementation is 'bogus'" in done.stderr
    assert "model_name_or_path must be" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(config, tmp_path, number):
    path = config(max_steps=100_000)
    command = [sys.executable, "-m", "stableopd", "train", str(path), "seed=5"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"stableopd train {path} seed=5 --resume" in err


@pytest.mark.slow
def test_a_stopped_demo_leaves_no_process_behind(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "stableopd", "demo", "--quick", "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / "opd" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "half made" in err
    commands = [" ".join(child.info["cmdline"] or ()) for child in psutil.process_iter(["cmdline"])]
    assert not [line for line in commands if f"stableopd train {out}" in line], "a training process outlived the demo"


@pytest.mark.slow
def test_the_quick_demo_makes_everything(tmp_path):
    done = stableopd("demo", "--quick", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "demo"
    for name in ("opd", "stableopd"):
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 20
        AutoModelForCausalLM.from_pretrained(out / name / "checkpoints" / "step-000020")
    assert (out / "report.html").stat().st_size > 100_000
    assert (out / "collapse.png").read_bytes().startswith(b"\x89PNG")
    assert "teacher" in done.stdout
    assert "verdict" in done.stdout
    again = stableopd("train", out / "opd.yaml", "max_steps=21", "--resume")
    assert again.returncode == 0, again.stderr
