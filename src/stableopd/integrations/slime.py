"""Health of slime's rollouts, by the functions that slime lets one hook into its logging.

    --custom-rollout-log-function-path stableopd.integrations.slime.log_rollout_data
    --custom-eval-rollout-log-function-path stableopd.integrations.slime.log_eval_rollout_data

Needs numpy alone: samples are read by the fields of slime's `Sample`. For thresholds of your own make a `RolloutLog` in
a module of yours and name its methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stableopd.health.history import is_number
from stableopd.health.monitor import HealthMonitor, MonitorSettings
from stableopd.integrations.journal import Journal, announce
from stableopd.types import Alert, FinishReason

_FINISH_REASONS: Mapping[str, FinishReason] = {"completed": "stop", "truncated": "length"}
"""Of a sample's status; any other is a request that came to nothing."""


class RolloutLog:
    """Measures and judges what slime's rollout manager generates, one rollout batch after the other.

    Figures are added to slime's own metrics (`health/*`, `completions/*`) and so reach its trackers; alerts are said
    through logging and kept in `alerts`. With a folder (default: `stableopd` within slime's `--save`, if that is
    given) they are also written, as metrics.jsonl and alerts.jsonl; a run that is resumed picks up the rows before its
    first rollout from there, so that it is judged against its own beginning.
    """

    def __init__(self, settings: MonitorSettings | None = None, *, folder: str | Path | None = None) -> None:
        self.monitor = HealthMonitor(settings)
        self.alerts: list[Alert] = []
        self._folder = folder
        self._journal: Journal | None = None
        self._begun = False

    def log_rollout_data(
        self,
        rollout_id: int,
        args: Any,
        samples: Sequence[Any],
        rollout_extra_metrics: dict[str, Any] | None,
        rollout_time: float,
    ) -> bool:
        """What `--custom-rollout-log-function-path` names. Returns False: slime goes on with its own logging.

        `rollout_extra_metrics` takes the figures; where slime passes None there is no place for them but the folder.
        """
        self._begin(rollout_id, args)
        flat = list(_flat(samples))
        rewards = [_reward(sample, getattr(args, "reward_key", None)) for sample in flat]
        rows = [_model_tokens(sample) for sample in flat]
        report = self.monitor.observe(
            rollout_id,
            lengths=[len(ids) for ids in rows],
            finish_reasons=[_finish_reason(sample) for sample in flat],
            texts=[str(sample.response) for sample in flat],
            token_ids=rows,
            accuracy=_right_fraction(rewards),
        )
        self._keep(rollout_id, report.metrics, report.alerts, rollout_extra_metrics)
        return False

    def log_eval_rollout_data(
        self,
        rollout_id: int,
        args: Any,
        data: Mapping[str, Mapping[str, Any]],
        extra_metrics: dict[str, Any] | None = None,
    ) -> bool:
        """What `--custom-eval-rollout-log-function-path` names. Returns False, as above.

        `data` has, per held-out set, `rewards` and perhaps `truncated`. Rewards of 0 and 1 are taken for accuracy.
        """
        self._begin(rollout_id, args)
        figures: dict[str, float] = {}
        for name, of_set in data.items():
            key = getattr(args, "eval_reward_key", None) or getattr(args, "reward_key", None)
            rewards = [_scalar(reward, key) for reward in of_set.get("rewards") or []]
            right, truncated = _right_fraction(rewards), [bool(cut) for cut in of_set.get("truncated") or []]
            area = f"eval/{name.replace('/', '_')}"
            if right is not None:
                figures[f"{area}/accuracy"] = right
            if truncated:
                figures[f"{area}/truncation_rate"] = sum(truncated) / len(truncated)
        self._keep(rollout_id, figures, self.monitor.observe_eval(rollout_id, figures), extra_metrics)
        return False

    def _begin(self, rollout_id: int, args: Any) -> None:
        """Once per process: open the folder, and judge again, silently, what came before a resumed run's first."""
        if self._begun:
            return
        self._begun = True
        save = getattr(args, "save", None)
        folder = self._folder or (Path(save) / "stableopd" if save else None)
        if folder is None:
            return
        self._journal = Journal(Path(folder))
        if rollout_id == 0:
            self._journal.begin()
            return
        self._journal.go_on_after(rollout_id - 1)
        for row in self._journal.rows():
            self.monitor.judge(row["step"], {key: value for key, value in row.items() if key != "step"})

    def _keep(
        self,
        step: int,
        figures: Mapping[str, float],
        alerts: Sequence[Alert],
        metrics_of_slime: dict[str, Any] | None,
    ) -> None:
        if metrics_of_slime is not None:
            worst = {"health/alerts": float(len(alerts))}
            metrics_of_slime |= {**figures, **worst}
        self.alerts += alerts
        announce(alerts)
        if self._journal is not None:
            self._journal.note(step, figures)
            self._journal.note_alerts(alerts)


_log = RolloutLog()
log_rollout_data = _log.log_rollout_data
log_eval_rollout_data = _log.log_eval_rollout_data


# ------------------------------------------------------------------------------------ a sample's fields


def _flat(samples: Iterable[Any]) -> Iterator[Any]:
    """Samples come flat or in groups, of whatever depth."""
    for sample in samples:
        if isinstance(sample, list | tuple):
            yield from _flat(sample)
        else:
            yield sample


def _model_tokens(sample: Any) -> list[int]:
    """The tokens of the response that the model wrote; `loss_mask` leaves out those of tools.

    A mask without any token belongs to a sample that is not trained on, which is judged all the same.
    """
    count = int(sample.response_length)
    ids = [int(token) for token in sample.tokens[len(sample.tokens) - count :]]
    mask = getattr(sample, "loss_mask", None)
    if mask is None or len(mask) != len(ids) or not any(mask):
        return ids
    return [token for token, written in zip(ids, mask, strict=True) if written]


def _finish_reason(sample: Any) -> FinishReason:
    status = getattr(sample.status, "value", sample.status)
    return _FINISH_REASONS.get(str(status).lower(), "abort")


def _reward(sample: Any, key: str | None) -> float | None:
    return _scalar(sample.reward, key)


def _scalar(reward: Any, key: str | None) -> float | None:
    value = reward.get(key) if isinstance(reward, Mapping) else reward
    return float(value) if is_number(value) or isinstance(value, bool) else None


def _right_fraction(rewards: Sequence[float | None]) -> float | None:
    """Share of rewards that are 1, where all are 0 or 1; other rewards are no accuracy."""
    known = [reward for reward in rewards if reward in (0.0, 1.0)]
    return sum(known) / len(known) if known and len(known) == len(rewards) else None
