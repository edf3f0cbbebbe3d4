"""From one row of somebody's rollout file to a record: which key holds what, in whose format."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from stableopd.reading import Place, kind_of
from stableopd.types import FinishReason

TEXT_KEYS = ("completion", "response", "output", "text")
IDS_KEYS = ("completion_ids", "response_ids", "output_ids", "token_ids")
PROMPT_KEYS = ("prompt", "input", "question", "instruction")
STEP_KEYS = ("step", "global_step", "rollout_id", "iteration")
COUNT_KEYS = ("num_tokens", "completion_tokens", "num_completion_tokens", "response_length")
REASON_KEYS = ("finish_reason", "stop_reason", "status")
REWARD_KEYS = ("reward", "score", "rewards")
CORRECT_KEYS = ("correct", "is_correct", "acc", "accuracy")
ANSWER_KEYS = ("answer", "gts", "ground_truth", "label")

_REASONS: Mapping[str, FinishReason] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "completed", "tool_calls"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length", "truncated"), "length"),
    "loop": "loop",
    **dict.fromkeys(("abort", "aborted", "cancelled", "failed", "error"), "abort"),
}


class BadRowError(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRecord:
    """One completion of whatever trainer. What its file does not tell is None."""

    place: Place
    step: int | None = None
    prompt: str | None = None
    completion: str | None = None
    """Its text. There is text or there are token ids, often both."""
    token_ids: NDArray[np.int64] | None = None
    """[T]."""
    finish_reason: FinishReason | None = None
    num_tokens: int | None = None
    reward: float | None = None
    correct: bool | None = None
    answer: str | None = None


def record_of(row: Any, place: Place, step: int | None = None) -> RolloutRecord:
    """The record of one row; `step` holds where the row has none of its own.

    Raises: BadRowError when the row is no object, holds no completion, or has a completion or step that is none.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f'it is {kind_of(row)}, not an object such as {{"completion": ...}}')
    text, ids = _completion(row)
    own = _first(row, STEP_KEYS)
    count = _first(row, COUNT_KEYS)
    return RolloutRecord(
        place=place,
        step=step if own is None else _step(own),
        prompt=_prompt(_first(row, PROMPT_KEYS)),
        completion=text,
        token_ids=ids,
        finish_reason=_reason(row),
        num_tokens=int(count) if _is_count(count) else None if ids is None else len(ids),
        reward=_number(_first(row, REWARD_KEYS)),
        correct=_correct(_first(row, CORRECT_KEYS)),
        answer=None if (answer := _first(row, ANSWER_KEYS)) is None else str(answer),
    )


def slime_row(sample: Any) -> Any:
    """A sample of slime's dump, in which the prompt's tokens precede those of the response."""
    if not isinstance(sample, Mapping):
        return sample
    length, tokens = sample.get("response_length"), _listed(sample.get("tokens"))
    row = {name: sample[name] for name in ("prompt", "response", "response_length", "status", "reward", "label")
           if name in sample}  # fmt: skip
    if _is_count(length) and isinstance(tokens, list) and 0 < length <= len(tokens):
        row["completion_ids"] = tokens[-int(length) :]
    if isinstance(judged := row.get("reward"), Mapping):  # as reward functions with several figures give it
        row |= {"reward": _first(judged, REWARD_KEYS), "correct": _first(judged, CORRECT_KEYS)}
    return row


def trl_row(row: Mapping[str, Any], rewards: Sequence[str]) -> dict[str, Any]:
    """A row of TRL's completions table, in which each reward function has a column under its own name."""
    judged = [name for name in rewards if re.search(r"accura|correct", name)]
    chosen = judged[:1] or (list(rewards) if len(rewards) == 1 else [])
    known = {name: row.get(name) for name in ("step", "prompt", "completion", *IDS_KEYS)}
    return known | ({"reward": row.get(chosen[0])} if chosen else {})


# ------------------------------------------------------------------------------------ helpers


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _completion(row: Mapping[str, Any]) -> tuple[str | None, NDArray[np.int64] | None]:
    given = _first(row, IDS_KEYS)
    ids = None if given is None else _ids(_listed(given))
    value = _listed(_first(row, TEXT_KEYS))
    if value is None and ids is None:
        keys = ", ".join(map(repr, list(row)[:8])) or "no keys"
        raise BadRowError(f"it holds no completion: none of {', '.join(TEXT_KEYS)}, only {keys}")
    if value == []:  # of messages or of tokens: either way it ended at once
        return "", _ids(value)
    if isinstance(value, list) and not any(isinstance(item, Mapping | str) for item in value):
        return None, _ids(value)
    return None if value is None else _text_of(value), ids


def _listed(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _ids(values: Any) -> NDArray[np.int64]:
    try:
        array = np.asarray(values if values != [] else np.empty(0, np.int64))
    except (ValueError, OverflowError):  # lists of different lengths in it
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadRowError("its token ids are not a plain list of whole numbers")
    return array.astype(np.int64)


def _text_of(value: Any) -> str:
    """Text of a string or of chat messages; of these what the assistant said, where there is an assistant."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        parts = [value.get("reasoning_content"), value.get("content", value.get("text"))]
        return "".join(_text_of(part) for part in parts if part is not None)
    if isinstance(value, list):
        spoken = [item for item in value if isinstance(item, Mapping) and item.get("role") == "assistant"]
        return "\n".join(_text_of(item) for item in spoken or value)
    raise BadRowError(f"its completion is {kind_of(value)}, not text, chat messages or token ids")


def _prompt(value: Any) -> str | None:
    """It is only shown, so one that cannot be read is no reason to refuse a rollout."""
    try:
        return _text_of(value)
    except BadRowError:
        return None


def _step(value: Any) -> int:
    number = _number(value)
    if number is None or not number.is_integer() or abs(number) >= 2**63:
        raise BadRowError(f"its step is {str(value)[:40]!r}, not a whole number")
    return int(number)


def _reason(row: Mapping[str, Any]) -> FinishReason | None:
    value = _first(row, REASON_KEYS)
    if isinstance(value, Mapping):
        value = value.get("type")
    if isinstance(value, str) and value.lower() in _REASONS:
        return _REASONS[value.lower()]
    truncated = row.get("truncated")
    return ("length" if truncated else "stop") if isinstance(truncated, bool) else None


def _correct(value: Any) -> bool | None:
    number = float(value) if isinstance(value, bool) else _number(value)
    return None if number not in (0.0, 1.0) else bool(number)


def _number(value: Any) -> float | None:
    """A finite number; None for anything else, truth values excepted: they count as 0 and 1."""
    value = _listed(value)
    if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) >= 2**63):
        return None
    return float(value) if math.isfinite(value) else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
