"""Tells somebody of alerts: a webhook or a command, from a thread of its own, within a time limit.

Nothing here can stop, slow or crash the run that it speaks of: alerts go into a bounded queue, a daemon thread sends
them, every attempt has a time limit, and what fails is logged once. A webhook's URL is a secret and is never shown.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import urlsplit

from stableopd.types import Alert, Severity

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
TIMEOUT_S = 5.0
QUEUE_SIZE = 64
"""Alerts that wait to be sent; more are dropped."""

_log = logging.getLogger(__name__)


class NotDelivered(Exception):  # noqa: N818 - what happened, and no more than that
    """An attempt failed; the message is short and names no secret."""


class Target(Protocol):
    """Where alerts go."""

    name: str

    def deliver(self, body: bytes) -> None:
        """Send one JSON object, within the time limit. Raises: NotDelivered."""
        ...

    def abort(self) -> None:
        """Give up what is under way; called from another thread."""
        ...


class Notifier:
    """Sends alerts of at least `min_severity` to a webhook, a command, or both.

    Args:
        run_name: what the alerts are about; part of every message.
        url: http or https. The body of the POST request is `payload`; redirects are not followed.
        url_env: the environment variable that holds the URL, in place of `url`.
        command: program and arguments. Run without a shell, with `payload` on its standard input; its output is
            thrown away. After `timeout_s` it is killed together with its children.
        timeout_s: of one attempt, and of the wait for unsent alerts in `close`.

    What cannot work, such as an unset variable, is logged and left out: a run does not end for it.
    """

    def __init__(
        self,
        run_name: str,
        *,
        url: str | None = None,
        url_env: str | None = None,
        command: Sequence[str] = (),
        min_severity: Severity = "warning",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.run_name = run_name
        self.min_severity = min_severity
        self.timeout_s = timeout_s
        self.num_sent = self.num_failed = self.num_dropped = 0
        self._complained: set[str] = set()
        self._targets: list[Target] = []
        if url_env is not None:
            url = self._url_from(url_env)
        if url:
            self._targets.append(Webhook(url, timeout_s))
        if command:
            self._targets.append(Command(command, timeout_s))
        self._queue: queue.Queue[Alert | None] = queue.Queue(QUEUE_SIZE)
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._worker: threading.Thread | None = None

    def send(self, alerts: Iterable[Alert]) -> None:
        """Queue the alerts that are severe enough, and return at once."""
        least = SEVERITIES.index(self.min_severity)
        for alert in alerts:
            if not self._targets or SEVERITIES.index(alert.severity) < least or self._closing.is_set():
                continue
            try:
                self._queue.put_nowait(alert)
            except queue.Full:
                self.num_dropped += 1
                self._complain("queue", f"{QUEUE_SIZE} alerts wait to be sent; further ones are dropped")
        if not self._queue.empty():
            self._start()

    def close(self) -> None:
        """Wait for unsent alerts, at most `timeout_s`, then give up the rest and kill what still runs."""
        self._closing.set()
        if self._worker is None:
            return
        with suppress(queue.Full):
            self._queue.put_nowait(None)  # wakes a worker that waits
        try:
            self._worker.join(self.timeout_s)
        finally:
            self._given_up.set()
            for target in self._targets:
                target.abort()
        if self._worker.is_alive():
            self._complain("close", "the run ends before all alerts could be sent")

    def _start(self) -> None:
        if self._worker is not None:
            return
        worker = threading.Thread(target=self._work, name="stableopd-notify", daemon=True)
        try:
            worker.start()
        except RuntimeError:  # no more threads on this machine
            self._complain("thread", "no thread can be started; alerts are not sent")
        else:
            self._worker = worker

    def _work(self) -> None:
        while not self._given_up.is_set():
            alert = self._queue.get()
            if alert is not None:
                self._tell(alert)
            if self._closing.is_set() and self._queue.empty():
                return

    def _tell(self, alert: Alert) -> None:
        body = json.dumps(payload(alert, self.run_name), allow_nan=False).encode()
        for target in self._targets:
            if self._given_up.is_set():
                return
            try:
                target.deliver(body)
                self.num_sent += 1
            except NotDelivered as failure:
                self.num_failed += 1
                if not self._given_up.is_set():
                    self._complain(target.name, f"an alert did not reach the {target.name}: {failure}")

    def _url_from(self, variable: str) -> str | None:
        url = os.environ.get(variable, "")
        problem = url_problem(url) if url else "is not set"
        if problem:
            self._complain("webhook", f"no webhook is called: the environment variable {variable} {problem}")
        return None if problem else url

    def _complain(self, about: str, message: str) -> None:
        """Once for each thing that fails: a broken webhook must not fill the log of a long run."""
        if about not in self._complained:
            self._complained.add(about)
            _log.warning("health.notify: %s (said once)", message)


def payload(alert: Alert, run_name: str) -> dict[str, Any]:
    """The alert's fields, `run`, and `text` with all of it in one sentence, which Slack and its like show."""
    fields = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in alert.to_json().items()
    }
    action = "" if alert.action == "none" else f" [{alert.action}]"
    text = f"{run_name}: {alert.severity} at step {alert.step}, {alert.rule}{action}: {alert.message}"
    return {"text": text, "run": run_name, **fields}


def url_problem(url: str) -> str | None:
    """What is wrong with a webhook's URL, without showing it; None if nothing is."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        return "does not hold a URL"
    if parts.scheme not in ("http", "https"):
        return "does not begin with http:// or https://"
    if not parts.hostname or not port_is_fine or not url.isascii() or any(c.isspace() or c < " " for c in url):
        return "does not hold a URL"
    if parts.username is not None:
        return "holds a URL with a user name in it, which is not supported"
    return None


class Webhook:
    """POSTs JSON to a URL."""

    name = "webhook"

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._unanswered: threading.Thread | None = None

    def deliver(self, body: bytes) -> None:
        # The limits of sockets count each read by itself, and looking up a name has none: hence a thread to leave
        # behind, one at a time.
        if self._unanswered is not None and self._unanswered.is_alive():
            raise NotDelivered("it has not answered an earlier one yet")
        reasons: list[str | None] = []
        attempt = threading.Thread(
            target=lambda: reasons.append(_post(self._url, body, self._timeout_s)), name="stableopd-post", daemon=True
        )
        try:
            attempt.start()
        except RuntimeError:
            raise NotDelivered("no thread can be started") from None
        attempt.join(self._timeout_s)
        if attempt.is_alive():
            self._unanswered = attempt
            raise NotDelivered(f"no answer within {self._timeout_s:g} s")
        reason = reasons[0] if reasons else "it failed"
        if reason is not None:
            raise NotDelivered(reason)

    def abort(self) -> None:
        """The thread of an attempt dies with the process."""


def _post(url: str, body: bytes, timeout_s: float) -> str | None:
    """None when the server took it (2xx), else why not. Exceptions may hold the URL, so only their kind is told."""
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class NoRedirects(HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **kwargs: Any) -> None:
            return None

    headers = {"Content-Type": "application/json", "User-Agent": "stableopd"}
    try:
        request = Request(url, data=body, headers=headers, method="POST")
        with build_opener(NoRedirects).open(request, timeout=timeout_s):
            return None
    except HTTPError as error:
        error.close()
        redirect = ", a redirect, which is not followed" if 300 <= error.code < 400 else ""
        return f"it answered {error.code}{redirect}"
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None)
        return type(reason if isinstance(reason, Exception) else error).__name__


class Command:
    """Runs a program with JSON on its standard input."""

    name = "command"

    def __init__(self, arguments: Sequence[str], timeout_s: float) -> None:
        self._arguments = list(arguments)
        self._timeout_s = timeout_s
        self._aborted = False
        self._process: subprocess.Popen[bytes] | None = None

    def deliver(self, body: bytes) -> None:
        try:
            # A session of its own: Ctrl-C on the run does not reach it, and its children die with it.
            process = self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise NotDelivered("there is no such program") from None
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise NotDelivered(f"it cannot be started ({type(error).__name__})") from None
        if self._aborted:  # given up while the program was being started
            _kill_with_children(process)
        try:
            process.communicate(body, timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            _kill_with_children(process)
            raise NotDelivered(f"it took more than {self._timeout_s:g} s and was killed") from None
        except OSError as error:
            _kill_with_children(process)
            raise NotDelivered(f"it does not read its input ({type(error).__name__})") from None
        if process.returncode:
            raise NotDelivered(f"it ended with status {process.returncode}")

    def abort(self) -> None:
        self._aborted = True
        if self._process is not None:
            _kill_with_children(self._process)


def _kill_with_children(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait(timeout=1.0)
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        pass  # gone already, or held by the system: nothing more can be done
