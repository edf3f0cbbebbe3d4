"""Answers that were generated already: one line each, kept by what they depend on; nothing is generated twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from stableopd.lines import append_line, write_atomically
from stableopd.types import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion of the model, as text, without its end token."""

    prompt: int
    sample: int
    text: str
    num_tokens: int
    finish_reason: str


class AnswerStore:
    """The answers in one folder. A kill at any instant tears the last line alone; what cannot be read is made again.

    Args: `longest` is the most tokens that an answer may have; one that says more is none.
    """

    def __init__(self, folder: Path, longest: int) -> None:
        self.folder, self._path, self._longest = folder, folder / "completions.jsonl", longest
        folder.mkdir(parents=True, exist_ok=True)
        self.answers = self._read()

    def missing(self, num_prompts: int, num_samples: int) -> dict[int, list[int]]:
        """Numbers of the prompts that lack answers, by the number of the first answer that they lack."""
        found: dict[int, list[int]] = {}
        for prompt in range(num_prompts):
            lacking = (sample for sample in range(num_samples) if (prompt, sample) not in self.answers)
            if (first := next(lacking, None)) is not None:
                found.setdefault(first, []).append(prompt)
        return found

    def add(self, answer: Answer) -> None:
        key = (answer.prompt, answer.sample)
        if key not in self.answers:
            append_line(self._path, asdict(answer))
            self.answers[key] = answer

    def _read(self) -> dict[tuple[int, int], Answer]:
        if not self._path.exists():
            return {}
        text = self._path.read_text(encoding="utf-8", errors="replace")
        whole, newline, torn = text.rpartition("\n")
        if torn:
            write_atomically(self._path, whole + newline)
        found = [_answer(line, self._longest) for line in whole.split("\n") if line]
        return {(answer.prompt, answer.sample): answer for answer in found if answer is not None}


def _answer(line: str, longest: int) -> Answer | None:
    """The answer of a line; None for one that is torn, or holds what no answer has."""
    try:
        answer = Answer(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return answer if _is_possible(answer, longest) else None


def _is_possible(answer: Answer, longest: int) -> bool:
    return (
        all(type(number) is int for number in (answer.prompt, answer.sample, answer.num_tokens))
        and min(answer.prompt, answer.sample) >= 0
        and 1 <= answer.num_tokens <= longest
        and isinstance(answer.text, str)
        and answer.finish_reason in get_args(FinishReason)
    )


def key_of(parts: Mapping[str, Any]) -> str:
    """A short name for everything that answers depend on."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
