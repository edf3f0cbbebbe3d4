"""The process that a `TimedJudge` asks: `python -m stableopd.benchmarking.judge_worker NAME SETTING`.

Reads lines of {"completion", "answer", "token", "last_resort_s"}; writes for each a line {"token", "error"}, or
{"token", "right"} and then {"token", "vote"}. JSON, so that nothing that a model wrote is ever executed. The judge, and
whatever it starts, have no part in it: they read nothing from standard input, what they print goes to standard error,
and what they write elsewhere lacks the token. The one who asks kills a judge that hangs; should it be dead itself,
the kernel ends this process after `last_resort_s`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import IO, Any

from stableopd.errors import StableOPDError
from stableopd.judges import as_verdict, get_judge, voter_of


def main() -> None:
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    name, setting = sys.argv[1:]
    try:
        judge, vote = get_judge(name, setting, timeout_s=None), voter_of(name, setting)
    except StableOPDError as error:
        print(json.dumps({"refused": str(error)}), file=replies)
        return
    except Exception as error:  # told to whoever asks, as the name may be a user's
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)
        return
    print(json.dumps({"ready": True}), file=replies)
    for line in questions:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked["last_resort_s"])
        verdict = _judged(judge, asked)
        _reply(replies, asked, verdict)
        if "right" in verdict:
            _reply(replies, asked, {"vote": _vote(vote, asked["completion"])})
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reply(replies: IO[str], asked: dict[str, Any], told: dict[str, Any]) -> None:
    """On a line of its own, whatever the judge has written there before."""
    print("\n" + json.dumps({"token": asked["token"], **told}), file=replies)


def _judged(judge: Callable[[str, str], object], asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"right": as_verdict(judge(asked["completion"], asked["answer"]))}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _vote(vote: Callable[[str], object], completion: str) -> str | None:
    """The vote as text, a set in one order in all processes. One that cannot be had leaves the verdict as it is."""
    try:
        found = vote(completion)
        if isinstance(found, set | frozenset):
            found = sorted(map(str, found))
        return None if found is None else str(found)
    except (Exception, SystemExit):
        return None


if __name__ == "__main__":
    main()
