"""Requests to a server that may be busy, broken or away: repeated with growing waits, and given up with a reason."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from stableopd.errors import TeacherError

if TYPE_CHECKING:
    import httpx

_RETRIED = frozenset({408, 409, 425, 429})
_MOST_SHOWN = 300
_LONGEST_ASKED_WAIT_S = 300.0


class RefusedError(TeacherError):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status = status
        self.said = said


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long one answer may take, and how often and after what waits a request is repeated."""

    timeout_s: float
    max_retries: int
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def wait_s(self, retry: int, asked_s: float | None) -> float:
        """Seconds before repeat `retry` (from 0): uniform up to a bound that doubles, after what is asked for."""
        jittered = random.uniform(0.0, min(self.longest_wait_s, self.first_wait_s * 2.0**retry))
        return jittered if asked_s is None else min(asked_s, _LONGEST_ASKED_WAIT_S) + jittered


class Caller:
    """Sends requests to one server. Knows the key, and keeps it out of whatever it says."""

    def __init__(self, client: httpx.AsyncClient, url: str, key: str | None, patience: Patience) -> None:
        self._client = client
        self._url = url
        self._key = key
        self._patience = patience

    def __repr__(self) -> str:
        return f"Caller({self._url!r})"

    async def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, parsed, of a POST of `body`, or of a GET without one.

        Raises: RefusedError when the server will not answer; TeacherError when it stays away or its answer is not JSON.
        """
        begun = time.monotonic()
        for retry in range(self._patience.max_retries + 1):
            failure, asked_s, response = await self._once(path, body)
            if response is not None:
                return self._parsed(response, path)
            if retry < self._patience.max_retries:
                await asyncio.sleep(self._patience.wait_s(retry, asked_s))
        raise TeacherError(
            f"the teacher's server {self._url} stays away: {self._patience.max_retries + 1} tries of {path} in "
            f"{time.monotonic() - begun:.0f} s, the last one: {failure}. No weight was touched by this step. See "
            "that the server runs and can be reached, then resume the run from its last checkpoint (--resume)"
        )

    async def _once(self, path: str, body: dict[str, Any] | None) -> tuple[str, float | None, httpx.Response | None]:
        """(what went wrong, seconds that the server asks to wait, answer if there is one) of one try."""
        import httpx

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else None
        try:
            async with asyncio.timeout(self._patience.timeout_s):
                response = await self._client.request(
                    "GET" if body is None else "POST", self._url + path, json=body, headers=headers
                )
        except (TimeoutError, httpx.TimeoutException):
            return f"no answer within {self._patience.timeout_s:g} s", None, None
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            # Said without the error's text, which may hold a header.
            raise TeacherError(f"the request to {self._url} cannot be sent ({type(error).__name__})") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            return f"{type(error).__name__}: {self.shown(str(error))}", None, None
        if response.is_success:
            return "", None, response
        said = self.shown(_message(response))
        if response.status_code in _RETRIED or response.status_code >= 500:
            return f"status {response.status_code}: {said}", _asked_wait_s(response), None
        raise self._refusal(path, response.status_code, said)

    def _refusal(self, path: str, status: int, said: str) -> RefusedError:
        remedy = ""
        if status in (401, 403):
            remedy = ". Set teacher.api_key_env to the environment variable that holds the server's key"
        elif status == 404:
            remedy = ". See that server_url, api and server_model are those of the server"
        elif 300 <= status < 400:
            remedy = ". It points elsewhere, and the key goes nowhere else; set server_url to where it points"
        return RefusedError(f"the teacher's server {self._url} refuses {path} ({status}): {said}{remedy}", status, said)

    def _parsed(self, response: httpx.Response, path: str) -> Any:
        try:
            return response.json()
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise TeacherError(
                f"the teacher's server {self._url} answers {path} with something that is not JSON: "
                f"{self.shown(response.text)}"
            ) from None

    def shown(self, text: str) -> str:
        """A server's words, fit to be shown: without the key and control characters, and short."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def _message(response: httpx.Response) -> str:
    """What the server says of its error; both servers put it into `error.message` or `message`."""
    try:
        found = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return response.text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)


def _asked_wait_s(response: httpx.Response) -> float | None:
    """Seconds of the Retry-After header, which is a number or a date."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
