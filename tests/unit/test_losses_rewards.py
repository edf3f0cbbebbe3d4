"""Advantages of whole completions against the mean of their group."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stableopd import losses

REWARD = st.floats(-5, 5, allow_subnormal=False)
COMPLETIONS = st.lists(st.tuples(REWARD, st.integers(0, 3)), min_size=1, max_size=12)


@given(completions=COMPLETIONS, scale=st.sampled_from(["group", "none"]))
@settings(max_examples=100, deadline=None)
def test_group_advantages_are_the_naive_distance_from_the_groups_mean(completions, scale):
    rewards, groups = zip(*completions, strict=True)
    found = losses.group_advantages(torch.tensor(rewards, dtype=torch.float64), groups, scale)
    for value, reward, group in zip(found.tolist(), rewards, groups, strict=True):
        own = [r for r, g in completions if g == group]
        expected = reward - math.fsum(own) / len(own)
        if scale == "group":
            expected /= statistics.pstdev(own) + 1e-6
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(value=REWARD, size=st.integers(1, 30), scale=st.sampled_from(["group", "none"]), double=st.booleans())
@example(value=0.1, size=3, scale="group", double=True)  # whose sum is rounded
@settings(max_examples=60, deadline=None)
def test_equal_rewards_and_groups_of_one_give_exactly_zero(value, size, scale, double):
    rewards = torch.tensor([value] * size + [9.0, -3.0], dtype=torch.float64 if double else torch.float32)
    found = losses.group_advantages(rewards, [0] * size + [1, 2], scale)
    assert found.tolist() == [0.0] * (size + 2)


def test_the_names_and_the_order_of_groups_mean_nothing():
    rewards = torch.tensor([0.0, 1.0, 5.0, 1.0, 0.0, 7.0])
    found = losses.group_advantages(rewards, [4, 9, -2, 4, 9, -2])
    torch.testing.assert_close(found, losses.group_advantages(rewards, [0, 1, 2, 0, 1, 2]))
    torch.testing.assert_close(found.abs(), torch.ones(6), rtol=1e-4, atol=0)


def test_groups_may_be_a_tensor():
    rewards, groups = torch.tensor([1.0, 0.0, 4.0, 2.0]), [3, 0, 3, 0]
    expected = losses.group_advantages(rewards, groups)
    assert torch.equal(losses.group_advantages(rewards, torch.tensor(groups)), expected)
    with pytest.raises(ValueError, match=r"groups are \(4, 1\)"):
        losses.group_advantages(rewards, torch.tensor(groups)[:, None])


def test_scaled_groups_count_alike_and_unscaled_ones_by_their_spread():
    rewards, groups = torch.tensor([0.0, 0.1, 0.0, 10.0]), [0, 0, 1, 1]
    torch.testing.assert_close(losses.group_advantages(rewards, groups, "none"), torch.tensor([-0.05, 0.05, -5.0, 5.0]))
    scaled = losses.group_advantages(rewards, groups, "group")
    torch.testing.assert_close(scaled, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-4, atol=0)


def test_whole_numbers_as_rewards_give_float32_and_no_completions_give_none():
    assert losses.group_advantages(torch.tensor([0, 1]), [0, 0], "none").tolist() == [-0.5, 0.5]
    assert losses.group_advantages(torch.tensor([0, 1]), [0, 0]).dtype == torch.float32
    assert losses.group_advantages(torch.zeros(0), []).shape == (0,)


def test_rewards_that_do_not_fit_their_groups_are_refused():
    with pytest.raises(ValueError, match=r"groups are \(2,\)"):
        losses.group_advantages(torch.zeros(3), [0, 0])
    with pytest.raises(ValueError, match="one of each"):
        losses.group_advantages(torch.zeros(2, 1), [0, 0])
    with pytest.raises(ValueError, match=r"'std'.*group, none"):
        losses.group_advantages(torch.zeros(2), [0, 0], "std")  # type: ignore[arg-type]
