"""Figures of streamed rollouts: the same as of the whole, in whatever order, in bounded memory."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_makers import LOOP, looping, prose

from stableopd.health import MonitorSettings, measure_rollouts
from stableopd.reading import Place
from stableopd.rollout_figures import MAX_LENGTHS, MAX_STEPS, Lengths, RolloutFigures, shorten
from stableopd.rollout_rows import RolloutRecord


def record(text: str | None = "x", step: int | None = 1, line: int = 1, **known) -> RolloutRecord:
    return RolloutRecord(place=Place("a.jsonl", "line", line), step=step, completion=text, **known)


def figures(*records: RolloutRecord, **options) -> RolloutFigures:
    taken = RolloutFigures(settings=options.pop("settings", MonitorSettings()), **options)
    for one in records:
        taken.add(one)
    return taken


# ------------------------------------------------------------------------------------ lengths

LENGTHS = st.lists(st.integers(0, 100_000), min_size=1, max_size=300)


@settings(max_examples=60)
@given(st.lists(LENGTHS, min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_lengths_that_are_merged_are_those_of_all_and_quantiles_are_numpys(parts, share):
    merged = Lengths()
    for part in parts:
        own = Lengths()
        for length in part:
            own.add(length)
        merged.merge(own)
    together = [length for part in parts for length in part]
    assert (merged.num, merged.total, merged.min, merged.max) == (
        len(together), sum(together), min(together), max(together)
    )  # fmt: skip
    assert len(merged.counts) <= MAX_LENGTHS
    assert merged.quantile(share) == pytest.approx(np.quantile(together, share), abs=max(together) / 100)
    if len(set(together)) <= MAX_LENGTHS and merged.shift == 0:
        assert merged.quantile(share) == pytest.approx(np.quantile(together, share))


def test_few_different_lengths_are_exact_however_many_rollouts():
    own = Lengths()
    for length in [7] * 5000 + [4096] * 5000 + [9]:
        own.add(length)
    assert own.shift == 0
    assert own.quantile(0.5) == 9.0


# ------------------------------------------------------------------------------------ figures


REASONS = st.sampled_from(["stop", "length", "loop", "abort"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=60), REASONS, st.integers(1, 3)), min_size=1, max_size=12
    ),
    st.randoms(),
)  # fmt: skip
def test_figures_by_step_are_those_of_measure_rollouts_in_any_order(rows, rng):
    records = [
        record(str(ids), step, token_ids=np.array(ids, dtype=np.int64), num_tokens=len(ids), finish_reason=reason)
        for ids, reason, step in rows
    ]
    rng.shuffle(records)
    taken = figures(*records)
    for step in {step for *_, step in rows}:
        own = [r for r in records if r.step == step]
        expected = measure_rollouts(
            lengths=[r.num_tokens for r in own],
            finish_reasons=[r.finish_reason for r in own],
            texts=[r.completion for r in own],
            token_ids=[r.token_ids for r in own],
        )
        found = taken.steps[step].metrics("tokens")
        for key in found.keys() | expected.keys():
            if not re.fullmatch(r"completions/(min|max)_(terminated|truncated)_length", key):
                assert found[key] == pytest.approx(expected[key]), key


def test_loops_are_found_in_the_text_where_token_ids_are_not_known():
    rng = random.Random(0)
    healthy, sick = prose(rng), looping(rng)
    assert figures(record(healthy)).total().loop == 0
    total = figures(record(sick)).total()
    assert total.loop / total.units > 0.8


def test_a_budget_tells_truncation_by_tokens_where_known_and_by_characters_where_not():
    taken = figures(
        record("x" * 50, num_tokens=9), record("x", num_tokens=10), record("x" * 9), record("x" * 10),
        record("x" * 99, finish_reason="stop"), max_length=10,
    )  # fmt: skip
    total = taken.total()
    assert (total.truncated, total.reasons, taken.guessed) == (2, 5, 4)


def test_without_finish_reasons_and_budget_there_is_no_truncation_figure():
    assert "completions/clipped_ratio" not in figures(record()).steps[1].metrics("characters")
    known = figures(record(), record(finish_reason="length")).steps[1].metrics("characters")
    assert known["completions/clipped_ratio"] == 1.0  # of the one that is known


def test_accuracy_is_that_of_judged_rollouts_or_of_rewards_that_are_all_0_or_1():
    def accuracy(*records):
        taken = figures(*records)
        return (
            taken.steps[1]
            .metrics("tokens", rewards_are_accuracy=taken.rewards_are_accuracy)
            .get("completions/accuracy")
        )

    assert accuracy(record(reward=1.0), record(reward=0.0)) == 0.5
    assert accuracy(record(reward=1.0), record(reward=0.7), record(reward=0.0)) is None
    assert accuracy(record(reward=0.7, correct=True)) == 1.0
    assert accuracy(record()) is None


def test_more_steps_than_fit_are_taken_together_and_nothing_is_lost():
    taken = RolloutFigures(settings=MonitorSettings())
    steps = [*range(3 * MAX_STEPS), -5, 10**15]
    random.Random(0).shuffle(steps)
    for step in steps:
        taken.add(record("ab", step))
    assert len(taken.steps) <= MAX_STEPS
    assert taken.width >= 4
    assert taken.total().num == len(steps)
    assert all(step % taken.width == 0 for step in taken.steps if step is not None)


# ------------------------------------------------------------------------------------ samples


def test_the_worst_samples_are_kept_whatever_the_order():
    rng = random.Random(1)
    records = [record(prose(rng), line=n) for n in range(20)]
    records += [record(looping(rng, times), line=100 + times) for times in range(20, 60, 10)]
    for seed in range(3):
        random.Random(seed).shuffle(records)
        assert [s.place.number for s in figures(*records).samples()] == [150, 140, 130]
    assert figures(*records, num_samples=0).samples() == ()


def test_healthy_rollouts_give_no_sample():
    rng = random.Random(2)
    assert figures(*(record(prose(rng), finish_reason="stop") for _ in range(5))).samples() == ()


def test_a_sample_names_the_loop_by_place_period_repeats_and_text():
    head = "The sum of the two is 12"
    (sample,) = figures(record(head + LOOP * 40 + " Good", num_tokens=400)).samples()
    loop = sample.loop
    assert (loop.unit, loop.start, loop.period, loop.text) == ("characters", len(head), len(LOOP), LOOP)
    assert loop.num_repeats == 40
    assert (sample.before, sample.after) == (head, " Good")


def test_a_sample_without_text_shows_token_ids():
    ids = np.array([5] + [7, 8, 9] * 10)
    (sample,) = figures(record(None, token_ids=ids, num_tokens=len(ids))).samples()
    assert (sample.loop.unit, sample.loop.start, sample.loop.period, sample.loop.text) == ("tokens", 1, 3, "7 8 9")


def test_a_loop_at_the_end_of_a_huge_completion_has_its_true_place():
    head = "".join(chr(0x4E00 + random.Random(n).randrange(20_000)) for n in range(250_000))
    (sample,) = figures(record(head + LOOP * 20)).samples()
    assert sample.loop.start == len(head)
    assert len(sample.before) < 500


@given(st.text(max_size=60), st.integers(8, 40))
def test_shortening_keeps_both_ends(text, most):
    short = shorten(text, most)
    assert len(short) <= most or short == text
    assert text.startswith(short.split(" … ")[0]) or len(text) <= most
