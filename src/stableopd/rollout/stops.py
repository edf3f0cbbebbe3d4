"""Sees while completions are drawn that the text of one holds a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoding says for the bytes of a character that is not there as a whole yet."""

_LONGEST_CHARACTER = 8
"""Tokens to wait for the rest of a character; one has four bytes at most, and what goes on longer is none."""


class StopWatch:
    """Follows b growing completions, one token each at a time.

    A row stops with the first token after which the text of its completion holds one of the strings. A token is decoded
    behind the one before it, as what stands before a token decides about its spaces, and behind the tokens of a
    character that is not complete yet; of the text only the tail is kept in which a string may have begun. So a
    token costs the same wherever it stands.
    """

    def __init__(self, num_rows: int, stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._strings = tuple(stop_strings)
        self._text = _decoder(tokenizer)
        self._tail = max(map(len, stop_strings)) - 1
        self._rows = [_Tail() for _ in range(num_rows)]

    def push(self, tokens: Tensor, alive: Tensor) -> Tensor:
        """Whether each row stops now, [b] bool. `tokens` [b] are new; only rows that are `alive` [b] are looked at."""
        rows = zip(self._rows, tokens.tolist(), alive.tolist(), strict=True)
        found = [living and self._stops(row, token) for row, token, living in rows]
        return torch.tensor(found, device=tokens.device)

    def keep(self, kept: Tensor) -> None:
        """Drops all rows but `kept`."""
        self._rows = [self._rows[row] for row in kept.tolist()]

    def join(self, other: StopWatch) -> None:
        """Takes the rows of another watch for the same strings behind its own."""
        self._rows += other._rows

    def _stops(self, row: _Tail, token: int) -> bool:
        row.pending = (*row.pending, token)
        new = self._text((*row.context, *row.pending))[len(self._text(row.context)) :]
        text = row.text + new
        if any(string in text for string in self._strings):
            return True
        if not new.endswith(_INCOMPLETE) or len(row.pending) >= _LONGEST_CHARACTER:
            row.text = text[-self._tail :] if self._tail else ""
            row.context, row.pending = row.pending, ()
        return False


@dataclass(slots=True)
class _Tail:
    text: str = ""
    """The last characters of the completion so far, one fewer than the longest stop string has."""
    context: tuple[int, ...] = ()
    """The last tokens whose text is in `text`: one, or those of one character."""
    pending: tuple[int, ...] = ()
    """Tokens of a character that is not complete."""


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Text of token ids, special tokens included, as the rollouts are read by everybody else."""

    @lru_cache(maxsize=65_536)
    def text(ids: tuple[int, ...]) -> str:
        if not ids:
            return ""
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return text
