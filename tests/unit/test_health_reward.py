"""The reward function of zeros by itself, and the sums over processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopd.errors import ConfigError
from stableopd.health import HealthMonitor, MonitorSettings
from stableopd.integrations.trl import HealthCallback, HealthReward, _combine, _end_token_ids, _text

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=6)


def test_every_completion_gets_0_and_the_figures_are_logged():
    logged: dict[str, float] = {}
    reward = HealthReward(MonitorSettings(loop_min_tokens=4), end_token_ids=[0])
    given_back = reward(
        prompts=["p", "p"],
        completions=["ab", "cccccccc"],
        completion_ids=[[1, 0], [3] * 8],
        trainer_state=None,
        log_metric=logged.__setitem__,
        answer=["x", "y"],
    )
    assert given_back == [0.0, 0.0]
    assert logged["health/loop_token_fraction"] == 0.8
    assert not any(key.startswith("completions/") for key in logged)
    assert reward.take_parts() == []


def test_without_end_tokens_the_budget_tells_what_is_truncated():
    reward = HealthReward(max_completion_length=3)
    reward.keeps_parts = True
    reward(completions=["a", "b"], completion_ids=[[1, 2], [1, 2, 3]])
    (part,) = reward.take_parts()
    assert part.finish_reasons == ["stop", "length"]


def test_a_reward_that_cannot_tell_says_what_to_do():
    with pytest.raises(ConfigError, match=r"give it end_token_ids or max_completion_length"):
        HealthReward()(completions=["a"], completion_ids=[[1]])
    with pytest.raises(ConfigError, match="completion_ids"):
        HealthReward(end_token_ids=[0])(completions=["a"])


def test_what_the_assistant_wrote_is_the_text_of_a_conversation():
    messages = [
        {"role": "assistant", "reasoning_content": "hm", "content": None},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}, {"type": "image"}]},
        {"role": "assistant", "content": "42"},
    ]
    assert _text(messages) == "hm\nso\n42"
    assert _text("plain") == "plain"


def test_an_unknown_severity_is_refused():
    with pytest.raises(ConfigError, match="stop_on must be one of info, warning, critical or None, got 'bad'"):
        HealthCallback(stop_on="bad")


def test_no_end_token_anywhere_is_unknown():
    assert _end_token_ids(None, None) is None


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_parts_together_are_the_figures_of_all_rollouts(rows_of_parts):
    settings = MonitorSettings(loop_min_tokens=4, tail_chars=5, compression_threshold=0.5, ngram=3)
    reward = HealthReward(settings, end_token_ids=[0])
    reward.keeps_parts = True
    for rows in rows_of_parts:
        reward(completions=["".join(map(str, row)) for row in rows], completion_ids=rows)
    everything = [row for rows in rows_of_parts for row in rows]
    expected = HealthMonitor(settings).observe(
        1,
        lengths=[len(row) for row in everything],
        finish_reasons=["stop" if row[-1] == 0 else "length" for row in everything],
        texts=["".join(map(str, row)) for row in everything],
        token_ids=everything,
    )
    assert _combine(reward.take_parts()) == pytest.approx(expected.metrics)
