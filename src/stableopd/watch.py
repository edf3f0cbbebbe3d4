"""`stableopd watch`: follows a run in the terminal until it is interrupted, or shows it once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from stableopd.errors import RunFolderError
from stableopd.frames import frame
from stableopd.snapshot import Snapshot
from stableopd.watched import Follower

HEALTHY, UNHEALTHY = 0, 1
PATIENCE_S = 2.0
"""How long a frame waits for the disk before it says that it does not answer."""
ONCE_PATIENCE_S = 60.0
"""How long `--once` waits for one read."""


def follow(path: Path, console: Console, *, interval_s: float) -> None:
    """Show the run, and again whenever it has changed, until KeyboardInterrupt.

    On a terminal the frame is drawn over; elsewhere a new one is printed when there is something new.
    """
    lookout = Lookout(Follower(path).poll)
    if console.is_terminal:
        _follow_live(lookout, console, interval_s)
    else:
        _follow_in_prints(lookout, console, interval_s)


def show_once(path: Path, console: Console) -> int:
    """Print one frame; 0 when the run is healthy, 1 when it has collapsed or an alert stands.

    Raises: RunFolderError when there is nothing that could be shown, or the disk does not give it.
    """
    lookout = Lookout(Follower(path).poll)
    before: Snapshot | None = None
    while True:
        snapshot = lookout.look(ONCE_PATIENCE_S)
        if snapshot is None:
            raise RunFolderError(f"{path} cannot be read: the disk has not answered for {ONCE_PATIENCE_S:.0f} s")
        if before is not None and not snapshot.more and snapshot.version == before.version:
            break
        before = snapshot
    if snapshot.problem:
        raise RunFolderError(f"{snapshot.problem}. Give a run folder, or a file of rollouts (JSON Lines)")
    console.print(frame(snapshot, width=console.width))
    return UNHEALTHY if snapshot.verdict.status in ("warning", "collapsed") or snapshot.standing else HEALTHY


class Lookout:
    """Polls in a thread, so that a disk that does not answer holds up neither the frame nor Ctrl-C."""

    def __init__(self, poll: Callable[[], Snapshot]) -> None:
        self._poll = poll
        self._pending: Future[Snapshot] | None = None
        self._since = 0.0

    @property
    def delay_s(self) -> float:
        """How long the poll under way has been waiting; 0 when there is none."""
        return time.monotonic() - self._since if self._pending else 0.0

    def look(self, patience_s: float) -> Snapshot | None:
        """The newest snapshot; None while the disk does not answer."""
        if self._pending is None:
            self._pending, self._since = Future(), time.monotonic()
            # A daemon: it must not keep the process from ending.
            threading.Thread(target=self._run, args=(self._pending,), name="stableopd-watch", daemon=True).start()
        try:
            snapshot = self._pending.result(patience_s)
        except TimeoutError:
            return None
        self._pending = None
        return snapshot

    def _run(self, future: Future[Snapshot]) -> None:
        try:
            future.set_result(self._poll())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)


def _follow_live(lookout: Lookout, console: Console, interval_s: float) -> None:
    last: Snapshot | None = None
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            snapshot = lookout.look(PATIENCE_S) or last
            last = snapshot
            if snapshot is not None:
                live.update(_fitting(snapshot, console, lookout.delay_s), refresh=True)
            else:
                live.update("the disk does not answer yet; waiting", refresh=True)
            if snapshot is None or not snapshot.more:
                time.sleep(interval_s)


def _fitting(snapshot: Snapshot, console: Console, delay_s: float) -> RenderableType:
    """The whole frame where the terminal is high enough, else the brief one: what is below its edge cannot be seen."""
    whole = frame(snapshot, width=console.width, delay_s=delay_s)
    if len(console.render_lines(whole, pad=False)) < console.height:
        return whole
    return frame(snapshot, width=console.width, delay_s=delay_s, brief=True)


def _follow_in_prints(lookout: Lookout, console: Console, interval_s: float) -> None:
    shown: object = None
    while True:
        snapshot = lookout.look(PATIENCE_S)
        state = None if snapshot is None else (snapshot.version, snapshot.problem)
        if snapshot is not None and not snapshot.more and state != shown:
            if shown is not None:
                console.print()
            console.print(frame(snapshot, width=console.width))
            shown = state
        if snapshot is None or not snapshot.more:
            time.sleep(interval_s)
