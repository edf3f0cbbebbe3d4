"""On-policy distillation of language models that does not collapse.

The names below are imported when they are first used, so that `import stableopd` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stableopd.config import StableOPDConfig
    from stableopd.health import HealthMonitor, check_sequence_length
    from stableopd.trainer import StableOPDTrainer

__all__ = ["HealthMonitor", "StableOPDConfig", "StableOPDTrainer", "__version__", "check_sequence_length"]

try:
    __version__ = version("stableopd")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0.1.0"

_HOMES = {
    "HealthMonitor": "stableopd.health",
    "StableOPDConfig": "stableopd.config",
    "StableOPDTrainer": "stableopd.trainer",
    "check_sequence_length": "stableopd.health",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stableopd' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
