"""An event loop in a thread of its own, so that requests go on while the main thread generates or computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

T = TypeVar("T")
_LOOK_UP_S = 0.5


class Background:
    """Runs coroutines. Its thread starts with the first and never keeps the process alive."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts it; returns at once. Cancelling the future cancels the coroutine."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), name="stableopd-teacher", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result. Ctrl-C is heard while it waits, and gives it up."""
        future = self.submit(coroutine)
        return wait_for_all([future])[0]

    def stop(self) -> None:
        """Ends the thread; a later `submit` starts another."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def wait_for_all(futures: Iterable[Future[T]]) -> list[T]:
    """Results in their order. The first failure is raised at once; the others are then given up."""
    futures = list(futures)
    pending = set(futures)
    try:
        while pending:
            # A wait without an end would not hear Ctrl-C on every system.
            done, pending = wait(pending, timeout=_LOOK_UP_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [future.result() for future in futures]
