"""Health of on-policy distillation: how long, how repetitive, how truncated the rollouts are. Needs no torch."""

from stableopd.health.controller import ControllerSettings, Controls, HealthController, Levers
from stableopd.health.loops import (
    Loop,
    TokenClasses,
    classify_tokens,
    find_loops,
    loop_mask,
    loop_spans,
    near_loop_mask,
    repeated_token_mask,
)
from stableopd.health.monitor import Alarm, HealthMonitor, MonitorSettings
from stableopd.health.signals import (
    LengthWarning,
    SequenceLengths,
    advantage_by_class,
    advantage_by_position,
    check_sequence_length,
    compression_ratio,
    is_repetitive,
    length_stats,
    measure_rollouts,
    repetition_rate,
    token_fraction,
    truncation_rate,
)
from stableopd.health.verdict import Verdict, judge_run

__all__ = [
    "Alarm",
    "ControllerSettings",
    "Controls",
    "HealthController",
    "HealthMonitor",
    "LengthWarning",
    "Levers",
    "Loop",
    "MonitorSettings",
    "SequenceLengths",
    "TokenClasses",
    "Verdict",
    "advantage_by_class",
    "advantage_by_position",
    "check_sequence_length",
    "classify_tokens",
    "compression_ratio",
    "find_loops",
    "is_repetitive",
    "judge_run",
    "length_stats",
    "loop_mask",
    "loop_spans",
    "measure_rollouts",
    "near_loop_mask",
    "repeated_token_mask",
    "repetition_rate",
    "token_fraction",
    "truncation_rate",
]
