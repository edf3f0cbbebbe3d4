"""Slots that waiting rows take over from finished ones: the same completions, for less work."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_engine import END, MODELS, PAD, Scripted, engine, llama, prompts, qwen, sliding_qwen
from torch import Tensor

from stableopd.rollout.cache import CachePart, growing_cache, joined
from stableopd.rollout.draws import Uniforms
from stableopd.rollout.loops import LoopWatch
from stableopd.types import Example, FinishedRollout, RolloutBatch, Sampling


def row_by_row(model: Any, examples: list[Example], sampling: Sampling, **options: Any) -> RolloutBatch:
    return engine(model, max_batch_size=1, compact_below=0.0, **options).generate(examples, sampling, step=2)


def assert_same(found: RolloutBatch, expected: RolloutBatch) -> None:
    assert found.completions() == expected.completions()
    assert found.finish_reason == expected.finish_reason
    assert found.prompt_index == expected.prompt_index
    torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs, atol=1e-5, rtol=0)


def widths_of(model: Any, **arguments: Any) -> list[tuple[int, int]]:
    widths: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine(model, **arguments.pop("options")).generate(step=2, **arguments)
    hook.remove()
    return widths


# ------------------------------------------------------------------------------------------ the same completions


@MODELS
@pytest.mark.parametrize("compact_below", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("max_batch_size", [2, 5])
def test_refilled_slots_give_the_completions_of_row_by_row_decoding(build, max_batch_size, compact_below):
    model, examples = build(), prompts(3, 9, 1, 5, 14, 2)
    sampling = Sampling(max_new_tokens=30, num_generations=3)
    options = {"max_batch_size": max_batch_size, "compact_below": compact_below}
    expected = row_by_row(model, examples, sampling)
    assert_same(engine(model, **options).generate(examples, sampling, step=2), expected)
    assert len(set(expected.lengths())) > 5, "the lengths must differ for the test to mean anything"


def test_rows_that_outlive_many_refills_keep_their_completions():
    """Past the first refill of random numbers and the first growth of the cache, at all offsets."""
    model, examples = llama(initializer_range=0.02), prompts(3, 1, 6)  # nearly uniform: one token in 24 ends a row
    sampling = Sampling(max_new_tokens=150, num_generations=24)
    expected = row_by_row(model, examples, sampling)
    assert_same(engine(model, max_batch_size=7, compact_below=0.8).generate(examples, sampling, step=2), expected)
    assert sum(length > 70 for length in expected.lengths()) > 2


def test_more_generations_than_slots_read_their_prompt_once():
    model, examples = qwen(), prompts(5, 7)
    sampling = Sampling(max_new_tokens=20, num_generations=9)
    options = {"max_batch_size": 4, "compact_below": 0.75}
    read = [shape for shape in widths_of(model, examples=examples, sampling=sampling, options=options) if shape[1] > 1]
    assert read == [(1, 5), (1, 7)]
    assert_same(engine(model, **options).generate(examples, sampling, step=2), row_by_row(model, examples, sampling))


def test_a_prompt_longer_than_the_running_cache_joins_it():
    model, examples = qwen(), prompts(1, 1, 40)
    sampling, options = Sampling(max_new_tokens=20, num_generations=2), {"max_batch_size": 3, "compact_below": 1.0}
    shapes = widths_of(model, examples=examples, sampling=sampling, options=options)
    joined_at = shapes.index((1, 40))
    assert shapes[joined_at + 1][0] == 3, "it must join rows that are under way"
    assert_same(engine(model, **options).generate(examples, sampling, step=2), row_by_row(model, examples, sampling))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}])
def test_refilling_changes_nothing_however_tokens_are_drawn(settings):
    model, examples = llama(), prompts(3, 9, 1, 5)
    sampling = Sampling(max_new_tokens=24, num_generations=4, **settings)
    found = engine(model, max_batch_size=6).generate(examples, sampling, step=2)
    assert_same(found, row_by_row(model, examples, sampling))


def test_loops_are_ended_at_the_same_token_in_refilled_slots():
    model, examples = qwen(), prompts(3, 5, 4, 6)
    sampling = Sampling(max_new_tokens=80, temperature=0.3, num_generations=4, seed=3, stop_loops_after=4)
    expected = row_by_row(model, examples, sampling)
    assert_same(engine(model, max_batch_size=5).generate(examples, sampling, step=2), expected)
    assert {"loop", "stop"} <= set(expected.finish_reason)


def test_eager_attention_is_refilled_too():
    model, examples = qwen(attn_implementation="eager"), prompts(3, 9, 1, 5)
    sampling = Sampling(max_new_tokens=20, num_generations=3)
    found = engine(model, max_batch_size=5).generate(examples, sampling, step=2)
    assert_same(found, row_by_row(model, examples, sampling))


# ------------------------------------------------------------------------------------------------- for less work


def test_a_freed_slot_is_taken_by_the_next_row():
    scripts = [[5] * 9 + [END], [5, END], [6] * 4 + [END], [7, 7, END]]
    model = Scripted({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,)) for at in range(4)]
    found = engine(model, max_batch_size=2, compact_below=1.0).generate(examples, Sampling(max_new_tokens=12), step=0)
    assert found.completions() == scripts
    decoded = [shape for shape in model.widths if shape[0] == 2]
    assert len(model.widths) == 2 + 10, "three readings of prompts, and nine tokens after the longest row's first"
    assert len(decoded) == 1 + 7, "until the last row but one ends, both slots are busy"


def test_rows_join_only_when_enough_slots_are_free():
    scripts = [[5] * length + [END] for length in (1, 2, 3, 20, 3, 3, 3)]
    model = Scripted({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,) * 2) for at in range(7)]
    engine(model, max_batch_size=4, compact_below=0.5).generate(examples, Sampling(max_new_tokens=30), step=0)
    assert [shape for shape in model.widths if shape[1] > 1] == [(4, 2), (2, 2), (1, 2)]


def test_a_sliding_window_waits_until_its_batch_is_over():
    model, examples = sliding_qwen(), prompts(4, 4, 4, 4, 4)
    options = {"max_batch_size": 3, "compact_below": 1.0}
    shapes = widths_of(model, examples=examples, sampling=Sampling(max_new_tokens=12), options=options)
    second = shapes.index((2, 4))
    assert max(rows for rows, _ in shapes[second:]) == 2, "no row of the first three goes on beside the last two"


def test_padding_that_all_rows_share_is_dropped():
    seen: list[tuple[int, int]] = []

    class Watched(Scripted):
        def forward(self, input_ids: Tensor, attention_mask: Any, past_key_values: Any, use_cache: bool):
            outputs: SimpleNamespace = super().forward(input_ids, attention_mask, past_key_values, use_cache)
            seen.append((input_ids.shape[0], past_key_values.get_seq_length()))
            return outputs

    scripts = [[5] * 20 + [END], *[[6] * 20 + [END]] * 3]
    model = Watched({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,)) for at in range(4)]
    engine(model, max_batch_size=2, compact_below=0.5).generate(examples, Sampling(max_new_tokens=30), step=0)
    assert max(width for _, width in seen) <= 22, "the cache is never wider than the longest row under way"


# ---------------------------------------------------------------------------------------------------- its pieces


def test_joined_caches_stand_side_by_side_flushed_to_the_right():
    first, second = growing_cache(torch.nn.Module()), growing_cache(torch.nn.Module())
    states = torch.arange(1.0, 4 * 2 * 5 * 3 + 1).reshape(4, 2, 5, 3)
    first.update(states, -states, 0)
    second.update(states[:2, :, :2] + 1000, states[:2, :, :2], 0)
    parts = [CachePart(cache=first, rows=torch.tensor([3, 1]), skip=1), CachePart(cache=second, rows=torch.tensor([1]))]
    cache = joined(parts, width=6)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert torch.equal(keys[:2, :, 2:], states[[3, 1], :, 1:])
    assert torch.equal(keys[2:, :, 4:], states[1:2, :, :2] + 1000)
    assert not keys[:2, :, :2].any()
    assert not keys[2:, :, :4].any()
    assert torch.equal(values[:2, :, 2:], -states[[3, 1], :, 1:])
    keys, _ = cache.update(states[:3, :, :1], states[:3, :, :1], 0)
    assert keys.shape[-2] == 7
    assert torch.equal(first.layers[0].keys, states), "the caches that it was made from are as they were"


@given(st.lists(st.tuples(st.integers(0, 150), st.integers(1, 3)), min_size=1, max_size=4), st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_row_goes_on_in_its_own_stream_of_random_numbers_through_joins_and_losses(events, choose):
    device, label, counts = torch.device("cpu"), 0, []
    watched: Uniforms | None = None
    labels: list[int] = []

    def expected(name: int, count: int) -> float:
        single = Uniforms([(1, 2, name, 0)], device)
        return [float(single.next()) for _ in range(count)][-1]

    for tokens, newcomers in events:
        fresh = list(range(label, label + newcomers))
        label += newcomers
        new = Uniforms([(1, 2, name, 0) for name in fresh], device)
        if watched is None:
            watched = new
        else:
            kept = sorted(choose.sample(range(len(labels)), choose.randint(1, len(labels))))
            watched.keep(torch.tensor(kept))
            labels, counts = [labels[at] for at in kept], [counts[at] for at in kept]
            watched.join(new)
        labels, counts = labels + fresh, counts + [0] * newcomers
        for _ in range(tokens):
            found = watched.next()
            counts = [count + 1 for count in counts]
        if tokens:
            assert found.tolist() == [expected(name, count) for name, count in zip(labels, counts, strict=True)]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=2, max_size=3), st.integers(2, 4))
@settings(max_examples=80, deadline=None)
def test_loops_of_rows_that_began_at_different_times_are_seen_as_of_each_alone(rows, min_repeats):
    """Row r joins r tokens after row 0."""
    device, total = torch.device("cpu"), max(len(ids) + at for at, ids in enumerate(rows))
    alone = []
    for ids in rows:
        watch = LoopWatch(1, min_repeats, 60, device)
        table = torch.tensor([ids])
        alone.append([bool(watch.push(table[:, :t], torch.tensor([0]))) for t in range(1, len(ids) + 1)])
    table = torch.zeros(len(rows), 61, dtype=torch.int64)
    watch, counts = LoopWatch(1, min_repeats, 60, device), [0]
    for clock in range(total):
        if 0 < clock < len(rows):
            watch.join(LoopWatch(1, min_repeats, 60, device))
            counts.append(0)
        for at in range(len(counts)):
            table[at, counts[at]] = rows[at][counts[at]] if counts[at] < len(rows[at]) else 7 + clock
            counts[at] += 1
        found = watch.push(table[:, : max(counts)], torch.arange(len(counts)), torch.tensor(counts))
        for at, count in enumerate(counts):
            if count <= len(rows[at]):
                assert bool(found[at]) == alone[at][count - 1]


# ------------------------------------------------------------------------------------------ told as they finish


def test_each_rollout_is_told_of_once_and_as_soon_as_it_ends():
    model, told, seen_after = qwen(), [], []
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_hook(count)
    examples = [Example(index=at, prompt="", prompt_ids=e.prompt_ids, teacher="ab"[at % 2])
                for at, e in enumerate(prompts(3, 9, 1, 5))]  # fmt: skip

    def on_finished(rollout: FinishedRollout) -> None:
        told.append(rollout)
        seen_after.append(calls)

    sampling = Sampling(max_new_tokens=25, num_generations=3)
    batch = engine(model, max_batch_size=5).generate(examples, sampling, step=2, on_finished=on_finished)
    hook.remove()
    teachers = batch.teachers
    whole = [
        FinishedRollout(prompt_ids=examples[prompt].prompt_ids, completion_ids=tuple(ids), teacher=teacher)
        for prompt, ids, teacher in zip(batch.prompt_index, batch.completions(), teachers, strict=True)
    ]
    by_content = lambda rollout: (rollout.prompt_ids, rollout.completion_ids)  # noqa: E731
    assert sorted(told, key=by_content) == sorted(whole, key=by_content)
    assert seen_after == sorted(seen_after)
    assert seen_after[0] < calls / 2, "the first is told of long before the batch is over"
    assert len({key for key, _ in groupby(seen_after)}) > 4
    assert "length" in batch.finish_reason, "some must run into the budget"


def test_a_rollout_is_told_of_at_the_token_that_ends_it():
    scripts = [[5, END], [5] * 8 + [END], [6, 6, 6, 6, 6, 6]]
    model, told = Scripted({10 + at: script for at, script in enumerate(scripts)}), []
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,)) for at in range(3)]
    sampling = Sampling(max_new_tokens=6)
    engine(model, compact_below=0.0).generate(
        examples, sampling, step=0,
        on_finished=lambda rollout: told.append((len(model.widths), rollout.completion_ids)),
    )  # fmt: skip
    assert told == [(2, (5, END)), (6, (5,) * 6), (6, (6,) * 6)]


def test_any_end_token_closes_a_row_and_padding_stays_padding():
    scripts = [[5, 2, 7], [5, 3, 7, 7], [4]]
    model = Scripted({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,)) for at in range(3)]
    found = engine(model, end_token_ids={2, 3, 4}, max_batch_size=1).generate(
        examples, Sampling(max_new_tokens=4), step=0
    )
    assert found.completions() == [[5, 2], [5, 3], [4]]
    assert found.finish_reason == ("stop",) * 3
    assert found.completion_ids.tolist() == [[5, 2], [5, 3], [4, PAD]]
