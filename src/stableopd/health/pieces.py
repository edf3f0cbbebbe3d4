"""Text cut into pieces of about a token's size, so that loops can be found where token ids are not known.

The standard library and numpy only; no tokenizer, and no list of languages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stableopd.health.loops import find_loops

MAX_WORD = 16
"""A longer row of letters is no word, and may be a loop within itself: its letters are pieces."""

# Letters of scripts that part words by spaces: those before Thai, and the later blocks of Georgian, Ethiopic, Latin and
# Greek. All other characters (Thai, Chinese, Japanese, Korean, digits, punctuation, emoji) are pieces of their own.
_LETTER = r"[^\W\d_\u0e00-\u109f\u1400-\u1dff\u2000-\U0010ffff]"
_PIECE = re.compile(rf" ?(?<!{_LETTER}){_LETTER}{{1,{MAX_WORD}}}(?!{_LETTER})|.", re.DOTALL)


class TextLoop(NamedTuple):
    """A stretch of a text that repeats itself exactly, in characters."""

    start: int
    """Position of its first character."""
    end: int
    """Position after its last character."""
    period: int
    """Characters from one repeat to the next."""

    @property
    def num_repeats(self) -> float:
        """How many periods the stretch holds, the first one and a broken last one included."""
        return (self.end - self.start) / self.period


def split_pieces(text: str) -> list[str]:
    """The text in pieces: words of up to 16 letters with the space before them, and single characters.

    Holds: joined, the pieces are the text again. The pieces of a repeated stretch repeat, whatever its language.
    """
    return _PIECE.findall(text)


def piece_ids(pieces: Sequence[str]) -> NDArray[np.int64]:
    """A number for each piece, equal exactly where the pieces are, [T] int64."""
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(piece, len(numbers)) for piece in pieces), np.int64, len(pieces))


def find_text_loops(
    text: str, max_period: int | None = None, min_repeats: int | None = None, min_tokens: int | None = None
) -> list[TextLoop]:
    """The loops of a text, in the order of their starts: those of its pieces, as positions of characters.

    Args: as `find_loops`, in pieces; None: its defaults.
    """
    given = {"max_period": max_period, "min_repeats": min_repeats, "min_tokens": min_tokens}
    pieces = split_pieces(text)
    loops = find_loops(piece_ids(pieces), **{name: value for name, value in given.items() if value is not None})
    at = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return [
        TextLoop(int(at[loop.start]), int(at[loop.end]), int(at[loop.start + loop.period] - at[loop.start]))
        for loop in loops
    ]
