"""Processes with what they wait for: so many at a time, each finished once, a failure stopping only what needs it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from stableopd.lines import write_atomically

Status = Literal["done", "failed", "skipped"]
_POLL_S = 0.1
_LOG_TAIL = 15
STOPPED_BY_CONTROLLER = 3
"""Exit status of a run that its health controller ended: a result, not a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One thing to make. `stem` names its files: STEM.log, and STEM.job.json once it is made."""

    name: str
    command: tuple[str, ...]
    """{resume} in it becomes --resume where the job was begun before, else nothing."""
    stem: Path
    after: tuple[str, ...] = ()
    """Names of jobs that must be done before."""
    begun: Path | None = None
    """A file that is there once the job has something to go on from."""
    reads: tuple[Path, str] | None = None
    """A file that is written before it is started, and what it holds."""
    makes: Path | None = None
    """A file without which it is not made, whatever its record says."""
    leaves: Path | None = None
    """What is there when it has come to its end; without it, one that ended with status 0 has failed."""
    again: bool = False
    """Make it anew where it was made with other settings, instead of refusing."""
    settings: str = ""
    """What it is made with: a finished job is taken as it is only where these are the same."""

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.settings.encode(), digest_size=12).hexdigest()

    @property
    def last_start(self) -> dict[str, Any]:
        """What is known of its last start: with which settings, and how it ended if it ended well."""
        try:
            found = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def log(self) -> Path:
        return self.stem.with_name(self.stem.name + ".log")

    @property
    def record(self) -> Path:
        return self.stem.with_name(self.stem.name + ".job.json")

    @property
    def is_to_be_made(self) -> bool:
        """Whether there is nothing of it, or it is to be made anew."""
        record = self.finished
        return record is None or (self.again and record.get("digest") != self.digest)

    @property
    def finished(self) -> dict[str, Any] | None:
        """The record of a finished job; None when it has not ended well yet."""
        found = self.last_start
        if "returncode" not in found or (self.makes is not None and not self.makes.exists()):
            return None
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a job ended in this session, or had ended before it (`fresh=False`)."""

    job: Job
    status: Status
    why: str = ""
    seconds: float = 0.0
    fresh: bool = True


@dataclass(slots=True)
class _Active:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


def run_jobs(
    jobs: Iterable[Job],
    *,
    parallel: int,
    environment: Mapping[str, str] | None = None,
    tell: Callable[[Ended], None] = lambda ended: None,
    tell_active: Callable[[Sequence[Job]], None] = lambda active: None,
) -> dict[str, Ended]:
    """How each job ended. Jobs made before are not repeated; those that need a failed one are skipped.

    An interrupt ends the processes that are running, which go on where they were the next time.
    """
    waiting = list({job.name: job for job in jobs}.values())
    assert {name for job in waiting for name in job.after} <= {job.name for job in waiting}, "a job waits for nothing"
    ended: dict[str, Ended] = {}
    active: list[_Active] = []

    def end(job: Job, status: Status, **details: Any) -> None:
        ended[job.name] = Ended(job=job, status=status, **details)
        tell(ended[job.name])

    for job in waiting.copy():
        if job.is_to_be_made:
            continue
        waiting.remove(job)
        record = job.finished or {}
        if record.get("digest") == job.digest:
            end(job, "done", fresh=False, seconds=record.get("seconds", 0.0))
        else:
            end(job, "failed", why=f"{job.stem} was made with other settings; remove {job.record} and what it made")
    try:
        while waiting or active:
            for job in [job for job in waiting if _is_blocked(job, ended)]:
                waiting.remove(job)
                end(job, "skipped", why="needs " + _unmade(job, ended))
            ready = [job for job in waiting if all(_is_done(name, ended) for name in job.after)]
            for job in ready[: parallel - len(active)]:
                waiting.remove(job)
                if why := _begun_otherwise(job):
                    end(job, "failed", why=why)
                    continue
                try:
                    active.append(_start(job, environment))
                except OSError as error:
                    named = f"{error.filename or ''}" in ("", job.command[0])
                    what = f"{job.command[0]} cannot be started" if named else f"{error.filename} cannot be made"
                    end(job, "failed", why=f"{what}: {error.strerror or error}")
                tell_active([one.job for one in active])
            if active:
                time.sleep(_POLL_S)
            for one in active.copy():
                outcome = _look_at(one)
                if outcome is not None:
                    active.remove(one)
                    end(one.job, outcome[0], why=outcome[1], seconds=time.monotonic() - one.started)
                    tell_active([still.job for still in active])
    finally:
        for one in active:
            one.process.terminate()
        for one in active:
            one.process.wait()
            one.log.close()
    return ended


def _unmade(job: Job, ended: Mapping[str, Ended]) -> str:
    return ", ".join(name for name in job.after if name in ended and ended[name].status != "done")


def _is_done(name: str, ended: Mapping[str, Ended]) -> bool:
    return name in ended and ended[name].status == "done"


def _is_blocked(job: Job, ended: Mapping[str, Ended]) -> bool:
    return any(name in ended and ended[name].status != "done" for name in job.after)


def _begun_otherwise(job: Job) -> str:
    """Why a job that was begun cannot be gone on with; empty: it can, or there is nothing to go on from."""
    if job.begun is None or not job.begun.exists() or job.last_start.get("digest", job.digest) == job.digest:
        return ""
    return f"{job.begun} was begun with other settings; put them back, or remove it to begin anew"


def _start(job: Job, environment: Mapping[str, str] | None) -> _Active:
    """Its log begins anew only where nothing is gone on with: in a new file, for an orphan may still write to the old.

    Raises: OSError when its program cannot be started.
    """
    job.stem.parent.mkdir(parents=True, exist_ok=True)
    resumed = job.begun is not None and job.begun.exists()
    if job.reads is not None:
        write_atomically(*job.reads)
    write_atomically(job.record, json.dumps({"digest": job.digest}) + "\n")
    parts = [part for part in job.command if part != "{resume}" or resumed]
    if not resumed:
        job.log.unlink(missing_ok=True)
    log = job.log.open("ab")
    try:
        process = subprocess.Popen(
            ["--resume" if part == "{resume}" else part for part in parts],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    except OSError:
        log.close()
        raise
    return _Active(job, process, log, time.monotonic())


def _look_at(one: _Active) -> tuple[Status, str] | None:
    """How a process ended, and why; None while it runs."""
    code = one.process.poll()
    if code is None:
        return None
    one.log.close()
    if code not in (0, STOPPED_BY_CONTROLLER):
        return "failed", f"ended with status {code}; see {one.job.log}\n{_tail(one.job.log)}"
    if code == 0 and one.job.leaves is not None and not one.job.leaves.exists():
        return "failed", f"ended with status 0, but {one.job.leaves} is not there; see {one.job.log}"
    record = {"digest": one.job.digest, "returncode": code, "seconds": round(time.monotonic() - one.started, 1)}
    write_atomically(one.job.record, json.dumps(record) + "\n")
    return "done", ""


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL:])
