"""Health of runs of TRL's trainers: alerts from what they log, and from every completion where they show them.

Needs transformers for the callback, and nothing of our trainer; TRL itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stableopd.errors import ConfigError, MissingDependencyError
from stableopd.health.history import is_number
from stableopd.health.monitor import SEVERITIES, HealthMonitor, MonitorSettings
from stableopd.health.signals import length_stats, measure_rollouts
from stableopd.integrations.journal import Journal, announce, logger
from stableopd.types import Alert, FinishReason, Severity

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise MissingDependencyError.of("transformers", "stableopd.integrations.trl", "trl") from error

STATE_KEY = "stableopd_health"
"""Where the monitor's state lies within `stateful_callbacks` of a checkpoint's trainer_state.json."""
OWN_AREAS = ("completions/", "health/")
HELD_OUT = "eval/held_out"
WRITTEN_BY_THE_MODEL = ("reasoning_content", "thinking", "content")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Some of a step's rollouts, measured: those of one call on one process."""

    lengths: list[int]
    finish_reasons: list[FinishReason]
    figures: dict[str, float]
    """The `health/*` figures of these rollouts."""


class HealthReward:
    """A reward function for TRL's `GRPOTrainer`: 0 for every completion, which it measures in passing.

    Take that of a `HealthCallback` (its `reward`), which judges what this sees. By itself it only adds the figures
    `health/*` to TRL's logs: the mean over processes and over the steps of a log line.

    Args: `end_token_ids` as in TRL: a completion whose last token is none of them is truncated. Where they are not
    known, one of `max_completion_length` tokens is. A callback fills in both from the trainer.
    """

    def __init__(
        self,
        settings: MonitorSettings | None = None,
        *,
        end_token_ids: Iterable[int] | None = None,
        max_completion_length: int | None = None,
    ) -> None:
        self.__name__ = "health"  # TRL logs its mean as rewards/health/mean
        self.settings = settings or MonitorSettings()
        self.end_token_ids = None if end_token_ids is None else frozenset(end_token_ids)
        self.max_completion_length = max_completion_length
        self.keeps_parts = False
        """Whether what comes now belongs to a training step that a callback will judge; evaluation does not."""
        self._parts: list[_Part] = []

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        """Zeros, one per completion (text or messages). TRL calls this once per generation, with its ids.

        Raises: no ids, or nothing known of how completions end -> ConfigError.
        """
        if completion_ids is None:
            raise ConfigError("HealthReward needs completion_ids, which this trainer does not pass: update trl.")
        part = self._measure([_text(completion) for completion in completions], completion_ids)
        if self.keeps_parts:
            self._parts.append(part)
        if log_metric is not None:
            for key, value in part.figures.items():
                log_metric(key, value)
        return [0.0] * len(completions)

    def take_parts(self) -> list[_Part]:
        """What has been kept since the last time."""
        parts, self._parts = self._parts, []
        return parts

    def _measure(self, texts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> _Part:
        lengths = [len(ids) for ids in completion_ids]
        reasons: list[FinishReason] = ["stop" if self._ended(ids) else "length" for ids in completion_ids]
        figures = measure_rollouts(
            lengths=lengths,
            finish_reasons=reasons,
            texts=texts,
            token_ids=completion_ids,
            **self.settings.of_signals,
        )
        health = {key: value for key, value in figures.items() if key.startswith("health/")}
        return _Part(lengths=lengths, finish_reasons=reasons, figures=health)

    def _ended(self, ids: Sequence[int]) -> bool:
        if self.end_token_ids is not None:
            return bool(len(ids)) and int(ids[-1]) in self.end_token_ids
        if self.max_completion_length is not None:
            return len(ids) < self.max_completion_length
        raise ConfigError(
            "HealthReward cannot tell truncated completions from finished ones: give it end_token_ids or "
            "max_completion_length, or take the reward of a HealthCallback that is among the trainer's callbacks."
        )


class HealthCallback(TrainerCallback):
    """Judges a run of a TRL trainer as it goes: alerts, and on request a save or a stop.

    What it sees: without more, the `completions/*` that TRL logs, which tell length and truncation; once per log line,
    so set `logging_steps=1`. With `reward` among the reward functions of a `GRPOTrainer`, every completion of every
    step, loops and repetition included; what is logged is then not judged a second time.

    An alert is said once through logging, kept in `alerts`, and counted in the logs (`health/alerts`,
    `health/severity`: 0 none, 1 warning, 2 critical; since the last line). Trackers of `report_to` are called before
    a trainer's `callbacks` and miss these two, unless the callback is added by `attach` instead.

    With several processes each measures its own completions, and all judge the figures of all of them, so that they
    come to the same end; the first process writes and speaks.

    The monitor's state goes into the trainer_state.json of each checkpoint and is taken up again on resume.

    Args:
        settings: thresholds, for short texts or small batches.
        save_on, stop_on: the least severity ("warning", "critical") of an alert on which a checkpoint is asked for and
            training ends after the step. None: never. A save is a checkpoint like any other: with a small
            `save_total_limit` it can push out a healthy one.
        train_accuracy: key of TRL's training logs that holds the share of right completions, such as
            "rewards/accuracy_reward/mean"; so that growth in length which comes with accuracy is no alarm.
        eval_accuracy: key of its evaluation logs with held-out accuracy, such as "eval_rewards/accuracy_reward/mean".
        files: whether to write metrics.jsonl and alerts.jsonl into `output_dir`; `stableopd report` reads them there.

    Raises: an unknown severity -> ConfigError.
    """

    def __init__(
        self,
        settings: MonitorSettings | None = None,
        *,
        save_on: Severity | None = None,
        stop_on: Severity | None = None,
        train_accuracy: str | None = None,
        eval_accuracy: str | None = None,
        files: bool = True,
    ) -> None:
        for name, level in (("save_on", save_on), ("stop_on", stop_on)):
            if level is not None and level not in SEVERITIES:
                raise ConfigError(f"{name} must be one of {', '.join(SEVERITIES)} or None, got {level!r}.")
        self.monitor = HealthMonitor(settings)
        self.reward = HealthReward(self.monitor.settings)
        self.alerts: list[Alert] = []
        """Every alert of this run, since the process began."""
        self._save_on, self._stop_on = save_on, stop_on
        self._train_accuracy, self._eval_accuracy = train_accuracy, eval_accuracy
        self._files = files
        self._journal: Journal | None = None
        self._begun = False
        self._sees_rollouts = False
        self._unlogged: list[Alert] = []
        self._measured: dict[str, float] = {}
        """Figures of this step's rollouts, until the step is logged."""

    def attach(self, trainer: Any) -> HealthCallback:
        """Add this to a trainer's callbacks, before all others, so that trackers see its figures. Returns itself."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    # -------------------------------------------------------------------------------- events of the trainer

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        self._begun, self._sees_rollouts = True, False
        self.alerts, self._unlogged, self._measured = [], [], {}
        self.reward.take_parts()
        if self.reward.end_token_ids is None:
            self.reward.end_token_ids = _end_token_ids(model, processing_class)
        if self.reward.max_completion_length is None:
            self.reward.max_completion_length = getattr(args, "max_completion_length", None)
        self._restore(state)
        if self._files and state.is_world_process_zero:
            self._journal = Journal(Path(args.output_dir))
            if state.global_step:
                self._journal.go_on_after(state.global_step)
            else:
                self._journal.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reward.keeps_parts = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reward.keeps_parts = False
        parts = self.reward.take_parts()
        self._sees_rollouts = self._sees_rollouts or bool(parts)
        if not self._sees_rollouts:
            return
        self._measured = _combine(_of_all_processes(parts, args.world_size))
        if self._measured:  # a generation may serve several steps: the others have no rollouts of their own
            self._judge(self._measured, state, control)
            self._note(state, self._measured)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not (self._begun and logs):
            return
        figures = self._figures_of_logs(logs)
        if figures:
            self._judge(figures, state, control)
        worst = max((SEVERITIES.index(alert.severity) for alert in self._unlogged), default=0)
        own = {"health/alerts": float(len(self._unlogged)), "health/severity": float(worst)}
        self._unlogged = []
        logs |= own
        state.log_history[-1] |= own  # the trainer has put a copy of the logs there already
        # TRL's are means over processes and over the steps since its last line.
        self._note(state, {**logs, **self._measured, **figures})
        self._measured = {}

    # -------------------------------------------------------------------------------- what they have in common

    def _figures_of_logs(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """What there is to judge in a line of the trainer's logs, under our keys."""
        figures: dict[str, Any] = {}
        if any(key.startswith("eval_") for key in logs):
            if self._eval_accuracy is not None and self._eval_accuracy in logs:
                figures[f"{HELD_OUT}/accuracy"] = logs[self._eval_accuracy]
                figures[f"{HELD_OUT}/truncation_rate"] = logs.get("eval_completions/clipped_ratio")
        else:
            if not self._sees_rollouts:
                figures |= {key: value for key, value in logs.items() if key.startswith(OWN_AREAS)}
            if self._train_accuracy is not None and self._train_accuracy in logs:
                figures["completions/accuracy"] = logs[self._train_accuracy]
        return {key: float(value) for key, value in figures.items() if is_number(value)}

    def _judge(self, figures: Mapping[str, float], state: Any, control: Any) -> None:
        """Raise the alerts of some figures, and act on them."""
        alerts = [self._acted_on(alert, control) for alert in self.monitor.judge(state.global_step, figures)]
        self.alerts += alerts
        self._unlogged += alerts
        if state.is_world_process_zero:
            announce(alerts)
        if self._journal is not None:
            self._journal.note_alerts(alerts)
        # Not as an `ExportableState`: restoring one replaces the callback by a new one, which knows no reward function.
        state.stateful_callbacks[STATE_KEY] = {"attributes": {"monitor": self.monitor.state_dict()}}

    def _acted_on(self, alert: Alert, control: Any) -> Alert:
        action = alert.action
        if _reaches(alert, self._save_on):
            control.should_save, action = True, "save"
        if _reaches(alert, self._stop_on):
            control.should_training_stop, action = True, "stop"
        return replace(alert, action=action)

    def _note(self, state: Any, figures: Mapping[str, Any]) -> None:
        if self._journal is not None:
            self._journal.note(state.global_step, figures)

    def _restore(self, state: Any) -> None:
        """Take up the state of the checkpoint that the trainer resumes from; without one begin anew."""
        saved = (state.stateful_callbacks or {}).get(STATE_KEY)
        self.monitor.load_state_dict({})
        if not state.global_step:
            return
        try:
            if saved is None:
                raise ValueError("the checkpoint holds no health state")
            self.monitor.load_state_dict(saved["attributes"]["monitor"])
        except ValueError as error:
            logger.warning("health: %s: what comes now is compared with step %d on.", error, state.global_step + 1)


# ------------------------------------------------------------------------------------ helpers


def _reaches(alert: Alert, level: Severity | None) -> bool:
    return level is not None and SEVERITIES.index(alert.severity) >= SEVERITIES.index(level)


def _text(completion: Any) -> str:
    """What the model wrote: the text, or of messages those of the assistant."""
    if isinstance(completion, str):
        return completion
    messages = [message for message in completion if message.get("role", "assistant") == "assistant"]
    return "\n".join(text for message in messages for text in _texts(message))


def _texts(message: Mapping[str, Any]) -> Iterable[str]:
    for key in WRITTEN_BY_THE_MODEL:
        content = message.get(key)
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (str(block["text"]) for block in content if isinstance(block, Mapping) and "text" in block)


def _end_token_ids(model: Any, processing_class: Any) -> frozenset[int] | None:
    """The ids at which TRL takes a completion for finished: those of the model, those of the tokenizer, padding."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(ends) if isinstance(ends, Collection) else [ends]
    ids += [getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")]
    return frozenset(token for token in ids if token is not None) or None


def _of_all_processes(parts: list[_Part], world_size: int) -> list[_Part]:
    if world_size == 1:
        return parts
    from accelerate.utils import gather_object

    gathered: list[_Part] = gather_object(parts)
    return gathered


def _combine(parts: Sequence[_Part]) -> dict[str, float]:
    """The figures of all rollouts together: the same as measured in one go."""
    figures = length_stats(
        [length for part in parts for length in part.lengths],
        [reason for part in parts for reason in part.finish_reasons],
    )
    for key in dict.fromkeys(key for part in parts for key in part.figures):
        having = [part for part in parts if key in part.figures]
        weights = [_weight(key, part) for part in having]
        figures[key] = sum(part.figures[key] * w for part, w in zip(having, weights, strict=True)) / sum(weights)
    return figures


def _weight(key: str, part: _Part) -> int:
    return sum(part.lengths) if key.endswith("_token_fraction") else len(part.lengths)
