"""Loops and repeats in token ids: definitions against brute force, and every edge that a sequence can have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.health import (
    Loop,
    classify_tokens,
    find_loops,
    loop_mask,
    loop_spans,
    near_loop_mask,
    repeated_token_mask,
)

TOY_CYCLE = "1368;w"

# Few symbols and copied stretches, so that loops of many periods come up.
SEQUENCES = st.one_of(
    st.lists(st.integers(0, 2), max_size=40),
    st.builds(
        lambda head, cycle, times, tail: head + cycle * times + tail,
        st.lists(st.integers(0, 3), max_size=8),
        st.lists(st.integers(0, 3), min_size=1, max_size=7),
        st.integers(1, 6),
        st.lists(st.integers(0, 3), max_size=8),
    ),
)


def brute_force_loops(ids: list[int], max_period: int, min_repeats: int, min_tokens: int) -> list[bool]:
    mask = [False] * len(ids)
    for period in range(1, max_period + 1):
        for start in range(len(ids)):
            for end in range(start + max(period * min_repeats, min_tokens), len(ids) + 1):
                if all(ids[t] == ids[t - period] for t in range(start + period, end)):
                    mask[start:end] = [True] * (end - start)
    return mask


def brute_force_repeats(ids: list[int], ngram: int) -> list[bool]:
    grams = [tuple(ids[end - ngram + 1 : end + 1]) if end >= ngram - 1 else None for end in range(len(ids))]
    return [gram is not None and gram in grams[:end] for end, gram in enumerate(grams)]


def brute_force_near_loops(
    ids: list[int], max_period: int, min_repeats: int, min_tokens: int, ngram: int
) -> list[bool]:
    grams = [tuple(ids[t : t + ngram]) for t in range(len(ids) - ngram + 1)]
    marked = [False] * len(ids)
    for gram in set(grams):
        chains: list[list[int]] = []
        for t in (t for t, other in enumerate(grams) if other == gram):
            if chains and t - chains[-1][-1] <= max_period:
                chains[-1].append(t)
            else:
                chains.append([t])
        for chain in (chain for chain in chains if len(chain) >= min_repeats):
            for t in chain:
                marked[t : t + ngram] = [True] * ngram
    for start in range(len(ids)):
        for end in range(start + 2, min(start + ngram + 2, len(ids))):
            if marked[start] and marked[end] and not any(marked[start + 1 : end]):
                marked[start + 1 : end] = [True] * (end - start - 1)
    near = [False] * len(ids)
    start = 0
    for t in range(len(ids) + 1):
        if t == len(ids) or not marked[t]:
            near[start:t] = [t - start >= 2 * min_tokens] * (t - start)
            start = t + 1
    exact = brute_force_loops(ids, max_period, min_repeats, min_tokens)
    return [a and not b for a, b in zip(near, exact, strict=True)]


class TestLoopMask:
    @settings(max_examples=400, deadline=None)
    @given(SEQUENCES, st.integers(1, 8), st.integers(2, 4), st.integers(0, 12))
    def test_equals_brute_force(self, ids: list[int], max_period: int, min_repeats: int, min_tokens: int) -> None:
        expected = brute_force_loops(ids, max_period, min_repeats, min_tokens)
        assert loop_mask(ids, max_period, min_repeats, min_tokens).tolist() == expected

    def test_finds_a_long_period_in_a_long_sequence(self) -> None:
        rng = np.random.default_rng(0)
        head, cycle = rng.integers(0, 50_000, 1000), rng.integers(0, 50_000, 512)
        ids = np.concatenate([head, np.tile(cycle, 4)])
        expected = np.arange(len(ids)) >= 1000
        np.testing.assert_array_equal(loop_mask(ids), expected)
        assert not loop_mask(ids, max_period=511).any()

    def test_a_partial_last_turn_belongs_to_the_loop(self) -> None:
        assert loop_spans([9, *[1, 2, 3, 4, 5, 6] * 3, 1, 2, 7]) == [(1, 21)]

    def test_three_turns_of_a_toy_cycle_are_a_loop_and_two_are_not(self) -> None:
        assert loop_mask(TOY_CYCLE * 3).all()
        assert not loop_mask(TOY_CYCLE * 2 + "1368").any()

    def test_a_few_equal_tokens_are_no_loop_by_default(self) -> None:
        assert not loop_mask([1] * 15).any()
        assert loop_mask([1] * 16).all()
        assert loop_mask([1] * 3, min_tokens=0).all()

    @pytest.mark.parametrize("ids", [[], [5], [5, 5], np.array([], dtype=np.int64)])
    def test_short_sequences_hold_no_loop(self, ids: list[int]) -> None:
        mask = loop_mask(ids)
        assert mask.dtype == np.bool_
        assert mask.tolist() == [False] * len(ids)

    def test_reads_text_by_code_point_with_lone_surrogates(self) -> None:
        assert loop_spans("🙂" + "é\ud800x" * 6) == [(1, 19)]

    @pytest.mark.parametrize("bad", [{"max_period": 0}, {"min_repeats": 1}])
    def test_refuses_meaningless_settings(self, bad: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="min_repeats"):
            loop_mask([1, 2, 3], **bad)

    def test_refuses_a_batch(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
            loop_mask(np.zeros((2, 3), dtype=int))

    def test_spans_are_the_stretches_of_the_mask(self) -> None:
        ids = [*[7] * 20, 1, 2, *[3, 4] * 10]
        spans = loop_spans(ids)
        assert spans == [(0, 20), (22, 42)]
        assert [t for start, end in spans for t in range(start, end)] == np.flatnonzero(loop_mask(ids)).tolist()

    def test_spans_of_nothing_are_none(self) -> None:
        assert loop_spans([]) == []


class TestFindLoops:
    @settings(max_examples=300, deadline=None)
    @given(SEQUENCES, st.integers(1, 8), st.integers(2, 4), st.integers(0, 12))
    def test_loops_cover_the_mask_and_each_repeats_with_its_period_and_no_smaller_one(
        self, ids: list[int], max_period: int, min_repeats: int, min_tokens: int
    ) -> None:
        loops = find_loops(ids, max_period, min_repeats, min_tokens)
        covered = [False] * len(ids)
        for loop in loops:
            covered[loop.start : loop.end] = [True] * (loop.end - loop.start)
            assert loop.num_repeats >= min_repeats
            assert loop.end - loop.start >= min_tokens
            explains = [
                period
                for period in range(1, loop.period + 1)
                if all(ids[t] == ids[t - period] for t in range(loop.start + period, loop.end))
            ]
            assert explains == [loop.period]
        assert covered == brute_force_loops(ids, max_period, min_repeats, min_tokens)
        assert loops == sorted(loops)
        for one in loops:
            assert not any(one != other and other.start <= one.start and one.end <= other.end for other in loops)

    def test_names_start_end_and_period(self) -> None:
        text = "So x = 3. " + "Wait, no. " * 6 + "Done"
        (loop,) = find_loops(text)
        assert loop == Loop(start=8, end=70, period=10)
        assert text[loop.start : loop.start + loop.period] == ". Wait, no"
        assert loop.num_repeats == 6.2

    def test_an_inner_cycle_is_part_of_the_outer_loop(self) -> None:
        assert find_loops([*[1, 2] * 9, 3] * 4) == [Loop(0, 76, 19)]

    def test_two_loops_one_after_the_other_are_two(self) -> None:
        assert find_loops([*[7] * 20, 5, *[3, 4] * 10]) == [Loop(0, 20, 1), Loop(21, 41, 2)]


def steps(count: int, first: int = 1) -> list[int]:
    """Token ids of "Step 1: add the number. Step 2: add the number. ...", numbers as single tokens from 1000 on."""
    return [token for number in range(first, first + count) for token in (10, 1000 + number, 11, 12, 13, 14, 15)]


class TestNearLoopMask:
    @settings(max_examples=300, deadline=None)
    @given(SEQUENCES, st.integers(1, 8), st.integers(2, 4), st.integers(0, 6), st.integers(1, 4))
    def test_equals_brute_force(
        self, ids: list[int], max_period: int, min_repeats: int, min_tokens: int, ngram: int
    ) -> None:
        expected = brute_force_near_loops(ids, max_period, min_repeats, min_tokens, ngram)
        assert near_loop_mask(ids, max_period, min_repeats, min_tokens, ngram).tolist() == expected

    def test_a_loop_with_a_counter_is_near_and_not_exact(self) -> None:
        ids = [*range(100, 140), *steps(12)]
        assert not loop_mask(ids).any()
        near = np.flatnonzero(near_loop_mask(ids))
        assert near[0] == 42, "the first step's number is new, what follows it returns"
        assert near[-1] == len(ids) - 1
        assert len(near) == len(ids) - 42

    def test_a_counter_of_growing_width_is_still_near(self) -> None:
        text = " ".join(f"Step {number}: the sum is even." for number in range(1, 30))
        assert near_loop_mask(text)[40:-40].all()
        assert not loop_mask(text).any()

    def test_an_exact_loop_is_not_near(self) -> None:
        assert not near_loop_mask([1, 2, 3, 4, 5] * 40).any()

    def test_prose_with_a_phrase_now_and_then_is_neither(self) -> None:
        rng = np.random.default_rng(0)
        phrase = [1, 2, 3, 4, 5]
        ids = np.concatenate([[*rng.integers(100, 30_000, 60), *phrase] for _ in range(20)])
        assert not near_loop_mask(ids).any()

    def test_repeats_farther_apart_than_the_longest_period_do_not_count(self) -> None:
        ids = np.concatenate([[*range(40), *range(1000 * k, 1000 * k + 600)] for k in range(1, 5)])
        assert not near_loop_mask(ids).any()
        assert near_loop_mask(ids, max_period=640).sum() == 160

    @pytest.mark.parametrize("ids", [[], [5], [5] * 11])
    def test_short_sequences_hold_none(self, ids: list[int]) -> None:
        assert near_loop_mask(ids).tolist() == [False] * len(ids)

    @pytest.mark.parametrize("bad", [{"max_period": 0}, {"min_repeats": 1}, {"ngram": 0}])
    def test_refuses_meaningless_settings(self, bad: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"min_repeats|ngram"):
            near_loop_mask([1, 2, 3], **bad)


class TestRepeatedTokenMask:
    @settings(max_examples=300, deadline=None)
    @given(SEQUENCES, st.integers(1, 9))
    def test_equals_brute_force(self, ids: list[int], ngram: int) -> None:
        assert repeated_token_mask(ids, ngram).tolist() == brute_force_repeats(ids, ngram)

    def test_sees_a_quotation_that_is_no_loop(self) -> None:
        ids = [*range(10), 99, *range(10)]
        assert np.flatnonzero(repeated_token_mask(ids)).tolist() == [18, 19, 20]
        assert not loop_mask(ids).any()

    @pytest.mark.parametrize("ids", [[], [5], [5] * 8])
    def test_the_first_ngram_is_never_repeated(self, ids: list[int]) -> None:
        assert repeated_token_mask(ids).tolist() == [False] * len(ids)

    def test_negative_and_huge_ids_are_told_apart(self) -> None:
        ids = [-1, 2**62, -1, 2**62, -1]
        assert repeated_token_mask(ids, ngram=2).tolist() == [False, False, False, True, True]

    def test_refuses_an_empty_ngram(self) -> None:
        with pytest.raises(ValueError, match="ngram"):
            repeated_token_mask([1, 2], ngram=0)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.integers(1, 8), st.integers(2, 4), st.integers(0, 12), st.integers(1, 9))
def test_tokens_classified_at_once_are_those_of_the_single_masks(
    ids: list[int], max_period: int, min_repeats: int, min_tokens: int, ngram: int
) -> None:
    found = classify_tokens(ids, max_period, min_repeats, min_tokens, ngram)
    arguments = (ids, max_period, min_repeats, min_tokens)
    for mask, expected in zip(
        found, (loop_mask(*arguments), near_loop_mask(*arguments), repeated_token_mask(ids, ngram)), strict=True
    ):
        np.testing.assert_array_equal(mask, expected)
    assert not (found.loop & found.near_loop).any()
