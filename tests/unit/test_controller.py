"""The controller: bounded, reversible, logged, not too often; and what it leaves alone."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.health import Alarm, ControllerSettings, HealthController, Levers
from stableopd.health.causes import BUDGET, END_TOKEN, INFLATION, STABILISABLE
from stableopd.health.controller import Action, Actions

OPD = Levers(gold_coef=0.0, reference_coef=0.0, has_gold=True, has_reference=True, max_completion_length=100)
STABLEOPD = Levers(gold_coef=1.0, reference_coef=0.1, has_gold=True, has_reference=True, max_completion_length=100)


def alarm(
    severity: str = "warning",
    since: int = 1,
    cause: str = INFLATION.name,
    *,
    rule: str = "loops",
    easing: bool = False,
    measured_at: int = 10**6,
) -> Alarm:
    return Alarm(
        rule=rule, signal="health/loop_token_fraction", severity=severity, since=since, value=0.3, threshold=0.2,
        cause=cause, easing=easing, measured_at=measured_at,
    )  # fmt: skip


def controller(actions: str = "stabilise", levers: Levers = OPD, **options) -> HealthController:
    return HealthController(ControllerSettings(actions=actions, **options), levers)


def coefs(found) -> tuple[float, float]:
    return found.gold_coef, pytest.approx(found.reference_coef)


def test_a_plain_opd_run_is_turned_into_stableopd_at_its_first_alarm_and_says_so():
    found, said = controller().decide(7, [alarm(since=5)])
    assert coefs(found) == (1.0, 0.1)
    (alert,) = said
    assert (alert.rule, alert.action, alert.step, alert.since, alert.cause) == (
        "controller",
        "raise",
        7,
        5,
        "inflation",
    )
    assert "objective.gold.coef from 0 to 1 and objective.reference.coef from 0 to 0.1" in alert.message


def test_coefficients_rise_again_only_after_the_cooldown_and_only_to_their_bounds():
    it = controller(cooldown_steps=4)
    levels = []
    for step in range(1, 20):
        it.decide(step, [alarm()])
        levels.append(it.level)
    assert levels == [1] * 4 + [2] * 4 + [3] * 11
    assert coefs(it.controls()) == (4.0, 0.9)
    assert coefs(controller(levers=STABLEOPD, max_gold_coef=2.0).decide(1, [alarm()])[0]) == (2.0, 0.3)


def test_a_critical_alarm_raises_to_the_second_level_at_once():
    it = controller()
    it.decide(1, [alarm("critical")])
    assert it.level == 2


def test_coefficients_come_down_one_level_at_a_time_after_calm_steps_but_stableopd_stays_on():
    it = controller(calm_steps=5)
    it.decide(1, [alarm("critical")])
    said = [it.decide(step, [])[1] for step in range(2, 40)]
    lowered = [alerts[0] for alerts in said if alerts]
    assert [alert.step for alert in lowered] == [6]
    assert [alert.action for alert in lowered] == ["lower"]
    assert coefs(it.controls()) == (1.0, 0.1)


def test_a_run_that_began_as_stableopd_comes_back_to_its_own_coefficients():
    it = controller(levers=STABLEOPD, calm_steps=5)
    assert coefs(it.decide(1, [alarm("critical")])[0]) == (4.0, 0.9)
    for step in range(2, 12):
        it.decide(step, [])
    assert coefs(it.controls()) == (1.0, 0.1)


def test_an_alarm_that_was_last_measured_before_a_raise_raises_nothing_more():
    """A held-out figure stands until the next evaluation."""
    it = controller(cooldown_steps=4)
    for step in range(10, 40):
        it.decide(step, [alarm(measured_at=10)])
    assert it.level == 1
    it.decide(40, [alarm(measured_at=40)])
    assert it.level == 2


def test_a_checkpoint_is_healthy_with_an_alarm_that_stabilisation_has_nothing_to_do_with():
    it = controller("rollback")
    it.saved(10, [alarm(cause=BUDGET.name)])
    it.saved(20, [alarm(easing=True)])
    assert it.checkpoints_needed == (10,)


def test_lengths_of_rollouts_that_were_cut_short_are_no_reason_to_act():
    it = controller(shorten_budget=True, calm_steps=5, cooldown_steps=1)
    it.decide(1, [alarm("critical")])
    for step in range(2, 7):
        it.decide(step, [alarm("critical", rule="truncation")])
    assert it.level == 1


def test_an_alarm_that_eases_neither_raises_nor_counts_as_calm():
    it = controller(calm_steps=5, cooldown_steps=1, levers=STABLEOPD)
    it.decide(1, [alarm()])
    for step in range(2, 30):
        it.decide(step, [alarm(easing=True)])
    assert it.level == 1


@pytest.mark.parametrize("cause", [END_TOKEN.name, BUDGET.name, "never heard of"])
@pytest.mark.parametrize("actions", ["stabilise", "rollback"])
def test_what_stabilisation_cannot_mend_raises_nothing(actions, cause):
    it = controller(actions)
    it.saved(1, [])
    found, said = it.decide(9, [alarm("critical", since=5, cause=cause)])
    assert (found, said) == (it.controls(), ())
    assert it.level == 0


@pytest.mark.parametrize("actions", ["off", "warn"])
def test_off_and_warn_do_nothing_and_log_no_figures(actions):
    it = controller(actions)
    found, said = it.decide(9, [alarm("critical")])
    assert coefs(found) == (0.0, 0.0)
    assert not found.stop
    assert found.rollback_to is None
    assert said == ()
    assert it.metrics() == {}


def test_stop_ends_the_run_on_a_critical_alarm_of_any_cause_and_not_on_a_warning():
    it = controller("stop")
    assert not it.decide(8, [alarm(cause=END_TOKEN.name)])[0].stop
    found, (alert,) = it.decide(9, [alarm("critical", cause=END_TOKEN.name)])
    assert found.stop
    assert (alert.action, alert.severity) == ("stop", "critical")


def test_a_rollback_goes_to_the_newest_checkpoint_from_before_the_trouble_and_stabilises():
    it = controller("rollback")
    for step, healthy in ((10, True), (20, True), (30, True), (40, False)):
        it.saved(step, [] if healthy else [alarm()])
    found, said = it.decide(45, [alarm("critical", since=29)])
    assert found.rollback_to == 20
    assert coefs(found) == (3.0, 0.3)
    assert [alert.action for alert in said] == ["rollback", "raise"]
    assert "step 20" in said[0].message


def test_a_second_rollback_without_a_checkpoint_in_between_goes_further_back():
    it = controller("rollback", cooldown_steps=5)
    for step in (10, 20, 30):
        it.saved(step, [])
    assert it.decide(40, [alarm("critical", since=38)])[0].rollback_to == 30
    assert it.decide(42, [alarm("critical", since=42)])[0].rollback_to is None
    assert it.decide(45, [alarm("critical", since=42)])[0].rollback_to == 20


def test_without_a_checkpoint_from_before_the_trouble_a_critical_alarm_only_stabilises():
    it = controller("rollback")
    it.saved(30, [])
    found, said = it.decide(40, [alarm("critical", since=25)])
    assert found.rollback_to is None
    assert [alert.action for alert in said] == ["raise"]
    assert "no healthy checkpoint" in said[0].message


def test_after_its_last_rollback_the_run_is_stopped():
    it = controller("rollback", max_rollbacks=1, cooldown_steps=5)
    it.saved(10, [])
    assert it.decide(20, [alarm("critical", since=15)])[0].rollback_to == 10
    found, said = it.decide(30, [alarm("critical", since=28)])
    assert found.stop
    assert "1 rollbacks have not helped" in said[0].message


def test_checkpoints_that_a_rollback_needs_are_kept_and_those_that_are_gone_forgotten():
    it = controller("rollback")
    for step in (10, 20, 30, 40):
        it.saved(step, [])
    assert it.checkpoints_needed == (20, 30, 40)
    it.lost_all_but([20, 40])
    assert it.decide(50, [alarm("critical", since=35)])[0].rollback_to == 20
    assert not controller("stabilise").checkpoints_needed


def test_levers_that_are_not_there_are_not_moved():
    no_gold = Levers(gold_coef=0.0, reference_coef=0.0, has_gold=False, has_reference=True, max_completion_length=9)
    found, (alert,) = controller(levers=no_gold).decide(1, [alarm()])
    assert coefs(found) == (0.0, 0.1)
    assert "gold" not in alert.message
    nothing = Levers(gold_coef=0.0, reference_coef=0.0, has_gold=False, has_reference=False, max_completion_length=9)
    found, (alert,) = controller(levers=nothing).decide(1, [alarm()])
    assert coefs(found) == (0.0, 0.0)
    assert alert.message.startswith("There is nothing to raise")


def test_looping_rollouts_are_dropped_and_budgets_cut_only_where_that_is_allowed():
    it = controller(drop_loops=True, shorten_budget=True)
    found, said = it.decide(1, [alarm("critical")])
    assert found.drop_loops
    assert found.max_completion_length == 50
    assert [alert.action for alert in said] == ["raise", "drop_loops", "shorten"]
    plain = controller().decide(1, [alarm("critical")])[0]
    assert not plain.drop_loops
    assert plain.max_completion_length == 100


alarms_of_a_step = st.lists(
    st.builds(
        alarm, st.sampled_from(["warning", "critical"]), st.integers(0, 60), st.sampled_from([*STABILISABLE, "budget"]),
        easing=st.booleans(),
    ),
    max_size=3,
)  # fmt: skip


@given(
    actions=st.sampled_from(get_args(Actions)), levers=st.sampled_from([OPD, STABLEOPD]),
    story=st.lists(st.tuples(alarms_of_a_step, st.booleans()), min_size=1, max_size=60), pause=st.integers(0, 60),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_whatever_happens_bounds_and_limits_hold_and_a_stored_state_goes_on_alike(actions, levers, story, pause):
    options = ControllerSettings(actions=actions, cooldown_steps=3, calm_steps=4, max_rollbacks=2)
    it, again = HealthController(options, levers), HealthController(options, levers)
    acted = {"raise": [], "rollback": []}
    for step, (alarms, saves) in enumerate(story, start=1):
        if step == pause:
            again.load_state_dict(json.loads(json.dumps(it.state_dict())))
        found, said = it.decide(step, alarms)
        if step >= pause:
            assert again.decide(step, alarms) == (found, said)
            again.saved(step, [] if saves else [alarm()])
        it.saved(step, [] if saves else [alarm()])
        assert levers.gold_coef <= found.gold_coef <= max(levers.gold_coef, options.max_gold_coef)
        assert levers.reference_coef <= found.reference_coef <= max(levers.reference_coef, options.max_reference_coef)
        for alert in said:
            assert alert.action in get_args(Action)
            acted.setdefault(alert.action, []).append(step)
        assert found.rollback_to is None or found.rollback_to < step
        if found.stop:
            return
    rollbacks, raises = acted["rollback"], acted["raise"]
    assert len(rollbacks) <= options.max_rollbacks
    assert all(later - earlier >= options.cooldown_steps for earlier, later in pairwise(rollbacks))
    # In one cooldown: a raise, one more when it turns critical, one more with a rollback.
    assert all(len([s for s in raises if 0 <= s - first < options.cooldown_steps]) <= 3 for first in raises)
