"""A whole run under a teacher behind a server: the same as under the teacher itself, and untouched when it fails."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopback_teacher import ModelServer
from stableopd import StableOPDConfig, StableOPDTrainer
from stableopd.errors import ConfigError, TeacherError

pytest.importorskip("httpx")


@pytest.fixture
def server(checkpoints) -> Iterator[ModelServer]:
    found = ModelServer(AutoModelForCausalLM.from_pretrained(checkpoints / "teacher"))
    found.manners.max_model_len = None
    yield found
    found.close()


def trainer(run_settings, tmp_path, name: str, **changes) -> StableOPDTrainer:
    settings = run_settings(
        method="opd",
        output_dir=str(tmp_path / name),
        max_steps=2,
        rollout={"num_prompts": 3, "num_generations": 2, "max_completion_length": 8, "temperature": 1.0},
        evaluation={"at_start": False, "every_steps": 100},
        checkpoint={"every_steps": 1},
        **changes,
    )
    if "teachers" in settings:
        del settings["teacher"]
    return StableOPDTrainer(args=StableOPDConfig(**settings))


def weights(run: StableOPDTrainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(run.student.state_dict())


def test_a_run_under_the_server_ends_where_a_run_under_the_model_ends(run_settings, tmp_path, server):
    near = trainer(run_settings, tmp_path, "near")
    near.train()
    far = trainer(run_settings, tmp_path, "far", teacher={"server_url": server.url})
    far.train()
    assert server.requests
    for name, weight in weights(near).items():
        torch.testing.assert_close(weights(far)[name], weight, rtol=0, atol=2e-3, msg=name)


def test_rollouts_are_scored_while_others_are_still_generated(run_settings, tmp_path, server):
    run = trainer(run_settings, tmp_path, "far", teacher={"server_url": server.url})
    seen: list[int] = []
    generate = run.engine.generate

    def watched(examples, sampling, *, step, on_finished=None):
        def told(rollout):
            on_finished(rollout)
            time.sleep(0.2)  # a slow generation
            seen.append(len(server.requests) - before)

        before = len(server.requests)
        return generate(examples, sampling, step=step, on_finished=told)

    run.engine.generate = watched
    run.train_step(1)
    assert len(seen) == 6
    assert seen[0] >= 1  # the first is asked about before the last is there


def test_a_server_that_fails_leaves_the_weights_and_the_run_resumes(run_settings, tmp_path, server):
    settings = {"teacher": {"server_url": server.url, "max_retries": 1}}
    run = trainer(run_settings, tmp_path, "failing", **settings)
    save = run._save_if_due

    def save_and_break(step, metrics):
        save(step, metrics)
        server.manners.fail_first = 999

    run._save_if_due = save_and_break
    with pytest.raises(TeacherError, match="stays away"):
        run.train()
    assert run.state.step == 1
    before = weights(run)
    server.manners.fail_first = 0
    again = trainer(run_settings, tmp_path, "failing", **settings)
    again.train(resume_from_checkpoint=True)
    whole = trainer(run_settings, tmp_path, "whole", **settings)
    whole.train()
    assert again.state.step == 2
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], weight, rtol=0, atol=2e-3, msg=name)
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(again).items())


def test_near_and_far_teachers_share_a_run(run_settings, tmp_path, server, checkpoints, dataset):
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    path = tmp_path / "routed.jsonl"
    path.write_text("".join(json.dumps({**row, "who": ("far", "near")[n % 2]}) + "\n" for n, row in enumerate(rows)))
    teachers = {"far": {"server_url": server.url}, "near": {"model_name_or_path": str(checkpoints / "student")}}
    run = trainer(
        run_settings,
        tmp_path,
        "both",
        teachers=teachers,
        data={"path": str(path), "teacher_column": "who", "shuffle": False},
    )
    run.train()
    first = json.loads((tmp_path / "both" / "metrics.jsonl").read_text().splitlines()[0])
    found = {
        name: first[f"teacher/{name}/reverse_kl"] for name in ("far", "near") if f"teacher/{name}/reverse_kl" in first
    }
    assert abs(found["near"]) < 1e-4  # the student itself
    assert abs(found["far"]) > 1e-3


def test_a_loss_over_the_vocabulary_is_refused_with_a_server(run_settings, tmp_path, server):
    with pytest.raises(ConfigError, match="needs the whole distribution"):
        trainer(
            run_settings,
            tmp_path,
            "whole",
            teacher={"server_url": server.url},
            objective={"distill": {"divergence": "reverse_kl"}},
        )


def test_a_temperature_that_the_server_ignores_is_refused(run_settings, tmp_path, server):
    server.manners.max_logprobs = 8  # the whole vocabulary cannot be had, so that no conversion is possible
    settings = run_settings(method="opd", teacher={"server_url": server.url}, rollout={"temperature": 0.7})
    with pytest.raises(ConfigError, match=r"rollout\.temperature"):
        StableOPDTrainer(args=StableOPDConfig(**settings))
