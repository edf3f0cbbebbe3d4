"""The vLLM engine against a real vLLM: conventions, determinism, weights that follow, whole runs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_vllm import CPU_SETTINGS, metrics_of, tied_model

from stableopd.config import StableOPDConfig
from stableopd.engines import make_engine
from stableopd.errors import ConfigError, EngineError
from stableopd.heads import HeadlessModel
from stableopd.scoring import completion_scores
from stableopd.trainer import StableOPDTrainer
from stableopd.types import Example, Sampling
from stableopd.vocabulary import end_token_ids, vocab_size

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPTS = [(3, 4, 5, 6, 7), (8, 9), (1, 2, 3, 4, 5, 6, 7, 8), (5, 5, 5)]
EXAMPLES = [Example(index=n, prompt="", prompt_ids=ids) for n, ids in enumerate(PROMPTS)]


def engine_for(student, tokenizer, **rollout):
    settings = {"engine": "vllm", "vllm": CPU_SETTINGS, "max_completion_length": 24, **rollout}
    config = StableOPDConfig(rollout=settings, teacher={"model_name_or_path": "unused"})
    return make_engine(student, config, tokenizer, end_token_ids(tokenizer), EXAMPLES, nullcontext)


@pytest.fixture(scope="module")
def student(tokenizer):
    return tied_model(tokenizer, seed=1)


@pytest.fixture(scope="module")
def engine(student, tokenizer):
    engine = engine_for(student, tokenizer)
    yield engine
    engine.close()


@pytest.fixture
def followed(engine, student):
    """The engine with the student's weights, whatever a test did to either."""
    kept = {name: array.clone() for name, array in student.state_dict().items()}
    yield engine
    student.load_state_dict(kept)
    engine.sync_weights(student, 0)


def own_logprobs(student, batch, tokenizer, temperature):
    model = HeadlessModel(student, vocab_size(tokenizer))
    return completion_scores(model, batch, temperature=temperature, token_budget=512, autocast=nullcontext).logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_trainer(engine, student, tokenizer, temperature):
    sampling = Sampling(max_new_tokens=24, temperature=temperature, num_generations=3, seed=1)
    batch = engine.generate(EXAMPLES, sampling, step=1)
    expected = own_logprobs(student, batch, tokenizer, temperature)
    torch.testing.assert_close(batch.sampling_logprobs, expected, atol=1e-4, rtol=0)
    assert batch.sampling_logprobs[batch.completion_mask].std() > 0.1


def test_rows_end_with_their_end_token_or_at_their_budget(engine, tokenizer):
    ends = end_token_ids(tokenizer)
    batch = engine.generate(EXAMPLES, Sampling(max_new_tokens=12, num_generations=8, seed=2), step=1)
    assert set(batch.finish_reason) == {"stop", "length"}
    for ids, reason in zip(batch.completions(), batch.finish_reason, strict=True):
        assert (ids[-1] in ends) == (reason == "stop")
        assert not ends & set(ids[:-1])
        assert len(ids) <= 12
        assert max(ids) < vocab_size(tokenizer)


def test_a_completion_depends_neither_on_the_order_nor_on_its_neighbours(engine):
    sampling = Sampling(max_new_tokens=16, num_generations=2, seed=3)
    whole = engine.generate(EXAMPLES, sampling, step=4).completions()
    turned = engine.generate(EXAMPLES[::-1], sampling, step=4).completions()
    assert [turned[2 * (3 - prompt) + n] for prompt in range(4) for n in range(2)] == whole
    assert engine.generate(EXAMPLES[2:3], sampling, step=4).completions() == whole[4:6]
    assert engine.generate(EXAMPLES, sampling, step=5).completions() != whole


def test_each_rollout_is_told_of_once_and_as_it_is(engine):
    told = []
    batch = engine.generate(EXAMPLES, Sampling(max_new_tokens=9, num_generations=2), step=1, on_finished=told.append)
    prompts = [PROMPTS[prompt] for prompt in batch.prompt_index]
    expected = [(prompt, tuple(ids)) for prompt, ids in zip(prompts, batch.completions(), strict=True)]
    assert sorted((one.prompt_ids, one.completion_ids) for one in told) == sorted(expected)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine, tokenizer):
    free = engine.generate(EXAMPLES, Sampling(max_new_tokens=20, seed=5), step=1).completions()
    row = max(range(len(free)), key=lambda n: len(free[n]))
    text = tokenizer.decode(free[row][3:5])
    sampling = Sampling(max_new_tokens=20, seed=5, stop_strings=(text,))
    batch = engine.generate(EXAMPLES, sampling, step=1)
    stopped = batch.completions()[row]
    assert stopped == free[row][: len(stopped)]
    assert len(stopped) <= 5
    assert tokenizer.decode(stopped).endswith(text)
    assert batch.finish_reason[row] == "stop"


def test_greedy_decoding_takes_the_trainers_likeliest_token(engine, student, tokenizer):
    batch = engine.generate(EXAMPLES[:1], Sampling(max_new_tokens=6, temperature=0.0), step=1)
    ids = list(PROMPTS[0])
    for token in batch.completions()[0]:
        assert int(student(input_ids=torch.tensor([ids])).logits[0, -1, : vocab_size(tokenizer)].argmax()) == token
        ids.append(token)


def test_a_tied_head_follows_a_sync(followed, student, tokenizer):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    followed.sync_weights(student, 1)
    assert followed.last_sync.change > 0.05
    assert followed.last_sync.gap < 1e-4
    batch = followed.generate(EXAMPLES, Sampling(max_new_tokens=16, num_generations=2), step=1)
    torch.testing.assert_close(batch.sampling_logprobs, own_logprobs(student, batch, tokenizer, 1.0), atol=1e-4, rtol=0)
    assert batch.policy_version == 1


def test_a_small_update_that_the_engine_does_not_take_is_refused(followed, student, monkeypatch):
    monkeypatch.setattr(followed._backend, "load_weights", lambda weights: None)
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight.mul_(1.02)
    with pytest.raises(EngineError, match="does not have the student's weights after the sync to policy version 3"):
        followed.sync_weights(student, 3)
    monkeypatch.undo()


def test_a_head_that_stays_behind_is_mended(followed, student, monkeypatch):
    """As a reload may leave a tied head on a processor: everything is new but the head."""
    backend = followed._backend
    load = backend.load_weights

    def all_but_the_head(weights):
        load(weights)
        backend._llm.apply_model(lambda model: setattr(model.lm_head, "weight", stale) or None)
        backend._llm.apply_model(repack)

    stale = torch.nn.Parameter(student.lm_head.weight.detach().clone(), requires_grad=False)

    def repack(model):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    monkeypatch.setattr(backend, "load_weights", all_but_the_head)
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(1.3)
    with monkeypatch.context() as without:
        without.setattr(backend, "mend", lambda: False)
        with pytest.raises(EngineError):
            followed.sync_weights(student, 2)
    followed.sync_weights(student, 2)
    assert followed.last_sync.in_sync
    assert followed.last_sync.gap < 1e-4
    monkeypatch.undo()


def test_a_run_trains_on_colocated_rollouts(run_settings, tied_checkpoints, tmp_path):
    settings = run_settings(
        student={"model_name_or_path": str(tied_checkpoints / "student")},
        teacher={"model_name_or_path": str(tied_checkpoints / "teacher")},
        rollout={"engine": "vllm", "vllm": CPU_SETTINGS},
        optimizer={"learning_rate": 1e-3},
        max_steps=3,
    )
    trainer = StableOPDTrainer(args=StableOPDConfig(**settings))
    try:
        trainer.train()
    finally:
        trainer.engine.close()
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert len(lines) == 3
    assert max(line["sampling/logprob_gap"] for line in lines) < 1e-4
    assert trainer.engine.last_sync.change > 0


def test_a_run_trains_on_the_rollouts_of_a_server(run_settings, tied_checkpoints, vllm_server, tmp_path):
    settings = run_settings(
        student={"model_name_or_path": str(tied_checkpoints / "student")},
        teacher={"model_name_or_path": str(tied_checkpoints / "teacher")},
        rollout={"engine": "vllm", "vllm": {"mode": "server", "server_url": vllm_server}},
        optimizer={"learning_rate": 1e-3},
        max_steps=3,
    )
    trainer = StableOPDTrainer(args=StableOPDConfig(**settings))
    trainer.train()
    trainer.engine.close()
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert max(line["sampling/logprob_gap"] for line in lines) < 1e-4
    assert trainer.engine.last_sync.in_sync
    assert trainer.engine.last_sync.change > 1e-3


def test_sampling_whose_log_probabilities_vllm_does_not_give_is_refused(student, tokenizer):
    with pytest.raises(ConfigError, match="Set temperature=1"):
        engine_for(student, tokenizer, temperature=0.7, top_p=0.9)
    with pytest.raises(ConfigError, match="stop_loops_after"):
        engine_for(student, tokenizer, stop_loops_after=4)
