"""The toy's models learn by the library's update, from their seed alone; the demo writes what its settings say."""

from __future__ import annotations

import json

import pytest
import torch

from stableopd.errors import ConfigError
from stableopd.toy.build import StudentRecipe, TeacherRecipe, first_right_share, train_student, train_teacher
from stableopd.toy.demo import DemoSettings, demo_config, write_data
from stableopd.toy.task import World, is_held_out

TEACHER = TeacherRecipe(verification_steps=15, trace_steps=15, verification_batch=32, trace_batch=16, warmup_steps=5)
STUDENT = StudentRecipe(copying_steps=30, max_steps=60, probe_from=10_000)


def losses_of(train, *arguments):
    losses = []
    model = train(*arguments, lambda name, step, total, loss: losses.append(loss))
    return model, losses


@pytest.mark.parametrize(("train", "recipe"), [(train_teacher, TEACHER), (train_student, STUDENT)])
def test_training_lowers_the_loss_and_depends_on_the_seed_alone(tokenizer, train, recipe):
    torch.manual_seed(1)
    model, losses = losses_of(train, World.t4(), tokenizer, 5, recipe)
    torch.manual_seed(2)
    again, losses_again = losses_of(train, World.t4(), tokenizer, 5, recipe)
    assert losses == losses_again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert losses[-1] < 0.8 * losses[0]
    other, _ = losses_of(train, World.t4(), tokenizer, 6, recipe)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_student_stops_when_it_is_good_enough(tokenizer):
    recipe = StudentRecipe(copying_steps=5, max_steps=60, probe_from=10, probe_every=5, target_first_right=0.0)
    _, losses = losses_of(train_student, World.a(), tokenizer, 5, recipe)
    assert len(losses) == 10


def test_an_untrained_student_is_hardly_ever_right(tokenizer):
    from stableopd.toy.models import build_student

    prompts = [f"{number:04d}" for number in range(0, 1000, 10)]
    assert first_right_share(build_student(tokenizer, seed=1), tokenizer, prompts, seed=1) < 0.1


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_data_is_split_by_hash_and_gold_comes_from_a_pool_when_asked(tmp_path):
    settings = DemoSettings(out=tmp_path, gold_pool=20)
    write_data(settings, settings.build_world())
    train, validation = rows(tmp_path / "data/train.jsonl"), rows(tmp_path / "data/validation.jsonl")
    assert len(train) + len(validation) == 10_000
    assert all(is_held_out(row["prompt"][:-1]) for row in validation)
    assert not any(is_held_out(row["prompt"][:-1]) for row in train)
    pool = rows(tmp_path / "data/gold_pool.jsonl")
    assert len(pool) == 20
    assert all(row in train for row in pool)
    assert demo_config(settings, "stableopd").data.gold_path == str(tmp_path / "data/gold_pool.jsonl")


def test_worlds_teachers_and_terse_gold_are_settings(tmp_path):
    assert DemoSettings(out=tmp_path).build_world() == World.t4()
    assert DemoSettings(out=tmp_path, world="a").build_world() == World.a()
    assert DemoSettings(out=tmp_path, terse_fraction=0.7).build_world().terse_fraction == 0.7
    assert DemoSettings(out=tmp_path, teacher="clean").build_world() == World.t4().with_clean_teacher()
    with pytest.raises(ConfigError, match="standard, moderate, clean"):
        DemoSettings(out=tmp_path, teacher="loud").build_world()


def test_the_two_runs_of_the_demo_differ_in_method_coefficients_and_folder_only(tmp_path):
    settings = DemoSettings(out=tmp_path)
    opd, stable = (demo_config(settings, method).model_dump() for method in ("opd", "stableopd"))
    assert {key for key in opd if opd[key] != stable[key]} == {"method", "objective", "output_dir"}
