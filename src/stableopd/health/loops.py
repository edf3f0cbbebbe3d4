"""Repetition in a sequence of token ids: exact loops, loops with a changing part, n-grams that come back.

numpy and the standard library only; independent of language and tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_PERIOD = 512
MIN_REPEATS = 3
MIN_LOOP_TOKENS = 16
NGRAM = 8
NEAR_NGRAM = 4

BoolArray = NDArray[np.bool_]


class Loop(NamedTuple):
    """A stretch of tokens that repeats itself exactly; no longer stretch around it does, with this period."""

    start: int
    """Position of its first token."""
    end: int
    """Position after its last token."""
    period: int
    """Tokens from one repeat to the next: the least that explains the stretch."""

    @property
    def num_repeats(self) -> float:
        """How many periods the stretch holds, the first one and a broken last one included."""
        return (self.end - self.start) / self.period


def loop_mask(
    token_ids: ArrayLike | str,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_tokens: int = MIN_LOOP_TOKENS,
) -> BoolArray:
    """Which tokens lie in a loop, [T] bool.

    Definition: a loop is a stretch of tokens x_a .. x_b with x_t = x_{t-p} throughout for some period
    p <= max_period, that holds at least `min_repeats` periods (the first one counts) and at least
    `min_tokens` tokens. Exact: no token is missed and none is added. A string is read character by
    character.

    Args: `min_tokens` keeps "111" or a row of dashes from being a loop; 16 also lets three turns of a
    six-token cycle count. With min_tokens=0 the number of repeats decides alone.
    Raises: max_period < 1, min_repeats < 2, or not one-dimensional -> ValueError.
    Numerics: O(T) memory. Periods that cannot hold a loop are dismissed on a few sampled positions.
    """
    mask = np.zeros(np.shape(ids := _as_ids(token_ids)), dtype=np.bool_)
    for start, end, _ in _stretches(ids, max_period, min_repeats, min_tokens):
        mask[start:end] = True
    return mask


def find_loops(
    token_ids: ArrayLike | str,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_tokens: int = MIN_LOOP_TOKENS,
) -> list[Loop]:
    """The loops of a sequence, in the order of their starts; together they cover what `loop_mask` marks.

    Of stretches that lie within one another the outer one is named, with the least period that explains it; loops
    may overlap at their ends. `token_ids[loop.start : loop.start + loop.period]` is what repeats.
    """
    found: list[Loop] = []
    for stretch in _stretches(_as_ids(token_ids), max_period, min_repeats, min_tokens):
        if not any(loop.start <= stretch.start and stretch.end <= loop.end for loop in found):
            within = (stretch.start, stretch.end)
            found = [loop for loop in found if not (within[0] <= loop.start and loop.end <= within[1])]
            found.append(stretch)
    return sorted(found)


def loop_spans(
    token_ids: ArrayLike | str,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_tokens: int = MIN_LOOP_TOKENS,
) -> list[tuple[int, int]]:
    """Stretches of looping tokens as half-open (start, end) positions, in order; see `loop_mask`.

    Loops that touch or overlap come as one span.
    """
    mask = loop_mask(token_ids, max_period, min_repeats, min_tokens)
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def repeated_token_mask(token_ids: ArrayLike | str, ngram: int = NGRAM) -> BoolArray:
    """Which tokens end an n-gram that had already ended at an earlier token of the sequence, [T] bool.

    Milder than `loop_mask`: it also sees repeats with other text in between, quotations included.
    The first occurrence is not repeated, and the first `ngram` tokens never are. Exact, not hashed.
    Raises: ngram < 1, or not one-dimensional -> ValueError.
    """
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1 token, got {ngram}.")
    return _repeated(_Ngrams(_as_ids(token_ids)), ngram)


def near_loop_mask(
    token_ids: ArrayLike | str,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_tokens: int = MIN_LOOP_TOKENS,
    ngram: int = NEAR_NGRAM,
) -> BoolArray:
    """Which tokens lie in a loop with a changing part ("Step 1: so x. Step 2: so x. ..."), no exact one, [T] bool.

    Definition: an n-gram *returns* when it occurs `min_repeats` times or more, each time at most `max_period` tokens
    after the time before; all of these occurrences are marked. Marked stretches with up to `ngram` other tokens
    between them are one stretch, the tokens between included. A near loop is such a stretch of at least
    2 · `min_tokens` tokens, without the tokens that `loop_mask` marks with the same arguments.

    Where `loop_mask` asks whether a token is the one a period ago, this asks whether its surroundings keep coming back,
    at whatever distance. Text with a template and text of its own, such as a table, can be a near loop too: judge it
    by its growth.
    Raises: as `loop_mask`; ngram < 1 -> ValueError.
    """
    ids = _as_ids(token_ids)
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1 token, got {ngram}.")
    exact = loop_mask(ids, max_period, min_repeats, min_tokens)
    return _returning(_Ngrams(ids), ngram, max_period, min_repeats, 2 * min_tokens) & ~exact


class TokenClasses(NamedTuple):
    """Which tokens of a sequence repeat, in three senses; [T] bool each."""

    loop: BoolArray
    """See `loop_mask`."""
    near_loop: BoolArray
    """See `near_loop_mask`; never together with `loop`."""
    repeated: BoolArray
    """See `repeated_token_mask`."""


def classify_tokens(
    token_ids: ArrayLike | str,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_tokens: int = MIN_LOOP_TOKENS,
    ngram: int = NGRAM,
) -> TokenClasses:
    """All three masks in less time than one by one. Raises: as the functions that make them."""
    ids = _as_ids(token_ids)
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1 token, got {ngram}.")
    loop = loop_mask(ids, max_period, min_repeats, min_tokens)
    grams = _Ngrams(ids)
    near = _returning(grams, NEAR_NGRAM, max_period, min_repeats, 2 * min_tokens)
    return TokenClasses(loop, near & ~loop, _repeated(grams, ngram))


# ------------------------------------------------------------------------------------ helpers


def _stretches(ids: NDArray[Any], max_period: int, min_repeats: int, min_tokens: int) -> Iterator[Loop]:
    """For each period, from the least on, the maximal stretches that it explains and that are long enough."""
    if max_period < 1 or min_repeats < 2:
        raise ValueError(f"need max_period >= 1 and min_repeats >= 2, got {max_period} and {min_repeats}.")
    for period in range(1, min(max_period, len(ids) // min_repeats) + 1):
        shortest = max(period * (min_repeats - 1), min_tokens - period)
        for start, stop in _matching_runs(ids, period, shortest):
            yield Loop(start, stop + period, period)


def _matching_runs(ids: NDArray[Any], period: int, shortest: int) -> list[tuple[int, int]]:
    """Start and stop of each maximal run of positions t with ids[t] == ids[t + period], `shortest` or longer."""
    later, earlier = ids[period:], ids[:-period]
    # A long enough run covers at least this many probes in a row, so without them there is none.
    num_probes = min(shortest, 4)
    stride = shortest // num_probes
    probes = later[::stride] == earlier[::stride]
    if b"\x01" * num_probes not in probes.tobytes():
        return []
    breaks = np.flatnonzero(later != earlier)
    stops = np.append(breaks, len(later))
    starts = np.append(0, breaks + 1)
    long_enough = stops - starts >= shortest
    return list(zip(starts[long_enough].tolist(), stops[long_enough].tolist(), strict=True))


class _Ngrams:
    """The n-grams of a sequence, compared exactly: an n-gram is named by the shorter ones that cover it."""

    def __init__(self, ids: NDArray[Any]) -> None:
        small = len(ids) and ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() < 2**31
        self._names = {1: ids.astype(np.int64) if small else np.unique(ids, return_inverse=True)[1].astype(np.int64)}

    def __len__(self) -> int:
        """Tokens of the sequence."""
        return len(self._names[1])

    def occurrences(self, width: int) -> tuple[NDArray[np.int64], BoolArray]:
        """Starts of all n-grams, those of equal ones together and rising; and whether each equals the one before."""
        names = self._named(width)
        keys = np.sort(self._ranked(names) * len(names) + np.arange(len(names)))
        ranks, starts = np.divmod(keys, len(names))
        return starts, np.append(False, ranks[1:] == ranks[:-1])

    def _named(self, width: int) -> NDArray[np.int64]:
        """A number below 2^62 for each n-gram start, equal exactly where the n-grams are equal."""
        if width not in self._names:
            half = 1 << (width - 1).bit_length() - 1  # the largest power of two below: widths double
            names = self._named(half) if half == 1 else self._ranked(self._named(half))
            shift = width - half
            self._names[width] = names[:-shift] * (names.max() + 1) + names[shift:]
        return self._names[width]

    @staticmethod
    def _ranked(names: NDArray[np.int64]) -> NDArray[np.int64]:
        """Small numbers, equal where the names are equal."""
        order = np.argsort(names)
        ranks = np.empty_like(names)
        ranks[order] = np.cumsum(np.append(False, np.diff(names[order]) != 0))
        return ranks


def _repeated(grams: _Ngrams, ngram: int) -> BoolArray:
    mask = np.zeros(len(grams), dtype=np.bool_)
    if len(grams) > ngram:
        starts, again = grams.occurrences(ngram)
        mask[starts[again] + ngram - 1] = True
    return mask


def _returning(grams: _Ngrams, ngram: int, max_period: int, min_repeats: int, shortest: int) -> BoolArray:
    """Stretches of n-grams that return, as `near_loop_mask` defines them, exact loops included."""
    mask = np.zeros(len(grams), dtype=np.bool_)
    if len(grams) < ngram:
        return mask
    starts, again = grams.occurrences(ngram)
    chain = np.cumsum(~(again & (np.diff(starts, prepend=0) <= max_period))) - 1
    returning = np.sort(starts[np.bincount(chain)[chain] >= min_repeats])
    if not len(returning):
        return mask
    apart = np.flatnonzero(np.diff(returning) > 2 * ngram)  # the n-gram itself, and the tokens between
    firsts = returning[np.append(0, apart + 1)]
    ends = returning[np.append(apart, len(returning) - 1)] + ngram
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        mask[first:end] = end - first >= shortest
    return mask


def _as_ids(token_ids: ArrayLike | str) -> NDArray[Any]:
    if isinstance(token_ids, str):
        return np.frombuffer(token_ids.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    ids = np.asarray(token_ids)
    if ids.ndim != 1:
        raise ValueError(f"token ids of one sequence are one-dimensional, got shape {ids.shape}.")
    return ids
