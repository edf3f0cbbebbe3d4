"""The functions that slime calls, with samples of the fields that slime's have."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace

import pytest

from stableopd.health import MonitorSettings
from stableopd.integrations.slime import RolloutLog
from stableopd.runfolder import read_run


class Status(Enum):
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class Sample:
    response_ids: list[int]
    status: Status = Status.COMPLETED
    reward: float | dict | None = 0.0
    loss_mask: list[int] | None = None
    tokens: list[int] = field(init=False)
    response_length: int = field(init=False)
    response: str = field(init=False)

    def __post_init__(self):
        self.tokens = [7, 7, 7, *self.response_ids]
        self.response_length = len(self.response_ids)
        self.response = " ".join(map(str, self.response_ids))


def args(**more):
    return SimpleNamespace(reward_key=None, save=None, **more) if "save" not in more else SimpleNamespace(**more)


def healthy(count=16):
    return [Sample(list(range(row, row + 40)), reward=float(row % 2)) for row in range(count)]


def looping(count=16):
    return [Sample([1, 2, 3] * 40, Status.TRUNCATED) for _ in range(count)]


def call(log, rollout_id, samples, arguments=None):
    metrics: dict = {"rollout/own": 1.0}
    assert log.log_rollout_data(rollout_id, arguments or args(), samples, metrics, 1.5) is False
    return metrics


def test_the_paths_in_the_documents_name_functions_as_slime_loads_them():
    """slime splits at the last dot, imports the module and takes the attribute."""
    for path in ("log_rollout_data", "log_eval_rollout_data"):
        module, _, name = f"stableopd.integrations.slime.{path}".rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_figures_join_those_of_slime_and_leave_its_own():
    metrics = call(RolloutLog(), 0, healthy())
    assert metrics["rollout/own"] == 1.0
    assert metrics["completions/mean_length"] == 40.0
    assert metrics["completions/accuracy"] == 0.5
    assert metrics["health/loop_token_fraction"] == 0.0
    assert metrics["health/alerts"] == 0.0


def test_nowhere_to_put_figures_is_no_error():
    log = RolloutLog()
    assert log.log_rollout_data(0, args(), healthy(), None, 1.5) is False
    assert log.log_eval_rollout_data(0, args(), {"math": {"rewards": [1]}}, None) is False


def test_rollouts_that_come_to_loop_raise_alerts_and_healthy_ones_do_not(caplog):
    log = RolloutLog()
    with caplog.at_level(logging.WARNING, logger="stableopd"):
        for step in range(10):
            call(log, step, healthy())
        assert log.alerts == []
        metrics = [call(log, step, looping()) for step in range(10, 16)]
    assert {"loops", "truncation"} <= {alert.rule for alert in log.alerts if alert.severity == "critical"}
    assert sum(row["health/alerts"] for row in metrics) == len(log.alerts) == len(caplog.records)


def test_groups_of_samples_are_read_like_a_flat_list():
    samples = [*healthy(8), *looping(8)]
    grouped = [[samples[:4], samples[4:8]], [samples[8:]]]
    assert call(RolloutLog(), 0, grouped) == call(RolloutLog(), 0, samples)


def test_truncated_samples_count_as_such_aborted_and_failed_ones_do_not():
    samples = [Sample([1, 2], status) for status in Status]
    assert call(RolloutLog(), 0, samples)["completions/clipped_ratio"] == 0.25


def test_a_status_given_as_text_is_read_too():
    samples = healthy(1)
    samples[0].status = "truncated"
    assert call(RolloutLog(), 0, samples)["completions/clipped_ratio"] == 1.0


def test_tokens_of_tools_are_left_out_and_a_sample_without_any_weight_is_judged_whole():
    ids = list(range(10)) + [1, 2, 3] * 10
    settings = MonitorSettings(loop_min_tokens=8)
    masked = call(RolloutLog(settings), 0, [Sample(ids, loss_mask=[1] * 10 + [0] * 30)])
    removed = call(RolloutLog(settings), 0, [Sample(ids, loss_mask=[0] * 40)])
    assert (masked["completions/mean_length"], masked["health/loop_token_fraction"]) == (10.0, 0.0)
    assert (removed["completions/mean_length"], removed["health/loop_token_fraction"]) == (40.0, 0.75)


def test_an_empty_response_is_no_error():
    metrics = call(RolloutLog(), 0, [Sample([], Status.ABORTED), Sample([1, 2])])
    assert metrics["completions/min_length"] == 0.0


@pytest.mark.parametrize(
    ("rewards", "key", "accuracy"),
    [
        ([1, 0, 1, 1], None, 0.75),
        ([0.5, 0.0], None, None),
        ([{"acc": 1.0}, {"acc": 0.0}], "acc", 0.5),
        ([None], None, None),
    ],
)
def test_rewards_of_0_and_1_are_accuracy_others_are_not(rewards, key, accuracy):
    samples = [Sample([1, 2], reward=reward) for reward in rewards]
    metrics: dict = {}
    RolloutLog().log_rollout_data(0, SimpleNamespace(reward_key=key), samples, metrics, 1.0)
    assert metrics.get("completions/accuracy") == accuracy


def test_held_out_accuracy_that_falls_while_answers_are_truncated_is_critical():
    log = RolloutLog()
    extra: dict = {}
    good = {"math": {"rewards": [1, 1, 1, 0], "truncated": [False] * 4, "samples": []}}
    bad = {"math": {"rewards": [0, 0, 1, 0], "truncated": [True] * 4, "samples": []}}
    assert log.log_eval_rollout_data(0, args(), good, {}) is False
    assert log.log_eval_rollout_data(5, args(), bad, extra) is False
    assert extra["eval/math/accuracy"] == 0.25
    assert "eval_accuracy" in {alert.rule for alert in log.alerts if alert.severity == "critical"}


def test_a_resumed_run_judges_as_if_it_had_never_stopped(tmp_path):
    whole, folders = RolloutLog(), [tmp_path / name for name in ("whole", "broken")]
    for step in range(16):
        call(whole, step, healthy() if step < 10 else looping(), args(save=str(folders[0])))
    first, second = RolloutLog(), RolloutLog()
    for step in range(12):
        call(first, step, healthy() if step < 10 else looping(), args(save=str(folders[1])))
    for step in range(11, 16):  # from a checkpoint that is one rollout older than the last line
        call(second, step, looping(), args(save=str(folders[1])))
    assert second.monitor.state_dict() == whole.monitor.state_dict()
    for name in ("metrics.jsonl", "alerts.jsonl"):
        left, right = ([json.loads(line) for line in (folder / "stableopd" / name).open()] for folder in folders)
        assert left == right
    assert len(read_run(folders[1] / "stableopd").metrics) == 16
