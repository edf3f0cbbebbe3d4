"""What shapes advantages and weights of tokens, against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_losses import SEEDS, logits, rows_of_lengths, tokens

from stableopd import losses

ROWS = {"num_rows": st.integers(1, 3), "width": st.integers(1, 20)}


@given(value=st.floats(-50, 50), limit=st.floats(0.01, 20))
@settings(max_examples=100, deadline=None)
def test_clamped_advantages_are_cut_at_the_limit(value, limit):
    found = losses.clamp_advantages(torch.tensor([[value]], dtype=torch.float64), limit).item()
    assert found == max(-limit, min(limit, value))


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match="limit"):
        losses.clamp_advantages(torch.zeros(1, 1), limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_of_zeros_and_ones_is_taken_as_it_is_meant(dtype):
    values, mask = torch.randn(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for shape in (
        lambda m: losses.discounted_advantages(values, m, 0.5),
        lambda m: losses.prefix_weights(values, m, 0.5),
        lambda m: losses.high_entropy_mask(values, m, 0.5),
    ):
        assert torch.equal(shape(mask.to(dtype)), shape(mask.bool()))


@given(value=st.floats(-1e6, 1e6))
@settings(max_examples=100, deadline=None)
def test_compressed_advantages_are_the_published_formula(value):
    found = losses.compress_advantages(torch.tensor([[value]], dtype=torch.float64)).item()
    assert found == pytest.approx(math.copysign(math.log(1 + abs(value)), value), rel=1e-9, abs=1e-15)


def test_compression_keeps_the_order_and_hardly_touches_small_advantages():
    advantages = torch.linspace(-20, 20, 101, dtype=torch.float64)[None]
    found = losses.compress_advantages(advantages)
    assert (found.diff() > 0).all()
    torch.testing.assert_close(losses.compress_advantages(advantages * 1e-6), advantages * 1e-6, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "shape",
    [
        lambda a: losses.clamp_advantages(a, 1.0),
        losses.compress_advantages,
        lambda a: losses.discounted_advantages(a, torch.ones(1, 3).bool(), 0.5),
        lambda a: losses.prefix_weights(a, torch.ones(1, 3).bool(), 0.5),
        lambda a: losses.high_entropy_mask(a, torch.ones(1, 3).bool(), 0.5),
        lambda a: losses.group_advantages(a[0], [0, 0, 1]),
    ],
)
def test_what_shapes_the_update_is_no_part_of_the_graph(shape):
    assert not shape(torch.tensor([[0.1, -0.2, 3.0]], requires_grad=True)).requires_grad


@given(seed=SEEDS, gamma=st.floats(0, 1), num_rows=st.integers(1, 3), width=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_discounted_advantages_are_the_naive_sum_over_what_follows(seed, gamma, num_rows, width):
    advantages = logits(seed, num_rows, width)
    lengths = torch.randint(0, width + 1, (num_rows,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) < lengths[:, None]
    expected = torch.zeros_like(advantages)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            expected[row, t] = sum(gamma ** (i - t) * advantages[row, i].item() for i in range(t, length))
    dirty = advantages.masked_fill(~mask, math.nan)
    torch.testing.assert_close(losses.discounted_advantages(dirty, mask, gamma), expected, rtol=1e-9, atol=1e-9)


def test_a_discount_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="gamma"):
        losses.discounted_advantages(torch.zeros(1, 1), torch.ones(1, 1).bool(), 1.1)


@given(seed=SEEDS, gamma=st.floats(0, 3), **ROWS)
@settings(max_examples=60, deadline=None)
def test_prefix_weights_are_the_naive_share_of_what_came_before(seed, gamma, num_rows, width):
    advantages, mask = logits(seed, num_rows, width), rows_of_lengths(seed, num_rows, width)
    expected = torch.zeros_like(advantages)
    for row in range(num_rows):
        sizes = [abs(a) for a, real in zip(advantages[row].tolist(), mask[row].tolist(), strict=True) if real]
        for t in range(len(sizes)):
            expected[row, t] = 1 + gamma * (1 - sum(sizes[:t]) / sum(sizes))
    found = losses.prefix_weights(advantages.masked_fill(~mask, math.nan), mask, gamma)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_prefix_weights_fall_from_the_first_token_to_the_last():
    found = losses.prefix_weights(torch.tensor([[1.0, -2.0, 1.0, 9.0]]), torch.tensor([[True, True, True, False]]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[1.5, 1.375, 1.125, 0.0]]))


def test_prefix_weights_where_nothing_differs_are_those_of_a_first_token():
    mask = torch.tensor([[True, True], [False, False]])
    assert losses.prefix_weights(torch.zeros(2, 2), mask, 0.5).tolist() == [[1.5, 1.5], [0.0, 0.0]]


def test_prefix_weights_without_an_extra_weight_are_one():
    mask = rows_of_lengths(3, 4, 6)
    assert torch.equal(losses.prefix_weights(logits(3, 4, 6), mask, 0.0), mask.double())


@pytest.mark.parametrize("gamma", [-0.1, math.inf, math.nan])
def test_a_prefix_weight_that_is_none_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        losses.prefix_weights(torch.zeros(1, 1), torch.ones(1, 1).bool(), gamma)


@given(seed=SEEDS, numerator=st.integers(1, 20), levels=st.integers(1, 40), **ROWS)
@settings(max_examples=100, deadline=None)
def test_the_mask_holds_the_naive_first_tokens_by_entropy_then_position(seed, numerator, levels, num_rows, width):
    entropy, mask = tokens(seed, levels, num_rows, width).double(), rows_of_lengths(seed, num_rows, width)
    found = losses.high_entropy_mask(entropy.masked_fill(~mask, math.nan), mask, numerator / 20)
    real = [(-entropy[b, t].item(), b, t) for b in range(num_rows) for t in range(width) if mask[b, t]]
    wanted = -(-numerator * len(real) // 20)  # rounded up, in whole numbers
    expected = torch.zeros_like(mask)
    for _, b, t in sorted(real)[:wanted]:
        expected[b, t] = True
    assert torch.equal(found, expected)


def test_high_entropy_tokens_are_those_of_the_whole_batch_not_of_each_row():
    entropy = torch.tensor([[0.1, 0.2, 0.3], [2.0, 3.0, 1.0]])
    found = losses.high_entropy_mask(entropy, torch.ones(2, 3).bool(), 0.5)
    assert found.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize(("fraction", "number", "kept"), [(0.07, 100, 7), (0.071, 100, 8), (1e-9, 10, 1), (0.5, 1, 1)])
def test_a_fraction_is_rounded_up_but_not_for_the_rounding_of_the_computer(fraction, number, kept):
    found = losses.high_entropy_mask(logits(5, 1, number), torch.ones(1, number).bool(), fraction)
    assert found.sum() == kept


def test_the_whole_fraction_keeps_every_token_and_an_empty_mask_none():
    mask = rows_of_lengths(4, 5, 6)
    assert torch.equal(losses.high_entropy_mask(logits(4, 5, 6), mask, 1.0), mask)
    assert not losses.high_entropy_mask(torch.full((2, 3), math.nan), torch.zeros(2, 3).bool(), 0.2).any()


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.1, math.nan])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        losses.high_entropy_mask(torch.zeros(1, 1), torch.ones(1, 1).bool(), fraction)


def test_special_tokens_are_marked_wherever_they_are():
    ids = torch.tensor([[5, 0, 7], [7, 7, 1]])
    assert losses.special_token_mask(ids, {7, 0}).tolist() == [[False, True, True], [True, True, False]]
    assert not losses.special_token_mask(ids, ()).any()


def test_rows_that_were_cut_count_what_they_are_told_to():
    reasons = ("stop", "length", "loop", "abort")
    assert losses.truncation_weights(reasons, 0.25).tolist() == [1.0, 0.25, 0.25, 0.25]
    assert losses.truncation_weights(reasons, 1).tolist() == [1.0] * 4
    assert losses.truncation_weights(("length",), 0).dtype == torch.float32
    assert losses.truncation_weights((), 0.5).shape == (0,)


def test_impossible_weights_and_reasons_are_refused():
    with pytest.raises(ValueError, match=r"weight is 1\.5"):
        losses.truncation_weights(("stop",), 1.5)
    with pytest.raises(ValueError, match=r"\['eos'\] are unknown.*stop, length, loop, abort"):
        losses.truncation_weights(("stop", "eos"), 1.0)  # type: ignore[arg-type]
