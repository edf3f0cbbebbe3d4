"""A teacher behind a server says what the same teacher says in this process, or says why it cannot."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from loopback_teacher import Manners, ModelServer
from stableopd.config import TeacherConfig
from stableopd.errors import ConfigError, MissingDependencyError, ModelError, TeacherError
from stableopd.protocols import StreamingTeacher, Teacher
from stableopd.teachers.local import LocalTeacher
from stableopd.teachers.retrying import Patience, _asked_wait_s
from stableopd.teachers.server import ServerTeacher
from stableopd.tokens import pad_left, pad_right
from stableopd.types import FinishedRollout, RolloutBatch, TokenScores

pytest.importorskip("httpx")

VOCAB = 19
KEY = "sk-secret-0123456789"
BOTH = pytest.mark.parametrize("api", ["openai", "sglang"])


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    """Three more embeddings than the tokenizer has ids, as checkpoints are padded; unlikely, as training makes them."""
    torch.manual_seed(4)
    config = Qwen3Config(
        vocab_size=VOCAB + 3, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def unpadded() -> Qwen3ForCausalLM:
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def running(unpadded) -> Iterator[ModelServer]:
    server = ModelServer(unpadded)
    yield server
    server.close()


@pytest.fixture
def server(running) -> Iterator[ModelServer]:
    """The server, with its best manners."""
    running.manners = Manners()
    running.requests.clear()
    while running.arrived.acquire(blocking=False):
        pass
    yield running
    if running.manners.gate is not None:
        running.manners.gate.set()


def remote(server: ModelServer, api: str = "openai", **changes: Any) -> ServerTeacher:
    given = {"server_url": server.url, "api": api, "timeout_s": 20.0, "max_retries": 3, "max_concurrent": 4, **changes}
    return ServerTeacher(TeacherConfig(**given), vocab_size=VOCAB, first_wait_s=0.01)


def local(model: Qwen3ForCausalLM) -> LocalTeacher:
    return LocalTeacher(model, model_id="local", vocab_size=VOCAB, token_budget=64, autocast=nullcontext)


def batch(rows: list[tuple[list[int], list[int]]]) -> RolloutBatch:
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


ROWS = batch([([3], [4, 5, 6, 7]), ([8, 9, 10, 11, 12], [13]), ([3], [4, 5, 6, 7]), ([1, 2], [3, 3, 3])])


def assert_alike(found: TokenScores, expected: TokenScores, mask: torch.Tensor) -> None:
    torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, rtol=0, atol=1e-4)
    assert not found.sampled_logprobs[~mask].any()
    if expected.topk_ids is not None:
        assert torch.equal(found.topk_ids, expected.topk_ids)
        torch.testing.assert_close(found.topk_logprobs, expected.topk_logprobs, rtol=0, atol=1e-4)


def tokens(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=most)


@BOTH
@pytest.mark.parametrize("topk", [0, 1, 5, VOCAB])
def test_far_and_near_give_the_same_scores(server, unpadded, api, topk):
    found = remote(server, api).score(ROWS, temperature=1.0, topk=topk)
    expected = local(unpadded).score(ROWS, temperature=1.0, topk=topk)
    assert_alike(found, expected, ROWS.completion_mask)
    assert found.sampled_logprobs.dtype == torch.float32
    assert (found.topk_ids is None) == (topk == 0)
    assert found.temperature == 1.0
    assert found.model_id == "tiny"
    assert (found.entropy is None) == (topk < VOCAB)
    if found.entropy is not None:
        torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-4)


@BOTH
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(tokens(12), tokens(9)), min_size=1, max_size=6), topk=st.integers(0, 6))
def test_far_and_near_agree_at_all_lengths(server, unpadded, teachers, api, rows, topk):
    rollouts = batch(rows)
    found = teachers(api).score(rollouts, temperature=1.0, topk=topk)
    assert_alike(found, local(unpadded).score(rollouts, temperature=1.0, topk=topk), rollouts.completion_mask)


@pytest.fixture(scope="module")
def teachers(running) -> Callable[[str], ServerTeacher]:
    """One teacher for each api, its connections kept."""
    made: dict[str, ServerTeacher] = {}
    return lambda api: made.get(api) or made.setdefault(api, remote(running, api))


@BOTH
@pytest.mark.parametrize("topk", [0, 4, VOCAB])
@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_a_server_that_knows_only_temperature_1_is_converted_from_the_whole_vocabulary(
    server, unpadded, api, topk, temperature
):
    found = remote(server, api).score(ROWS, temperature=temperature, topk=topk)
    expected = local(unpadded).score(ROWS, temperature=temperature, topk=topk)
    assert_alike(found, expected, ROWS.completion_mask)
    if topk:
        torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-4)
        assert not found.entropy[~ROWS.completion_mask].any()


def test_the_whole_vocabulary_leaves_the_padding_of_the_embedding_out(model):
    server = ModelServer(model)
    server.manners.max_logprobs = None
    found = remote(server).score(ROWS, temperature=0.7, topk=3)
    assert_alike(found, local(model).score(ROWS, temperature=0.7, topk=3), ROWS.completion_mask)
    server.close()


@BOTH
def test_a_server_that_applies_the_temperature_is_asked_for_it(server, unpadded, api):
    server.manners.applies_temperature = True
    found = remote(server, api).score(ROWS, temperature=0.7, topk=4)
    assert_alike(found, local(unpadded).score(ROWS, temperature=0.7, topk=4), ROWS.completion_mask)
    assert server.requests[-1][1].get("prompt_logprobs", server.requests[-1][1].get("top_logprobs_num")) == 4
    assert found.entropy is None


def test_another_temperature_is_refused_when_it_cannot_be_had(server):
    server.manners.max_logprobs = VOCAB - 1
    with pytest.raises(ConfigError, match=r"temperature 1 whatever.*0\.7.*max allowed: 18.*rollout\.temperature=1"):
        remote(server).check(temperature=0.7)
    with pytest.raises(ConfigError, match=r"rollout\.temperature=1"):
        remote(server).begin(temperature=0.7)


def test_a_large_vocabulary_is_not_asked_for_to_convert_a_temperature(server, monkeypatch):
    monkeypatch.setattr("stableopd.teachers.server._SMALL_VOCABULARY", VOCAB - 1)
    with pytest.raises(ConfigError, match=r"rollout\.temperature=1"):
        remote(server).check(temperature=0.7, topk=2)
    assert all(body["prompt_logprobs"] in (2, 4) for _, body in server.requests)


def test_more_likeliest_tokens_than_the_server_gives_are_refused_at_the_start(server):
    server.manners.max_logprobs = 5
    with pytest.raises(ConfigError, match=r"max allowed: 5.*--max-logprobs 6"):
        remote(server).check(temperature=1.0, topk=6)


def test_only_the_completion_is_asked_of_sglang(server):
    remote(server, "sglang").score(batch([([1, 2, 3, 4], [5, 6])]), temperature=1.0)
    path, body = server.requests[-1]
    assert path == "/generate"
    assert body["logprob_start_len"] == 3
    assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}


def test_equal_rollouts_are_scored_once(server):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    before = len(server.requests)
    found = teacher.score(ROWS, temperature=1.0)
    assert len(server.requests) - before == 3
    assert torch.equal(found.sampled_logprobs[0], found.sampled_logprobs[2])


def test_a_stream_is_on_its_way_before_its_result_is_asked_for(server, unpadded):
    teacher = remote(server)
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, StreamingTeacher)
    teacher.check(temperature=1.0)
    while server.arrived.acquire(blocking=False):
        pass
    gate = server.manners.gate = threading.Event()
    stream = teacher.begin(temperature=1.0)
    stream.add(FinishedRollout(prompt_ids=(3,), completion_ids=(4, 5, 6, 7)))
    stream.add(FinishedRollout(prompt_ids=(8, 9, 10, 11, 12), completion_ids=(13,)))
    assert all(server.arrived.acquire(timeout=10) for _ in range(2))
    gate.set()
    found = stream.result(ROWS)
    stream.close()
    assert_alike(found, local(unpadded).score(ROWS, temperature=1.0), ROWS.completion_mask)


def test_no_more_requests_than_allowed_are_under_way(server):
    teacher = remote(server, max_concurrent=2)
    teacher.check(temperature=1.0)
    while server.arrived.acquire(blocking=False):
        pass
    gate = server.manners.gate = threading.Event()
    stream = teacher.begin(temperature=1.0)
    for token in range(5):
        stream.add(FinishedRollout(prompt_ids=(1,), completion_ids=(token,)))
    assert all(server.arrived.acquire(timeout=10) for _ in range(2))
    assert not server.arrived.acquire(timeout=0.3)
    gate.set()
    stream.result(batch([([1], [token]) for token in range(5)]))


def test_rows_without_tokens_are_not_asked_for(server):
    found = remote(server).score(batch([([1], []), ([1], [2, 3])]), temperature=1.0, topk=2)
    assert not found.sampled_logprobs[0].any()
    assert (found.sampled_logprobs[1] < 0).all()


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503])
def test_a_busy_or_broken_server_is_asked_again(server, unpadded, status):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    server.manners.fail_first, server.manners.status = 2, status
    found = teacher.score(ROWS, temperature=1.0)
    assert_alike(found, local(unpadded).score(ROWS, temperature=1.0), ROWS.completion_mask)


def test_a_closed_connection_is_asked_again(server, unpadded):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    server.manners.close_first = 2
    assert_alike(
        teacher.score(ROWS, temperature=1.0), local(unpadded).score(ROWS, temperature=1.0), ROWS.completion_mask
    )


def test_the_wait_that_a_server_asks_for_is_kept(server):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    server.manners.fail_first, server.manners.status, server.manners.headers = 1, 429, {"Retry-After": "1"}
    begun = time.monotonic()
    teacher.score(batch([([1], [2])]), temperature=1.0)
    assert time.monotonic() - begun >= 1.0


def test_a_date_may_be_asked_for_as_well():
    import httpx

    def asked(value: str) -> float | None:
        return _asked_wait_s(httpx.Response(429, headers={"Retry-After": value}))

    assert 55 < asked(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60
    assert asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert asked("soon") is None


@given(retry=st.integers(0, 40), asked=st.none() | st.floats(0, 1e6))
def test_waits_grow_and_are_bounded(retry, asked):
    wait = Patience(timeout_s=1, max_retries=9).wait_s(retry, asked)
    least = min(asked or 0.0, 300.0)
    assert least <= wait <= least + min(30.0, 0.5 * 2**retry)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_final_and_shown_fit_to_be_shown(server, status):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    before = len(server.requests)
    server.manners.fail_first, server.manners.status = 99, status
    server.manners.message = "no\x1b[31m way\u202e\n" + "x" * 1000
    with pytest.raises(TeacherError, match=rf"refuses /v1/completions \({status}\): no \[31m way x+\.\.\.") as caught:
        teacher.score(batch([([1], [2])]), temperature=1.0)
    assert len(server.requests) - before == 1
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_server_that_stays_away_is_given_up_with_all_that_is_known(server):
    teacher = remote(server, max_retries=2)
    teacher.check(temperature=1.0)
    before = len(server.requests)
    server.manners.fail_first, server.manners.status = 99, 503
    with pytest.raises(
        TeacherError, match=rf"{server.url} stays away: 3 tries .* in \d+ s.*status 503: out of sorts.*--resume"
    ):
        teacher.score(batch([([1], [2])]), temperature=1.0)
    assert len(server.requests) - before == 3
    server.manners.fail_first = 0
    assert teacher.score(batch([([1], [2])]), temperature=1.0).sampled_logprobs[0, 0] < 0


def test_a_stream_that_failed_sends_nothing_more(server):
    teacher = remote(server, max_retries=0)
    teacher.check(temperature=1.0)
    server.manners.fail_first = 1
    stream = teacher.begin(temperature=1.0)
    stream.add(FinishedRollout(prompt_ids=(1,), completion_ids=(2,)))
    deadline = time.monotonic() + 10
    while stream._failed() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    before = len(server.requests)
    stream.add(FinishedRollout(prompt_ids=(1,), completion_ids=(3,)))
    with pytest.raises(TeacherError, match="stays away"):
        stream.result(batch([([1], [2]), ([1], [3])]))
    assert len(server.requests) == before


def test_a_server_that_hangs_is_given_up_in_time(server):
    teacher = remote(server, max_retries=1, timeout_s=0.3)
    teacher.check(temperature=1.0)
    server.manners.gate = threading.Event()
    begun = time.monotonic()
    with pytest.raises(TeacherError, match=r"no answer within 0\.3 s"):
        teacher.score(batch([([1], [2])]), temperature=1.0)
    assert time.monotonic() - begun < 5


def test_a_server_that_was_never_there_is_given_up():
    import socket

    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        config = TeacherConfig(server_url=f"http://127.0.0.1:{taken.getsockname()[1]}", max_retries=1)
        with pytest.raises(TeacherError, match="2 tries of /v1/models"):
            ServerTeacher(config, vocab_size=VOCAB, first_wait_s=0.01).check(temperature=1.0)


@BOTH
@pytest.mark.parametrize("wrong", ["ids", "nan", "floor", "short", "above", "text", "none"])
def test_an_answer_that_cannot_be_used_is_never_used(server, api, wrong):
    teacher = remote(server, api)
    teacher.check(temperature=1.0)
    server.manners.wrong = wrong
    with pytest.raises(TeacherError, match="cannot be used"):
        teacher.score(ROWS, temperature=1.0)


def test_an_answer_about_other_tokens_is_seen_by_its_keys_too(server):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    server.manners.wrong = "keys"
    with pytest.raises(TeacherError, match=r"token id \d+ was sent, and the answer is about others"):
        teacher.score(ROWS, temperature=1.0)


def test_one_bad_answer_among_good_ones_spoils_the_step(server):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    server.manners.wrong, server.manners.wrong_after = "nan", 2
    with pytest.raises(TeacherError, match="not a finite number"):
        teacher.score(ROWS, temperature=1.0)


def test_a_likeliest_token_that_the_student_does_not_know_is_refused(model):
    server = ModelServer(model)
    server.manners.max_logprobs = None
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight[VOCAB:] *= 30
    try:
        with pytest.raises(TeacherError, match="student's tokenizer ends at 18"):
            remote(server).score(ROWS, temperature=1.0, topk=4)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)
        server.close()


def test_the_key_comes_from_the_environment_and_is_never_shown(server, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", KEY)
    server.manners.key = KEY
    teacher = remote(server, api_key_env="TEACHER_KEY")
    teacher.score(ROWS, temperature=1.0)
    server.manners.key, server.manners.echo_key = "another", True
    with pytest.raises(TeacherError, match=r"wrong key: Bearer \*\*\*.*api_key_env") as caught:
        teacher.score(ROWS, temperature=1.0)
    said = "".join(map(str, (caught.value, caught.value.__cause__, caught.value.__context__)))
    assert KEY not in said + repr(teacher) + repr(teacher._caller) + caplog.text


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_key_that_is_not_there_is_told_by_the_name_of_its_variable(server, monkeypatch, value):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(ConfigError, match="TEACHER_KEY"):
        remote(server, api_key_env="TEACHER_KEY")


def test_a_key_that_would_break_a_header_is_refused_unseen(server, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\nX-Evil: 1")
    with pytest.raises(ConfigError, match="TEACHER_KEY") as caught:
        remote(server, api_key_env="TEACHER_KEY")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:pw@host", "http://host?key=1", "ftp://host", "http://", "http://host:99999", "http://h\x1b"]
)
def test_a_url_that_cannot_be_shown_or_used_is_refused(url):
    with pytest.raises(ValueError, match="server_url"):
        TeacherConfig(server_url=url)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_base_url_is_understood_with_and_without_v1(server, end):
    teacher = ServerTeacher(TeacherConfig(server_url=server.url + end), vocab_size=VOCAB)
    assert teacher.model_id == "tiny"


def test_of_several_models_one_must_be_named(server):
    server.manners.models = ("large", "small")
    with pytest.raises(ConfigError, match="'large', 'small'"):
        remote(server).check(temperature=1.0)
    with pytest.raises(ConfigError, match=r"no model 'tiny'.*'large', 'small'"):
        remote(server, server_model="tiny").check(temperature=1.0)
    teacher = remote(server, server_model="small")
    teacher.check(temperature=1.0)
    assert server.requests[-1][1]["model"] == "small"


def test_a_server_without_a_list_is_used_where_its_model_is_known(server):
    server.manners.lists = False
    teacher = remote(server, "sglang")
    teacher.score(ROWS, temperature=1.0)
    assert teacher.context_length is None
    assert remote(server, server_model="named").model_id == "named"
    with pytest.raises(TeacherError, match=r"refuses /v1/models \(404\)"):
        remote(server).check(temperature=1.0)


def test_something_that_is_no_inference_server_is_told_as_such(server):
    server.manners.models = ()
    with pytest.raises(TeacherError, match="lists no models"):
        remote(server).check(temperature=1.0)


def test_the_context_leaves_the_server_room_for_one_token_and_bounds_rollouts(server):
    server.manners.max_model_len = 10
    teacher = remote(server)
    assert teacher.context_length == 9
    teacher.score(batch([([1] * 4, [2] * 5)]), temperature=1.0)
    with pytest.raises(TeacherError, match=r"10 tokens.*at most 9.*max_completion_length"):
        teacher.score(batch([([1] * 5, [2] * 5)]), temperature=1.0)


def test_hidden_states_are_not_to_be_had(server):
    with pytest.raises(ConfigError, match=r"support=teacher_topk"):
        remote(server).score(ROWS, temperature=1.0, states=True)


def test_tokenizers_are_compared_where_the_server_can_be_asked(server, tokenizer):
    from transformers import PreTrainedTokenizerFast

    teacher = remote(server)
    assert teacher.check_tokens(tokenizer) is False
    server.manners.tokenizer = tokenizer
    assert teacher.check_tokens(tokenizer) is True
    other = PreTrainedTokenizerFast(tokenizer_object=_renumbered(tokenizer), unk_token="<unk>")
    with pytest.raises(ModelError, match="another text"):
        teacher.check_tokens(other)


def _renumbered(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*tokenizer.get_vocab(), "<unk>"]
    vocabulary = {name: number for number, name in enumerate(sorted(names, reverse=True))}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return found


def test_without_httpx_the_remedy_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingDependencyError, match=r"stableopd\[server\]"):
        remote(server)


def test_ctrl_c_is_heard_while_waiting(server):
    teacher = remote(server)
    teacher.check(temperature=1.0)
    server.manners.gate = threading.Event()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        teacher.score(ROWS, temperature=1.0)
    assert time.monotonic() - begun < 5


def test_closing_ends_the_thread(server):
    def alive() -> int:
        return sum(thread.name == "stableopd-teacher" for thread in threading.enumerate())

    before = alive()
    teacher = remote(server)
    teacher.check(temperature=1.0)
    assert alive() == before + 1
    teacher.close()
    deadline = time.monotonic() + 5
    while alive() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive() == before
