"""A loop is seen at the very token that completes it, and the rollout ends there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_engine import END, Scripted, engine, prompts, qwen

from stableopd.health import find_loops, measure_rollouts
from stableopd.health.loops import MAX_PERIOD, MIN_LOOP_TOKENS
from stableopd.rollout.loops import LoopWatch
from stableopd.types import Example, RolloutBatch, Sampling


def loops_now(ids: list[int], min_repeats: int, max_new_tokens: int) -> bool:
    """The same question put to the whole sequence anew."""
    max_period = min(MAX_PERIOD, max_new_tokens // min_repeats)
    return any(loop.end == len(ids) for loop in find_loops(ids, max(1, max_period), min_repeats, MIN_LOOP_TOKENS))


def said(scripts: list[list[int]], max_new_tokens: int, stop_loops_after: int | None) -> RolloutBatch:
    """One rollout per script."""
    model = Scripted({10 + at: script for at, script in enumerate(scripts)})
    examples = [Example(index=at, prompt="", prompt_ids=(10 + at,)) for at in range(len(scripts))]
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_loops_after=stop_loops_after)
    return engine(model).generate(examples, sampling, step=0)


pieces = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 12))


@given(
    rows=st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=3), min_repeats=st.integers(2, 5),
    dropped_at=st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_row_loops_exactly_when_its_tokens_so_far_end_in_a_loop(rows, min_repeats, dropped_at):
    ids = [[token for unit, times in row for token in unit * times] for row in rows]
    width = min(len(row) for row in ids)
    completions = torch.tensor([row[:width] for row in ids])
    watch, slots = LoopWatch(len(ids), min_repeats, width, completions.device), torch.arange(len(ids))
    for t in range(1, width + 1):
        if t == dropped_at and len(slots) > 1:
            watch.keep(torch.tensor([len(slots) - 1]))
            slots = slots[-1:]
        found = watch.push(completions[:, :t], slots)
        assert found.tolist() == [loops_now(ids[slot][:t], min_repeats, width) for slot in slots.tolist()]


def test_a_looping_rollout_ends_with_its_last_allowed_repeat_and_others_go_on():
    cycle, steady = [5, 6, 7] * 30, [2, 3, 4, 5, 6, 7, 8] * 4
    found = said([cycle, [*steady, END]], 60, 8)
    assert found.finish_reason == ("loop", "stop")
    assert found.completions() == [cycle[:24], [*steady, END]]
    untouched = said([cycle, [*steady, END]], 60, None)
    assert untouched.finish_reason == ("length", "stop")


def test_short_cycles_need_sixteen_tokens_too():
    found = said([[8] * 40], 40, 3)
    assert found.lengths() == [16]
    assert found.finish_reason == ("loop",)


def test_an_end_token_that_completes_a_loop_is_a_stop():
    found = said([[8] * 15 + [END]], 40, 3)
    assert found.finish_reason == ("stop",)


def test_the_tokens_before_the_loop_ended_are_those_of_an_untouched_rollout():
    model, examples = qwen(), prompts(3, 5, 4, 6)
    sampling = {"max_new_tokens": 80, "temperature": 0.3, "num_generations": 4, "seed": 3}
    free = engine(model).generate(examples, Sampling(**sampling), step=1)
    cut = engine(model).generate(examples, Sampling(**sampling, stop_loops_after=4), step=1)
    assert "loop" in cut.finish_reason
    for whole, part, reason in zip(free.completions(), cut.completions(), cut.finish_reason, strict=True):
        assert part == whole[: len(part)]
        ends = [t for t in range(1, len(whole) + 1) if loops_now(whole[:t], 4, 80)]
        assert (reason == "loop") == bool(ends)
        assert len(part) == (ends[0] if ends else len(whole))


def test_a_rollout_cut_short_in_a_loop_counts_as_truncated_and_repetitive_however_short_it_is():
    found = measure_rollouts(lengths=[20, 9], finish_reasons=["loop", "stop"], texts=["ab" * 10, "a finding"])
    assert found["completions/clipped_ratio"] == 0.5
    assert found["health/repetition_rate"] == 0.5


def test_one_repeat_is_no_loop():
    with pytest.raises(ValueError, match="at least 2"):
        engine(qwen()).generate(prompts(3), Sampling(max_new_tokens=4, stop_loops_after=1), step=1)
