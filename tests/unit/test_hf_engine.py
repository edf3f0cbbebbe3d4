"""What `HFEngine` promises about completions, their log-probabilities, and the model it borrows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache

from stableopd.errors import ModelError
from stableopd.protocols import RolloutEngine
from stableopd.rollout.draws import draw_tokens
from stableopd.rollout.hf import HFEngine
from stableopd.types import Example, RolloutBatch, Sampling

VOCAB = 24
END = 1
PAD = 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def qwen(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 8} | overrides)).eval()


def llama(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | overrides)).eval()


def sliding_qwen() -> nn.Module:
    return qwen(use_sliding_window=True, sliding_window=6, layer_types=["full_attention", "sliding_attention"])


MODELS = pytest.mark.parametrize("build", [qwen, llama, sliding_qwen])


def engine(model: nn.Module, **options: Any) -> HFEngine:
    defaults: dict[str, Any] = {"end_token_ids": {END}, "pad_token_id": PAD}
    return HFEngine(model=model, **defaults | options)


def prompts(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    return [
        Example(
            index=100 + at, prompt="", prompt_ids=tuple(torch.randint(2, 20, (size,), generator=generator).tolist())
        )
        for at, size in enumerate(lengths)
    ]


def teacher_forced(model: nn.Module, rollouts: RolloutBatch, temperature: float) -> list[Tensor]:
    """Log-probabilities of each completion by one full pass over its own unpadded sequence."""
    scores = []
    for prompt, mask, completion in zip(rollouts.prompt_ids, rollouts.prompt_mask, rollouts.completions(), strict=True):
        ids = torch.cat([prompt[mask], torch.tensor(completion)])
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -len(completion) - 1 : -1]
        logprobs = (logits.double() / temperature).log_softmax(-1)
        scores.append(logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
    return scores


class Scripted(nn.Module):
    """A language model that says what it is told to: the first prompt token names the script of the completion.

    Ids below 9 are completion tokens, 9 is what comes after a script, and ids from 10 on are names of scripts. All it
    knows of a row it reads back from the cache, so that a cache whose rows went astray would show. It takes no
    position ids and no `logits_to_keep`.
    """

    def __init__(self, scripts: dict[int, Sequence[int]]) -> None:
        super().__init__()
        self.scripts = scripts
        self.weight = nn.Parameter(torch.zeros(1))
        self.widths: list[tuple[int, int]] = []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, past_key_values: DynamicCache, use_cache: bool
    ) -> SimpleNamespace:
        self.widths.append(tuple(input_ids.shape))
        states = input_ids[:, None, :, None].float()
        history = past_key_values.update(states, states, 0)[0][:, 0, :, 0].long()
        mask = torch.ones_like(history).bool() if attention_mask is None else attention_mask
        logits = torch.full((*input_ids.shape, 32), -30.0)
        for row, (ids, real) in enumerate(zip(history, mask, strict=True)):
            seen = ids[real].tolist()
            script = [*self.scripts[seen[0]], *[9] * len(seen)]
            logits[row, -1, script[sum(token < 10 for token in seen)]] = 30.0
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


def scripted(scripts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> RolloutBatch:
    """One rollout per script; prompts of different lengths, so that some are padded."""
    model = Scripted({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,) * (1 + at % 3)) for at in range(len(scripts))]
    return engine(model, **options).generate(examples, Sampling(max_new_tokens=max_new_tokens), step=0)


# ------------------------------------------------------------------------------------------- how completions end


def test_a_completion_ends_with_its_end_token() -> None:
    rollouts = scripted([[5, 6, END, 7, 7], [5, END, 7, 7, 7]], max_new_tokens=5)
    assert rollouts.completions() == [[5, 6, END], [5, END]]
    assert rollouts.finish_reason == ("stop", "stop")
    assert rollouts.completion_mask.tolist() == [[True, True, True], [True, True, False]]


def test_a_completion_without_end_token_has_exactly_the_budget() -> None:
    rollouts = scripted([[5, 6, 7, 8, END]], max_new_tokens=4)
    assert rollouts.completions() == [[5, 6, 7, 8]]
    assert rollouts.finish_reason == ("length",)


def test_an_end_token_on_the_last_allowed_place_is_a_stop() -> None:
    rollouts = scripted([[5, 6, 7, END], [5, 6, 7, 8]], max_new_tokens=4)
    assert rollouts.lengths() == [4, 4]
    assert rollouts.finish_reason == ("stop", "length")


def test_an_end_token_may_come_first() -> None:
    rollouts = scripted([[END, 4, 4], [5, 5, 5]], max_new_tokens=3)
    assert rollouts.completions() == [[END], [5, 5, 5]]
    assert rollouts.finish_reason == ("stop", "length")


def test_all_rows_may_end_with_the_first_token() -> None:
    rollouts = scripted([[END], [END]], max_new_tokens=3)
    assert rollouts.completion_ids.shape == (2, 1)
    assert rollouts.finish_reason == ("stop", "stop")


def test_a_budget_of_one_token() -> None:
    rollouts = scripted([[END], [5]], max_new_tokens=1)
    assert rollouts.completions() == [[END], [5]]
    assert rollouts.finish_reason == ("stop", "length")


def test_any_of_several_end_tokens_ends() -> None:
    rollouts = scripted([[5, 2, 7], [5, 3, 7], [5, 4, 7]], max_new_tokens=3, end_token_ids={2, 4, 999})
    assert rollouts.completions() == [[5, 2], [5, 3, 7], [5, 4]]
    assert rollouts.finish_reason == ("stop", "length", "stop")


def test_without_end_tokens_all_completions_have_the_budget() -> None:
    assert scripted([[END, END, 5]], max_new_tokens=3, end_token_ids=()).finish_reason == ("length",)


def test_a_pad_token_that_is_an_end_token_hides_nothing() -> None:
    rollouts = scripted([[5, END], [5, 6, 7, 8]], max_new_tokens=4, pad_token_id=END)
    assert rollouts.completions() == [[5, END], [5, 6, 7, 8]]
    assert rollouts.completion_ids[0].tolist() == [5, END, END, END]
    assert rollouts.finish_reason == ("stop", "length")


def test_a_pad_token_may_be_drawn() -> None:
    rollouts = scripted([[5, PAD, PAD, END]], max_new_tokens=6)
    assert rollouts.completions() == [[5, PAD, PAD, END]]


def test_padding_holds_pad_tokens_and_zero_logprobs() -> None:
    rollouts = scripted([[END, 7, 7], [5, 6, END]], max_new_tokens=3, compact_below=0.0)
    padding = ~rollouts.completion_mask
    assert rollouts.completion_ids[padding].tolist() == [PAD, PAD]
    assert rollouts.sampling_logprobs[padding].tolist() == [0.0, 0.0]


def test_rows_keep_their_order_whatever_their_lengths() -> None:
    scripts = [[2 + at % 7] * (1 + at % 5) + [END] for at in range(12)]
    for options in ({}, {"max_batch_size": 5}, {"compact_below": 1.0, "max_batch_size": 3}):
        assert scripted(scripts, max_new_tokens=8, **options).completions() == scripts


def test_finished_rows_are_no_longer_computed() -> None:
    scripts = [[5] * at + [END] for at in range(4)]
    model = Scripted({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,)) for at in range(4)]
    engine(model, compact_below=1.0).generate(examples, Sampling(max_new_tokens=9), step=0)
    assert model.widths == [(4, 1), (3, 1), (2, 1), (1, 1)]


def test_progress_adds_up_to_the_completion_tokens() -> None:
    counts: list[int] = []
    rollouts = scripted([[END], [5, 5, END], [5] * 6], max_new_tokens=6, compact_below=0.5, on_tokens=counts.append)
    assert sum(counts) == sum(rollouts.lengths()) == 10


# ------------------------------------------------------------------------------ what a completion depends on


@MODELS
@pytest.mark.parametrize(
    "options",
    [{"compact_below": 0.0}, {"compact_below": 1.0}, {"max_batch_size": 1}, {"max_batch_size": 5}],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_dropping_rows_and_batch_size_change_no_completion(build: Any, options: dict[str, Any]) -> None:
    model, examples = build(), prompts(3, 9, 1, 5)
    sampling = Sampling(max_new_tokens=30, num_generations=3)
    expected = engine(model).generate(examples, sampling, step=2)
    rollouts = engine(model, **options).generate(examples, sampling, step=2)
    assert rollouts.completions() == expected.completions()
    assert rollouts.finish_reason == expected.finish_reason
    torch.testing.assert_close(rollouts.sampling_logprobs, expected.sampling_logprobs, atol=1e-5, rtol=0)
    assert len(set(expected.lengths())) > 3, "the lengths must differ for the test to mean anything"


def test_dropping_rows_changes_no_long_completion() -> None:
    model = llama(initializer_range=0.02)  # nearly uniform: one token in 24 ends a completion
    examples, sampling = prompts(3), Sampling(max_new_tokens=150, num_generations=128)
    expected = engine(model, compact_below=0.0).generate(examples, sampling, step=0)
    rollouts = engine(model, compact_below=1.0).generate(examples, sampling, step=0)
    assert rollouts.completions() == expected.completions()
    assert sum(length > 70 for length in expected.lengths()) > 2, (
        "some must outlive refills of cache and random numbers"
    )


def test_the_order_of_examples_changes_no_completion() -> None:
    examples = prompts(3, 9, 1, 5)
    sampling = Sampling(max_new_tokens=20)
    rollouts = engine(qwen()).generate(examples, sampling, step=0)
    backwards = engine(qwen()).generate(examples[::-1], sampling, step=0)
    assert backwards.completions() == rollouts.completions()[::-1]


def test_left_padding_changes_no_completion() -> None:
    short, long = prompts(2, 40)
    sampling = Sampling(max_new_tokens=20)
    together = engine(qwen()).generate([short, long], sampling, step=0)
    alone = engine(qwen()).generate([short], sampling, step=0)
    assert together.completions()[0] == alone.completions()[0]
    length = alone.lengths()[0]
    torch.testing.assert_close(together.sampling_logprobs[0, :length], alone.sampling_logprobs[0], atol=1e-5, rtol=0)


def test_more_generations_leave_the_first_ones_as_they_were() -> None:
    examples = prompts(4, 2)
    few, many = (
        engine(qwen(), max_batch_size=4).generate(examples, Sampling(max_new_tokens=20, num_generations=n), step=0)
        for n in (1, 5)
    )
    assert many.prompt_index == (0,) * 5 + (1,) * 5
    assert [many.completions()[0], many.completions()[5]] == few.completions()
    assert len({tuple(row) for row in many.completions()}) == 10


def test_a_prompt_is_read_once_for_all_its_generations() -> None:
    model = Scripted({10: [5, END], 11: [6, END]})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,) * 3) for at in range(2)]
    rollouts = engine(model).generate(examples, Sampling(max_new_tokens=2, num_generations=4), step=0)
    assert model.widths == [(2, 3), (8, 1)]
    assert rollouts.completions() == [[5, END]] * 4 + [[6, END]] * 4


def test_seed_step_and_index_each_name_other_random_numbers() -> None:
    (example,) = prompts(4)
    other = Example(index=5, prompt="", prompt_ids=example.prompt_ids)

    def draw(example: Example, seed: int, step: int) -> list[int]:
        sampling = Sampling(max_new_tokens=20, seed=seed)
        return engine(qwen(), end_token_ids=()).generate([example], sampling, step=step).completions()[0]

    same = draw(example, seed=3, step=1)
    assert draw(example, seed=3, step=1) == same
    assert same not in (draw(example, seed=4, step=1), draw(example, seed=3, step=2), draw(other, seed=3, step=1))


def test_the_state_of_torchs_generator_is_neither_used_nor_touched() -> None:
    examples = prompts(4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = engine(qwen_once := qwen()).generate(examples, Sampling(max_new_tokens=10), step=0)
    torch.manual_seed(1)
    engine(qwen_once).generate(examples, Sampling(max_new_tokens=10), step=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert (
        engine(qwen_once).generate(examples, Sampling(max_new_tokens=10), step=0).completions() == first.completions()
    )


# ------------------------------------------------------------------------------------------- log-probabilities


@MODELS
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()) or "plain",
)
def test_logprobs_are_those_of_a_teacher_forced_pass(build: Any, settings: dict[str, float]) -> None:
    model, sampling = build(), Sampling(max_new_tokens=25, num_generations=2, **settings)  # type: ignore[arg-type]
    rollouts = engine(model).generate(prompts(3, 8, 1), sampling, step=0)
    for row, expected in enumerate(teacher_forced(model, rollouts, sampling.temperature)):
        torch.testing.assert_close(
            rollouts.sampling_logprobs[row, : len(expected)].double(), expected, atol=1e-4, rtol=0
        )


def test_greedy_takes_the_likeliest_token_and_scores_it_at_temperature_one() -> None:
    model = qwen()
    rollouts = engine(model).generate(prompts(3, 8), Sampling(max_new_tokens=10, temperature=0.0), step=0)
    for row, expected in enumerate(teacher_forced(model, rollouts, temperature=1.0)):
        torch.testing.assert_close(
            rollouts.sampling_logprobs[row, : len(expected)].double(), expected, atol=1e-4, rtol=0
        )
    for prompt, mask, completion in zip(rollouts.prompt_ids, rollouts.prompt_mask, rollouts.completions(), strict=True):
        ids = torch.cat([prompt[mask], torch.tensor(completion)])
        likeliest = model(input_ids=ids[None]).logits[0, -len(completion) - 1 : -1].argmax(-1)
        assert completion == likeliest.tolist()


def test_ids_that_pad_the_vocabulary_are_never_drawn_and_have_no_mass() -> None:
    model = qwen(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[20:] *= 50  # without the cut nearly all mass would be there
    sampling = Sampling(max_new_tokens=20, num_generations=8)
    rollouts = engine(model, vocab_size=20).generate(prompts(3), sampling, step=0)
    assert rollouts.completion_ids.max() < 20
    model.lm_head.weight.data = model.lm_head.weight.data[:20]
    for row, expected in enumerate(teacher_forced(model, rollouts, 1.0)):
        torch.testing.assert_close(
            rollouts.sampling_logprobs[row, : len(expected)].double(), expected, atol=1e-4, rtol=0
        )


# ------------------------------------------------------------------------------------------------- drawing a token


def uniform_grid(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def drawn_fractions(logits: Tensor, sampling: Sampling, count: int = 20_000) -> Tensor:
    """Fraction of an even grid of random numbers that draws each id: the distribution drawn from."""
    ids, _ = draw_tokens(logits.expand(count, -1), sampling, uniform_grid(count))
    return torch.bincount(ids, minlength=logits.shape[-1]) / count


def allowed_by_definition(logits: list[float], sampling: Sampling) -> list[float]:
    """Top-k, then top-p of the renormalised rest, in plain Python."""
    weights = [2.718281828459045 ** (value / sampling.temperature) for value in logits]
    ranked = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    ranked = ranked[: sampling.top_k or None]
    total, kept, mass = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        kept.append(token)
        mass += weights[token]
        if mass >= sampling.top_p * total * (1 - 1e-6):
            break
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_drawn_from_the_truncated_distribution(top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(top_k)) * 2
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    expected = torch.tensor(allowed_by_definition(logits.tolist(), sampling))
    fractions = drawn_fractions(logits, sampling)
    torch.testing.assert_close(fractions, expected, atol=2e-4, rtol=0)
    assert torch.equal(fractions > 0, expected > 2e-4) or (expected[fractions == 0] < 1e-4).all()


def test_a_draw_from_a_large_vocabulary_follows_the_whole_distribution_function() -> None:
    """Blocks of ids that are full, empty, and cut short by the end of the vocabulary."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(256 * 3 + 77, generator=generator) * 3
    logits[256:512] = float("-inf")
    logits[torch.rand(len(logits), generator=generator) < 0.3] = float("-inf")
    grid = uniform_grid(30_000)
    ids, logprobs = draw_tokens(logits.expand(len(grid), -1), Sampling(max_new_tokens=1), grid)
    cdf = logits.double().softmax(-1).cumsum(-1)
    below = torch.cat([torch.zeros(1), cdf])[ids]
    assert ((below - 1e-6 <= grid) & (grid <= cdf[ids] + 1e-6)).all()
    assert logits[ids].isfinite().all()
    torch.testing.assert_close(logprobs.double(), logits.double().log_softmax(-1)[ids], atol=1e-6, rtol=1e-6)


def test_of_equally_likely_ids_the_lower_ones_stay() -> None:
    flat = torch.zeros(8)
    assert drawn_fractions(flat, Sampling(max_new_tokens=1, top_k=3)).nonzero().squeeze(1).tolist() == [0, 1, 2]
    assert drawn_fractions(flat, Sampling(max_new_tokens=1, top_p=0.5)).nonzero().squeeze(1).tolist() == [0, 1, 2, 3]


def test_top_k_of_one_is_greedy() -> None:
    examples = prompts(3, 8, 1)
    greedy = engine(qwen()).generate(examples, Sampling(max_new_tokens=20, temperature=0.0), step=0)
    top_one = engine(qwen()).generate(examples, Sampling(max_new_tokens=20, top_k=1), step=0)
    assert top_one.completions() == greedy.completions()


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_impossible_ids_are_not_drawn_even_at_the_ends_of_the_range(settings: dict[str, Any]) -> None:
    never = float("-inf")
    logits = torch.tensor([never, 0.0, never, 0.0, -200.0, never])
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    ids, logprobs = draw_tokens(logits.expand(4, -1), Sampling(max_new_tokens=1, **settings), uniforms)
    assert set(ids.tolist()) <= {1, 3}
    assert logprobs.isfinite().all()


def test_a_random_number_on_a_step_of_the_distribution_draws_the_id_above() -> None:
    ids, _ = draw_tokens(torch.zeros(4, 4), Sampling(max_new_tokens=1), torch.arange(4, dtype=torch.float64) / 4)
    assert ids.tolist() == [0, 1, 2, 3]


def test_frequencies_of_drawn_tokens_match_the_softmax() -> None:
    model, (example,), count = llama(), prompts(4), 6000
    sampling = Sampling(max_new_tokens=1, temperature=0.8, num_generations=count)
    rollouts = engine(model, max_batch_size=count).generate([example], sampling, step=0)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.prompt_ids])).logits[0, -1]
    expected = (logits / 0.8).softmax(-1) * count
    observed = torch.bincount(rollouts.completion_ids[:, 0], minlength=VOCAB)
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 49.7, "99.9% of samples from the right distribution are below, with 23 degrees of freedom"


def test_random_numbers_of_a_row_do_not_repeat_along_the_completion() -> None:
    flat = qwen(tie_word_embeddings=False)
    nn.init.zeros_(flat.lm_head.weight)
    sampling = Sampling(max_new_tokens=300)
    (tokens,) = engine(flat, end_token_ids=()).generate(prompts(1), sampling, step=0).completions()
    assert all(tokens[:50] != tokens[start : start + 50] for start in range(1, 250))
    assert set(tokens) == set(range(VOCAB))


# ---------------------------------------------------------------------------------------------- the borrowed model


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_training_model_with_gradient_checkpointing_decodes_with_its_cache_and_comes_back_as_it_was() -> None:
    examples, sampling = prompts(3, 6), Sampling(max_new_tokens=12)
    expected = engine(llama(attention_dropout=0.5)).generate(examples, sampling, step=0)
    model = llama(attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rollouts = engine(model).generate(examples, sampling, step=0)
    hook.remove()
    assert rollouts.completions() == expected.completions()
    assert widths[0] == 6
    assert set(widths[1:]) == {1}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing


def test_modes_come_back_even_when_decoding_fails() -> None:
    model = qwen().train()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        engine(model).generate(prompts(3), Sampling(max_new_tokens=3), step=0)
    assert model.training


def test_rollouts_can_take_part_in_a_loss() -> None:
    model = qwen()
    rollouts = engine(model).generate(prompts(3), Sampling(max_new_tokens=5), step=0)
    assert not rollouts.sampling_logprobs.requires_grad
    logits = model(input_ids=rollouts.completion_ids).logits
    (logits.log_softmax(-1).amax(-1) * rollouts.sampling_logprobs).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_autocast_surrounds_the_forward_pass() -> None:
    model, dtypes = qwen(), []
    model.lm_head.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    bf16 = engine(model, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    rollouts = bf16.generate(prompts(3), Sampling(max_new_tokens=3), step=0)
    assert set(dtypes) == {torch.bfloat16}
    assert rollouts.sampling_logprobs.dtype == torch.float32


def test_synced_weights_are_those_decoded_with() -> None:
    borrower = engine(qwen())
    assert isinstance(borrower, RolloutEngine)
    other = llama()
    borrower.sync_weights(other, policy_version=7)
    rollouts = borrower.generate(prompts(3), Sampling(max_new_tokens=9), step=0)
    assert rollouts.policy_version == 7
    assert (
        rollouts.completions() == engine(other).generate(prompts(3), Sampling(max_new_tokens=9), step=0).completions()
    )


def test_prompts_come_back_padded_on_the_left() -> None:
    examples = prompts(2, 4)
    rollouts = engine(qwen()).generate(examples, Sampling(max_new_tokens=2), step=0)
    assert rollouts.prompt_mask.tolist() == [[False, False, True, True], [True] * 4]
    assert rollouts.prompt_ids[0].tolist() == [PAD, PAD, *examples[0].prompt_ids]


# ------------------------------------------------------------------------------------------------ what is refused


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        engine(qwen()).generate([], Sampling(max_new_tokens=3), step=0)


def test_an_empty_prompt_is_refused_by_name() -> None:
    empty = Example(index=42, prompt="", prompt_ids=())
    with pytest.raises(ValueError, match="example 42 has no tokens"):
        engine(qwen()).generate([*prompts(3), empty], Sampling(max_new_tokens=3), step=0)


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"num_generations": 0}]
)
def test_impossible_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        engine(qwen()).generate(prompts(3), Sampling(**{"max_new_tokens": 3} | settings), step=0)


def test_end_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ModelError, match="could ever stop"):
        engine(qwen(), end_token_ids={VOCAB + 5}).generate(prompts(3), Sampling(max_new_tokens=3), step=0)


def test_a_model_that_ignores_the_cache_is_refused() -> None:
    class Stateful(Scripted):
        def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(*args, **kwargs).logits, past_key_values=None)

    with pytest.raises(ModelError, match="DynamicCache"):
        engine(Stateful({10: [5]})).generate(
            [Example(index=0, prompt="", prompt_ids=(10,))], Sampling(max_new_tokens=1), step=0
        )
