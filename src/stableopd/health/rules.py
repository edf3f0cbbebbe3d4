"""What each alarm rule looks at, its levels, and the sentence that says what it means.

A rule turns the present metrics and the run's history into a `Reading`: a value, the levels it is
held against, and an explanation. Whether a reading becomes an alert is the monitor's affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stableopd.health.causes import (
    BUDGET,
    DRIFT,
    EARLY_LOOPS,
    END_TOKEN,
    FORGETTING,
    INFLATION,
    NO_TOKENS,
    NOT_FINITE,
    REWARD_FUNCTION,
    UNLEARNS_STOPPING,
    UNMEASURED,
    Cause,
)
from stableopd.health.history import (
    ACCURACY,
    ENDING_DRIFT,
    ENDING_PROBE,
    FAILED_REWARDS,
    LENGTH_DRIFT,
    LOOPS,
    MAX_LENGTH,
    MEAN_LENGTH,
    NEAR_LOOPS,
    REPETITION,
    SKIPPED,
    SKIPPED_WITHOUT_TOKENS,
    STOP_PROBE,
    TRUNCATION,
    History,
    is_number,
)

if TYPE_CHECKING:
    from stableopd.health.monitor import MonitorSettings

OF_LENGTH = frozenset({"length_over_expected", "length_growth", "length_drift", "truncation"})
"""Rules that compare lengths with a budget or with those of other steps."""

NEVER = math.inf
NEVER_STOPS = 0.95
EVAL_TRUNCATION_OF_COLLAPSE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One rule's look at one step."""

    signal: str
    value: float
    warning: float
    critical: float
    release: float
    """An alert is over once the value is on the good side of this."""
    seen: str
    """What was seen and what it is compared to, ready to be followed by the threshold."""
    cause: Cause
    patience: int
    patience_critical: int | None = None
    """Steps in a row for the critical level, where that takes more than `patience`."""
    falling: bool = False
    """Low is bad instead of high."""
    excused: bool = False
    """Beyond its level for a good reason: no alert, but no all-clear either."""

    @property
    def level(self) -> int:
        """0 fine, 1 warning, 2 critical."""
        if self.excused:
            return 0
        return 2 if self._beyond(self.critical) else int(self._beyond(self.warning))

    def patience_of(self, level: int) -> int:
        return self.patience_critical if level == 2 and self.patience_critical else self.patience

    @property
    def calm(self) -> bool:
        return not self._beyond(self.release)

    def _beyond(self, limit: float) -> bool:
        return self.value < limit if self.falling else self.value > limit


def window_of(signal: str, settings: MonitorSettings) -> int:
    """Over how many measurements the rules average a signal before they look at it."""
    as_it_is = signal.startswith("eval/") or signal in (MAX_LENGTH, ENDING_DRIFT, LENGTH_DRIFT, SKIPPED, FAILED_REWARDS)
    return 1 if as_it_is else settings.window


def read_all(metrics: Mapping[str, float], history: History) -> Iterator[tuple[str, Reading]]:
    """(rule id, reading) for every rule whose signal is among this step's metrics."""
    rules = {
        "length_over_expected": (MAX_LENGTH, _length_over_expected),
        "length_growth": (MEAN_LENGTH, _length_growth),
        "length_drift": (MEAN_LENGTH, _length_drift),
        "truncation": (TRUNCATION, _truncation),
        "repetition": (REPETITION, _repetition),
        "loops": (LOOPS, _loops),
        "stop_probe": (STOP_PROBE, _stop_probe),
        "ending_probe": (ENDING_PROBE, _ending_probe),
        "skipped_updates": (SKIPPED, _skipped_updates),
        "reward_failures": (FAILED_REWARDS, _reward_failures),
    }
    for rule, (signal, read) in rules.items():
        if is_number(metrics.get(signal)):
            reading = read(metrics, history)
            if reading is not None:
                yield rule, reading
    for key in metrics:
        if key not in history.evals:
            continue
        if key.endswith("/accuracy"):
            yield "eval_accuracy", _eval_accuracy(key, history)
        elif key.endswith("/truncation_rate"):
            yield "eval_truncation", _eval_truncation(key, history)


# ------------------------------------------------------------------------------------ the rules


def _length_over_expected(metrics: Mapping[str, float], history: History) -> Reading | None:
    bound = history.settings.max_expected_length
    if bound is None:
        return None
    mean = metrics.get(MEAN_LENGTH, 0.0)
    return Reading(
        signal=MAX_LENGTH,
        value=metrics[MAX_LENGTH],
        warning=bound,
        critical=bound if mean > bound else NEVER,
        release=bound,
        seen=f"The longest completion has {metrics[MAX_LENGTH]:.0f} tokens (mean {mean:.0f})",
        cause=_cause(history),
        patience=1,
    )


def _length_growth(metrics: Mapping[str, float], history: History) -> Reading | None:
    settings, now, baseline = history.settings, history.now(MEAN_LENGTH), history.baseline(MEAN_LENGTH)
    if now is None or not baseline:
        return None
    warning = settings.length_growth_warning * baseline
    return Reading(
        signal=MEAN_LENGTH,
        value=now,
        warning=warning,
        critical=settings.length_growth_critical * baseline,
        release=_release(warning, baseline, settings),
        seen=f"Completions have {now:.1f} tokens on average ({_window(settings)}), {now / baseline:.2f} times the "
        f"{baseline:.1f} of the first {settings.baseline_steps} steps",
        cause=_cause(history),
        patience=settings.patience,
        excused=_grows_for_a_reason(history),
    )


def _length_drift(metrics: Mapping[str, float], history: History) -> Reading | None:
    """Sees a growth that has begun and lasts before it is as large as `length_growth` asks for."""
    settings = history.settings
    beyond = f"the excess beyond {settings.length_slack:.0%}"
    reading = _drift_reading(
        LENGTH_DRIFT, MEAN_LENGTH, "Completions have {:.1f} tokens on average", beyond, _cause(history), history
    )
    excused = _grows_for_a_reason(history) or _waits_for_evaluation(history)
    return replace(reading, excused=excused) if reading else None


def _drift_reading(signal: str, key: str, what: str, beyond: str, cause: Cause, history: History) -> Reading | None:
    settings, now, baseline = history.settings, history.now(key), history.baseline(key)
    if now is None or not baseline:
        return None
    drift, warning = history.drift(key), history.drift_warning(key)
    return Reading(
        signal=signal,
        value=drift,
        warning=warning,
        critical=NEVER,
        release=_release(warning, 0.0, settings),
        seen=f"{what.format(now)} ({_window(settings)}; {baseline:.3g} in the first {settings.baseline_steps} steps); "
        f"{beyond} of that adds up to {drift:.2f} over the steps",
        cause=cause,
        patience=1,
    )


def _truncation(metrics: Mapping[str, float], history: History) -> Reading | None:
    settings, now, baseline = history.settings, history.now(TRUNCATION), history.baseline(TRUNCATION)
    if now is None:
        return None
    warning, critical = settings.truncated_warning, NEVER
    if baseline is not None:
        # A pair may live with a high rate from the start: only a rise is critical, and one that fits below 1.
        warning = min(warning, baseline + settings.truncation_rise_warning)
        critical = baseline + min(settings.truncation_rise_critical, (1 - baseline) / 2)
    return Reading(
        signal=TRUNCATION,
        value=now,
        warning=warning,
        critical=critical,
        release=_release(warning, min(baseline or 0.0, warning), settings),
        seen=f"{now:.0%} of the completions run out of budget ({_window(settings)}; "
        f"{_since_start(baseline, settings)})",
        cause=_cause(history),
        patience=settings.patience,
    )


def _repetition(metrics: Mapping[str, float], history: History) -> Reading | None:
    settings = history.settings
    what = f"of the completions end in highly compressible text (over {settings.compression_threshold:g}x)"
    return _share_reading(REPETITION, what, settings.repetition_warning, settings.repetition_critical, history)


def _loops(metrics: Mapping[str, float], history: History) -> Reading | None:
    settings, what = history.settings, "of all tokens lie in exact loops"
    inside, outside = metrics.get("health/advantage_loop"), metrics.get("health/advantage_other")
    if inside is not None and outside is not None:
        what += f", with a mean advantage of {inside:+.3f} against {outside:+.3f} elsewhere"
    return _share_reading(LOOPS, what, settings.loop_warning, settings.loop_critical, history)


def _share_reading(signal: str, what: str, warning: float, critical: float, history: History) -> Reading | None:
    """A share that ought to be near 0: warns on its value, critical on its rise over the run's start."""
    settings, now, baseline = history.settings, history.now(signal), history.baseline(signal)
    if now is None:
        return None
    waits_for_baseline = baseline is None and settings.baseline_steps > 0
    return Reading(
        signal=signal,
        value=now,
        warning=warning,
        critical=NEVER if waits_for_baseline else _rise(baseline or 0.0, critical),
        release=_release(warning, 0.0, settings),
        seen=f"{now:.1%} {what} ({_window(settings)}; {_since_start(baseline, settings)})",
        cause=_cause(history),
        patience=settings.patience,
    )


def _stop_probe(metrics: Mapping[str, float], history: History) -> Reading | None:
    settings, now, baseline = history.settings, history.now(STOP_PROBE), history.baseline(STOP_PROBE)
    if now is None or not baseline:
        return None
    warning = (1 - settings.stop_probe_drop_warning) * baseline
    return Reading(
        signal=STOP_PROBE,
        value=now,
        warning=warning,
        critical=-NEVER,
        release=_release(warning, baseline, settings),
        seen=f"The student ends a finished gold answer with probability {now:.2f} ({_window(settings)}; "
        f"{baseline:.2f} in the first {settings.baseline_steps} steps)",
        cause=UNLEARNS_STOPPING,
        patience=settings.patience,
        falling=True,
    )


def _ending_probe(metrics: Mapping[str, float], history: History) -> Reading | None:
    """Its golden solutions are always the same, so that it hardly varies but for the drift: a CUSUM sees that early."""
    beyond = f"the shortfall beyond {history.settings.ending_slack:.0%}"
    what = "The student ends golden solutions as they end with probability {:.3f}"
    return _drift_reading(ENDING_DRIFT, ENDING_PROBE, what, beyond, UNLEARNS_STOPPING, history)


def _skipped_updates(metrics: Mapping[str, float], history: History) -> Reading:
    """Warns at once: an update that is not made is nothing that a window should smooth away."""
    skipped, without_tokens = metrics[SKIPPED], metrics.get(SKIPPED_WITHOUT_TOKENS, 0.0)
    empty = skipped > 0 and without_tokens >= skipped
    why = "no token counted in them" if empty else "their gradient was not finite"
    broken = [key for key, value in metrics.items() if key.startswith("loss/") and not is_number(value)]
    if broken and not empty:
        why += f", nor was {', '.join(broken)}"
    return Reading(
        signal=SKIPPED,
        value=skipped,
        warning=0.0,
        critical=0.0,
        release=0.0,
        seen=f"{skipped:.0%} of the step's updates were not made, since {why}",
        cause=NO_TOKENS if empty else NOT_FINITE,
        patience=1,
        patience_critical=max(2, history.settings.patience),
    )


def _reward_failures(metrics: Mapping[str, float], history: History) -> Reading:
    """Warns when half of a step's completions could not be judged, critical when hardly any could."""
    failed = metrics[FAILED_REWARDS]
    return Reading(
        signal=FAILED_REWARDS,
        value=failed,
        warning=0.5,
        critical=0.99,
        release=0.5,
        seen=f"The reward function failed on {failed:.0%} of the step's completions",
        cause=REWARD_FUNCTION,
        patience=1,
    )


def _eval_accuracy(key: str, history: History) -> Reading:
    settings, series, name = history.settings, history.evals[key], key.split("/")[1]
    truncation = history.eval_truncation(name)
    truncated = truncation is not None and truncation > EVAL_TRUNCATION_OF_COLLAPSE
    warning = series.best - settings.accuracy_drop_warning
    return Reading(
        signal=key,
        value=series.last,
        warning=warning,
        critical=series.best - settings.accuracy_drop_critical if truncated else -NEVER,
        release=_release(warning, series.best, settings),
        seen=f"Held-out accuracy on {name} is {series.last:.3f} after a best of {series.best:.3f}"
        + (f", with {truncation:.0%} truncated" if truncation is not None else ""),
        cause=INFLATION if truncated or _loops_seen(history) else FORGETTING,
        patience=1,
        falling=True,
    )


def _eval_truncation(key: str, history: History) -> Reading:
    settings, series, name = history.settings, history.evals[key], key.split("/")[1]
    warning = min(settings.truncated_warning, series.first + settings.truncation_rise_warning)
    return Reading(
        signal=key,
        value=series.last,
        warning=warning,
        critical=NEVER,
        release=_release(warning, min(series.first, warning), settings),
        seen=f"{series.last:.0%} of the held-out answers on {name} run out of budget ({series.first:.0%} at first)",
        cause=EARLY_LOOPS if _loops_seen(history) or history.repeats_more(name) else BUDGET,
        patience=1,
    )


# ------------------------------------------------------------------------------------ what it means


def _cause(history: History) -> Cause:
    """The likely cause, from the signals side by side."""
    settings = history.settings
    truncation = history.now(TRUNCATION) or 0.0
    started_at = history.baseline(TRUNCATION)
    if truncation > NEVER_STOPS and (started_at is None or started_at > NEVER_STOPS):
        return END_TOKEN
    if _loops_seen(history):
        return INFLATION
    risen = truncation > (started_at or 0.0) + settings.truncation_rise_warning
    cause = BUDGET if risen or truncation > settings.truncated_warning else DRIFT
    measured = history.now(LOOPS) is not None or history.now(REPETITION) is not None
    return cause if measured else cause._replace(remedy=cause.remedy + UNMEASURED)


def _loops_seen(history: History) -> bool:
    settings = history.settings
    loops, repetition = history.now(LOOPS) or 0.0, history.now(REPETITION) or 0.0
    # Tables and lists are near loops too, so that only a rise counts.
    near = (history.now(NEAR_LOOPS) or 0.0) - (history.baseline(NEAR_LOOPS) or 0.0)
    exact = loops > settings.loop_warning or repetition > settings.repetition_warning
    return exact or near > settings.loop_critical


def _grows_for_a_reason(history: History) -> bool:
    """Whether accuracy grows as well, with no sign of loops or truncation: longer reasoning, not inflation."""
    settings = history.settings
    held_out = [series for key, series in history.evals.items() if key.endswith("/accuracy")]
    cut_off = [series for key, series in history.evals.items() if key.endswith("/truncation_rate")]
    now, baseline = history.now(ACCURACY), history.baseline(ACCURACY)
    accuracy = [s.last > s.first and s.last > s.best - settings.accuracy_drop_warning / 2 for s in held_out]
    accuracy += [now > baseline] if now is not None and baseline is not None else []
    truncation_rise = (history.now(TRUNCATION) or 0.0) - (history.baseline(TRUNCATION) or 0.0)
    rises = [truncation_rise, *(series.last - series.first for series in cut_off)]
    truncates_more = any(rise > settings.truncation_rise_warning for rise in rises)
    return bool(accuracy) and all(accuracy) and not truncates_more and not _loops_seen(history)


def _waits_for_evaluation(history: History) -> bool:
    """Whether the next evaluation will be the first to tell if accuracy grows too."""
    return any(series.num == 1 for key, series in history.evals.items() if key.endswith("/accuracy"))


def _rise(baseline: float, rise: float) -> float:
    return baseline + min(rise, (1 - baseline) / 2)


def _release(warning: float, good: float, settings: MonitorSettings) -> float:
    return good + settings.release_fraction * (warning - good)


def _window(settings: MonitorSettings) -> str:
    return "this step" if settings.window == 1 else f"mean of the last {settings.window} steps"


def _since_start(baseline: float | None, settings: MonitorSettings) -> str:
    return "no baseline yet" if baseline is None else f"{baseline:.1%} in the first {settings.baseline_steps} steps"
