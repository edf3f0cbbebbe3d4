"""The process that a `TimedJudge` asks: `python -m stableopd.benchmarking.judge_worker NAME`.

Reads lines of {"completion", "answer"}, writes lines of {"right", "vote"} or {"error"}. JSON, so that nothing that a
model wrote is ever executed; what the judge itself prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from stableopd.judges import get_judge, voter_of


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    name = sys.argv[1]
    try:
        judge, vote = get_judge(name, timeout_s=None), voter_of(name)
    except Exception as error:  # told to whoever asks, as the name may be a user's
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)
        return
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        print(json.dumps(_judged(judge, vote, json.loads(line))), file=replies)


def _judged(judge: Callable[[str, str], object], vote: Callable[[str], str | None], asked: dict[str, Any]) -> Any:
    try:
        verdict = judge(asked["completion"], asked["answer"])
        if hasattr(verdict, "item"):  # numpy's booleans
            verdict = verdict.item()
        if not isinstance(verdict, bool | int):
            raise TypeError(f"a judge says True or False, not {verdict!r}")
        return {"right": bool(verdict), "vote": vote(asked["completion"])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    main()
