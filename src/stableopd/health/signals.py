"""What a set of rollouts looks like: lengths, truncation, repetition, loops, and who gets the advantage.

Pure functions of plain lists and arrays; numpy and the standard library only. A length is a number
of completion tokens, end token included. Shares and rates lie in [0, 1].
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopd.health.loops import (
    MAX_PERIOD,
    MIN_LOOP_TOKENS,
    MIN_REPEATS,
    NGRAM,
    BoolArray,
    classify_tokens,
)
from stableopd.types import FinishReason

TAIL_CHARS = 10_000
COMPRESSION_THRESHOLD = 10.0
FIRST_BOUND = 16
"""Tokens before the second of the positions that `advantage_by_position` tells apart."""

TRUNCATED_REASONS = frozenset({"length", "loop"})
"""The budget ran out, or would have: a loop that was cut short never reached an end token either."""


class LengthWarning(UserWarning):
    """A sequence is longer than it was expected to be."""


class SequenceLengths(NamedTuple):
    """Mean and greatest length of a set of sequences."""

    mean: float
    max: int


# ------------------------------------------------------------------------------------ text


def compression_ratio(text: str, tail_chars: int = TAIL_CHARS) -> float:
    """How many times smaller zlib makes the end of a text: about 2-4 for prose, above 10 for loops.

    Definition: bytes(tail) / bytes(zlib(tail)), tail = last `tail_chars` characters in UTF-8,
    zlib level 9. An empty text gives 1.0. A short text can give less than 1: zlib adds a header.
    Lone surrogates, which a cut token may leave behind, count as three bytes each.
    Source: Luo et al. 2026, arXiv 2604.08527; the level is our choice, the paper names none.
    Raises: tail_chars < 1 -> ValueError.
    """
    if tail_chars < 1:
        raise ValueError(f"tail_chars must be at least 1 character, got {tail_chars}.")
    tail = text[-tail_chars:].encode("utf-8", "surrogatepass")
    return len(tail) / len(zlib.compress(tail, 9)) if tail else 1.0


def is_repetitive(text: str, tail_chars: int = TAIL_CHARS, threshold: float = COMPRESSION_THRESHOLD) -> bool:
    """Whether a text is longer than `tail_chars` characters and its tail compresses more than `threshold` times.

    A text of `tail_chars` characters or fewer is never repetitive, so choose `tail_chars` below
    what the length budget can hold: with budgets under ~3,000 tokens the paper's 10,000 is too much.
    Source: Luo et al. 2026, arXiv 2604.08527 (L = 10,000, τ = 10).
    """
    return len(text) > tail_chars and compression_ratio(text, tail_chars) > threshold


def repetition_rate(
    texts: Iterable[str], tail_chars: int = TAIL_CHARS, threshold: float = COMPRESSION_THRESHOLD
) -> float:
    """Share of the texts that are repetitive in the sense of `is_repetitive`; 0.0 for no texts.

    Raises: one bare string -> TypeError.
    """
    if isinstance(texts, str):
        raise TypeError("repetition_rate needs several texts, got one string. Put it into a list.")
    return _share(is_repetitive(text, tail_chars, threshold) for text in texts)


# ------------------------------------------------------------------------------------ lengths


def truncation_rate(finish_reasons: Iterable[str]) -> float:
    """Share of all rollouts that ran out of budget instead of ending by themselves; 0.0 for none.

    "length" and "loop" (cut short while looping) are truncated, "stop" is not. "abort" is neither:
    it counts as a rollout, not as a truncated one.
    Raises: any other reason -> ValueError; read as "not truncated" it would hide a collapse.
    """
    return _share(_checked(reason) in TRUNCATED_REASONS for reason in finish_reasons)


def length_stats(lengths: Iterable[int], finish_reasons: Sequence[str]) -> dict[str, float]:
    """Mean, extremes and quantiles of the lengths in tokens, and the truncated share, by metric key.

    The `*_terminated_length` keys look at rollouts that ended with "stop" alone, the `*_truncated_length` keys at
    those that were cut, and are left out when there are none. Quantiles are interpolated linearly. No rollouts -> {}.
    Raises: as many lengths as reasons are needed -> ValueError.
    """
    rows = list(zip(lengths, finish_reasons, strict=True))
    if not rows:
        return {}
    all_lengths = np.array([length for length, _ in rows])
    terminated = np.array([length for length, reason in rows if reason == "stop"])
    truncated = np.array([length for length, reason in rows if reason in TRUNCATED_REASONS])
    quantiles = np.quantile(all_lengths, (0.5, 0.9, 0.99))
    stats = _spread(all_lengths, "length") | _spread(terminated, "terminated_length")
    stats |= _spread(truncated, "truncated_length")
    stats |= {f"completions/length_p{q}": float(x) for q, x in zip((50, 90, 99), quantiles, strict=True)}
    return stats | {"completions/clipped_ratio": truncation_rate(finish_reasons)}


def check_sequence_length(sequences: Iterable[Sized], max_expected_length: int) -> SequenceLengths:
    """Mean and greatest length of the sequences; warns with `LengthWarning` when one is too long.

    The length of a sequence is its `len()`: tokens for a list or 1-D array of token ids, characters
    for a string, the padded width for a row of a 2-D array. No sequences -> (0.0, 0), no warning.
    Raises: max_expected_length <= 0 -> ValueError; one bare string, or items without a length -> TypeError.
    """
    if not max_expected_length > 0:
        raise ValueError(f"max_expected_length must be positive, got {max_expected_length}.")
    if isinstance(sequences, str):
        raise TypeError("check_sequence_length needs several sequences, got one string. Put it into a list.")
    sequences = list(sequences)
    if any(not hasattr(sequence, "__len__") or isinstance(sequence, Mapping) for sequence in sequences):
        raise TypeError("check_sequence_length needs the sequences themselves: lists, arrays or strings, one each.")
    lengths = [len(sequence) for sequence in sequences]
    found = SequenceLengths(sum(lengths) / len(lengths), max(lengths)) if lengths else SequenceLengths(0.0, 0)
    if found.max > max_expected_length:
        num_over = sum(length > max_expected_length for length in lengths)
        message = (
            f"{num_over} of {len(lengths)} sequences are longer than the expected {max_expected_length} "
            f"(longest {found.max}, mean {found.mean:.1f}). Lengths that grow during training while accuracy "
            "does not are the first sign of length inflation: look at truncation and repetition too."
        )
        warnings.warn(message, LengthWarning, stacklevel=2)
    return found


# ------------------------------------------------------------------------------------ advantages


def token_fraction(masks: Iterable[ArrayLike]) -> float | None:
    """Share of all tokens that the masks (one [T] bool array per rollout) select; None without tokens."""
    selected = _joined(masks, np.bool_)
    return float(selected.mean()) if len(selected) else None


def advantage_by_class(
    masks: Iterable[ArrayLike], advantages: Iterable[ArrayLike], name: str = "loop", rest: str = "other"
) -> dict[str, float]:
    """Mean advantage (nats) of the masked tokens and of the others, and the masked tokens' weight in the update.

    Returns, for name="loop" and rest="other": `health/advantage_loop`, `health/advantage_other` (means),
    `health/loop_update_share` = Σ|A| over loops / Σ|A| over all, `health/loop_token_fraction`.
    A key whose denominator is empty or zero is left out. Tokens with an advantage that is not finite
    count for the token fraction alone.

    Args: one [T] bool and one [T] float array per rollout, of equal lengths.
    Raises: lengths that differ -> ValueError.
    Source: Luo et al. 2026, arXiv 2604.08527, the split of the update over states in and out of repetition.
    """
    rows = [(np.asarray(mask, dtype=np.bool_), np.asarray(a)) for mask, a in zip(masks, advantages, strict=True)]
    for row, (mask, advantage) in enumerate(rows):
        if mask.shape != advantage.shape:
            raise ValueError(f"rollout {row} has {mask.size} tokens but {advantage.size} advantages.")
    selected = _joined((mask for mask, _ in rows), np.bool_)
    values = _joined((advantage for _, advantage in rows), np.float64)
    finite = np.isfinite(values)
    inside, outside = values[selected & finite], values[~selected & finite]
    mass = float(np.abs(inside).sum() + np.abs(outside).sum())
    figures = {
        f"health/advantage_{name}": float(inside.mean()) if len(inside) else None,
        f"health/advantage_{rest}": float(outside.mean()) if len(outside) else None,
        f"health/{name}_update_share": float(np.abs(inside).sum()) / mass if mass else None,
        f"health/{name}_token_fraction": float(selected.mean()) if len(selected) else None,
    }
    return _known(figures)


def advantage_by_position(advantages: Iterable[ArrayLike]) -> dict[str, float]:
    """Where in the completions tokens and update lie: figures of the tokens from one position to the next.

    Positions count completion tokens from 0; the bounds 0, 16, 32, 64, 128, ... are the same for every budget, so
    that steps and runs compare.

    Returns, for each bound B that a completion reaches: `health/token_fraction_from_B` (of all tokens),
    `health/advantage_from_B` (mean, nats), `health/update_share_from_B` = Σ|A| there / Σ|A| everywhere. Left out where
    the denominator is empty or zero. Advantages that are not finite count as tokens alone.

    Args: one [T] float array per rollout.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in advantages]
    longest = max((len(row) for row in rows), default=0)
    if not longest:
        return {}
    bounds = [0, *(FIRST_BOUND << power for power in range(longest.bit_length()) if FIRST_BOUND << power < longest)]
    values = np.concatenate(rows)
    part = np.searchsorted(bounds, np.concatenate([np.arange(len(row)) for row in rows]), side="right") - 1
    finite = np.isfinite(values)
    tokens = np.bincount(part, minlength=len(bounds))
    known = np.bincount(part[finite], minlength=len(bounds))
    total, mass = (
        np.bincount(part[finite], weights=weight, minlength=len(bounds))
        for weight in (values[finite], np.abs(values[finite]))
    )
    figures: dict[str, float | None] = {}
    for place, bound in enumerate(bounds):
        figures[f"health/token_fraction_from_{bound}"] = float(tokens[place] / len(values))
        figures[f"health/advantage_from_{bound}"] = float(total[place] / known[place]) if known[place] else None
        figures[f"health/update_share_from_{bound}"] = float(mass[place] / mass.sum()) if mass.sum() else None
    return _known(figures)


# ------------------------------------------------------------------------------------ all of it


def measure_rollouts(
    *,
    lengths: Sequence[int],
    finish_reasons: Sequence[str],
    texts: Sequence[str] | None = None,
    token_ids: Sequence[ArrayLike] | None = None,
    advantages: Sequence[ArrayLike] | None = None,
    accuracy: float | None = None,
    tail_chars: int = TAIL_CHARS,
    compression_threshold: float = COMPRESSION_THRESHOLD,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_loop_tokens: int = MIN_LOOP_TOKENS,
    ngram: int = NGRAM,
) -> dict[str, float]:
    """Every health figure that the given columns allow, by metric key. No rollouts -> {}.

    Always: `completions/*` of `length_stats`. With texts: `health/repetition_rate` (rollouts cut short in a
    loop count, however short they are). With token ids:
    `health/loop_token_fraction`, `health/near_loop_token_fraction` (loops with a changing part, no exact ones),
    `health/repeated_token_fraction`. With advantages on top:
    `health/advantage_{loop,other}` and `health/loop_update_share`, split by `loop_mask`, and
    `health/advantage_{repeated,fresh}` and `health/repeated_update_share`, split by
    `repeated_token_mask`, which sees repetition build up before it is a loop; and the figures of
    `advantage_by_position`.
    With accuracy (of these rollouts): `completions/accuracy`.

    Raises: columns of different lengths, or advantages without token ids -> ValueError.
    """
    _check_columns(lengths, finish_reasons=finish_reasons, texts=texts, token_ids=token_ids, advantages=advantages)
    if advantages is not None and token_ids is None:
        raise ValueError("advantages are split by loops, which are found in token_ids: give both.")
    metrics = length_stats(lengths, finish_reasons)
    if not metrics:
        return {}
    if accuracy is not None:
        metrics["completions/accuracy"] = float(accuracy)
    if texts is not None:
        rows = zip(texts, finish_reasons, strict=True)
        metrics["health/repetition_rate"] = _share(
            reason == "loop" or is_repetitive(text, tail_chars, compression_threshold) for text, reason in rows
        )
    if token_ids is not None:
        metrics |= advantage_figures(
            token_ids,
            advantages,
            max_period=max_period,
            min_repeats=min_repeats,
            min_loop_tokens=min_loop_tokens,
            ngram=ngram,
        )
    return metrics


def advantage_figures(
    token_ids: Sequence[ArrayLike],
    advantages: Sequence[ArrayLike] | None,
    *,
    max_period: int = MAX_PERIOD,
    min_repeats: int = MIN_REPEATS,
    min_loop_tokens: int = MIN_LOOP_TOKENS,
    ngram: int = NGRAM,
) -> dict[str, float]:
    """The part of `measure_rollouts` that is about tokens: their shares by class, and who gets the advantage."""
    classes = [classify_tokens(ids, max_period, min_repeats, min_loop_tokens, ngram) for ids in token_ids]
    return (
        _class_figures([found.loop for found in classes], advantages, "loop", "other")
        | _class_figures([found.repeated for found in classes], advantages, "repeated", "fresh")
        | _class_figures([found.near_loop for found in classes], None, "near_loop", "other")
        | advantage_by_position(() if advantages is None else advantages)
    )


# ------------------------------------------------------------------------------------ helpers


def _share(hits: Iterable[bool]) -> float:
    flags = list(hits)
    return sum(flags) / len(flags) if flags else 0.0


def _checked(reason: str) -> str:
    known = get_args(FinishReason)
    if reason not in known:
        raise ValueError(f"unknown finish reason {reason!r}: translate it to one of {', '.join(known)}.")
    return reason


def _spread(lengths: NDArray[Any], name: str) -> dict[str, float]:
    if not len(lengths):
        return {}
    spread = {"mean": lengths.mean(), "min": lengths.min(), "max": lengths.max()}
    return {f"completions/{stat}_{name}": float(value) for stat, value in spread.items()}


def _joined(rows: Iterable[ArrayLike], dtype: type) -> NDArray[Any]:
    arrays: list[NDArray[Any]] = [np.asarray(row, dtype=dtype) for row in rows]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if value is not None}


def _class_figures(
    masks: Sequence[BoolArray], advantages: Sequence[ArrayLike] | None, name: str, rest: str
) -> dict[str, float]:
    if advantages is None:
        return _known({f"health/{name}_token_fraction": token_fraction(masks)})
    return advantage_by_class(masks, advantages, name, rest)


def _check_columns(lengths: Sequence[int], **columns: Sequence[Any] | None) -> None:
    if any(not float(length).is_integer() or length < 0 for length in lengths):
        raise ValueError(f"lengths are whole numbers of tokens, 0 or more; got {list(lengths)[:5]} ...")
    for name in ("token_ids", "advantages"):
        column = columns.get(name)
        for row, (values, length) in enumerate(zip(() if column is None else column, lengths, strict=False)):
            if len(values) != length:
                raise ValueError(f"{name} of rollout {row} has {len(values)} entries, but its length is {length}.")
    for name, column in columns.items():
        if column is not None and len(column) != len(lengths):
            raise ValueError(f"{name} has {len(column)} rows for {len(lengths)} lengths: one per rollout is needed.")
