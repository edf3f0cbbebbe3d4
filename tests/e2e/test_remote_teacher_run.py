"""A whole run under a teacher behind a server: the same as under the teacher itself, and untouched when it fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from loopback_teacher import ModelServer
from stableopd import StableOPDConfig, StableOPDTrainer
from stableopd.config import TeacherConfig
from stableopd.errors import TeacherError
from stableopd.teachers.server import ServerTeacher
from stableopd.vocabulary import vocab_size

pytest.importorskip("httpx")


@pytest.fixture
def server(checkpoints) -> Iterator[ModelServer]:
    found = ModelServer(AutoModelForCausalLM.from_pretrained(checkpoints / "teacher"))
    found.manners.max_model_len = None
    yield found
    found.close()


def trainer(run_settings, tmp_path, name: str) -> StableOPDTrainer:
    settings = run_settings(
        method="opd",
        objective={"distill": {"divergence": "sampled_reverse_kl"}},
        output_dir=str(tmp_path / name),
        max_steps=2,
        rollout={"num_prompts": 3, "num_generations": 2, "max_completion_length": 8, "temperature": 1.0},
    )
    return StableOPDTrainer(args=StableOPDConfig.model_validate(settings))


def weights(run: StableOPDTrainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(run.student.state_dict())


def test_a_run_under_the_server_ends_where_a_run_under_the_model_ends(run_settings, tmp_path, server):
    near = trainer(run_settings, tmp_path, "near")
    near.train()
    far = trainer(run_settings, tmp_path, "far")
    far.teacher = ServerTeacher(TeacherConfig(server_url=server.url), vocab_size=vocab_size(far.tokenizer))
    far.train()
    assert server.requests
    for name, weight in weights(near).items():
        torch.testing.assert_close(weights(far)[name], weight, rtol=0, atol=2e-3, msg=name)


def test_a_server_that_fails_leaves_the_weights_as_they_were(run_settings, tmp_path, server):
    run = trainer(run_settings, tmp_path, "failing")
    config = TeacherConfig(server_url=server.url, max_retries=1)
    run.teacher = ServerTeacher(config, vocab_size=vocab_size(run.tokenizer), first_wait_s=0.01)
    run.teacher.check(temperature=1.0)
    before = weights(run)
    server.manners.fail_first = 999
    with pytest.raises(TeacherError, match="stays away"):
        run.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(run).items())
    assert run.state.step == 0
