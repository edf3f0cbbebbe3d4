"""Signals of health: definitions against brute force, and every edge that a rollout can have."""

from __future__ import annotations

import random
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.health import (
    LengthWarning,
    advantage_by_class,
    advantage_by_position,
    check_sequence_length,
    compression_ratio,
    is_repetitive,
    length_stats,
    measure_rollouts,
    repetition_rate,
    truncation_rate,
)

LOOP_TEXT = "Wait, let me check that again. "
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


class TestCompressionRatio:
    def test_is_bytes_over_zlib_bytes_of_the_tail(self) -> None:
        text = "a preamble that does not count " + "".join(random.Random(0).choices("0123456789+= ", k=4000))
        tail = text[-4000:].encode()
        assert len(zlib.compress(tail, 9)) < len(zlib.compress(tail, 1)), "the level has to matter"
        assert compression_ratio(text, tail_chars=4000) == len(tail) / len(zlib.compress(tail, 9))

    def test_tail_is_counted_in_characters_not_bytes(self) -> None:
        assert compression_ratio("é" * 50, tail_chars=50) == 100 / len(zlib.compress(("é" * 50).encode(), 9))

    def test_separates_loops_from_prose_at_the_papers_threshold(self) -> None:
        vocabulary = ["so", "the", "sum", "of", "both", "roots", "is", "then", "seven", "minus", "two", "x", "over"]
        words = random.Random(0).choices(vocabulary, k=3000)
        assert compression_ratio(LOOP_TEXT * 400) > 10 > compression_ratio(" ".join(words))

    def test_toy_scale_separates_a_pure_cycle_from_random_attempts(self) -> None:
        rng = random.Random(0)
        attempts = ";w".join("".join(rng.choices("0123456789", k=4)) for _ in range(14))
        assert compression_ratio(TOY_CYCLE * 13, tail_chars=64) == pytest.approx(3.76, abs=0.01)
        assert compression_ratio(attempts, tail_chars=64) < 2.2

    def test_empty_text_is_neither_compressible_nor_not(self) -> None:
        assert compression_ratio("") == 1.0

    @pytest.mark.parametrize("text", ["\ud800", "x\udfff" * 20, "\x00", "🙂"])
    def test_takes_any_string(self, text: str) -> None:
        assert compression_ratio(text) > 0

    def test_refuses_an_empty_tail(self) -> None:
        with pytest.raises(ValueError, match="tail_chars"):
            compression_ratio("text", tail_chars=0)


class TestRepetitionRate:
    def test_only_texts_longer_than_the_tail_can_be_repetitive(self) -> None:
        assert not is_repetitive("a" * 10_000)
        assert is_repetitive("a" * 10_001)

    def test_ratio_must_exceed_the_threshold(self) -> None:
        text = TOY_CYCLE * 13
        ratio = compression_ratio(text, 64)
        assert not is_repetitive(text, 64, threshold=ratio)
        assert is_repetitive(text, 64, threshold=ratio - 1e-9)

    def test_is_the_share_of_repetitive_texts(self) -> None:
        assert repetition_rate([TOY_CYCLE * 13, "1368;y=8$", TOY_CYCLE * 5, ""], 64, 2.2) == 0.25

    def test_is_zero_without_texts(self) -> None:
        assert repetition_rate([]) == 0.0


class TestTruncationRate:
    def test_counts_spent_budgets_and_cut_loops_but_not_aborts(self) -> None:
        assert truncation_rate(["stop", "length", "loop", "abort"]) == 0.5

    def test_is_zero_without_rollouts(self) -> None:
        assert truncation_rate([]) == 0.0

    def test_refuses_a_reason_it_does_not_know(self) -> None:
        with pytest.raises(ValueError, match="max_tokens"):
            truncation_rate(["stop", "max_tokens"])


class TestLengthStats:
    def test_gives_all_and_terminated_lengths(self) -> None:
        stats = length_stats([10, 20, 80, 50], ["stop", "stop", "length", "abort"])
        assert stats == {
            "completions/mean_length": 40.0,
            "completions/min_length": 10.0,
            "completions/max_length": 80.0,
            "completions/mean_terminated_length": 15.0,
            "completions/min_terminated_length": 10.0,
            "completions/max_terminated_length": 20.0,
            "completions/mean_truncated_length": 80.0,
            "completions/min_truncated_length": 80.0,
            "completions/max_truncated_length": 80.0,
            "completions/length_p50": 35.0,
            "completions/length_p90": pytest.approx(71.0),
            "completions/length_p99": pytest.approx(79.1),
            "completions/clipped_ratio": 0.25,
        }

    def test_leaves_terminated_lengths_out_when_nothing_terminated(self) -> None:
        stats = length_stats([80, 80], ["length", "loop"])
        assert stats["completions/clipped_ratio"] == 1.0
        assert not [key for key in stats if "terminated" in key]

    def test_of_nothing_is_nothing(self) -> None:
        assert length_stats([], []) == {}

    def test_refuses_unequal_columns(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            length_stats([1, 2], ["stop"])


ADVANTAGES = st.lists(
    st.lists(st.one_of(st.floats(-5, 5), st.sampled_from([float("nan"), float("-inf")])), max_size=70), max_size=5
)


def brute_force_positions(rows: list[list[float]]) -> dict[str, float]:
    tokens = [(t, value) for row in rows for t, value in enumerate(row)]
    mass = sum(abs(value) for _, value in tokens if np.isfinite(value))
    figures = {}
    for low, high in ((0, 16), (16, 32), (32, 64), (64, 128)):
        here = [value for t, value in tokens if low <= t < high]
        finite = [value for value in here if np.isfinite(value)]
        if here:
            figures[f"health/token_fraction_from_{low}"] = len(here) / len(tokens)
        if finite:
            figures[f"health/advantage_from_{low}"] = sum(finite) / len(finite)
        if here and mass:
            figures[f"health/update_share_from_{low}"] = sum(map(abs, finite)) / mass
    return figures


class TestAdvantageByPosition:
    @settings(max_examples=200, deadline=None)
    @given(ADVANTAGES)
    def test_equals_brute_force(self, rows: list[list[float]]) -> None:
        assert advantage_by_position(rows) == pytest.approx(brute_force_positions(rows), abs=1e-9)

    def test_a_late_loop_shows_where_it_begins(self) -> None:
        figures = advantage_by_position([[-0.5] * 16, [-0.5] * 16 + [0.0] * 16 + [0.25] * 32])
        assert figures["health/advantage_from_0"] == -0.5
        assert figures["health/update_share_from_16"] == 0
        assert figures["health/update_share_from_32"] == pytest.approx(8 / 24)
        assert figures["health/token_fraction_from_32"] == 0.4

    @pytest.mark.parametrize("rows", [[], [[]], [[], []]])
    def test_of_nothing_is_nothing(self, rows: list[list[float]]) -> None:
        assert advantage_by_position(rows) == {}


class TestAdvantageByClass:
    def test_splits_means_and_mass(self) -> None:
        masks = [np.array([True, True, False]), np.array([False])]
        advantages = [np.array([-0.1, 0.3, -1.0]), np.array([-0.6])]
        assert advantage_by_class(masks, advantages) == pytest.approx(
            {
                "health/advantage_loop": 0.1,
                "health/advantage_other": -0.8,
                "health/loop_update_share": 0.4 / 2.0,
                "health/loop_token_fraction": 0.5,
            }
        )

    def test_leaves_out_a_class_without_tokens(self) -> None:
        assert advantage_by_class([[False, False]], [[1.0, 2.0]]) == {
            "health/advantage_other": 1.5,
            "health/loop_update_share": 0.0,
            "health/loop_token_fraction": 0.0,
        }
        assert "health/advantage_other" not in advantage_by_class([[True]], [[1.0]])

    def test_share_of_no_update_is_left_out(self) -> None:
        assert "health/loop_update_share" not in advantage_by_class([[True, False]], [[0.0, 0.0]])

    @pytest.mark.parametrize("rows", [[], [[]]])
    def test_without_tokens_there_is_nothing_to_say(self, rows: list[list[float]]) -> None:
        assert advantage_by_class(rows, rows) == {}

    def test_infinite_advantages_do_not_spoil_the_means(self) -> None:
        figures = advantage_by_class([[True, True, False]], [[-np.inf, -0.5, np.nan]])
        assert figures["health/advantage_loop"] == -0.5
        assert figures["health/loop_token_fraction"] == pytest.approx(2 / 3)
        assert "health/advantage_other" not in figures

    def test_refuses_misaligned_rows(self) -> None:
        with pytest.raises(ValueError, match="rollout 1 has 1 tokens but 2 advantages"):
            advantage_by_class([[True], [True]], [[0.0], [0.0, 1.0]])


class TestMeasureRollouts:
    def test_measures_what_the_columns_allow(self) -> None:
        columns = {"lengths": [18], "finish_reasons": ["length"]}
        ids = [[1, 2, 3, 4, 5, 6] * 3]
        plain = measure_rollouts(**columns)
        assert not [key for key in plain if key.startswith("health/")]
        texts = measure_rollouts(**columns, texts=[TOY_CYCLE * 13], tail_chars=64, compression_threshold=2.2)
        assert texts["health/repetition_rate"] == 1.0
        tokens = measure_rollouts(**columns, token_ids=ids)
        assert tokens["health/loop_token_fraction"] == 1.0
        # 18 tokens; the first repeated 8-gram ends at the 14th.
        assert tokens["health/repeated_token_fraction"] == pytest.approx(5 / 18)

    def test_splits_advantages_by_loop_and_by_repetition(self) -> None:
        ids = [1, 2, 3, 4, 5, 6] * 3
        advantages = [np.where(np.arange(18) < 13, -1.0, -0.1)]
        metrics = measure_rollouts(lengths=[18], finish_reasons=["stop"], token_ids=[ids], advantages=advantages)
        assert metrics["health/advantage_loop"] == pytest.approx((-13 - 0.5) / 18)
        assert metrics["health/advantage_repeated"] == pytest.approx(-0.1)
        assert metrics["health/advantage_fresh"] == pytest.approx(-1.0)
        assert metrics["health/loop_update_share"] == 1.0
        assert metrics["health/repeated_update_share"] == pytest.approx(0.5 / 13.5)

    def test_of_no_rollouts_is_nothing(self) -> None:
        assert measure_rollouts(lengths=[], finish_reasons=[], texts=[], token_ids=[], advantages=[]) == {}

    def test_refuses_columns_of_different_lengths(self) -> None:
        with pytest.raises(ValueError, match="texts has 1 rows for 2 lengths"):
            measure_rollouts(lengths=[1, 2], finish_reasons=["stop", "stop"], texts=["a"])

    def test_refuses_advantages_without_tokens(self) -> None:
        with pytest.raises(ValueError, match="token_ids"):
            measure_rollouts(lengths=[1], finish_reasons=["stop"], advantages=[[0.1]])


class TestCheckSequenceLength:
    def test_returns_mean_and_maximum_without_warning_up_to_the_bound(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = check_sequence_length([[1, 2], [1, 2, 3, 4]], 4)
        assert found == (3.0, 4)
        assert (found.mean, found.max) == (3.0, 4)

    def test_warns_above_the_bound_and_names_the_figures(self) -> None:
        with pytest.warns(LengthWarning, match="1 of 2 sequences are longer than the expected 3 .*longest 4"):
            assert check_sequence_length([[1, 2], [1, 2, 3, 4]], 3).max == 4

    def test_takes_strings_arrays_and_rows_of_a_matrix(self) -> None:
        assert check_sequence_length(["abc", np.zeros(5)], 10) == (4.0, 5)
        assert check_sequence_length(np.zeros((2, 7)), 10) == (7.0, 7)
        assert check_sequence_length((range(n) for n in (1, 3)), 10) == (2.0, 3)

    def test_empty_input_is_no_alarm(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert check_sequence_length([], 5) == (0.0, 0)
            assert check_sequence_length([[]], 5) == (0.0, 0)

    @pytest.mark.parametrize("bound", [0, -1])
    def test_refuses_a_bound_that_nothing_can_meet(self, bound: int) -> None:
        with pytest.raises(ValueError, match="positive"):
            check_sequence_length([], bound)

    def test_refuses_one_bare_string(self) -> None:
        with pytest.raises(TypeError, match="list"):
            check_sequence_length("a completion", 5)


@pytest.mark.parametrize("lengths", [[-1], [1.5], [float("nan")]])
def test_lengths_that_cannot_be_are_refused(lengths):
    with pytest.raises(ValueError):
        measure_rollouts(lengths=lengths, finish_reasons=["stop"])


def test_token_ids_of_another_length_than_told_are_refused():
    with pytest.raises(ValueError, match="token_ids of rollout 0 has 2 entries, but its length is 1"):
        measure_rollouts(lengths=[1], finish_reasons=["stop"], token_ids=[[1, 2]])


def test_one_bare_text_is_not_taken_for_many():
    with pytest.raises(TypeError, match="Put it into a list"):
        repetition_rate("aaaa")


@pytest.mark.parametrize("sequences", [[5, 20], [{"input_ids": [1]}]])
def test_lengths_in_place_of_sequences_are_refused(sequences):
    with pytest.raises(TypeError, match="the sequences themselves"):
        check_sequence_length(sequences, 10)


def test_arrays_are_as_good_as_lists():
    ids = np.arange(8).reshape(2, 4)
    metrics = measure_rollouts(
        lengths=np.array([4, 4]), finish_reasons=["stop", "stop"], token_ids=ids, advantages=-ids
    )
    assert metrics["health/loop_token_fraction"] == 0.0
