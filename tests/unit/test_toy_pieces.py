from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stableopd.study.worlds import ToyWorld
from stableopd.toy.build import StudentRecipe, TeacherRecipe
from stableopd.toy.demo import DemoSettings
from stableopd.toy.pieces import write_data, write_model
from stableopd.toy.task import World, is_held_out, judge


@dataclass(frozen=True, kw_only=True)
class Tiny(DemoSettings):
    """Models of a few steps."""

    @property
    def teacher_recipe(self) -> TeacherRecipe:
        return TeacherRecipe(verification_steps=1, trace_steps=1)

    @property
    def student_recipe(self) -> StudentRecipe:
        return StudentRecipe(copying_steps=1, max_steps=2)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_is_whole_or_not_there_and_says_what_it_can_do(tmp_path, role):
    folder = tmp_path / "models" / role
    write_model(folder, role, Tiny(out=folder, seed=3))
    assert [entry.name for entry in folder.parent.iterdir()] == [role]
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "$"
    assert "greedy/accuracy" in json.loads((folder / "checks.json").read_text())


def test_gold_comes_in_the_worlds_style_and_as_chains_for_training_and_from_a_scarce_pool(tmp_path):
    write_data(tmp_path / "data", World.t4(), pool_size=20)
    files = {
        name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation", "gold_pool")
    }
    train = {row["prompt"] for row in files["train"]}
    assert len(files["gold_pool"]) == 20
    assert {row["prompt"] for row in files["gold_pool"]} < train
    assert not train & {row["prompt"] for row in files["validation"]}
    assert all(is_held_out(row["prompt"].rstrip(":")) for row in files["validation"])
    terse = [row["gold"].startswith(";") for row in files["train"]]
    assert 0.35 < sum(terse) / len(terse) < 0.45
    assert not any(row["gold_chain"].startswith(";") for row in files["train"])
    assert all(judge(row[column], row["answer"]) for row in files["train"] for column in ("gold", "gold_chain"))


def test_a_world_shares_students_among_teachers_and_teachers_among_students(tmp_path):
    world = ToyWorld(name="toy", teachers={"a": {"seed": 1}, "b": {"habit": "clean", "seed": 2}})
    jobs = {
        (pair, seed): [job.name for job in world.jobs(tmp_path, pair, seed)] for pair in ("a", "b") for seed in (5, 6)
    }
    assert jobs["a", 5] == ["world data", "world teachers/a", "world students/seed-5"]
    assert jobs["b", 5][1:] == ["world teachers/b", "world students/seed-5"]
    assert jobs["a", 6][1:] == ["world teachers/a", "world students/seed-6"]
    moved = [job.settings for job in world.jobs(tmp_path / "elsewhere", "a", 5)]
    assert moved == [job.settings for job in world.jobs(tmp_path, "a", 5)]
    other = world.model_copy(update={"kind": "a"})
    assert moved != [job.settings for job in other.jobs(tmp_path, "a", 5)]
