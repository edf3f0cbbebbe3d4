"""Curves in block characters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopd.sparklines import BLOCKS, GAP, sparkline


def test_a_rising_curve_rises_from_the_lowest_block_to_the_highest():
    assert sparkline([float(value) for value in range(8)], 8) == BLOCKS


def test_more_values_than_columns_are_averaged_in_equal_parts():
    assert sparkline([0, 2, 10, 12, 0, 2], 3) == "▁█▁"


def test_fewer_values_than_columns_make_a_shorter_line():
    assert sparkline([0, 1], 40) == "▁█"


def test_given_bounds_fix_the_scale_and_clip_what_is_outside():
    assert sparkline([0.0, 0.5, 1.0, 2.0, -1.0], 5, low=0.0, high=1.0) == "▁▅██▁"


def test_values_that_are_not_finite_are_gaps_and_do_not_set_the_scale():
    assert sparkline([0.0, math.nan, math.inf, 1.0], 4) == f"▁{GAP}{GAP}█"


def test_nothing_and_nothing_finite_give_no_block():
    assert sparkline([], 5) == ""
    assert sparkline([math.nan] * 3, 5) == GAP * 3


def test_a_flat_curve_is_a_low_line():
    assert sparkline([7.0] * 3, 5) == "▁▁▁"


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match="width"):
        sparkline([1.0], 0)


@given(st.lists(st.floats(), max_size=60), st.integers(1, 40))
def test_any_values_fit_the_width(values, width):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= {*BLOCKS, GAP}


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_a_higher_value_is_never_drawn_lower(values):
    line = sparkline(values, len(values))
    drawn = sorted(zip(values, map(BLOCKS.index, line), strict=True))
    assert [level for _, level in drawn] == sorted(level for _, level in drawn)
