from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stableopd.bootstrap import mean_of_answers, mean_of_runs, paired_difference

TABLES = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=st.floats(0, 1))


@settings(max_examples=40, deadline=None)
@given(TABLES)
def test_the_mean_is_that_of_all_answers_and_lies_within_its_interval(table):
    found = mean_of_answers({"a": table.tolist()})
    assert found.mean == pytest.approx(table.mean())
    assert found.num_runs == len(table)
    if table.size > 1:
        assert table.min() - 1e-9 <= found.low <= found.high <= table.max() + 1e-9
    else:
        assert found.low is found.high is None


@settings(max_examples=20, deadline=None)
@given(TABLES, st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter_to_the_mean(table, random):
    rows = table.tolist()
    shuffled = random.sample(rows, len(rows))
    assert mean_of_answers({"a": rows}).mean == pytest.approx(mean_of_answers({"a": shuffled}).mean)


def test_the_order_of_runs_matters_little_to_the_interval():
    rows = (
        np.random.default_rng(3).uniform(0, 1, (12, 30)).tolist()
    )  # many values: an end between two of them moves little
    first, second = mean_of_answers({"a": rows}), mean_of_answers({"a": rows[::-1]})
    assert first.low == pytest.approx(second.low, abs=0.02)
    assert first.high == pytest.approx(second.high, abs=0.02)


def test_both_ends_of_an_interval_leave_out_as_much():
    values = np.random.default_rng(0).normal(0.5, 0.1, 200)
    found = mean_of_runs(values.tolist())
    assert found.high - found.mean == pytest.approx(found.mean - found.low, rel=0.06)
    assert found.high == pytest.approx(values.mean() + 1.96 * values.std() / np.sqrt(200), rel=0.003)


def test_benchmarks_count_alike_however_many_prompts_they_have():
    found = mean_of_answers({"small": [[1.0, 1.0]], "large": [[0.0] * 98]})
    assert found.mean == pytest.approx(0.5)


def test_an_interval_over_prompts_alone_is_that_of_the_binomial():
    answers = [1.0] * 300 + [0.0] * 700
    found = mean_of_answers({"a": [answers]})
    half_width = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert found.high - found.low == pytest.approx(2 * half_width, rel=0.1)


def test_an_interval_over_runs_alone_is_that_of_their_spread():
    values = np.random.default_rng(0).normal(0.5, 0.1, 60)
    found = mean_of_runs(values.tolist())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(60), rel=0.1)


def test_more_confidence_gives_a_wider_interval():
    values = [0.1, 0.4, 0.5, 0.9]
    narrow, wide = mean_of_runs(values, confidence=0.8), mean_of_runs(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_takes_away_what_prompts_and_runs_have_in_common():
    rng = np.random.default_rng(1)
    hardness = rng.uniform(0, 1, (6, 1)) * rng.uniform(0, 1, (1, 200))
    better, worse = hardness + 0.05 + rng.normal(0, 0.01, hardness.shape), hardness
    paired = paired_difference({"a": better.tolist()}, {"a": worse.tolist()})
    alone = mean_of_answers({"a": better.tolist()})
    assert paired.mean == pytest.approx(0.05, abs=0.005)
    assert paired.low > 0
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_runs_that_share_a_student_do_not_count_as_several():
    students = {"s1": 0.3, "s2": 0.5, "s3": 0.7}
    runs = [(teacher, student) for teacher in ("t1", "t2", "t3", "t4") for student in students]
    values = [students[student] for _, student in runs]
    alone = mean_of_runs(list(students.values()))
    naive, shared = mean_of_runs(values), mean_of_runs(values, factors=runs)
    assert naive.high - naive.low < 0.7 * (alone.high - alone.low)
    assert shared.high - shared.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_a_grid_of_runs_with_gaps_has_an_interval():
    found = mean_of_runs([0.2, 0.4, 0.9], factors=[("t1", "s1"), ("t1", "s2"), ("t2", "s2")])
    assert 0.2 <= found.low < found.high <= 0.9
    assert mean_of_runs([0.2, 0.4], factors=[("t1", "s1")] * 2).low is None


def test_factors_must_be_named_for_every_run():
    for factors in ([("t1",)], [("t1",), ("t1", "s1")]):
        with pytest.raises(ValueError, match="factors"):
            mean_of_runs([0.1, 0.2], factors=factors)


def test_intervals_of_the_truth_cover_it_about_as_often_as_they_say():
    """Crossed effects of runs and prompts; the pigeonhole bootstrap is known to cover somewhat more."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(80):
        table = 0.5 + rng.normal(0, 0.1, (12, 1)) + rng.normal(0, 0.2, (1, 60)) + rng.normal(0, 0.2, (12, 60))
        found = mean_of_answers({"a": table.tolist()}, seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert covered >= 0.86 * 80


@pytest.mark.parametrize(
    "answers",
    [{}, {"a": []}, {"a": [[]]}, {"a": [[1.0]], "b": [[1.0], [0.0]]}],
    ids=["no benchmark", "no run", "no prompt", "other runs"],
)
def test_tables_that_cannot_be_averaged_are_refused(answers):
    with pytest.raises(ValueError):
        mean_of_answers(answers)


@pytest.mark.parametrize("other", [{"b": [[1.0, 0.0]]}, {"a": [[1.0]]}, {"a": [[1.0, 0.0], [1.0, 0.0]]}])
def test_what_cannot_be_paired_is_refused(other):
    with pytest.raises(ValueError):
        paired_difference({"a": [[1.0, 0.0]]}, other)
