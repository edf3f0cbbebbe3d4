"""The learning rate is a pure function of the step; weight decay spares what has one dimension."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopd.config import OptimizerConfig
from stableopd.errors import ModelError
from stableopd.optimizer import adamw, learning_rate_at


def rates(max_steps: int, **settings) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [learning_rate_at(step, config, max_steps) for step in range(1, max_steps + 1)]


def test_a_constant_rate_is_constant():
    assert rates(5) == [1.0] * 5


def test_warmup_rises_linearly_to_the_peak():
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_begins_where_it_is_told_and_never_quite_reaches_zero():
    assert rates(4, schedule="linear", decay_start=0.5) == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])


def test_cosine_decay_is_half_way_down_in_the_middle():
    found = rates(99, schedule="cosine")
    assert found[49] == pytest.approx(0.5, abs=0.02)
    assert found == sorted(found, reverse=True)


@given(st.integers(2, 60), st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 59), st.floats(0, 1))
def test_every_rate_is_positive_and_at_most_the_peak(max_steps, schedule, warmup, decay_start):
    found = rates(max_steps, schedule=schedule, warmup_steps=min(warmup, max_steps - 1), decay_start=decay_start)
    assert all(0 < rate <= 1 for rate in found)


def test_weight_decay_spares_norms_and_biases():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    decayed, spared = adamw(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [p.dim() for p in decayed["params"]] == [2]
    assert [p.dim() for p in spared["params"]] == [1, 1, 1]


def test_a_student_with_nothing_to_train_is_refused():
    with pytest.raises(ModelError, match="requires_grad"):
        adamw(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig())
