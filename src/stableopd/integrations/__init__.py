"""Health of runs of other people's trainers. Each module needs what its trainer needs, and none needs ours.

The names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stableopd.integrations.slime import RolloutLog
    from stableopd.integrations.trl import HealthCallback, HealthReward

__all__ = ["HealthCallback", "HealthReward", "RolloutLog"]

_HOMES = {
    "HealthCallback": "stableopd.integrations.trl",
    "HealthReward": "stableopd.integrations.trl",
    "RolloutLog": "stableopd.integrations.slime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stableopd.integrations' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
