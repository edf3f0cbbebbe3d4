"""Writes a run folder so that a kill at any instant loses at most the step under way.

Lines are appended whole and flushed; other files are written aside and renamed. On resume, whatever lies
beyond the checkpoint is cut off again, since those steps are about to be repeated.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import yaml

from stableopd.errors import RunFolderError
from stableopd.lines import append_line, json_line, keep_until, write_atomically

try:
    import fcntl
except ImportError:  # not on Windows: runs go unlocked there
    fcntl = None  # type: ignore[assignment]

_ROLLOUT_FILE = re.compile(r"^step-(\d{6,})\.jsonl$")
_BEFORE_CONFIG = {".lock", "rollouts", "checkpoints", ".config.yaml.tmp"}
"""What a run killed at its very start may have left."""
_PACKAGES = ("stableopd", "torch", "transformers", "accelerate", "tokenizers", "numpy")


class RunRecorder:
    """The writer of one run folder. Holds a lock on it for as long as the process lives."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        check_run_folder(path, resume=resume)
        try:
            (path / "rollouts").mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be made: {error.strerror or error}") from error
        self._lock = lock_folder(path)

    def start(self, config_yaml: str, after_step: int | None) -> None:
        """Write configuration and environment; keep only records up to `after_step` (None: keep nothing)."""
        write_atomically(self.path / "config.yaml", config_yaml)
        write_atomically(self.path / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
        last = -1 if after_step is None else after_step
        for name in ("metrics.jsonl", "alerts.jsonl"):
            keep_until(self.path / name, last)
        for file in (self.path / "rollouts").iterdir():
            step = _ROLLOUT_FILE.match(file.name)
            if step and int(step[1]) > last:
                file.unlink()

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        append_line(self.path / "metrics.jsonl", {"step": step, **metrics})

    def alerts(self, alerts: Iterable[Mapping[str, Any]]) -> None:
        for alert in alerts:
            append_line(self.path / "alerts.jsonl", alert)

    def rollouts(self, step: int, rollouts: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json_line(rollout) for rollout in rollouts)
        write_atomically(self.path / "rollouts" / f"step-{step:06d}.jsonl", text)

    def close(self) -> None:
        self._lock.close()


def check_run_folder(path: Path, *, resume: bool) -> None:
    """Whether a run may write into `path`: a folder that is new or empty, or the run that it resumes.

    Raises: RunFolderError otherwise.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file; output_dir must be a folder")
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if entries and not resume:
        raise RunFolderError(
            f"{path} already holds something. Go on with the run that is there with --resume, "
            "or choose another output_dir; an existing run is never overwritten"
        )
    if "config.yaml" not in entries and not entries <= _BEFORE_CONFIG:
        raise RunFolderError(f"{path} is not a run folder (there is no config.yaml in it); there is nothing to resume")


def check_nothing_lost(path: Path) -> None:
    """Whether a run without a checkpoint may start over: it must have been killed before its first one was due.

    Raises: RunFolderError when checkpoints must have been there.
    """
    metrics, config = path / "metrics.jsonl", path / "config.yaml"
    if not (metrics.exists() and config.exists()):
        return
    due = yaml.safe_load(config.read_text(encoding="utf-8"))["checkpoint"]["every_steps"]
    steps = [int(number) for number in re.findall(rb'^\{"step": (\d+)', metrics.read_bytes(), re.MULTILINE)]
    if max(steps, default=0) > due:
        raise RunFolderError(
            f"{path} has logged {max(steps)} steps, but its checkpoints are gone: it cannot go on, and is not started "
            "over. Choose another output_dir"
        )


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for whoever reads the run later. No host or user names."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": [Path(sys.argv[0]).name, *(_without_secret(argument) for argument in sys.argv[1:])],
    }


def _without_secret(argument: str) -> str:
    """A webhook's URL is not for whoever reads the run later."""
    return re.sub(r"(?s)^(health(?:\.notify)?(?:\.url)?=)(?=.*://).*", r"\1**********", argument)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lock_folder(path: Path) -> IO[str]:
    """A lock on the folder, held until it is closed. Raises: RunFolderError when another process holds it."""
    lock = (path / ".lock").open("w")
    if fcntl is None:
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunFolderError(f"{path} is being written by another process; wait for it or stop it first") from None
    return lock
