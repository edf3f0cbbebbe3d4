"""Padding and batches under a token budget."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from stableopd.tokens import budget_batches, pad_left, pad_right, position_ids

LENGTHS = st.lists(st.integers(1, 39), max_size=20)


def test_prompts_are_padded_on_the_left_and_completions_on_the_right():
    ids, mask = pad_left([[1, 2], [3]], 9)
    assert ids.tolist() == [[1, 2], [9, 3]]
    assert mask.tolist() == [[True, True], [False, True]]
    values, mask = pad_right([[0.5], [1.0, 2.0]], 0.0, torch.float32)
    assert values.tolist() == [[0.5, 0.0], [1.0, 2.0]]
    assert mask.tolist() == [[True, False], [True, True]]


def test_a_padding_id_inside_a_row_is_not_padding():
    assert pad_right([[9, 9], [1]], 9)[1].tolist() == [[True, True], [True, False]]


def test_no_rows_give_empty_arrays():
    assert pad_left([], 0)[0].shape == (0, 0)


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[False, False, True, True, True]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2]]


@given(LENGTHS, st.integers(1, 100))
def test_every_row_is_in_one_batch_and_no_batch_of_several_rows_is_over_budget(lengths, budget):
    batches = budget_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        size = len(batch) * max(lengths[r] for r in batch)
        assert size <= budget or len(batch) == 1


@given(LENGTHS)
def test_batches_hold_rows_of_like_length_longest_first(lengths):
    order = [lengths[row] for batch in budget_batches(lengths, 40) for row in batch]
    assert order == sorted(order, reverse=True)


@given(LENGTHS, st.integers(1, 100))
def test_packed_batches_count_the_tokens_alone(lengths, budget):
    batches = budget_batches(lengths, budget, packed=True)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in batch) <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.integers(1, 39), min_size=1, max_size=7), st.integers(20, 100))
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths, budget):
    """All ways to cut the rows, longest first, into batches; a batch costs its padded size and budget // 16."""

    def cost(batches: list[list[int]]) -> float:
        sizes = [(len(batch) * max(lengths[row] for row in batch), len(batch)) for batch in batches]
        if any(size > budget and count > 1 for size, count in sizes):
            return math.inf
        return sum(size + budget // 16 for size, _ in sizes)

    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    every_way = []
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        batches = [[order[0]]]
        for row, cut in zip(order[1:], cuts, strict=True):
            batches = [*batches, [row]] if cut else [*batches[:-1], [*batches[-1], row]]
        every_way.append(cost(batches))
    assert cost(budget_batches(lengths, budget)) == min(every_way)
