"""The monitor: when it speaks, when it is silent, what it says, and that it resumes exactly."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from stableopd.errors import ConfigError
from stableopd.health import HealthMonitor, MonitorSettings
from stableopd.types import Alert

TRUNCATION = "completions/clipped_ratio"
LENGTH = "completions/mean_length"
LOOPS = "health/loop_token_fraction"
REPETITION = "health/repetition_rate"


def feed(monitor: HealthMonitor, rows: list[dict[str, float]], start: int = 1) -> list[Alert]:
    return [alert for step, row in enumerate(rows, start) for alert in monitor.judge(step, row)]


def said(alerts: list[Alert]) -> list[tuple[str, str]]:
    return [(alert.rule, alert.severity) for alert in alerts]


def row(truncated: float = 0.0, length: float = 100.0, loops: float = 0.0, **more: float) -> dict[str, float]:
    return {TRUNCATION: truncated, LENGTH: length, LOOPS: loops, **more}


def instant(**changes: Any) -> HealthMonitor:
    """Without smoothing, so that a test can say at which step something has to happen."""
    return HealthMonitor(MonitorSettings(**{"window": 1, "patience": 1, "cooldown_steps": 0, **changes}))


class TestHealthyRuns:
    def test_a_steady_run_raises_nothing(self) -> None:
        rng = np.random.default_rng(0)
        rows = [row(rng.binomial(256, 0.02) / 256, rng.normal(100, 5), rng.uniform(0, 0.01)) for _ in range(300)]
        assert feed(HealthMonitor(), rows) == []

    def test_truncation_as_high_as_in_the_paper_from_the_start_is_not_critical(self) -> None:
        rng = np.random.default_rng(0)
        alerts = feed(HealthMonitor(), [row(rng.binomial(256, 0.5) / 256) for _ in range(200)])
        assert {alert.severity for alert in alerts} <= {"warning"}

    def test_the_window_smooths_single_bad_steps_away(self) -> None:
        rows = [row(0.4 if step % 6 == 5 else 0.0) for step in range(60)]
        assert feed(instant(window=5), rows) == []
        assert feed(instant(window=1), rows) != []

    def test_growth_with_growing_held_out_accuracy_is_no_alarm(self) -> None:
        monitor = HealthMonitor()
        alerts: list[Alert] = []
        for step in range(1, 101):
            alerts += monitor.judge(step, row(length=100 + 3 * step))
            if step % 10 == 0:
                alerts += monitor.observe_eval(step, {"eval/math/accuracy": 0.3 + step / 400, "loss": 9.0})
        assert alerts == []

    def test_growth_with_growing_training_accuracy_is_no_alarm(self) -> None:
        rows = [row(length=100 + 3 * step, **{"completions/accuracy": 0.2 + step / 200}) for step in range(100)]
        assert feed(HealthMonitor(), rows) == []


class TestCollapse:
    def test_the_papers_jump_is_called_critical_within_a_few_steps(self) -> None:
        before = [row(0.5, 4000.0) for _ in range(50)]
        after = [row(0.5 + min(0.45, 0.03 * i), 4000 + 120.0 * i, min(0.3, 0.02 * i)) for i in range(1, 31)]
        alerts = feed(HealthMonitor(), before + after)
        assert ("truncation", "critical") in said(alerts)
        assert ("loops", "critical") in said(alerts)
        assert min(alert.step for alert in alerts) <= 58
        truncation = next(alert for alert in alerts if said([alert]) == [("truncation", "critical")])
        assert truncation.step <= 65
        assert "length inflation" in truncation.message
        assert "objective.gold.coef" in truncation.message
        assert "objective.reference.coef" in truncation.message

    def test_growth_is_an_alarm_when_accuracy_grows_but_loops_appear(self) -> None:
        rows = [
            row(length=100 + 3 * i, loops=0.2 * (i > 30), **{"completions/accuracy": 0.2 + i / 200}) for i in range(60)
        ]
        assert ("length_growth", "warning") in said(feed(HealthMonitor(), rows))

    def test_growth_is_an_alarm_when_held_out_accuracy_falls(self) -> None:
        monitor = HealthMonitor()
        monitor.observe_eval(0, {"eval/math/accuracy": 0.5})
        monitor.observe_eval(20, {"eval/math/accuracy": 0.45})
        alerts = said(feed(monitor, [row(length=100 + 3.0 * i) for i in range(60)]))
        assert alerts[:2] == [("length_drift", "warning"), ("length_growth", "warning")]

    def test_growth_that_lasts_is_told_before_it_is_large_and_noise_is_not(self) -> None:
        rng = random.Random(0)
        level = [row(length=100 + rng.gauss(0, 8)) for _ in range(200)]
        assert feed(HealthMonitor(), level) == []
        grown = [row(length=135 + rng.gauss(0, 8)) for _ in range(20)]
        alerts = feed(HealthMonitor(), level[:20] + grown)
        assert said(alerts) == [("length_drift", "warning")]
        assert alerts[0].step <= 27
        assert alerts[0].signal == "health/length_drift"

    def test_growth_waits_for_the_evaluation_that_tells_whether_accuracy_grows_too(self) -> None:
        monitor = HealthMonitor()
        monitor.observe_eval(0, {"eval/math/accuracy": 0.5})
        rows = [row(length=100)] * 5 + [row(length=140)] * 10
        assert feed(monitor, rows) == []
        monitor.observe_eval(16, {"eval/math/accuracy": 0.5})
        assert said(monitor.judge(17, row(length=140))) == [("length_drift", "warning")]

    def test_held_out_collapse_needs_truncation_to_be_critical(self) -> None:
        fell = {"eval/math/accuracy": 0.5}
        greedy = {"eval/math_greedy/truncation_rate": 0.9}
        for later, severity in ((fell, "warning"), (fell | greedy, "critical")):
            monitor = HealthMonitor()
            monitor.observe_eval(0, {"eval/math/accuracy": 0.7, "eval/math_greedy/truncation_rate": 0.0})
            alerts = [a for a in monitor.observe_eval(10, later) if a.rule == "eval_accuracy"]
            assert said(alerts) == [("eval_accuracy", severity)]
            assert alerts[0].signal == "eval/math/accuracy"

    def test_greedy_truncation_alone_is_a_warning(self) -> None:
        monitor = HealthMonitor()
        monitor.observe_eval(0, {"eval/math_greedy/truncation_rate": 0.0})
        assert said([*monitor.observe_eval(5, {"eval/math_greedy/truncation_rate": 0.3})]) == [
            ("eval_truncation", "warning")
        ]

    def test_a_falling_stop_probe_warns(self) -> None:
        rows = [{"health/stop_probe": 0.97} for _ in range(10)] + [{"health/stop_probe": 0.6} for _ in range(5)]
        alerts = feed(instant(), rows)
        assert said(alerts) == [("stop_probe", "warning")]
        assert alerts[0].value < alerts[0].threshold == pytest.approx(0.7 * 0.97)


class TestAdvice:
    def test_truncation_without_loops_points_to_the_budget(self) -> None:
        alert = feed(instant(), [row(0.0)] * 5 + [row(0.4)])[0]
        assert "rollout.max_completion_length" in alert.message
        assert "length inflation" not in alert.message

    def test_unmeasured_loops_are_admitted(self) -> None:
        assert "not measured" in feed(instant(), [{TRUNCATION: 0.0}] * 5 + [{TRUNCATION: 0.4}])[0].message

    def test_nothing_that_ever_stops_points_to_the_end_token(self) -> None:
        alerts = feed(HealthMonitor(), [row(1.0, loops=0.5)] * 10)
        truncation = next(alert for alert in alerts if alert.rule == "truncation")
        assert truncation.severity == "warning"
        assert "end token" in truncation.message

    def test_an_alert_names_its_figures(self) -> None:
        alert = feed(instant(), [row(0.04)] * 5 + [row(0.24)])[0]
        assert (alert.signal, alert.value, alert.step, alert.since) == (TRUNCATION, 0.24, 6, 6)
        assert alert.threshold == pytest.approx(0.14)
        assert "24%" in alert.message
        assert "4.0% in the first 5 steps" in alert.message
        assert "since step 6" in alert.message

    def test_lost_accuracy_without_loops_is_not_blamed_on_length(self) -> None:
        monitor = instant()
        monitor.observe_eval(0, {"eval/math/accuracy": 0.7})
        assert "learning_rate" in monitor.observe_eval(10, {"eval/math/accuracy": 0.5})[0].message

    def test_loop_alerts_tell_the_advantage_of_loops(self) -> None:
        bad = row(loops=0.3, **{"health/advantage_loop": -0.03, "health/advantage_other": -0.16})
        assert "-0.030 against -0.160" in feed(instant(), [row()] * 5 + [bad])[0].message


class TestSkippedUpdates:
    def test_the_first_one_warns_and_so_many_in_a_row_are_critical(self) -> None:
        rows = [{"skipped_updates": share, "loss/distill": 0.1} for share in (0.0, 0.5, 1.0, 1.0)]
        alerts = feed(HealthMonitor(MonitorSettings(patience=3)), rows)
        assert said(alerts) == [("skipped_updates", "warning"), ("skipped_updates", "critical")]
        assert [alert.step for alert in alerts] == [2, 4]
        assert {alert.cause for alert in alerts} == {"not_finite"}

    def test_it_names_the_loss_that_is_no_number(self) -> None:
        row = {"skipped_updates": 1.0, "loss/distill": float("nan"), "loss/gold": 0.5, "skipped_updates/no_tokens": 0.0}
        (alert,) = feed(HealthMonitor(), [row])
        assert "loss/distill" in alert.message
        assert "loss/gold" not in alert.message
        assert "weights of student or teacher" in alert.message

    def test_updates_without_a_token_have_another_cause(self) -> None:
        (alert,) = feed(HealthMonitor(), [{"skipped_updates": 1.0, "skipped_updates/no_tokens": 1.0}])
        assert alert.cause == "no_tokens"
        assert "truncated_weight" in alert.message
        assert "finite" not in alert.message

    def test_it_is_over_when_updates_are_made_again(self) -> None:
        monitor = HealthMonitor()
        feed(monitor, [{"skipped_updates": 1.0}])
        assert [alarm.rule for alarm in monitor.alarms] == ["skipped_updates"]
        feed(monitor, [{"skipped_updates": 0.0}], start=2)
        assert monitor.alarms == ()


class TestFailedRewards:
    def test_a_few_are_no_alarm_half_of_a_step_warns_and_all_of_it_is_critical(self) -> None:
        alerts = feed(HealthMonitor(), [{"reward/failed_fraction": share} for share in (0.0, 0.3, 0.6, 1.0)])
        assert said(alerts) == [("reward_failures", "warning"), ("reward_failures", "critical")]
        assert "100% of the step's completions" in alerts[-1].message
        assert alerts[-1].cause == "reward_function"


class TestHysteresis:
    def test_speaks_once_while_a_level_lasts(self) -> None:
        assert said(feed(instant(), [row()] * 5 + [row(0.2)] * 50)) == [("truncation", "warning")]

    def test_speaks_again_on_escalation_only(self) -> None:
        rows = [row()] * 5 + [row(0.2)] * 3 + [row(0.4)] * 3 + [row(0.2)] * 3 + [row(0.4)] * 3
        assert said(feed(instant(), rows)) == [("truncation", "warning"), ("truncation", "critical")]

    def test_a_dip_that_stays_above_release_does_not_rearm(self) -> None:
        rows = [row()] * 5 + [row(0.2), row(0.06)] * 10
        assert len(feed(instant(), rows)) == 1

    def test_clearing_rearms_after_the_cooldown(self) -> None:
        rows = [row()] * 5 + [row(0.2), row(0.0)] * 10
        assert [a.step for a in feed(instant(), rows)] == list(range(6, 26, 2))
        assert [a.step for a in feed(instant(cooldown_steps=7), rows)] == [6, 14, 22]

    def test_cooldown_does_not_hold_back_an_escalation(self) -> None:
        rows = [row()] * 5 + [row(0.2), row(0.0), row(0.6)]
        assert said(feed(instant(cooldown_steps=50), rows)) == [("truncation", "warning"), ("truncation", "critical")]

    def test_patience_waits_but_remembers_since_when(self) -> None:
        alerts = feed(instant(patience=3), [row()] * 5 + [row(0.2)] * 2 + [row()] + [row(0.2)] * 4)
        assert [(alert.step, alert.since) for alert in alerts] == [(11, 9)]

    def test_a_step_without_the_signal_changes_nothing(self) -> None:
        rows = [row()] * 5 + [row(0.2), {}, {TRUNCATION: float("nan")}, row(0.2)]
        assert [(alert.step, alert.since) for alert in feed(instant(patience=2), rows)] == [(9, 6)]

    def test_without_a_baseline_one_look_is_enough(self) -> None:
        one_look = MonitorSettings(baseline_steps=0, patience=1)
        assert said(feed(HealthMonitor(one_look), [row(0.3, loops=0.4)])) == [("loops", "critical")]
        assert feed(HealthMonitor(), [row(0.3, loops=0.4)]) == []


class TestObserve:
    def test_reports_figures_and_a_bound_that_was_crossed(self) -> None:
        monitor = HealthMonitor(MonitorSettings(max_expected_length=50))
        fine = monitor.observe(1, lengths=[10, 50], finish_reasons=["stop", "stop"])
        assert fine.healthy
        assert fine.metrics["completions/max_length"] == 50
        report = monitor.observe(2, lengths=[10, 51], finish_reasons=["stop", "stop"])
        assert not report.healthy
        assert said([*report.alerts]) == [("length_over_expected", "warning")]
        assert (report.alerts[0].value, report.alerts[0].threshold) == (51, 50)
        worse = monitor.observe(3, lengths=[70, 51], finish_reasons=["stop", "stop"])
        assert said([*worse.alerts]) == [("length_over_expected", "critical")]

    def test_sees_toy_rollouts_fall_into_loops(self) -> None:
        scaled = MonitorSettings(tail_chars=64, compression_threshold=2.2)
        monitor = HealthMonitor(scaled)
        good, loop = "1368;y=8$", ("1368;w" * 14)[:80]
        found: list[Alert] = []
        for step in range(1, 31):
            texts = [loop if row < 2 * (step - 10) else good for row in range(32)]
            report = monitor.observe(
                step,
                lengths=[len(text) for text in texts],
                finish_reasons=["length" if text is loop else "stop" for text in texts],
                texts=texts,
                token_ids=[[ord(c) for c in text] for text in texts],
                advantages=[np.full(len(text), -0.02 if text is loop else -0.5) for text in texts],
            )
            found += report.alerts
        assert {"truncation", "repetition", "loops", "length_growth"} <= {
            a.rule for a in found if a.severity == "critical"
        }
        assert report.metrics["health/repetition_rate"] == 1.0
        assert report.metrics["health/advantage_loop"] == pytest.approx(-0.02)

    def test_takes_an_empty_step(self) -> None:
        report = HealthMonitor().observe(1, lengths=[], finish_reasons=[], texts=[], token_ids=[])
        assert report.metrics == {}
        assert report.healthy


class TestJudge:
    def test_numpy_figures_are_judged_and_stay_json(self) -> None:
        monitor = instant()
        rows = [{TRUNCATION: np.float32(0.0)}] * 5 + [{TRUNCATION: np.float32(0.5)}]
        assert said(feed(monitor, rows)) == [("truncation", "critical")]
        assert json.loads(json.dumps(monitor.state_dict())) == monitor.state_dict()


class TestState:
    @pytest.mark.parametrize("cut", [0, 3, 7, 12, 20, 33])
    def test_a_round_trip_through_json_changes_no_later_report(self, cut: int) -> None:
        rng = np.random.default_rng(1)
        rows = [
            row(rng.uniform(0, 0.5), rng.uniform(50, 300), rng.uniform(0, 0.4))
            | {"eval/x/accuracy": rng.uniform(0.2, 0.9), "eval/x/truncation_rate": rng.uniform(0, 1)}
            for _ in range(60)
        ]
        settings = MonitorSettings(window=3, cooldown_steps=4)
        whole = HealthMonitor(settings)
        feed(whole, rows[:cut])
        resumed = HealthMonitor(settings)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
        later = feed(whole, rows[cut:], cut + 1)
        assert later, "the rest of the run must have something to say"
        assert feed(resumed, rows[cut:], cut + 1) == later
        assert resumed.state_dict() == whole.state_dict()

    def test_state_is_a_copy(self) -> None:
        monitor = instant()
        state = monitor.state_dict()
        feed(monitor, [row()] * 3)
        other = instant()
        other.load_state_dict(state)
        assert other.state_dict() == instant().state_dict()
        taken = monitor.state_dict()
        frozen = json.dumps(taken)
        other.load_state_dict(taken)
        feed(monitor, [row(0.9)] * 3, 4)
        feed(other, [row(0.9)] * 3, 4)
        assert json.dumps(taken) == frozen

    def test_an_empty_state_resets(self) -> None:
        monitor = instant()
        feed(monitor, [row()] * 3)
        monitor.load_state_dict({})
        assert monitor.state_dict() == instant().state_dict()

    def test_refuses_a_state_of_another_format(self) -> None:
        with pytest.raises(ValueError, match="version 99"):
            HealthMonitor().load_state_dict({"version": 99})


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"window": 0}, "window"),
            ({"patience": 1.5}, "patience"),
            ({"max_expected_length": 0}, "max_expected_length"),
            ({"loop_min_repeats": 1}, "loop_min_repeats"),
            ({"compression_threshold": 0.0}, "compression_threshold"),
            ({"loop_warning": float("nan")}, "loop_warning"),
            ({"loop_warning": 0.5}, "loop_critical"),
            ({"length_growth_warning": 1.0}, "length_growth_warning"),
            ({"release_fraction": 1.1}, "release_fraction"),
        ],
    )
    def test_an_impossible_value_is_refused_by_name(self, changes: dict[str, Any], named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            MonitorSettings(**changes)

    def test_whole_floats_from_a_configuration_become_integers(self) -> None:
        assert MonitorSettings(window=7.0).window == 7
        assert isinstance(MonitorSettings(window=7.0).window, int)

    def test_settings_cannot_change_under_a_running_monitor(self) -> None:
        with pytest.raises(AttributeError):
            MonitorSettings().window = 3  # type: ignore[misc]
