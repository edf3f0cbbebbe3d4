from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopd.benchmarking.scores import ks_up_to, majority_at_k, pass_at_k


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    answers = [True] * right + [False] * (n - right)
    subsets = list(combinations(answers, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_pass_at_k_is_exact_where_factorials_overflow():
    assert pass_at_k(3000, 3, 1500) == pytest.approx(1 - comb(2997, 1500) / comb(3000, 1500), rel=1e-9)


@given(st.integers(1, 30), st.data())
def test_pass_at_k_grows_with_k_and_begins_with_the_mean(n, data):
    right = data.draw(st.integers(0, n))
    values = [pass_at_k(n, right, k) for k in range(1, n + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(right / n)
    assert values[-1] == (1.0 if right else 0.0)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_what_does_not_exist_is_refused(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("votes", "right", "worth"),
    [
        (["1", "1", "2"], [True, True, False], 1.0),
        (["1", "2", "2"], [True, False, False], 0.0),
        (["1", "2"], [True, False], 0.5),
        (["1", "2", "3"], [True, False, False], 1 / 3),
        (["1/2", "0.5", "2", "3"], [True, True, False, False], 1.0),  # two ways to write the right answer
        ([None, None, "1"], [False, False, True], 1.0),  # no answer is no vote
        ([None, None], [False, False], 0.0),
        ([None], [True], 1.0),
        (["2", "2", "3", "1", "1"], [False, False, False, True, True], 0.5),
    ],
)
def test_the_majority_is_what_most_answers_say_and_a_tie_is_shared(votes, right, worth):
    assert majority_at_k(votes, right) == pytest.approx(worth)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1), st.randoms(use_true_random=False))
def test_the_majority_does_not_depend_on_the_order(answers, random):
    shuffled = random.sample(answers, len(answers))
    assert majority_at_k(*zip(*answers, strict=True)) == pytest.approx(majority_at_k(*zip(*shuffled, strict=True)))


@pytest.mark.parametrize(
    ("n", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_the_ks_are_powers_of_two_and_the_number_itself(n, ks):
    assert ks_up_to(n) == ks
