"""Engines whose weights are not the trainer's: real models play the engine, with some of their weights left behind."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from stableopd.config import StableOPDConfig
from stableopd.engines import checked_sequences
from stableopd.errors import ConfigError, EngineError
from stableopd.rollout.requests import Answer, requests_for, rollout_batch
from stableopd.rollout.vllm import VllmEngine
from stableopd.rollout.vllm_params import NEVER, sampling_arguments
from stableopd.rollout.weight_sync import SyncCheck, plain_weights, trainer_logprobs
from stableopd.types import Example, Sampling

SEQUENCES = [tuple(torch.randint(0, 60, (24,), generator=torch.Generator().manual_seed(n)).tolist()) for n in range(4)]
EXAMPLES = [Example(index=n, prompt="", prompt_ids=ids) for n, ids in ((0, (1, 2)), (7, (3,)), (9, (4, 5, 6)))]


def tied(seed=0, layers=6):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def moved(model, size, seed):
    """The model after an update of about this size."""
    new = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).sign() * size)
    return new


def with_head_of(model, old):
    """The model, but with another's output head: as a reload may leave a tied head."""
    mixed = copy.deepcopy(model)
    mixed.lm_head = torch.nn.Linear(32, 64, bias=False)
    mixed.lm_head.weight.data = old.lm_head.weight.data.clone()
    return mixed


def said(model, dtype=torch.float32):
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    return trainer_logprobs(model, SEQUENCES, nullcontext)


def checked(start, engine_start):
    check = SyncCheck(SEQUENCES, tolerance=0.1)
    assert check.start(said(start), engine_start).in_sync
    return check


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_a_head_that_stayed_behind_is_seen_at_the_first_sync(seed, size):
    old = tied(seed)
    new = moved(old, size, seed)
    check = checked(old, said(old))
    report = check.compare(said(new), said(with_head_of(new, old)))
    assert not report.in_sync, report
    assert check.compare(said(new), said(new)).in_sync


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_an_engine_that_takes_nothing_is_seen(size):
    old = tied()
    report = checked(old, said(old)).compare(said(moved(old, size, 1)), said(old))
    assert not report.in_sync
    assert report.gap == pytest.approx(report.change)


def test_an_engine_in_half_precision_that_follows_raises_no_alarm_over_many_syncs():
    model = tied()
    check = checked(model, said(model, torch.bfloat16))
    for step in range(20):
        model = moved(model, 3e-4, step)
        report = check.compare(said(model), said(model, torch.bfloat16))
        assert report.in_sync, (step, str(report))


def test_steps_too_small_to_see_in_half_precision_add_up_until_they_are_seen():
    first = model = tied()
    check = checked(first, said(first, torch.bfloat16))
    stale = said(first, torch.bfloat16)
    for step in range(200):
        model = moved(model, 3e-4, step)
        if not check.compare(said(model), stale).in_sync:
            return
    raise AssertionError("a stale engine was never seen")


class HFBackend:
    """A real model that answers as an engine would, and loads what it is given, or not."""

    def __init__(self, model, *, loads=True, mends=False):
        self.model, self.loads, self.mends, self.mended = copy.deepcopy(model), loads, mends, 0
        self.waiting = {}

    def run(self, requests, on_answer):
        for request in requests:
            torch.manual_seed(request.seed)
            ids, found = list(request.prompt_ids), []
            for _ in range(request.sampling.max_new_tokens):
                logprobs = self.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                token = int(torch.multinomial(logprobs.exp(), 1))
                ids.append(token)
                found.append(float(logprobs[token]))
            tokens = tuple(ids[len(request.prompt_ids) :])
            on_answer(Answer(row=request.row, token_ids=tokens, logprobs=tuple(found), finish_reason="length"))

    def prompt_logprobs(self, sequences):
        return trainer_logprobs(self.model, sequences, nullcontext)

    def load_weights(self, weights):
        self.waiting = {name: array.clone() for name, array in weights}
        if self.loads:
            self.model.load_state_dict(self.waiting)

    def mend(self):
        self.mended += 1
        if self.mends:
            self.model.load_state_dict(self.waiting)
        return self.mends

    def close(self): ...


def engine_over(backend, model, **changes):
    options = {"sequences": SEQUENCES, "tolerance": 0.1, "raw_logprobs": False, "autocast": nullcontext}
    options |= {"pad_token_id": 0, "vocab_size": None, "trial": Sampling(max_new_tokens=4)}
    return VllmEngine(backend, model, **{**options, **changes})


@torch.no_grad()
def test_an_engine_that_does_not_follow_is_mended_or_refused_and_never_drawn_from():
    model = tied()
    mending = HFBackend(model, loads=False, mends=True)
    engine = engine_over(mending, model)
    engine.sync_weights(moved(model, 1e-3, 1), 1)
    assert mending.mended == 1
    assert engine.last_sync.in_sync
    engine = engine_over(HFBackend(model, loads=False), model)
    with pytest.raises(EngineError, match="never trained on"):
        engine.sync_weights(moved(model, 1e-3, 1), 1)


@torch.no_grad()
def test_an_engine_of_other_weights_or_another_convention_is_refused_when_it_is_built():
    model = tied()
    with pytest.raises(EngineError, match="after it was built"):
        engine_over(HFBackend(tied(seed=5)), model, tolerance=1e-3)
    with pytest.raises(EngineError, match=r"softmax\(logits / 0.25\)"):
        engine_over(HFBackend(model), model, tolerance=1e-3, trial=Sampling(max_new_tokens=8, temperature=0.25))


@torch.no_grad()
def test_rollouts_of_an_engine_come_in_the_order_of_the_examples():
    model = tied(layers=1)
    engine = engine_over(HFBackend(model), model)
    told = []
    batch = engine.generate(EXAMPLES, Sampling(max_new_tokens=3, num_generations=2), step=1, on_finished=told.append)
    assert batch.prompt_index == (0, 0, 1, 1, 2, 2)
    assert [list(one.completion_ids) for one in told] == batch.completions()
    assert torch.isfinite(batch.sampling_logprobs).all()
    cut = engine.generate(EXAMPLES, Sampling(max_new_tokens=3, top_p=0.5), step=1)
    assert cut.sampling_logprobs.isnan().all()  # of no convention of ours


@given(st.permutations(range(6)))
@settings(deadline=None)
def test_answers_in_any_order_make_the_same_batch(order):
    requests = requests_for(EXAMPLES, Sampling(max_new_tokens=5, num_generations=2), step=3)
    answers = [
        Answer(row=row, token_ids=(row, 7), logprobs=(-0.5, -float(row)), finish_reason="stop") for row in range(6)
    ]
    fixed = {"pad_id": 0, "vocab_size": 10, "policy_version": 2, "device": torch.device("cpu")}
    batch = rollout_batch(EXAMPLES, requests, [answers[row] for row in order], **fixed)
    assert batch.completions() == [[row, 7] for row in range(6)]
    assert batch.sampling_logprobs[:, 1].tolist() == [-float(row) for row in range(6)]


@pytest.mark.parametrize("wrong", ["missing", "twice", "beyond", "short"])
def test_answers_that_make_no_batch_are_refused(wrong):
    requests = requests_for(EXAMPLES, Sampling(max_new_tokens=5), step=3)
    answers = [Answer(row=row, token_ids=(1, 2), logprobs=(-1.0, -1.0), finish_reason="stop") for row in range(3)]
    broken = Answer(row=2, token_ids=(1, 99), logprobs=(-1.0, -1.0), finish_reason="stop")
    short = Answer(row=2, token_ids=(1, 2), logprobs=(-1.0,), finish_reason="stop")
    given_answers = {
        "missing": answers[:2],
        "twice": [*answers, answers[0]],
        "beyond": [*answers[:2], broken],
        "short": [*answers[:2], short],
    }[wrong]
    fixed = {"pad_id": 0, "vocab_size": 10, "policy_version": 2, "device": torch.device("cpu")}
    with pytest.raises(EngineError):
        rollout_batch(EXAMPLES, requests, given_answers, **fixed)


def test_a_requests_seed_is_its_own():
    sampling = Sampling(max_new_tokens=5, num_generations=3, seed=4)
    seeds = {(r.prompt, r.row): r.seed for r in requests_for(EXAMPLES, sampling, step=3)}
    assert len(set(seeds.values())) == 9
    assert [r.seed for r in requests_for(EXAMPLES[1:2], sampling, step=3)] == [seeds[1, row] for row in (3, 4, 5)]
    assert {r.seed for r in requests_for(EXAMPLES, sampling, step=4)}.isdisjoint(seeds.values())


def test_what_a_request_says_leaves_nothing_to_the_models_own_defaults():
    [request] = requests_for(EXAMPLES[:1], Sampling(max_new_tokens=5, temperature=0.7, stop_strings=("END",)), step=1)
    said_to_vllm = sampling_arguments(request, stop_ids=[2, 3], banned=[60, 61])
    assert said_to_vllm["ignore_eos"]
    assert said_to_vllm["stop_token_ids"] == [2, 3]
    assert said_to_vllm["repetition_penalty"] == 1.0
    assert said_to_vllm["include_stop_str_in_output"]
    assert said_to_vllm["logit_bias"] == {60: NEVER, 61: NEVER}


def test_adapters_are_added_to_what_they_adapt_in_the_checkpoints_names():
    peft = pytest.importorskip("peft")
    model = tied(layers=2)
    names = set(model.state_dict())
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    weights = dict(plain_weights(adapted.get_base_model()))
    assert set(weights) == names
    model.load_state_dict(weights)
    ids = torch.tensor([SEQUENCES[0]])
    torch.testing.assert_close(model(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_compared_sequences_come_from_all_over_the_data_and_reach_into_gold():
    rows = [Example(index=n, prompt="", prompt_ids=tuple(range(100)), gold_ids=(n,) * 90) for n in range(40)]
    found = checked_sequences(rows, 4)
    assert [sequence[-1] for sequence in found] == [0, 10, 20, 30]
    assert all(len(sequence) == 64 for sequence in found)
    assert checked_sequences([Example(index=0, prompt="", prompt_ids=(1,))], 4) == []
    assert checked_sequences(rows, 0) == []


@pytest.mark.parametrize(
    ("rollout", "told"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, "Set temperature=1"),
        ({"stop_loops_after": 4}, "stop_loops_after is not possible"),
        ({"vllm": {"mode": "server"}}, "does not say where"),
        ({"vllm": {"mode": "server", "server_url": "http://u:hidden@h:1"}}, "neither a user and password"),
    ],
)
def test_a_vllm_engine_that_cannot_be_is_refused_and_no_secret_shown(rollout, told):
    with pytest.raises(ConfigError, match=told) as caught:
        StableOPDConfig(rollout={"engine": "vllm", **rollout}, teacher={"model_name_or_path": "t"})
    assert "hidden" not in str(caught.value)
