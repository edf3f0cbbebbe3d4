"""Word problems mean what they say: read back from their sentences alone, they have the answer that they claim."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.words.problems import Operation, ProblemSettings, draw_problem, draw_problems, working

DEFAULT = ProblemSettings()
MEANINGS = (
    (r"(\w+) (?:has|starts with|owns) (\d+) \w+\.", "start"),
    (r"(\w+) (?:buys|finds) (\d+) more\.", "add"),
    (r"\w+ gives (\w+) (\d+)\.", "add"),
    (r"(\w+) (?:loses|sells) (\d+)\.", "remove"),
    (r"(\w+) gives (\d+) to \w+\.", "remove"),
    (r"Then (\w+) has (\d+) times as many\.", "multiply"),
    (r"()Magic makes (\d+) of each\.", "multiply"),
    (r"(\w+) splits them into (\d+) equal parts and keeps one\.", "share"),
    (r"(\d+) friends share them evenly, and (\w+) is one\.", "share"),
    (r"\w+ is \d+ years old\.", "idle"),
    (r"It takes \d+ minutes\.", "idle"),
)


def read(text: str) -> tuple[Fraction, list[int]]:
    """The answer to the question and the numbers that do not matter, by a reader of its own."""
    question = re.search(r"(?:Now h|H)ow many (\w+) (?:does|has) (\w+)", text)
    assert question
    things, hero = question[1], question[2]
    value, idle = Fraction(-1), []
    for sentence in re.findall(r"[^.?]+\.", text):
        kind, match = next(
            (kind, match) for pattern, kind in MEANINGS if (match := re.fullmatch(pattern, sentence.strip()))
        )
        number = int(re.search(r"\d+", sentence)[0])
        if kind == "idle" or (kind == "start" and (match[1] != hero or things not in sentence)):
            idle.append(number)
            continue
        if "Magic" not in sentence:
            assert hero in match.groups()
        if kind == "start":
            value = Fraction(number)
        elif kind == "add":
            value += number
        elif kind == "remove":
            value -= number
        elif kind == "multiply":
            value *= number
        else:
            value /= number
    return value, idle


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_the_answer_is_what_an_independent_reader_finds(seed):
    problem = draw_problem(DEFAULT, np.random.default_rng(seed))
    value, _ = read(problem.text)
    assert value == problem.answer
    assert 1 <= problem.answer <= DEFAULT.max_value
    assert DEFAULT.min_operations <= len(problem.operations) <= DEFAULT.max_operations


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_every_step_is_true_and_takes_up_the_one_before(seed):
    problem = draw_problem(DEFAULT, np.random.default_rng(seed))
    value = problem.start
    for step in problem.steps:
        left, right = str(step).split(" = ")
        assert int(left.split()[0]) == value
        assert eval(left) == int(right) == step.result
        value = step.result
    assert value == problem.answer


def test_some_problems_hold_idle_numbers_and_up_to_as_many_as_are_allowed():
    rng = np.random.default_rng(0)
    counts = [len(read(draw_problem(DEFAULT, rng).text)[1]) for _ in range(300)]
    assert set(counts) == {0, 1, 2}
    plain = ProblemSettings(max_distractors=0)
    assert not any(read(draw_problem(plain, rng).text)[1] for _ in range(100))


def test_a_held_out_program_is_never_seen_in_training_in_any_words():
    rng = np.random.default_rng(1)
    train = draw_problems(DEFAULT, rng, 1_500, held_out=False)
    validation = draw_problems(DEFAULT, rng, 200, held_out=True)
    assert not {problem.program for problem in train} & {problem.program for problem in validation}
    assert len({problem.text for problem in train}) == 1_500


def test_one_program_in_five_is_held_out():
    rng = np.random.default_rng(2)
    programs = {problem.program: problem.is_held_out for problem in (draw_problem(DEFAULT, rng) for _ in range(2_000))}
    assert 0.17 < sum(programs.values()) / len(programs) < 0.23


def test_there_are_more_than_a_hundred_thousand_problems():
    """As many draws as n out of N equally likely ones collide about n² / 2N times; unequal ones collide more often."""
    rng = np.random.default_rng(3)
    num_draws = 3_000
    collisions = num_draws - len({draw_problem(DEFAULT, rng).text for _ in range(num_draws)})
    assert collisions < num_draws**2 / (2 * 100_000) / 4


def test_a_seed_gives_the_same_problems():
    first, again, other = (draw_problems(DEFAULT, np.random.default_rng(s), 20, held_out=False) for s in (4, 4, 5))
    assert first == again != other


@pytest.mark.parametrize(
    ("kind", "number", "result"), [("add", 3, 10), ("remove", 9, 0), ("multiply", 2, 14), ("share", 2, 3)]
)
def test_operations_stay_within_whole_numbers_even_after_a_slip(kind, number, result):
    operation = Operation(kind, number)
    assert operation.apply(7) == result
    assert [step.result for step in working(7, [operation])] == [result]
