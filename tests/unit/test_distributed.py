"""Gradients travel in buckets that hold each once; two processes are in tests/invariant/test_world_size.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopd import distributed
from stableopd.distributed import share_weights, sum_gradients

LIMIT = 10
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@given(st.lists(st.tuples(st.integers(0, 25), st.sampled_from(DTYPES)), max_size=12))
def test_buckets_hold_every_array_once_in_order_of_one_kind_and_up_to_the_limit(kinds):
    arrays = [torch.zeros(size, dtype=dtype) for size, dtype in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_BUCKET_ELEMENTS", LIMIT)
        buckets = list(distributed._buckets(arrays))
    assert [id(array) for bucket in buckets for array in bucket] == [id(array) for array in arrays]
    for bucket in buckets:
        assert len({array.dtype for array in bucket}) == 1
        assert sum(array.numel() for array in bucket) <= LIMIT or len(bucket) == 1
    for first, second in pairwise(buckets):
        full = sum(array.numel() for array in first) + second[0].numel() > LIMIT
        assert full or first[0].dtype != second[0].dtype, "two messages where one would do"


def test_in_a_single_process_nothing_is_done():
    model = nn.Linear(2, 3)
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.clone()
    share_weights(model)
    sum_gradients([*model.parameters()])
    assert torch.equal(model.weight, before)
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    assert model.bias.grad is None, "an optimizer leaves out what has no gradient"
