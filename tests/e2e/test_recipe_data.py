"""The command in a recipe's header makes data that the recipe trains on, where the student reads 4,096 tokens."""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from openr1_rows import row, write_parquet
from stableopd import cli
from stableopd.config_files import load_config
from stableopd.runfolder import read_run
from stableopd.toy.models import build_model
from stableopd.trainer import StableOPDTrainer
from stableopd.words.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
CONTEXT, ROOM_FOR_PROMPTS = 4096, 1024


def command_of(path: Path) -> list[str]:
    (line,) = re.findall(r"^#\s+(stableopd data openr1 .*)$", path.read_text(), re.MULTILINE)
    return shlex.split(line)


def option(command: list[str], name: str, default: str) -> str:
    return command[command.index(name) + 1] if name in command else default


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "studies" / "paper.yaml"], ids=lambda path: path.stem)
def test_every_header_makes_data_for_its_students_and_where_they_are_read(path):
    command, raw = command_of(path), yaml.safe_load(path.read_text())
    settings = raw.get("base", raw)
    out = option(command, "--out", "")
    assert {Path(settings[section]["path"]).parent.name for section in ("data", "evaluation")} == {out}
    pairs = raw.get("pairs", {"": raw})
    students = {pair["student"]["model_name_or_path"] for pair in pairs.values()}
    teachers = {pair.get("teacher", {}).get("model_name_or_path", "") for pair in pairs.values()}
    assert option(command, "--tokenizer", "") in students
    if any(student.startswith("Qwen/Qwen2.5-Math") for student in students):  # which read 4,096 tokens
        assert settings["rollout"]["max_completion_length"] == CONTEXT - ROOM_FOR_PROMPTS
        assert int(option(command, "--max-gold-tokens", "8192")) + 1 == CONTEXT - ROOM_FOR_PROMPTS
        assert int(option(command, "--max-prompt-tokens", "0")) == ROOM_FOR_PROMPTS
    is_text = any("R1-Distill" in teacher for teacher in teachers)  # whose turns have other markers
    assert option(command, "--prompt-format", "chat") == ("text" if is_text else "chat")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """`student` and `teacher`, untrained, for text of any kind; a digit is a token."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = train_tokenizer(["Please reason step by step, and find the sum of the digits."] * 4, 320)
    for name, width, seed in (("student", 16, 1), ("teacher", 24, 2)):
        model = build_model(
            num_layers=1, hidden_size=width, num_heads=2, tokenizer=tokenizer, seed=seed, max_positions=CONTEXT,
            attention="sdpa",
        )  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Tiny Parquet in the schema of the dataset: solutions that just fit, that fit, and that are all too long."""
    chance, rows = random.Random(0), []
    for number in range(60):
        lengths = ((3072, 3071), (5000, 40), (6000, 5000))[number % 3]
        solutions = ["".join(chance.choices("0123456789", k=length)) for length in lengths]
        rows.append(row(f"What is the sum of the digits of {number}?", *solutions, answer=str(number)))
    return write_parquet(tmp_path_factory.mktemp("openr1") / "train-00000-of-00001.parquet", rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5-math-1.5b-openthinker3-7b",
        "qwen2.5-math-1.5b-r1-distill-7b",
        "qwen2.5-math-7b-openthinker3-7b",
        "baselines/sft",
    ],
)
def test_a_recipe_trains_on_what_its_header_makes(pair, source, tmp_path, monkeypatch, name):
    pytest.importorskip("math_verify")
    path = ROOT / "recipes" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    command = command_of(path)
    command[command.index("--tokenizer") + 1] = str(pair / "student")
    monkeypatch.setattr(sys, "argv", [*command, "--source", str(source)])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert not exited.value.code
    changes = {
        "student.model_name_or_path": str(pair / "student"),
        "rollout.num_prompts": 3,
        "rollout.num_generations": 2,
        "evaluation.num_prompts": 2,
        "max_steps": 1,
        "output_dir": "run",
    }
    recipe = load_config(path)
    if recipe.teacher.is_set:
        changes["teacher.model_name_or_path"] = str(pair / "teacher")
    if recipe.student.lora is not None:
        pytest.importorskip("peft")
    config = load_config(path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    assert {row["gold_tokens"] for row in rows} == {40, 3071}
    StableOPDTrainer(args=config).train()
    assert read_run(tmp_path / "run").series("loss/gold")
