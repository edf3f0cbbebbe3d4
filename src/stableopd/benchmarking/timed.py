"""A judge that may hang, raise or crash: asked in a process of its own, for so long, and counted when it fails."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

from stableopd.errors import ConfigError
from stableopd.judges import as_verdict, get_judge
from stableopd.protocols import Judge

Failure = Literal["timeout", "error"]
_ENDING_S = 10.0
"""Longest that a process may take to end whose pipe is closed."""
_START_S = 120.0
"""Longest that a judge's module may take to be imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What became of one answer. One that could not be judged is wrong, and `failure` says why."""

    right: bool
    vote: str | None = None
    """What this answer counts as where answers are compared with each other; None: it gives none."""
    failure: Failure | None = None
    message: str = ""


def verdict_of(judge: Judge, completion: str, answer: str) -> Judged:
    """What a judge of any kind says. One that raises, or says neither True nor False, costs its answer alone."""
    if isinstance(judge, TimedJudge):
        return judge.judge(completion, answer)
    try:
        return Judged(right=as_verdict(judge(completion, answer)))
    except (
        Exception,
        SystemExit,
    ) as error:  # a user's code on a model's text must not end a run of days
        return Judged(right=False, failure="error", message=f"{type(error).__name__}: {error}")


class JudgeFailedError(Exception):
    """The judge gave no verdict; `failure` is `timeout` or `error`."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class TimedJudge:
    """A judge by name, asked through processes that are replaced when they take too long or die.

    Works where a signal would not: in threads, and for a judge that hangs in C or swallows exceptions. `exact` needs
    none of that and is asked directly. Callable like any judge; then it raises JudgeFailedError.

    Args:
        name: `exact`, `math`, or `package.module:function`.
        timeout_s: for one answer.
        num_workers: processes, started when they are first needed.
        setting: names the judge in errors.

    Raises: ConfigError or MissingDependencyError when there is no such judge.
    """

    def __init__(self, name: str, *, timeout_s: float = 10.0, num_workers: int = 1, setting: str = "judge") -> None:
        self.name, self.timeout_s, self.setting = name, timeout_s, setting
        self._direct = get_judge(name, setting) if name == "exact" else None
        self._pool: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = [] if self._direct else [_Worker(name, setting) for _ in range(num_workers)]
        for worker in self._workers:
            self._pool.put(worker)

    def start(self) -> None:
        """Raises: ConfigError when the judge cannot be had, which is else found out when it is first asked."""
        for worker in self._workers[:1]:
            worker.start()

    def judge(self, completion: str, answer: str) -> Judged:
        """The verdict on one answer. Never raises because of the answer."""
        if self._direct is not None:
            return Judged(right=self._direct(completion, answer), vote=completion.strip() or None)
        worker = self._pool.get()
        try:
            return worker.ask(completion, answer, self.timeout_s)
        finally:
            self._pool.put(worker)

    def judge_all(self, asked: Sequence[tuple[str, str]]) -> list[Judged]:
        """Verdicts on (completion, answer) pairs, in their order."""
        if len(self._workers) < 2:
            return [self.judge(completion, answer) for completion, answer in asked]
        with ThreadPoolExecutor(len(self._workers)) as pool:
            return list(pool.map(lambda pair: self.judge(*pair), asked))

    def __call__(self, completion: str, answer: str) -> bool:
        """Raises: JudgeFailedError when there is no verdict."""
        found = self.judge(completion, answer)
        if found.failure is not None:
            raise JudgeFailedError(found.failure, found.message)
        return found.right

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> TimedJudge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Worker:
    """One process, started when first asked and again after it was killed or died."""

    def __init__(self, name: str, setting: str) -> None:
        self._name, self._setting = name, setting
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, completion: str, answer: str, timeout_s: float) -> Judged:
        if self._process is not None and self._process.poll() is not None:  # died between two questions
            self.kill()
        process = self.start()
        assert process.stdin is not None
        token = secrets.token_hex(8)
        asked = {"completion": completion, "answer": answer, "token": token, "last_resort_s": 2 * timeout_s + 10}
        line = json.dumps(asked) + "\n"
        try:
            process.stdin.write(line.encode())
            process.stdin.flush()
        except (BrokenPipeError, OSError):
            return self._lost(process)
        verdict = self._reply(process, token, ("right", "error"), timeout_s)
        if verdict is None:
            self.kill()
            return Judged(right=False, failure="timeout", message=f"no verdict within {timeout_s:g} s")
        if not verdict:
            return self._lost(process)
        if "error" in verdict:
            return Judged(right=False, failure="error", message=verdict["error"])
        vote = self._reply(process, token, ("vote",), timeout_s)
        if not vote:  # it hangs or has died, and the verdict is there
            self.kill()
        return Judged(right=verdict["right"], vote=vote["vote"] if vote else None)

    def _reply(
        self, process: subprocess.Popen[bytes], token: str, keys: Sequence[str], timeout_s: float
    ) -> dict[str, Any] | None:
        """The next line that answers this question with one of `keys`; None when there is none in time, empty when the
        process has died. Others are passed over: a judge may write wherever it likes.
        """
        deadline = time.monotonic() + timeout_s
        while line := self._read(process, deadline):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict) and found.get("token") == token and not found.keys().isdisjoint(keys):
                return found
        return None if line is None else {}

    def start(self) -> subprocess.Popen[bytes]:
        """The process, begun where there is none. Raises: ConfigError when the judge cannot be had."""
        if self._process is not None:
            return self._process
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "stableopd.benchmarking.judge_worker", self._name, self._setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the one who asks; and what a judge starts dies with it
        )
        self._process, self._rest = process, b""
        reply = self._read(process, time.monotonic() + _START_S)
        told = json.loads(reply) if reply else {}
        if "ready" not in told:
            ended = process.wait(_ENDING_S) if reply == b"" else None
            self.kill()
            late = f"it was not ready within {_START_S:g} s"
            why = told.get("error", late if ended is None else f"its process ended with status {ended}")
            raise ConfigError(told.get("refused", f"{self._setting}: the judge {self._name!r} cannot be used: {why}"))
        return process

    def _read(self, process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        """One line with its end; None when there is none in time, nothing when the process has died."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return b""
                self._rest += chunk
        line, newline, self._rest = self._rest.partition(b"\n")
        return line + newline

    def _lost(self, process: subprocess.Popen[bytes]) -> Judged:
        self.kill()
        return Judged(right=False, failure="error", message=f"the judge's process ended with {process.returncode}")

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # closing writes what is left, and no one reads it
                    pipe.close()

    def __del__(self) -> None:
        if self._process is not None:
            self.kill()
