"""What is done about an alarm: bounded, reversible, logged, and not too often. Needs no torch.

The controller decides; the trainer carries out. A decision depends on the alarms and on the controller's own state
alone, so that every process comes to the same one and a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from stableopd.health.causes import STABILISABLE
from stableopd.health.monitor import Alarm
from stableopd.health.rules import OF_LENGTH
from stableopd.types import Alert, Severity

Actions = Literal["off", "warn", "stabilise", "rollback", "stop"]
Action = Literal["raise", "lower", "drop_loops", "shorten", "rollback", "stop"]

FIRST_GOLD, FIRST_REFERENCE = 1.0, 0.1
"""What the first level puts in place of lower ones: λ of StableOPD, and a third of its β."""
RAISE_BY = 3.0
"""Each further level multiplies both coefficients by this."""
MAX_LEVEL = 3
CRITICAL_LEVEL = 2
"""Level that a critical alarm raises to at once."""
SEVERITY: Mapping[Action, Severity] = {"rollback": "warning", "stop": "critical"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSettings:
    """What the controller may do, and how often."""

    actions: Actions = "warn"
    max_gold_coef: float = 4.0
    max_reference_coef: float = 1.0
    cooldown_steps: int = 10
    """Steps between two raises, and between two rollbacks."""
    calm_steps: int = 20
    """Steps without an alarm after which the coefficients go down one level."""
    max_rollbacks: int = 3
    """The next critical alarm after so many stops the run."""
    drop_loops: bool = False
    """While a level is in force, rollouts that loop do not count in the distillation loss."""
    shorten_budget: bool = False
    """While level 2 or 3 is in force, rollouts have half of their budget."""

    @property
    def may_stabilise(self) -> bool:
        return self.actions in ("stabilise", "rollback")


@dataclass(frozen=True, kw_only=True, slots=True)
class Levers:
    """What a run's configuration says, and what there is to move."""

    gold_coef: float
    reference_coef: float
    has_gold: bool
    """The data hold golden solutions."""
    has_reference: bool
    """The initial student is at hand."""
    max_completion_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """What holds for a step."""

    gold_coef: float
    reference_coef: float
    max_completion_length: int
    shortened: bool = False
    """The budget is not the configured one."""
    drop_loops: bool = False
    rollback_to: int | None = None
    """Go back to the checkpoint of this step in place of the update."""
    stop: bool = False
    """Save and end the run in place of the update."""


@dataclass(kw_only=True, slots=True)
class _State:
    level: int = 0
    floor: int = 0
    """Level that decay does not go below: StableOPD stays on once plain OPD has raised an alarm."""
    raised_at: int | None = None
    """Step of the last raise."""
    rolled_back_at: int | None = None
    calm_since: int = 0
    """Last step with an alarm, or at which the level went down."""
    num_rollbacks: int = 0
    healthy: list[int] = field(default_factory=list)
    """Steps of checkpoints that were saved without an alarm, the oldest first."""


class HealthController:
    """Turns alarms into `Controls` for the step and into alerts that say what was done.

    `off` and `warn` do nothing. `stop` ends the run on a critical alarm. `stabilise` raises the coefficients of gold
    and reference one level at an alarm and to the second at a critical one, again each `cooldown_steps` for as long
    as it lasts, and lets them down after `calm_steps` without one. `rollback` does the same, and on a critical alarm
    goes back to the newest checkpoint from before the trouble; when it has done so `max_rollbacks` times, it stops the
    run. Alarms whose cause more stabilisation cannot mend (an end token that never comes, a budget too small) raise
    nothing.
    """

    def __init__(self, settings: ControllerSettings, levers: Levers) -> None:
        self.settings = settings
        self.levers = levers
        self._state = _State()

    @property
    def level(self) -> int:
        """How far the coefficients are raised, 0 to 3."""
        return self._state.level

    @property
    def checkpoints_needed(self) -> tuple[int, ...]:
        """Steps of the checkpoints that a rollback may still go to; they must not be deleted."""
        return tuple(self._state.healthy) if self.settings.actions == "rollback" else ()

    def decide(self, step: int, alarms: Iterable[Alarm]) -> tuple[Controls, tuple[Alert, ...]]:
        """What to do at `step`, given all alarms that are on; and what is new about it, for the log."""
        alarms = list(alarms)
        critical = [alarm for alarm in alarms if alarm.severity == "critical"]
        if self.settings.actions == "stop" and critical:
            return self._stop(step, critical[0], "health.actions=stop")
        if not self.settings.may_stabilise:
            return self.controls(), ()
        mendable = self._mendable(alarms)
        if not mendable:
            return self._decay(step)
        self._state.calm_since = step
        # What was measured before the last raise says nothing of its effect.
        last = -1 if self._state.raised_at is None else self._state.raised_at
        mendable = [alarm for alarm in mendable if not alarm.easing and alarm.measured_at > last]
        if not mendable:
            return self.controls(), ()
        worst = max(mendable, key=lambda alarm: (alarm.severity == "critical", -alarm.since))
        critical_now = worst.severity == "critical"
        if self.settings.actions == "rollback" and critical_now and self._rested(step, self._state.rolled_back_at):
            if self._state.num_rollbacks >= self.settings.max_rollbacks:
                return self._stop(step, worst, f"{self._state.num_rollbacks} rollbacks have not helped")
            target = self._newest_healthy(min(alarm.since for alarm in mendable))
            if target is not None:
                return self._roll_back(step, worst, target)
            return self._raise(step, worst, "there is no healthy checkpoint from before it to go back to")
        if self._rested(step, self._state.raised_at) or (critical_now and self._state.level < CRITICAL_LEVEL):
            return self._raise(step, worst)
        return self.controls(), ()

    def controls(self) -> Controls:
        """What holds now."""
        level, levers, settings, shortened = self._state.level, self.levers, self.settings, self._shortened
        return Controls(
            gold_coef=self._coef(levers.gold_coef, FIRST_GOLD, settings.max_gold_coef, levers.has_gold),
            reference_coef=self._coef(
                levers.reference_coef, FIRST_REFERENCE, settings.max_reference_coef, levers.has_reference
            ),
            max_completion_length=max(1, levers.max_completion_length // 2)
            if shortened
            else levers.max_completion_length,
            shortened=shortened,
            drop_loops=settings.drop_loops and level >= 1,
        )

    def metrics(self) -> dict[str, float]:
        """`controller/level`, and the coefficients in force."""
        if self.settings.actions in ("off", "warn"):
            return {}
        controls = self.controls()
        return {
            "controller/level": float(self._state.level),
            "controller/gold_coef": controls.gold_coef,
            "controller/reference_coef": controls.reference_coef,
        }

    def saved(self, step: int, alarms: Iterable[Alarm], keep: int = 3) -> None:
        """A checkpoint was written at `step`, with these alarms on: healthy if none of them is length inflation."""
        again = step == self._state.rolled_back_at  # a copy of what was gone back to
        if not self._mendable(alarms) and not again:
            self._state.healthy = [*(s for s in self._state.healthy if s < step), step][-keep:]

    def lost_all_but(self, steps: Collection[int]) -> None:
        """Only checkpoints of these steps are still there."""
        self._state.healthy = [step for step in self._state.healthy if step in steps]

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; an empty one resets."""
        self._state = _State(**{**state, "healthy": [*state["healthy"]]}) if state else _State()

    # ------------------------------------------------------------------ actions

    def _mendable(self, alarms: Iterable[Alarm]) -> list[Alarm]:
        """Alarms that stabilisation helps against. Rollouts that were cut short by us tell nothing of length."""
        shortened = self._shortened
        return [a for a in alarms if a.cause in STABILISABLE and not (shortened and a.rule in OF_LENGTH)]

    @property
    def _shortened(self) -> bool:
        return self.settings.shorten_budget and self._state.level >= CRITICAL_LEVEL

    def _raise(self, step: int, alarm: Alarm, note: str = "") -> tuple[Controls, tuple[Alert, ...]]:
        state, before, level = self._state, self.controls(), self._state.level
        state.level = min(MAX_LEVEL, max(state.level + 1, CRITICAL_LEVEL if alarm.severity == "critical" else 1))
        if self.levers.gold_coef == 0 or self.levers.reference_coef == 0:
            state.floor = 1
        state.raised_at = step
        if state.level == level:  # nothing is left to raise, which was said when it was reached
            return self.controls(), ()
        why = f"after {_named(alarm)}" + (f"; {note}" if note else "")
        return self.controls(), self._log(step, before, alarm, "raise", why)

    def _roll_back(self, step: int, alarm: Alarm, target: int) -> tuple[Controls, tuple[Alert, ...]]:
        """Stronger stabilisation too: the same steps from the same weights would end the same way.

        Should the trouble come back before another checkpoint is saved, the next rollback goes further back.
        """
        _, said = self._raise(step, alarm)
        self._state.num_rollbacks += 1
        self._state.rolled_back_at = step
        self._state.healthy = [saved for saved in self._state.healthy if saved < target]
        text = (
            f"Went back to the weights and the optimizer of step {target} after {_named(alarm)} "
            f"({self._state.num_rollbacks} of at most {self.settings.max_rollbacks} rollbacks). Steps go on counting"
        )
        done = self._alert(step, alarm, "rollback", text)
        return replace(self.controls(), rollback_to=target), (done, *said)

    def _stop(self, step: int, alarm: Alarm, why: str) -> tuple[Controls, tuple[Alert, ...]]:
        text = f"Saved and stopped the run at step {step} after {_named(alarm)}: {why}"
        return replace(self.controls(), stop=True), (self._alert(step, alarm, "stop", text),)

    def _decay(self, step: int) -> tuple[Controls, tuple[Alert, ...]]:
        state = self._state
        if state.level <= state.floor or step - state.calm_since < self.settings.calm_steps:
            return self.controls(), ()
        before = self.controls()
        state.level -= 1
        state.calm_since = step
        return self.controls(), self._log(step, before, None, "lower", f"after {self.settings.calm_steps} calm steps")

    def _rested(self, step: int, last: int | None) -> bool:
        return last is None or step - last >= self.settings.cooldown_steps

    def _newest_healthy(self, since: int) -> int | None:
        """The newest checkpoint from before the trouble, which began earlier than it was noticed."""
        before = [step for step in self._state.healthy if step < since]
        return before[-1] if before else None

    def _coef(self, configured: float, first: float, most: float, at_hand: bool) -> float:
        if not self._state.level or not at_hand:
            return configured
        raised: float = max(configured, first) * RAISE_BY ** (self._state.level - 1 + (configured >= first))
        return max(configured, min(raised, most))

    def _log(self, step: int, before: Controls, alarm: Alarm | None, action: Action, why: str) -> tuple[Alert, ...]:
        """One alert for each thing that is other than before."""
        now = self.controls()
        changes = [
            f"{name} from {was:g} to {is_now:g}"
            for name, was, is_now in (
                ("objective.gold.coef", before.gold_coef, now.gold_coef),
                ("objective.reference.coef", before.reference_coef, now.reference_coef),
            )
            if was != is_now
        ]
        verb = "Raised" if action == "raise" else "Lowered"
        text = (
            f"{verb} {' and '.join(changes)} {why}"
            if changes
            else f"There is nothing to raise, neither gold nor reference being at hand, {why}"
        )
        said = [self._alert(step, alarm, action, text)] if changes or action == "raise" else []
        if now.drop_loops and not before.drop_loops:
            said.append(
                self._alert(step, alarm, "drop_loops", f"Looping rollouts are left out of the distillation loss {why}")
            )
        if before.drop_loops and not now.drop_loops:
            said.append(
                self._alert(step, alarm, "lower", f"Looping rollouts count in the distillation loss again {why}")
            )
        if now.max_completion_length < before.max_completion_length:
            text = f"Rollouts end after {now.max_completion_length} tokens, half of their budget, {why}"
            said.append(self._alert(step, alarm, "shorten", text))
        if now.max_completion_length > before.max_completion_length:
            text = f"Rollouts have their budget of {now.max_completion_length} tokens again {why}"
            said.append(self._alert(step, alarm, "lower", text))
        return tuple(said)

    def _alert(self, step: int, alarm: Alarm | None, action: Action, text: str) -> Alert:
        return Alert(
            rule="controller",
            severity=SEVERITY.get(action, "info"),
            signal=alarm.signal if alarm else "controller/level",
            value=alarm.value if alarm else float(self._state.level),
            threshold=alarm.threshold if alarm else float(self._state.floor),
            step=step,
            since=alarm.since if alarm else step,
            message=text + ".",
            cause=alarm.cause if alarm else "",
            action=action,
        )


def _named(alarm: Alarm) -> str:
    return f"a {alarm.severity} alarm of {alarm.rule} ({alarm.signal} {alarm.value:.3g}, since step {alarm.since})"
