"""The pipelined step and several teachers, through the whole trainer."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError, DataError
from stableopd.rollout.ahead import Ahead
from stableopd.trainer import StableOPDTrainer
from stableopd.types import FinishedRollout, Sampling

CORRECTED = {"correction": {"kind": "truncate"}}


def pipelined(run_settings, **changes):
    rollout = {"num_prompts": 6, "num_generations": 2, "max_completion_length": 12, "pipeline": True}
    evaluation = {"every_steps": 100, "at_start": False}
    return run_settings(rollout=rollout, objective=CORRECTED, **{"evaluation": evaluation, **changes})


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(trainer):
    return {name: array.clone() for name, array in trainer.student.state_dict().items()}


def test_rollouts_of_a_pipelined_run_come_from_the_policy_of_one_step_before(run_settings, tmp_path):
    settings = pipelined(run_settings, checkpoint={"every_steps": 100}, max_steps=4)
    trainer = StableOPDTrainer(args=StableOPDConfig(**settings))
    made, versions = {}, {}
    generate = trainer.engine.generate

    def watched(examples, sampling, *, step, on_finished=None):
        batch = generate(examples, sampling, step=step, on_finished=on_finished)
        made[step], versions[step] = batch.completion_ids, batch.policy_version
        return batch

    trainer.engine.generate = watched
    before = StableOPDTrainer(args=StableOPDConfig(**{**settings, "output_dir": str(tmp_path / "other")}))
    trainer.train()
    updates = settings["optimizer"]["num_minibatches"]
    del versions[0]  # the evaluation at the end
    assert versions == {1: 0, 2: 0, 3: updates, 4: 2 * updates}
    examples = before._my_prompts(2).examples
    expected = before.engine.generate(examples, before._sampling(), step=2)  # from the initial weights
    assert torch.equal(made[2], expected.completion_ids)
    staleness = [line["sampling/staleness"] for line in metrics_of(tmp_path / "run")]
    assert staleness == [0, updates, updates, updates]


def test_a_pipelined_run_is_the_same_run_when_it_is_resumed(run_settings, tmp_path):
    evaluation = {"every_steps": 3, "at_start": False}
    settings = pipelined(run_settings, checkpoint={"every_steps": 2}, evaluation=evaluation, max_steps=6)
    whole = StableOPDTrainer(args=StableOPDConfig(**settings))
    whole.train()
    halved = {**settings, "output_dir": str(tmp_path / "halved")}
    StableOPDTrainer(args=StableOPDConfig(**{**halved, "max_steps": 4})).train()
    resumed = StableOPDTrainer(args=StableOPDConfig(**halved))
    resumed.train(resume_from_checkpoint=True)
    for name, array in weights_of(whole).items():
        assert torch.equal(array, resumed.student.state_dict()[name]), name


def test_the_pipeline_starts_anew_after_a_checkpoint(run_settings, tmp_path):
    settings = pipelined(run_settings, checkpoint={"every_steps": 2}, max_steps=5)
    StableOPDTrainer(args=StableOPDConfig(**settings)).train()
    assert [line["sampling/staleness"] > 0 for line in metrics_of(tmp_path / "run")] == [
        False,
        True,
        False,
        True,
        False,
    ]


def test_a_pipelined_run_that_is_not_stale_is_the_plain_run(run_settings, tmp_path):
    always = {"every_steps": 1}
    one = pipelined(run_settings, checkpoint=always, max_steps=3)
    other = {**one, "rollout": {**one["rollout"], "pipeline": False}, "output_dir": str(tmp_path / "plain")}
    trainers = [StableOPDTrainer(args=StableOPDConfig(**settings)) for settings in (one, other)]
    for trainer in trainers:
        trainer.train()
    for name, array in weights_of(trainers[0]).items():  # the copy decodes with the model's own kernel: rounding
        torch.testing.assert_close(trainers[1].student.state_dict()[name], array)


def test_a_policy_gradient_without_correction_is_refused_in_a_pipeline(run_settings):
    with pytest.raises(ConfigError, match=r"set objective\.correction\.kind=truncate"):
        StableOPDConfig(**run_settings(rollout={"pipeline": True}))


def test_an_error_while_generating_ahead_ends_the_run_with_that_error(run_settings):
    trainer = StableOPDTrainer(args=StableOPDConfig(**pipelined(run_settings, checkpoint={"every_steps": 100})))
    generate = trainer.engine.generate

    def failing(examples, sampling, *, step, on_finished=None):
        if step == 2:
            raise DataError("no luck in step 2")
        return generate(examples, sampling, step=step, on_finished=on_finished)

    trainer.engine.generate = failing
    with pytest.raises(DataError, match="no luck in step 2"):
        trainer.train()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts-")]


def test_rollouts_that_were_made_ahead_are_known_by_the_budget_they_had(run_settings):
    trainer = StableOPDTrainer(args=StableOPDConfig(**pipelined(run_settings)))
    examples = trainer._my_prompts(2).examples
    trainer.source.begin(examples, Sampling(max_new_tokens=5), step=2)
    rollouts = trainer.source.rollouts(examples, Sampling(max_new_tokens=12), step=2)
    assert trainer.source.budget == 5
    assert max(rollouts.lengths()) <= 5
    trainer.source.rollouts(examples, Sampling(max_new_tokens=12), step=3)
    assert trainer.source.budget == 12
    trainer.source.drop()


class EndlessEngine:
    """Tells of a finished rollout for ever, until it is stopped by what it tells."""

    def generate(self, examples, sampling, *, step, on_finished=None):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            on_finished(FinishedRollout(prompt_ids=(1,), completion_ids=(2,)))
            time.sleep(0.001)
        raise AssertionError("nobody stopped it")


def test_a_generation_that_nobody_wants_any_more_is_given_up():
    closed = threading.Event()

    class Scoring:
        def add(self, rollout): ...

        def result(self, rollouts): ...

        def close(self):
            closed.set()

    ahead = Ahead()
    ahead.start(EndlessEngine(), [], Sampling(max_new_tokens=1), step=1, scoring=Scoring())
    start = time.monotonic()
    ahead.drop()
    assert time.monotonic() - start < 10
    assert closed.is_set()
    assert ahead.take(1) is None


def two_teachers(run_settings, checkpoints, tmp_path, dataset):
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "routed.jsonl"
    names = ("deep", "shallow")
    path.write_text("".join(json.dumps({**row, "who": names[n % 2]}) + "\n" for n, row in enumerate(rows)))
    settings = run_settings(data={"path": str(path), "teacher_column": "who"}, max_steps=2)
    del settings["teacher"]
    places = zip(names, ("teacher", "student"), strict=True)
    settings["teachers"] = {name: {"model_name_or_path": str(checkpoints / place)} for name, place in places}
    return settings


def test_a_run_with_two_teachers_scores_each_prompt_with_its_own(run_settings, checkpoints, tmp_path, dataset):
    settings = two_teachers(run_settings, checkpoints, tmp_path, dataset)
    trainer = StableOPDTrainer(args=StableOPDConfig(**settings))
    trainer.train()
    first = metrics_of(tmp_path / "run")[1]
    # The initial student is the teacher "shallow": the divergence from it is 0 but for rounding, from "deep" it is not.
    assert abs(first["teacher/shallow/reverse_kl"]) < 1e-4
    assert abs(first["teacher/deep/reverse_kl"]) > 1e-2


def test_a_row_that_names_no_known_teacher_is_told_with_its_line(run_settings, checkpoints, tmp_path, dataset):
    settings = two_teachers(run_settings, checkpoints, tmp_path, dataset)
    path = tmp_path / "routed.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"deep"', '"dep"')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"routed\.jsonl.*3.*'dep'.*did you mean 'deep'"):
        StableOPDTrainer(args=StableOPDConfig(**settings))


@pytest.mark.parametrize("teacher", [{"offload": True}, {"device_map": "cpu"}])
def test_where_the_teacher_lives_changes_nothing(run_settings, checkpoints, tmp_path, teacher):
    base = run_settings(evaluation={"every_steps": 100, "at_start": False}, max_steps=2)
    moved = {**base, "teacher": {**base["teacher"], **teacher}, "output_dir": str(tmp_path / "moved")}
    trainers = [StableOPDTrainer(args=StableOPDConfig(**settings)) for settings in (base, moved)]
    for trainer in trainers:
        trainer.train()
    for name, array in weights_of(trainers[0]).items():
        torch.testing.assert_close(trainers[1].student.state_dict()[name], array)
