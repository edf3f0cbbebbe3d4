"""Summing tokens: what is masked is never read, and how a batch is cut does not matter."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_losses import SEEDS, logits, rows_of_lengths

from stableopd import losses

AGGREGATIONS = get_args(losses.Aggregation)
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)
LENGTH = 7.0


def aggregate(values, weight, aggregation):
    weights, share = losses.aggregation_weights(weight, aggregation, LENGTH)
    return losses.reduce_tokens(values, weights, share)


def test_masked_tokens_are_never_read_not_even_their_gradient():
    values = torch.tensor([[1.0, math.nan], [math.inf, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    total = losses.reduce_tokens(values, mask, 2.0)
    total.backward()
    assert total.item() == 2.5
    assert values.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "mixed_kl", "jsd"])
def test_a_masked_token_where_a_divergence_is_infinite_has_no_gradient(name):
    student = logits(0, 1, 2, 4).requires_grad_()
    teacher = logits(1, 1, 2, 4)
    with torch.no_grad():
        teacher[0, 0, 1] = -math.inf
        student[0, 0, 2] = -math.inf
    token_loss = getattr(losses, name)(student, teacher)
    if name != "jsd":
        assert token_loss[0, 0].item() == math.inf
    losses.reduce_tokens(token_loss, torch.tensor([[False, True]]), 1.0).backward()
    assert student.grad[0, 0].tolist() == [0.0] * 4
    assert student.grad[0, 1].abs().sum() > 0


@pytest.mark.parametrize("kind", get_args(losses.KlEstimator))
@pytest.mark.parametrize("function", [losses.kl_penalty, losses.kl_estimate])
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_a_masked_token_whose_estimate_is_no_number_has_no_gradient(kind, function, odd):
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[odd, -1.5]])
    token_loss = function(logprobs, reference, kind)
    assert not token_loss[0, 0].isfinite()
    losses.reduce_tokens(token_loss, torch.tensor([[False, True]]), 1.0).backward()
    assert logprobs.grad[0, 0] == 0
    assert logprobs.grad[0, 1] != 0


def test_an_empty_mask_gives_zero():
    assert losses.reduce_tokens(torch.full((2, 3), math.nan), torch.zeros(2, 3), 5.0).item() == 0.0


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_a_denominator_that_is_not_positive_is_refused(denominator):
    with pytest.raises(ValueError, match="denominator"):
        losses.reduce_tokens(torch.ones(1, 1), torch.ones(1, 1), denominator)


@given(seed=SEEDS, num_rows=st.integers(2, 6), cut=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_any_split_of_the_rows_adds_up_to_the_whole(seed, num_rows, cut):
    values = logits(seed, num_rows, 4)
    weights = logits(seed + 1, num_rows, 4).abs()
    total = weights.sum().item()
    cut = min(cut, num_rows - 1)
    parts = [losses.reduce_tokens(v, w, total) for v, w in zip(values.split(cut), weights.split(cut), strict=True)]
    torch.testing.assert_close(sum(parts), losses.reduce_tokens(values, weights, total))


@every_aggregation
@given(seed=SEEDS, num_rows=st.integers(1, 5), width=st.integers(1, 6), weighted=st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_aggregate_is_the_naive_average(aggregation, seed, num_rows, width, weighted):
    values, mask = logits(seed, num_rows, width), rows_of_lengths(seed, num_rows, width)
    weight = mask * (logits(seed + 1, num_rows, width).abs() + 0.1) if weighted else mask
    rows = [
        [(v, float(w)) for v, w in zip(*pair, strict=True) if w]
        for pair in zip(values.tolist(), weight.tolist(), strict=True)
    ]
    rows = [row for row in rows if row]
    sums = [math.fsum(v * w for v, w in row) for row in rows]
    totals = [math.fsum(w for _, w in row) for row in rows]
    if not rows:
        assert losses.aggregation_weights(weight, aggregation, LENGTH)[1] == 0.0
        return
    expected = {
        "token_mean": math.fsum(sums) / math.fsum(totals),
        "sequence_mean": math.fsum(s / t for s, t in zip(sums, totals, strict=True)) / len(rows),
        "sequence_sum": math.fsum(s / LENGTH for s in sums) / len(rows),
    }[aggregation]
    dirty = values.masked_fill(~mask, math.nan)
    assert aggregate(dirty, weight, aggregation).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@every_aggregation
@given(seed=SEEDS, num_rows=st.integers(2, 6), cut=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_micro_batches_with_one_denominator_give_the_value_and_gradient_of_the_batch(aggregation, seed, num_rows, cut):
    mask = rows_of_lengths(seed, num_rows, 4)
    mask[0, 0] = True
    values = logits(seed, num_rows, 4).requires_grad_()
    parts = [losses.aggregation_weights(piece, aggregation, LENGTH) for piece in mask.split(cut)]
    denominator = sum(share for _, share in parts)
    assert denominator == pytest.approx(losses.aggregation_weights(mask, aggregation, LENGTH)[1])
    pieces = zip(values.split(cut), parts, strict=True)
    total = sum(losses.reduce_tokens(piece, weights, denominator) for piece, (weights, _) in pieces)
    whole = aggregate(values, mask, aggregation)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, values)[0] for value in (total, whole)))


@every_aggregation
def test_padding_columns_and_rows_without_weight_change_nothing(aggregation):
    values, mask = logits(1, 3, 4), rows_of_lengths(2, 3, 4)
    wide = torch.nn.functional.pad(values, (0, 2, 0, 1), value=math.nan)
    wide_mask = torch.nn.functional.pad(mask, (0, 2, 0, 1))
    torch.testing.assert_close(aggregate(wide, wide_mask, aggregation), aggregate(values, mask, aggregation))


@every_aggregation
def test_nothing_to_aggregate_has_no_share_and_no_weight(aggregation):
    weights, share = losses.aggregation_weights(torch.zeros(2, 3, dtype=torch.bool), aggregation, LENGTH)
    assert share == 0.0
    assert weights.tolist() == [[0.0] * 3] * 2


def test_a_long_row_counts_by_its_tokens_as_one_row_or_by_its_length():
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    found = {name: aggregate(values, mask, name).item() for name in AGGREGATIONS}
    assert found["token_mean"] == pytest.approx(9 / 5)
    assert found["sequence_mean"] == pytest.approx((1 + 5) / 2)
    assert found["sequence_sum"] == pytest.approx((4 / LENGTH + 5 / LENGTH) / 2)


def test_a_factor_common_to_a_row_cancels_in_sequence_mean_and_in_nothing_else():
    values, mask = logits(3, 2, 4), torch.ones(2, 4, dtype=torch.float64)
    halved = mask * torch.tensor([[0.5], [1.0]])
    for name in AGGREGATIONS:
        same = torch.allclose(aggregate(values, halved, name), aggregate(values, mask, name))
        assert same == (name == "sequence_mean")


def test_an_unknown_aggregation_and_a_sum_without_a_length_are_refused():
    with pytest.raises(ValueError, match=r"'mean'.*token_mean, sequence_mean, sequence_sum"):
        losses.aggregation_weights(torch.ones(1, 1), "mean")  # type: ignore[arg-type]
    for constant in (None, 0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"constant is {constant}"):
            losses.aggregation_weights(torch.ones(1, 1), "sequence_sum", constant)
