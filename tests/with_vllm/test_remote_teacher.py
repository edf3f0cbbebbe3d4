"""A real vLLM server gives the scores that the same checkpoint gives in this process."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from stableopd.errors import ConfigError, TeacherError
from stableopd.model_config import TeacherConfig
from stableopd.teachers.local import LocalTeacher
from stableopd.teachers.server import ServerTeacher
from stableopd.tokens import pad_left, pad_right
from stableopd.types import FinishedRollout, RolloutBatch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

KEY = "sk-of-this-test"
START_S = 400


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, initializer_range=0.3,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )  # fmt: skip
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory, tokenizer) -> Iterator[str]:
    """A server with the checkpoint, that gives as many likeliest tokens as there are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "64"),
        *("--enforce-eager", "--gpu-memory-utilization", "0.1", "--max-logprobs", str(len(tokenizer))),
        *("--served-model-name", "tiny", "--api-key", KEY),
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(20)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail("the server did not start:\n" + log.read_text(errors="replace")[-4000:])


@pytest.fixture
def teacher(url, tokenizer, monkeypatch) -> Iterator[ServerTeacher]:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    found = ServerTeacher(TeacherConfig(server_url=url, api_key_env="TEACHER_KEY"), vocab_size=len(tokenizer))
    yield found
    found.close()


@pytest.fixture(scope="module")
def near(checkpoint, tokenizer) -> LocalTeacher:
    model = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return LocalTeacher(model, model_id="local", vocab_size=len(tokenizer), token_budget=256, autocast=nullcontext)


def rollouts(num_ids: int) -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = [(1, 1), (1, 40), (2, 7), (17, 3), (30, 33), (5, 20), (9, 9)]
    rows = [
        (
            torch.randint(num_ids, (p,), generator=generator).tolist(),
            torch.randint(num_ids, (c,), generator=generator).tolist(),
        )
        for p, c in lengths
    ]
    rows.append(rows[2])
    prompt_ids, prompt_mask = pad_left([prompt for prompt, _ in rows], 0)
    completion_ids, completion_mask = pad_right([completion for _, completion in rows], 0)
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        sampling_logprobs=torch.zeros(completion_ids.shape),
        finish_reason=("stop",) * len(rows),
        prompt_index=tuple(range(len(rows))),
    )


@pytest.mark.parametrize("topk", [0, 1, 8, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_server_and_the_checkpoint_agree(teacher, near, tokenizer, temperature, topk):
    batch = rollouts(len(tokenizer))
    found = teacher.score(batch, temperature=temperature, topk=topk)
    expected = near.score(batch, temperature=temperature, topk=topk)
    torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, rtol=0, atol=1e-4)
    if topk:
        torch.testing.assert_close(found.topk_logprobs, expected.topk_logprobs, rtol=0, atol=1e-4)
        assert (found.topk_ids == expected.topk_ids).float().mean() > 0.99  # where two are equal, either may come first
    assert found.model_id == "tiny"


def test_a_stream_gives_the_same(teacher, near, tokenizer):
    batch = rollouts(len(tokenizer))
    stream = teacher.begin(temperature=1.0)
    for row, completion in enumerate(batch.completions()):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
        stream.add(FinishedRollout(prompt_ids=tuple(prompt), completion_ids=tuple(completion)))
    found = stream.result(batch)
    expected = near.score(batch, temperature=1.0)
    torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, rtol=0, atol=1e-4)


def test_the_context_is_what_the_server_accepts(teacher, tokenizer):
    assert teacher.context_length == 63
    longest = rollouts(len(tokenizer))
    assert int(longest.prompt_mask.sum(1).add(longest.completion_mask.sum(1)).max()) == 63


def test_the_tokenizer_is_the_same(teacher, tokenizer):
    assert teacher.check_tokens(tokenizer) is True


def test_more_likeliest_tokens_than_the_server_gives_are_refused(url, tokenizer, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    config = TeacherConfig(server_url=url, api_key_env="TEACHER_KEY")
    wider = ServerTeacher(config, vocab_size=len(tokenizer) + 100)
    with pytest.raises(ConfigError, match="max allowed"):
        wider.check(temperature=1.0, topk=len(tokenizer) + 50)


def test_a_wrong_key_is_refused_and_not_shown(url, tokenizer, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-wrong")
    config = TeacherConfig(server_url=url, api_key_env="TEACHER_KEY")
    with pytest.raises(TeacherError, match="401") as caught:
        ServerTeacher(config, vocab_size=len(tokenizer)).check(temperature=1.0)
    assert "sk-wrong" not in str(caught.value)
