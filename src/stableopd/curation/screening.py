"""Which generations of a prompt may be its golden solution, why the others may not, and which one is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stableopd.curation.plain import verdict_of
from stableopd.curation.splitting import draw
from stableopd.errors import DataError
from stableopd.health.signals import COMPRESSION_THRESHOLD, TAIL_CHARS, is_repetitive
from stableopd.protocols import Judge
from stableopd.reading import Place, kind_of

Choose = Literal["shortest", "first", "random"]
DROP_REASONS = (
    "not_text",
    "incomplete",
    "truncated",
    "too_long",
    "repetitive",
    "not_judged",
    "judge_failed",
    "wrong",
)
"""Looked at in this order; a generation is counted under the first that holds."""


@dataclass(frozen=True, kw_only=True)
class Screening:
    """What a golden solution must be: complete, not truncated, not too long, not repetitive, right."""

    max_gold_tokens: int = 8192
    """Without the end token."""
    tail_chars: int = TAIL_CHARS
    compression_threshold: float = COMPRESSION_THRESHOLD


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One solution of a row, with what the data set says of it; None is for what it does not say."""

    text: str
    complete: bool | None
    finish_reason: str | None
    right: bool | None


def generations_of(row: Mapping[str, Any], place: Place) -> list[Generation]:
    """The generations of a row of OpenR1-Math-220k, whose columns of lists go together by position.

    Raises: DataError when a column is no list, has another number of entries than there are generations, or holds
        something else than verdicts where these belong.
    """
    texts = _list(row, "generations", place)
    complete, right = (
        [verdict_of(value, f"{place}: {name!r}") for value in _column(row, name, place, len(texts))]
        for name in ("is_reasoning_complete", "correctness_math_verify")
    )
    finish = _column(row, "finish_reasons", place, len(texts))
    return [
        Generation(text=text if isinstance(text, str) else "", complete=done, finish_reason=reason, right=verdict)
        for text, done, reason, verdict in zip(texts, complete, finish, right, strict=True)
    ]


def _column(row: Mapping[str, Any], name: str, place: Place, number: int) -> list[Any]:
    """What the data set says of each of `number` generations; nothing of any where it has no entries."""
    column = _list(row, name, place)
    if column and len(column) != number:
        raise DataError(
            f"{place}: {name!r} has {len(column)} entries for {number} generations, so it is unknown which belongs to "
            "which. Correct or remove the row"
        )
    return column or [None] * number


def _list(row: Mapping[str, Any], column: str, place: Place) -> list[Any]:
    value = row.get(column)
    if value is not None and not isinstance(value, list):
        raise DataError(f"{place}: {column!r} is {kind_of(value)}, and must be a list with one entry per generation")
    return value or []


def is_unfinished(generation: Generation) -> str | None:
    """The first of the reasons that need no token count."""
    if not generation.text.strip() or not _is_unicode(generation.text):
        return "not_text"
    if generation.complete is False:
        return "incomplete"
    return "truncated" if generation.finish_reason in ("length", "abort") else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character pair, which no tokenizer takes
        return False
    return True


def drop_reason(
    generation: Generation, num_tokens: int | None, screening: Screening, judge: Judge | None, answer: str | None
) -> str | None:
    """Why a generation cannot be the golden solution, as one of `DROP_REASONS`; None: it can.

    Args:
        num_tokens: its length; None where `is_unfinished` has a reason already, or the tokenizer cannot encode it.
        judge: compares with `answer`; None: what the data set says counts.
    """
    unfinished = is_unfinished(generation)
    if unfinished is not None:
        return unfinished
    if num_tokens is None:
        return "not_text"
    if num_tokens > screening.max_gold_tokens:
        return "too_long"
    if is_repetitive(generation.text, screening.tail_chars, screening.compression_threshold):
        return "repetitive"
    if judge is None:
        return "not_judged" if generation.right is None else None if generation.right else "wrong"
    return judged_wrong(generation.text, str(answer), judge)


def judged_wrong(text: str, answer: str, judge: Judge) -> str | None:
    """`wrong`, `judge_failed`, or None for a right answer."""
    try:
        return None if judge(text, answer) else "wrong"
    except Exception:  # a judge is a user's or another library's code on a model's text: one text must not end all
        return "judge_failed"


def chosen(candidates: Sequence[tuple[int, int]], choose: Choose, *, seed: int, key: str) -> int:
    """The index of the golden one among (index, number of tokens); ties go to the lower index.

    `random` depends on seed, prompt (`key`) and index alone.
    """
    assert candidates
    if choose == "first":
        return min(index for index, _ in candidates)
    if choose == "shortest":
        return min(candidates, key=lambda one: (one[1], one[0]))[0]
    return min(candidates, key=lambda one: draw(seed, "choose", key, one[0]))[0]
