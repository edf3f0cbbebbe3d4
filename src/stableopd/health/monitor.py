"""Watches a run's rollouts and raises alerts: once when a signal gets bad, again only when it gets worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from numpy.typing import ArrayLike

from stableopd.errors import ConfigError
from stableopd.health import signals
from stableopd.health.history import MAX_LENGTH, MEAN_LENGTH, TRUNCATION, History
from stableopd.health.rules import Reading, read_all
from stableopd.types import Alert, HealthReport, Severity

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
STATE_VERSION = 1

_AT_LEAST = {
    "max_expected_length": 1,
    "tail_chars": 1,
    "loop_max_period": 1,
    "loop_min_repeats": 2,
    "loop_min_tokens": 0,
    "ngram": 1,
    "baseline_steps": 0,
    "window": 1,
    "patience": 1,
    "cooldown_steps": 0,
}
_OF_ALERT = ("rule", "signal", "severity", "since", "value", "threshold", "cause")
_OF_BUDGET = frozenset({MAX_LENGTH, MEAN_LENGTH, TRUNCATION})
_PAIRS = (
    ("repetition_warning", "repetition_critical"),
    ("loop_warning", "loop_critical"),
    ("length_growth_warning", "length_growth_critical"),
    ("truncation_rise_warning", "truncation_rise_critical"),
    ("accuracy_drop_warning", "accuracy_drop_critical"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorSettings:
    """Thresholds of the monitor. The defaults suit language models on 64 or more rollouts a step.

    Rates are compared as means over `window` steps, so small batches want a longer window. For short
    texts lower `tail_chars` and `compression_threshold`; to judge one batch without a history set
    `baseline_steps=0, patience=1`.
    Raises: an impossible value -> ConfigError.
    """

    max_expected_length: int | None = None
    """Tokens. A longer completion is a warning, a longer mean is critical. None: no such rule."""

    tail_chars: int = signals.TAIL_CHARS
    compression_threshold: float = signals.COMPRESSION_THRESHOLD
    loop_max_period: int = signals.MAX_PERIOD
    loop_min_repeats: int = signals.MIN_REPEATS
    loop_min_tokens: int = signals.MIN_LOOP_TOKENS
    ngram: int = signals.NGRAM

    truncated_warning: float = 0.5
    """A truncated share that warns even when the run began with it. It is never critical by itself."""
    truncation_rise_warning: float = 0.10
    truncation_rise_critical: float = 0.25
    """Rise of the truncated share over the run's baseline; half of what is left to 1 if that is less."""
    repetition_warning: float = 0.05
    repetition_critical: float = 0.20
    """Share of repetitive completions; critical counts from the baseline."""
    loop_warning: float = 0.05
    loop_critical: float = 0.20
    """Share of tokens in loops; critical counts from the baseline."""
    length_growth_warning: float = 1.5
    length_growth_critical: float = 2.0
    """Mean length as a multiple of the baseline."""
    stop_probe_drop_warning: float = 0.3
    """Fall of `health/stop_probe`, relative to its baseline."""
    ending_slack: float = 0.08
    ending_drift_warning: float = 0.1
    """Fall of `health/ending_probe` below its baseline, relative to it, beyond the slack, summed over steps (CUSUM)."""
    length_slack: float = 0.2
    length_drift_warning: float = 0.5
    """Growth of the mean length, likewise."""
    accuracy_drop_warning: float = 0.10
    accuracy_drop_critical: float = 0.15
    """Fall of held-out accuracy below its best; critical only with more than half of the answers truncated."""

    baseline_steps: int = 5
    """The run's first steps, which later ones are compared with. 0: none, levels count from zero."""
    window: int = 5
    patience: int = 2
    """Steps in a row that a signal has to be beyond a level, or back from it, before that counts."""
    cooldown_steps: int = 20
    """Steps after the end of an alert in which the same rule does not raise the same level again."""
    release_fraction: float = 0.5
    """An alert ends when the signal has come back to this share of the way from good to warning."""

    @property
    def of_signals(self) -> dict[str, Any]:
        """The settings that `measure_rollouts` takes, by its own names."""
        return {
            "tail_chars": self.tail_chars,
            "compression_threshold": self.compression_threshold,
            "max_period": self.loop_max_period,
            "min_repeats": self.loop_min_repeats,
            "min_loop_tokens": self.loop_min_tokens,
            "ngram": self.ngram,
        }

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None or name != "max_expected_length":
                object.__setattr__(self, name, _whole(name, value, least))
        for spec in fields(self):
            if spec.name not in _AT_LEAST and not getattr(self, spec.name) > 0:
                raise ConfigError(f"{spec.name} must be greater than 0, got {getattr(self, spec.name)!r}.")
        for low, high in _PAIRS:
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(f"{low} ({getattr(self, low)}) must not exceed {high} ({getattr(self, high)}).")
        if self.length_growth_warning <= 1:
            raise ConfigError(f"length_growth_warning must exceed 1 (no growth), got {self.length_growth_warning}.")
        if self.release_fraction > 1:
            raise ConfigError(f"release_fraction must be at most 1, got {self.release_fraction}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """A rule whose signal is beyond a level, or was and has not come back far enough."""

    rule: str
    signal: str
    severity: Severity
    since: int
    """First step of the stretch beyond the warning level."""
    value: float
    """When it was last measured."""
    threshold: float
    """The level that was crossed."""
    cause: str
    """See `Alert.cause`."""
    easing: bool
    """The value is back on the good side of the warning level, but not far enough for the alarm to be over."""
    measured_at: int
    """Step at which it was last measured."""


@dataclass(kw_only=True, slots=True)
class _Latch:
    """Hysteresis of one rule on one signal. Levels: 0 fine, 1 warning, 2 critical."""

    level: int = 0
    streak: list[int] = field(default_factory=lambda: [0, 0, 0])
    """By level: steps in a row at that level or above."""
    since: list[int] = field(default_factory=lambda: [0, 0, 0])
    fine_at: int | None = None
    """Last step at which the signal was on the good side of the warning level."""
    calm: int = 0
    muted_level: int = 0
    muted_until: int = 0
    muted: bool = False
    """The level that is on was not announced, as it came back too soon after the last time."""
    alarm: dict[str, Any] | None = None
    """Of the level that is on; see `Alarm`."""

    def advance(self, step: int, reading: Reading, cooldown_steps: int) -> int:
        """Take in a reading; the level that is newly reached, or 0."""
        for level in (1, 2):
            if reading.level < level:
                self.streak[level] = 0
                continue
            self.since[level] = self.since[level] if self.streak[level] else step
            self.streak[level] += 1
        if not reading.level:
            self.fine_at = step
        self.calm = self.calm + 1 if reading.calm else 0
        if self.level and self.calm >= reading.patience:
            if not self.muted:
                self.muted_level, self.muted_until = self.level, step + cooldown_steps
            self.level, self.alarm = 0, None
        if self.alarm:
            now = {"value": reading.value, "cause": reading.cause.name, "easing": reading.level == 0}
            self.alarm.update(now, measured_at=step)
        reached = max(lvl for lvl in (0, 1, 2) if lvl == 0 or self.streak[lvl] >= reading.patience_of(lvl))
        if reached <= self.level:
            return 0
        self.level = reached
        self.muted = reached <= self.muted_level and step < self.muted_until
        return reached


class HealthMonitor:
    """Turns the rollouts of each step into a `HealthReport` with figures and alerts.

    Rules: `length_over_expected`, `length_growth`, `length_drift`, `truncation`, `repetition`, `loops`, `stop_probe`,
    `ending_probe`, `skipped_updates`, `reward_failures`, `eval_accuracy`, `eval_truncation`. A rule raises an alert on
    entering the warning or critical level, and again only on escalation, or after it has come back below its release
    level and cooled down.
    A signal that a step lacks leaves its rule as it was. Needs no torch and nothing of the trainer.
    """

    def __init__(self, settings: MonitorSettings | None = None) -> None:
        self.settings = settings or MonitorSettings()
        self._history = History(self.settings)
        self._latches: dict[str, _Latch] = {}

    def observe(
        self,
        step: int,
        *,
        lengths: Sequence[int],
        finish_reasons: Sequence[str],
        texts: Sequence[str] | None = None,
        token_ids: Sequence[ArrayLike] | None = None,
        advantages: Sequence[ArrayLike] | None = None,
        accuracy: float | None = None,
        other_budget: bool = False,
    ) -> HealthReport:
        """Health of one step's rollouts: the figures of `measure_rollouts` and the alerts that they raise.

        With `other_budget` lengths and truncation are measured and not judged: they compare with no other step's.

        Args: one entry per rollout: length in tokens with the end token, finish reason, text, token ids [T],
        advantages [T] (nats); accuracy is the share of these rollouts that are right.
        """
        metrics = signals.measure_rollouts(
            lengths=lengths,
            finish_reasons=finish_reasons,
            texts=texts,
            token_ids=token_ids,
            advantages=advantages,
            accuracy=accuracy,
            **self.settings.of_signals,
        )
        judged = {key: value for key, value in metrics.items() if not (other_budget and key in _OF_BUDGET)}
        return HealthReport(step=step, metrics=metrics, alerts=self.judge(step, judged))

    def advantage_figures(self, token_ids: Sequence[ArrayLike], advantages: Sequence[ArrayLike]) -> dict[str, float]:
        """The figures of `observe` that need advantages, for those that become known after it; no alerts.

        Args: one [T] array per rollout each.
        """
        settings = self.settings
        return signals.advantage_figures(
            token_ids,
            advantages,
            max_period=settings.loop_max_period,
            min_repeats=settings.loop_min_repeats,
            min_loop_tokens=settings.loop_min_tokens,
            ngram=settings.ngram,
        )

    def observe_eval(self, step: int, metrics: Mapping[str, float]) -> tuple[Alert, ...]:
        """Alerts from held-out figures (`eval/NAME/accuracy`, `eval/NAME_greedy/truncation_rate`, ...).

        Keys of other areas are ignored, so a whole row of metrics may be handed over.
        Length that grows while every held-out accuracy grows, without loops or truncation, is no alarm.
        """
        return self.judge(step, {key: value for key, value in metrics.items() if key.startswith("eval/")})

    def judge(self, step: int, metrics: Mapping[str, float]) -> tuple[Alert, ...]:
        """Alerts that the metrics of one step raise, given all that came before; changes the monitor's state.

        For trainers that measure by themselves: keys as in `measure_rollouts`, held-out figures,
        `health/stop_probe`. Unknown keys and values that are not finite numbers are ignored.
        """
        self._history.push(metrics)
        alerts = []
        for rule, reading in read_all(metrics, self._history):
            latch = self._latches.setdefault(f"{rule} {reading.signal}", _Latch())
            level = latch.advance(step, reading, self.settings.cooldown_steps)
            if level:
                alert = _alert(rule, level, step, latch.since[level], reading)
                latch.alarm = {name: getattr(alert, name) for name in _OF_ALERT}
                # Of a figure that is not measured at every step, the trouble began after it was last fine.
                since = latch.since[1] if latch.fine_at is None else latch.fine_at + 1
                latch.alarm |= {"since": since, "easing": False, "measured_at": step}
                if not latch.muted:
                    alerts.append(alert)
        return tuple(alerts)

    @property
    def derived(self) -> dict[str, float]:
        """What the drift rules look at, by metric key: worth logging beside what was measured."""
        return self._history.derived()

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """The levels that are on: alerts that are not over, and such as came back too soon to be announced again."""
        return tuple(Alarm(**latch.alarm) for latch in self._latches.values() if latch.alarm)

    def state_dict(self) -> dict[str, Any]:
        """Everything the monitor remembers, as JSON values. A monitor that loads it goes on exactly alike."""
        latches = {name: asdict(latch) for name, latch in self._latches.items()}
        return {"version": STATE_VERSION, "history": self._history.to_json(), "latches": latches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; an empty one resets. Raises: another format -> ValueError."""
        if state and state.get("version") != STATE_VERSION:
            raise ValueError(f"monitor state has version {state.get('version')!r}, this package reads {STATE_VERSION}.")
        self._history.load_json(state["history"] if state else {"series": {}, "evals": {}})
        latches = deepcopy(state["latches"]) if state else {}
        self._latches = {name: _Latch(**latch) for name, latch in latches.items()}


def _alert(rule: str, level: int, step: int, since: int, reading: Reading) -> Alert:
    severity = SEVERITIES[level]
    threshold = reading.critical if level == 2 else reading.warning
    side = "below" if reading.falling else "above"
    return Alert(
        rule=rule,
        severity=severity,
        signal=reading.signal,
        value=float(reading.value),
        threshold=float(threshold),
        step=step,
        since=since,
        cause=reading.cause.name,
        message=f"{reading.seen}: {side} the {severity} level of {threshold:.4g} since step {since}. "
        f"{reading.cause.advice}",
    )


def _whole(name: str, value: Any, least: int) -> int:
    # Configuration files may hand over 5.0 for 5.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)
