"""Curves in one line of text, for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
GAP = " "
"""What stands where nothing was measured."""


def sparkline(values: Sequence[float], width: int, *, low: float | None = None, high: float | None = None) -> str:
    """A curve in at most `width` block characters, from its lowest value to its highest, or from `low` to `high`.

    More values than characters are averaged in equal parts, fewer make a shorter line. Values that are not finite are
    gaps; a part is the mean of its finite values. A curve that does not change is a low line.
    Raises: width < 1 -> ValueError.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1 character, got {width}.")
    means = _parts(values, width)
    known = [mean for mean in means if mean is not None]
    if not known:
        return GAP * len(means)
    bottom = min(known) if low is None else low
    top = max(known) if high is None else high
    return "".join(GAP if mean is None else _block(mean, bottom, top) for mean in means)


def _parts(values: Sequence[float], width: int) -> list[float | None]:
    count = min(len(values), width)
    bounds = [part * len(values) // count for part in range(count + 1)] if count else [0]
    return [_mean(values[begin:end]) for begin, end in pairwise(bounds)]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else None  # the sum of huge values would overflow


def _block(value: float, bottom: float, top: float) -> str:
    if not top > bottom:
        return BLOCKS[0]
    # Halved, since the distance of two huge values would overflow.
    share = (value / 2 - bottom / 2) / (top / 2 - bottom / 2)
    return BLOCKS[round(min(max(share, 0.0), 1.0) * (len(BLOCKS) - 1))]
