"""A user's reward function: what it is asked, what it may answer, and what becomes of a run when it fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopd.errors import ConfigError
from stableopd.evaluate import Completion
from stableopd.judges import exact_match, get_judge
from stableopd.rewards import reward_figures, score_completions
from stableopd.types import Example


def completions(*texts: str, answer: str | None = "42") -> list[Completion]:
    example = Example(index=0, prompt="q", prompt_ids=(1,), answer=answer)
    return [Completion(example=example, text=text, token_ids=[1], finish_reason="stop") for text in texts]


def scored(value: object) -> tuple[list[float], int]:
    rewards, failures = score_completions(completions("a"), lambda text, answer: value)
    return rewards, len(failures)


def test_a_function_sees_each_text_with_the_answer_of_its_prompt():
    seen = []
    rewards, failures = score_completions(
        [*completions("a", "b"), *completions("c", answer="7"), *completions("d", answer="")],
        lambda text, answer: seen.append((text, answer)) or len(seen),
    )
    assert seen == [("a", "42"), ("b", "42"), ("c", "7"), ("d", "")]
    assert (rewards, failures) == ([1.0, 2.0, 3.0, 4.0], [])


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (True, 1.0), (False, 0.0), (3, 3.0), (-0.5, -0.5), (np.bool_(True), 1.0), (np.float32(0.25), 0.25),
        (np.float64(2.5), 2.5), (np.int64(-2), -2.0),
    ],
)  # fmt: skip
def test_numbers_of_python_and_numpy_are_rewards_and_right_is_one(value, reward):
    rewards, failures = scored(value)
    assert (rewards, failures) == ([reward], 0)
    assert type(rewards[0]) is float


@pytest.mark.parametrize(
    "value",
    [None, "1.0", math.nan, math.inf, -math.inf, np.float32("nan"), [1.0], np.array([1.0, 2.0]), 1j, 10**400],
    ids=repr,
)
def test_what_is_no_finite_number_costs_the_reward_and_is_counted(value):
    assert scored(value) == ([0.0], 1)


def test_a_function_that_raises_costs_that_completion_alone():
    def fragile(text: str, answer: str) -> float:
        if text == "b":
            raise RecursionError("a parser that met a model's text")
        return 1.0

    told = ["RecursionError: a parser that met a model's text"]
    assert score_completions(completions("a", "b", "c"), fragile) == ([1.0, 0.0, 1.0], told)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1.0"], ids=repr)
def test_what_is_no_finite_number_is_told_in_words(value):
    _, (told,) = score_completions(completions("a"), lambda text, answer: value)
    assert told == f"TypeError: a reward is a finite number, not {value!r}"


def test_a_failure_that_quotes_a_model_is_one_short_line_without_control_characters():
    def quoting(text: str, answer: str) -> float:
        raise ValueError(text * 100)

    _, (told,) = score_completions(completions("\x1b[2J\n\u202eab"), quoting)
    assert told.startswith("ValueError: \\x1b[2J\\n\\u202eab")
    assert told.isprintable()
    assert len(told) == 300


def test_an_error_that_cannot_even_be_shown_is_a_failure_like_any_other():
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def broken(text: str, answer: str) -> float:
        raise UnspeakableError

    rewards, (told,) = score_completions(completions("a"), broken)
    assert rewards == [0.0]
    assert "UnspeakableError" in told


def test_a_function_is_not_shielded_from_the_user_who_stops_the_run():
    def interrupted(text: str, answer: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_completions(completions("a"), interrupted)


def test_a_judge_is_a_reward():
    assert score_completions(completions(" 42\n", "41"), exact_match) == ([1.0, 0.0], [])


@given(rewards=st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_figures_are_the_mean_and_the_spread(rewards):
    figures = reward_figures(rewards, 0)
    mean = math.fsum(rewards) / len(rewards)
    assert figures["reward"] == pytest.approx(mean, abs=1e-9)
    spread = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    assert figures["reward_std"] == pytest.approx(spread, abs=1e-6)
    assert ("reward/right_fraction" in figures) == (set(rewards) <= {0.0, 1.0})
    assert "reward/failures" not in figures


def test_rewards_of_right_and_wrong_are_also_told_as_a_share_and_failures_as_a_number():
    figures = reward_figures([1.0, 0.0, 0.0, 1.0, 1.0], 2)
    assert figures["reward/right_fraction"] == figures["reward"] == pytest.approx(0.6)
    assert figures["reward/failures"] == 2.0
    assert figures["reward/failed_fraction"] == pytest.approx(0.4)
    assert "reward/right_fraction" not in reward_figures([1.0, 0.5], 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exactly", "'exact', 'math' or 'package.module:function'"),
        ("no_such_module:function", "cannot be imported"),
        ("math:no_such_function", "cannot be imported"),
        ("math:pi", "is not a function"),
    ],
)
def test_a_function_that_there_is_not_is_refused_with_the_setting_that_named_it(name, expected):
    with pytest.raises(ConfigError) as caught:
        get_judge(name, "objective.reward.function")
    assert str(caught.value).startswith("objective.reward.function")
    assert expected in str(caught.value)
