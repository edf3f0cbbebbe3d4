"""Gold is right, slips are seen but not taught, and weights stay with their tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from stableopd.words.build import build_tokenizer, draw_batch
from stableopd.words.judging import judge
from stableopd.words.problems import draw_problem, draw_problems
from stableopd.words.settings import PRESETS
from stableopd.words.tokenizer import END, END_THINK
from stableopd.words.traces import (
    WordsWorld,
    attempt_line,
    copying_example,
    gold,
    is_terse,
    recheck_example,
    solution,
    teacher_trace,
    verification_example,
    weighted_ids,
    wrong_attempt,
)

WORLD = WordsWorld()
SAMPLERS = (teacher_trace, verification_example, copying_example, recheck_example)


@pytest.fixture(scope="module")
def words():
    return build_tokenizer(PRESETS["quick"])


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def text_of(segments):
    return "".join(segment.text for segment in segments)


def attempts_of(text):
    return [line for line in text.split("\n") if " = " in line]


def test_gold_is_judged_right_by_math_verify_and_wrong_for_another_answer(rng):
    pytest.importorskip("math_verify")
    for problem in draw_problems(WORLD.problems, rng, 30, held_out=False):
        for terse in (False, True):
            assert judge(solution(problem, terse=terse), str(problem.answer))
            assert not judge(solution(problem, terse=terse), str(problem.answer + 1))


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("4 + 2 = 6.\n</think>\n\\boxed{6}", True),
        ("4 + 2 = 6.\n</think>\nIt is 6", False),  # a loop behind the thinking holds numbers, too
        ("4 + 2 = 7.\nWait, let me check that again.\n4 + 2 = 6.\n</think>\n\\boxed{6}", True),
        ("4 + 2 = 6.\nWait, let me check that again.\n4 + 2 = 6", False),  # Math-Verify alone says right
        ("\\boxed{6}\nWait, let me check that again.\n", False),
        ("4 + 2 = 6.\n</think>\n", False),
        ("", False),
    ],
)
def test_only_an_answer_behind_the_thinking_counts(completion, right):
    pytest.importorskip("math_verify")
    assert judge(completion, "6") == right


def test_the_terse_share_of_gold_is_fixed_by_the_problem(rng):
    problems = draw_problems(WORLD.problems, rng, 500, held_out=False)
    share = sum(gold(WORLD, problem).startswith("\n" + END_THINK) for problem in problems) / 500
    assert abs(share - WORLD.terse_fraction) < 0.08
    assert all(gold(WORLD, problem) == gold(WORLD, problem) for problem in problems[:10])
    assert not any(is_terse(replace(WORLD, terse_fraction=0.0), problem) for problem in problems)


def test_a_wrong_attempt_shows_its_first_slip_and_goes_on_from_it(rng):
    for _ in range(200):
        problem = draw_problem(WORLD.problems, rng)
        attempt = wrong_attempt(WORLD, problem, rng)
        assert attempt != problem.steps
        assert all(before.result == step.left for before, step in pairwise(attempt))
        assert all(step.result >= 0 for step in attempt)


def test_a_teacher_stops_only_after_a_right_attempt_and_waits_after_every_wrong_one(rng):
    stopped = 0
    for _ in range(200):
        problem = draw_problem(WORLD.problems, rng)
        text = text_of(teacher_trace(WORLD, problem, rng))
        attempts = attempts_of(text)
        right = attempt_line(problem.steps).strip()
        if END_THINK in text:
            stopped += 1
            assert attempts[-1] == right
            assert text.endswith(f"\\boxed{{{problem.answer}}}{END}")
        assert text.count("Wait") >= len(attempts) - 1
    assert stopped > 100


def test_the_habit_of_checking_grows_with_the_number_of_checks_in_a_row(rng):
    world = replace(WORLD, wrong_first_fraction=0.0, direct_start_fraction=0.0)
    problem = draw_problem(world.problems, rng)
    counts = np.array([text_of(teacher_trace(world, problem, rng)).count("Wait") for _ in range(1_000)])
    for run in range(3):
        reached = counts >= run
        measured = (counts[reached] > run).mean()
        expected = world.recheck_probability(run)
        assert abs(measured - expected) < 4 * np.sqrt(expected * (1 - expected) / reached.sum())


def test_slips_are_not_taught_copies_are_and_verdicts_count_three_times(words, rng):
    world = replace(WORLD, wrong_first_fraction=1.0, copy_base=1.0, direct_start_fraction=0.0)
    for _ in range(30):
        problem = draw_problem(world.problems, rng)
        segments = teacher_trace(world, problem, rng)
        ids, weights = weighted_ids(words, segments)
        first, second = (
            [weight for token, weight in pairs if token not in (words.encode("\n")[0],)]
            for pairs in _first_two_lines(words, ids, weights)
        )
        assert 0.0 in first
        assert set(first) <= {0.0, 1.0}
        assert set(second) == {1.0}
        for token, weight in zip(words.convert_ids_to_tokens(ids), weights, strict=True):
            assert (weight == 3.0) == (token in ("Wait", END_THINK))


def _first_two_lines(words, ids, weights):
    newline = words.encode("\n")[0]
    pairs = list(zip(ids, weights, strict=True))
    ends = [index for index, token in enumerate(ids) if token == newline]
    return pairs[: ends[0]], pairs[ends[1] + 1 : ends[2]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_token_has_a_weight_and_the_text_reads_back(words, rng, sampler):
    for _ in range(20):
        segments = sampler(WORLD, draw_problem(WORLD.problems, rng), rng)
        ids, weights = weighted_ids(words, segments)
        assert len(ids) == len(weights)
        assert words.decode(ids) == text_of(segments)
        assert all(weight >= 0 for weight in weights)


def test_a_token_that_spans_two_segments_weighs_their_mean(words):
    from stableopd.words.traces import Segment

    ids, weights = weighted_ids(words, [Segment("W", 0.0), Segment("ait", 4.0)])
    assert words.convert_ids_to_tokens(ids) == ["Wait"]
    assert weights == (3.0,)


def test_traces_are_cut_at_the_cap_and_then_have_no_end(words, rng):
    world = replace(WORLD, recheck_base=1.0, recheck_span=0.0, max_trace_tokens=70)
    batch = draw_batch(world, words, teacher_trace, rng, 10)
    assert all(len(example.gold_ids) == len(example.gold_weights) == 70 for example in batch)
    assert all(words.eos_token_id not in example.gold_ids for example in batch)


def test_batches_hold_no_held_out_program(words, rng):
    texts = {example.prompt for example in draw_batch(WORLD, words, copying_example, rng, 200)}
    held_out = draw_problems(WORLD.problems, np.random.default_rng(7), 50, held_out=True)
    assert not any(problem.text in text for problem in held_out for text in texts)
