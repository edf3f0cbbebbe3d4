"""Whether gold passes the judge that answers are held to. The judge is a user's code: it may raise, and it may hang."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stableopd.doctor.findings import Finding
from stableopd.judges import exact_match
from stableopd.protocols import Judge
from stableopd.types import Example

_SECONDS_PER_ANSWER = 5.0
_HAS_ITSELF_BOUNDED = "math_match"
"""Math-Verify sets the same alarm for itself, five seconds long."""


class _Hangs(BaseException):
    """Raised into a judge that takes too long; not an Exception, which the judge might swallow."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    right: int
    failing: list[tuple[Example, str]]
    """With the gold as text."""
    errors: list[str]

    @property
    def total(self) -> int:
        return self.right + len(self.failing) + len(self.errors)


def judge_findings(
    judge: Judge, name: str, examples: Sequence[Example], texts: Sequence[str], budget_s: float
) -> Iterator[Finding]:
    """Gold that fails its own answer, and a judge that fails itself.

    Args:
        examples: rows with gold and answer; `texts` are their gold, without its end token.
        budget_s: most seconds spent on it; rows beyond are left out.
    """
    judged = _judge_all(judge, examples, texts, budget_s)
    if judged.errors:
        yield Finding(
            check="judge",
            danger="problem",
            summary=f"the judge {name!r} failed on {len(judged.errors)} of {judged.total} golden solutions",
            evidence=judged.errors[0],
            remedy="it is called with (completion, answer), two texts, and must return true or false within seconds; "
            "correct evaluation.judge",
            figures={"judge_failures": len(judged.errors) / judged.total},
        )
    number = judged.right + len(judged.failing)
    if not judged.failing or (judge is exact_match and not judged.right):
        return  # an exact match of a whole solution with its answer: not how this gold is written
    share = len(judged.failing) / number
    first, text = judged.failing[0]
    yield Finding(
        check="gold_fails",
        danger="problem" if share >= 0.05 else "note",
        summary=f"{len(judged.failing)} of {number} golden solutions are wrong by the judge {name!r}",
        evidence=f"row {first.index + 1}: the answer is {first.answer!r:.80}, the gold ends in {text[-60:]!r}",
        remedy="remove wrong solutions from the gold; if they are right, correct evaluation.judge or "
        "data.answer_column: every accuracy would be too low",
        figures={"gold_fails": share},
    )


def _judge_all(judge: Judge, examples: Sequence[Example], texts: Sequence[str], budget_s: float) -> Judged:
    deadline = time.monotonic() + budget_s
    right = 0
    failing: list[tuple[Example, str]] = []
    errors: list[str] = []
    for example, text in zip(examples, texts, strict=True):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            with _alarm(judge, min(left, _SECONDS_PER_ANSWER)):
                passed = bool(judge(text, example.answer or ""))
        except _Hangs:
            errors.append(f"row {example.index + 1}: no verdict in {min(left, _SECONDS_PER_ANSWER):.0f} s")
        except Exception as error:
            errors.append(f"row {example.index + 1}: {traceback.format_exception_only(error)[-1].strip():.200}")
        else:
            right += passed
            failing += [] if passed else [(example, text)]
    return Judged(right=right, failing=failing, errors=errors)


@contextmanager
def _alarm(judge: Judge, seconds: float) -> Iterator[None]:
    """Interrupts the judge after so many seconds, where signals can: in the main thread, not on Windows."""
    free = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if not free or getattr(judge, "__name__", "") == _HAS_ITSELF_BOUNDED or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
