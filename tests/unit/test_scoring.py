"""Padded or packed, whatever stands in the padding: every completion token is scored as in a sequence by itself."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from stableopd.heads import HeadlessModel
from stableopd.losses import token_entropy, token_logprobs
from stableopd.scoring import all_completion_states, completion_scores, completion_states, trimmed_batches

VOCAB, TEMPERATURE = 20, 0.7
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@lru_cache
def scorer(name: str) -> HeadlessModel:
    """`packed` attends sequence by sequence, `eager` under padding; GPT-2 has learned positions."""
    family, attention = name.split()
    torch.manual_seed(1)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB + 2, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = Qwen3Config(
            vocab_size=VOCAB + 2, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=0.4,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    return HeadlessModel(model.eval(), VOCAB)


MODELS = ("qwen3 packed", "qwen3 eager", "gpt2 packed", "gpt2 eager")


@dataclass
class Padded:
    """Prompts of these lengths padded on the left, completions on the right, with junk in the padding."""

    prompts: list[list[int]]
    completions: list[list[int]]
    junk: int = 0
    spare: int = 0
    """Columns on either side that are padding in every row."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.junk)
        width = self.spare + max(map(len, self.prompts))
        length = self.spare + max(map(len, self.completions))
        num_rows = len(self.prompts)
        self.prompt_ids = torch.randint(VOCAB, (num_rows, width), generator=generator)
        self.completion_ids = torch.randint(VOCAB, (num_rows, length), generator=generator)
        self.prompt_mask = torch.zeros(num_rows, width, dtype=torch.bool)
        self.completion_mask = torch.zeros(num_rows, length, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            self.prompt_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self.prompt_mask[row, width - len(prompt) :] = True
            self.completion_ids[row, : len(completion)] = torch.tensor(completion)
            self.completion_mask[row, : len(completion)] = True

    def unpadded(self) -> list[tuple[Tensor, int]]:
        """(prompt and completion in one row [1, L], length of the prompt) of each row."""
        return [
            (torch.tensor([[*prompt, *completion]]), len(prompt))
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]


def tokens(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=most)


@st.composite
def batches(draw) -> Padded:
    rows = draw(st.lists(st.tuples(tokens(6), tokens(8)), min_size=1, max_size=6))
    return Padded(
        [p for p, _ in rows], [c for _, c in rows], junk=draw(st.integers(0, 99)), spare=draw(st.integers(0, 2))
    )


FIXED = Padded(
    [[3, 4, 5, 6, 7], [8], [9, 10], [11], [12, 13, 14]],
    [[1, 2], [3, 4, 5, 6, 7, 8, 9], [10], [11], [12, 13, 14, 15]],
    junk=5,
    spare=1,
)
"""Prompts and completions of one token among them, also both in one row."""


def naive_states(model: HeadlessModel, batch: Padded) -> list[Tensor]:
    """Hidden states [length, H] of each row's completion, one forward pass for each row."""
    found = []
    for ids, start in batch.unpadded():
        whole = model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        found.append(whole[start - 1 : -1])
    return found


def naive_logits(model: HeadlessModel, batch: Padded) -> list[Tensor]:
    with torch.no_grad():
        return [
            model.model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1, :VOCAB]
            for ids, start in batch.unpadded()
        ]


def test_the_models_here_are_packed_and_padded_ones():
    assert [scorer(name).packs for name in MODELS] == [True, False, True, False]


@pytest.mark.parametrize("name", MODELS)
@given(batch=batches())
@settings(max_examples=25, deadline=None)
def test_states_are_those_of_each_row_without_padding(name, batch):
    model = scorer(name)
    with torch.no_grad():
        expected = torch.cat(naive_states(model, batch))
        torch.testing.assert_close(completion_states(model, batch), expected, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_the_states_are_those_of_each_row_without_padding(name):
    model = scorer(name)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(states: Tensor) -> tuple[Tensor, ...]:
        weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(4))
        return torch.autograd.grad((states * weight).sum(), parameters, allow_unused=True)

    found, expected = gradients(completion_states(model, FIXED)), gradients(torch.cat(naive_states(model, FIXED)))
    assert sum(grad is not None for grad in expected) > 10
    for grad, other, parameter in zip(found, expected, names, strict=True):
        assert (grad is None) == (other is None), parameter
        if other is not None:
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
@given(batch=batches(), budget=st.integers(1, 80))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_each_row_without_padding_whatever_the_budget(name, batch, budget):
    scores = completion_scores(
        scorer(name), batch, temperature=TEMPERATURE, token_budget=budget, autocast=nullcontext, entropy=True, topk=4
    )
    for row, logits in enumerate(naive_logits(scorer(name), batch)):
        length = len(logits)
        ids = torch.tensor(batch.completions[row])
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        top = scores.topk_ids[row, :length]
        torch.testing.assert_close(scores.logprobs[row, :length], token_logprobs(logits, ids, TEMPERATURE), **TOLERANCE)
        torch.testing.assert_close(scores.entropy[row, :length], token_entropy(logits, TEMPERATURE), **TOLERANCE)
        torch.testing.assert_close(scores.topk_logprobs[row, :length], log_p.topk(4).values, **TOLERANCE)
        torch.testing.assert_close(scores.topk_logprobs[row, :length], log_p.gather(-1, top), **TOLERANCE)
        assert all(len(set(ids)) == 4 for ids in top.tolist())
    for array in (scores.logprobs, scores.entropy, scores.topk_ids, scores.topk_logprobs):
        assert not array[~batch.completion_mask].any(), "0 where masked"


@pytest.mark.parametrize("name", MODELS)
@given(batch=batches(), budget=st.integers(1, 80))
@settings(max_examples=10, deadline=None)
def test_states_of_all_rows_come_in_the_rows_own_order(name, batch, budget):
    found = all_completion_states(scorer(name), batch, token_budget=budget, autocast=nullcontext)
    with torch.no_grad():
        expected = naive_states(scorer(name), batch)
    assert len(found) == len(expected)
    for states, other in zip(found, expected, strict=True):
        torch.testing.assert_close(states, other, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_learned_positions_up_to_the_last_one_are_used_and_padding_takes_none(name):
    """A row as long as GPT-2's positions, beside a short one: with padding counted there would be no place for it."""
    batch = Padded([list(range(20)), [1]], [[2] * 12, [3]], spare=3)
    scores = completion_scores(scorer(name), batch, temperature=1.0, token_budget=1000, autocast=nullcontext)
    for row, logits in enumerate(naive_logits(scorer(name), batch)):
        expected = token_logprobs(logits, torch.tensor(batch.completions[row]))
        torch.testing.assert_close(scores.logprobs[row, : len(logits)], expected, **TOLERANCE)


def test_what_was_not_asked_for_is_not_there_and_more_than_the_vocabulary_is_all_of_it():
    def scores(**options):
        return completion_scores(
            scorer("qwen3 packed"), FIXED, temperature=1.0, token_budget=50, autocast=nullcontext, **options
        )

    assert (scores().entropy, scores().topk_ids, scores().topk_logprobs) == (None, None, None)
    found = scores(topk=VOCAB + 9)
    assert found.topk_ids.shape == (*FIXED.completion_ids.shape, VOCAB)
    total = found.topk_logprobs.exp().sum(-1)[FIXED.completion_mask]
    torch.testing.assert_close(total, torch.ones_like(total))


def test_scoring_leaves_modes_alone_and_is_not_disturbed_by_dropout():
    model = HeadlessModel(
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)), VOCAB
    ).train()
    model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    scores = [
        completion_scores(model, FIXED, temperature=1.0, token_budget=50, autocast=nullcontext).logprobs
        for _ in range(2)
    ]
    assert torch.equal(*scores)
    assert not scores[0].requires_grad
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("packed", [False, True])
@given(batch=batches(), budget=st.integers(1, 80))
def test_batches_keep_to_the_budget_hold_each_row_once_and_no_common_padding(packed, batch, budget):
    seen: list[int] = []
    for rows, part in trimmed_batches(batch, budget, packed=packed):
        lengths = part.prompt_mask.sum(1) + part.completion_mask.sum(1)
        cost = int(lengths.sum()) if packed else int(lengths.max()) * len(rows)
        assert cost <= budget or len(rows) == 1
        assert part.prompt_mask.any(dim=0).all()
        assert part.completion_mask.any(dim=0).all()
        for at, row in enumerate(rows.tolist()):
            assert part.prompt_ids[at][part.prompt_mask[at]].tolist() == batch.prompts[row]
            assert part.completion_ids[at][part.completion_mask[at]].tolist() == batch.completions[row]
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(batch.prompts)))
