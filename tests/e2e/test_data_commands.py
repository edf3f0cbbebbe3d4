"""`stableopd data ...` as a user types it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stableopd import cli
from stableopd.data import load_examples
from stableopd.reading import read_rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture
def invoke(monkeypatch, capfd):
    def invoke(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["stableopd", "data", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(list(arguments), exited.value.code or 0, out, err)

    return invoke


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of Parquet files with the columns of OpenR1-Math-220k, in the alphabet of the toy's tokenizer."""
    folder, chance = tmp_path_factory.mktemp("openr1"), random.Random(1)
    for number in range(2):
        rows = [_row(chance, f"id {number} {index}") for index in range(800)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{number:05d}-of-00002.parquet", row_group_size=300)
    return folder


def _row(chance: random.Random, uuid: str) -> dict:
    texts = ["".join(chance.choices("0123456789:;", k=chance.randrange(1, 400))) for _ in range(2)]
    return {
        "problem": f"{chance.randrange(10**6)}=",
        "answer": "1",
        "uuid": uuid,
        "is_reasoning_complete": [True, chance.random() < 0.9],
        "generations": texts,
        "correctness_math_verify": [chance.random() < 0.5, True],
        "finish_reasons": None,
    }


def test_data_made_from_openr1_trains(invoke, source, checkpoints, tokenizer, tmp_path):
    made = invoke(
        "openr1", "--source", source, "--out", tmp_path / "data", "--tokenizer", checkpoints / "student",
        "--max-gold-tokens", 100, "--num-cold-start", 30, "--prompt-format", "text", "--instruction", "",
        "--limit", 300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "cold_start.jsonl: 30 rows" in made.stdout
    assert made.stderr == ""
    card = json.loads((tmp_path / "data" / "card.json").read_text())
    examples = load_examples(
        read_rows(str(tmp_path / "data" / "opd.jsonl")), tokenizer, source="opd", require_gold=True, require_answer=True
    )
    assert len(examples) == card["outputs"]["opd.jsonl"]["rows"] > 20
    assert max(len(example.gold_ids) for example in examples) <= 101
    assert card["settings"]["max_gold_tokens"] == 100


@pytest.mark.slow
def test_killed_by_the_system_the_same_command_goes_on_to_the_same_bytes(invoke, source, checkpoints, tmp_path):
    options = ("openr1", "--source", source, "--tokenizer", checkpoints / "student", "--prompt-format", "text", "--out")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "stableopd", "data", *map(str, options), str(killed)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / ".work" / "state.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "card.json").exists()
    for out in (killed, whole):
        done = invoke(*options, out)
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["README.md", "card.json", "cold_start.jsonl", "heldout.jsonl", "opd.jsonl"]
    assert names == sorted(path.name for path in killed.iterdir())
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)


def test_gold_is_drawn_from_the_teacher_of_a_configuration_or_of_the_options(
    invoke, run_settings, checkpoints, dataset, tmp_path
):
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_settings()))
    options = ("--samples", 2, "--max-completion-length", 8, "--judge", "operator:ne", "--seed", 3)
    by_file = invoke("gold", tmp_path / "run.yaml", "--out", tmp_path / "a.jsonl", *options)
    assert by_file.returncode == 0, by_file.stderr
    by_options = invoke(
        "gold", "--teacher", checkpoints / "teacher", "--data", dataset / "train.jsonl", "--out", tmp_path / "b.jsonl",
        *options, "health.tail_chars=8", "health.compression_threshold=2.2",
    )  # fmt: skip
    assert by_options.returncode == 0, by_options.stderr
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows
    assert all(0 < len(row["gold"]) < 8 for row in rows)
    assert f"a.jsonl: {len(rows)} rows" in by_file.stdout


def test_decontaminated_prompts_have_nothing_of_the_benchmark(invoke, tmp_path):
    benchmark = [{"prompt": "What is the least prime above ninety?", "answer": "97"}]
    rows = [{"prompt": "what is the LEAST prime above ninety"}, {"prompt": "Name a prime."}]
    for name, lines in (("bench", benchmark), ("rows", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = invoke(
        "decontaminate", tmp_path / "rows.jsonl", "--against", tmp_path / "bench.jsonl", "-o", tmp_path / "clean.jsonl"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clean.jsonl").read_text() == json.dumps(rows[1]) + "\n"
    assert "removed 1" in done.stdout


PROC = pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that even root cannot write to")


@pytest.mark.parametrize("command", ["openr1", "gold", "decontaminate"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file.jsonl/out.jsonl", "file.jsonl is a file, or lies in one, and not a folder. Choose another"),
        ("missing/out.jsonl", "the folder missing does not exist. Make it, or choose another"),
        pytest.param("/proc/out.jsonl", "the folder /proc cannot be written into", marks=PROC),
        ("file.jsonl", "file.jsonl is "),
        (".", ""),
    ],
)
def test_a_place_that_cannot_be_written_is_told_with_what_to_do(
    invoke, source, checkpoints, tmp_path, monkeypatch, command, place, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.jsonl").write_text('{"prompt": "1234:", "answer": "7"}\n')
    arguments = {
        "openr1": ("--source", source, "--tokenizer", checkpoints / "student", "--limit", 3, "--out", place),
        "gold": ("--teacher", checkpoints / "teacher", "--data", "file.jsonl", "--judge", "exact", "--out", place),
        "decontaminate": ("file.jsonl", "--against", "file.jsonl", "-o", place),
    }
    result = invoke(command, *arguments[command])
    if (command, place) == ("openr1", "missing/out.jsonl"):  # a folder, which is made with those above it
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert re.search(r"another (--out|-o)|Rename -o", result.stderr)
    assert "Errno" not in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "told", "never"),
    [
        (("openr1", "--source", "empty", "--tokenizer", "T", "--out", "o"), "correct --source", "data.path"),
        (("openr1", "--source", "a.jsonl", "--tokenizer", "./T", "--out", "o"), "--tokenizer: there is no", "student."),
        (("decontaminate", "a.jsonl", "--against", "./empty", "-o", "b.jsonl"), "the benchmark", "data.path"),
        (("decontaminate", "a.jsonl", "--against", "a.jsonl", "-o", "b.jsonl"), "Rename the column", "--answer-column"),
        (("gold", "several.yaml", "--out", "o.jsonl"), "--teacher, which replaces", "alone"),
        (("gold", "several.yaml", "--out", "o.jsonl", "--teacher", "./T"), "there is no folder './T'", "both given"),
        (("gold", "served.yaml", "--out", "o.jsonl"), "--teacher, which replaces", "alone"),
        (("gold", "served.yaml", "--out", "o.jsonl", "--teacher", "./T"), "there is no folder './T'", "a server"),
    ],
)
def test_messages_name_options_that_the_command_has(invoke, checkpoints, tmp_path, monkeypatch, arguments, told, never):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text('{"prompt": "1234:"}\n')
    common = "method: opd\nstudent: {model_name_or_path: S}\n"
    several = "teachers: {a: {model_name_or_path: A}, b: {model_name_or_path: B}}\ndata: {teacher_column: t}\n"
    (tmp_path / "several.yaml").write_text(common + several)
    (tmp_path / "served.yaml").write_text(f"{common}teacher: {{server_url: 'http://127.0.0.1:9'}}\n")
    result = invoke(*(checkpoints / "student" if one == "T" else one for one in arguments))
    assert result.returncode == 2
    message = " ".join(result.stderr.split())
    assert told in message
    assert never not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("openr1", "--source", "missing.parquet"), "missing.parquet does not exist"),
        (("openr1", "--cold-start-fraction", 0.5, "--num-cold-start", 3), "give one of them"),
        (("gold", "--data", "nothing.jsonl", "--teacher", "./nowhere"), "there is no folder './nowhere'"),
        (("gold", "--teacher", "T", "rollout.temprature=1"), "temperature"),
        (("gold", "--teacher", "T", "--data", "d.jsonl", "--temperature", 0), "--temperature is 0, at which all"),
        (("decontaminate", "missing.jsonl", "--against", "missing.jsonl"), "missing.jsonl"),
        (("decontaminate", "a.jsonl", "--against", "a.jsonl", "--min-ngram", 14), "--min-ngram is 14"),
    ],
)
def test_bad_input_is_told_in_one_message(invoke, checkpoints, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    rest = ("-o", "out.jsonl") if arguments[0] == "decontaminate" else ("--out", "out")
    rest += ("--tokenizer", checkpoints / "student") if arguments[0] == "openr1" else ()
    result = invoke(*arguments, *rest)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
