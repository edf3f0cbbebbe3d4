"""Padding, masks and alignment of token sequences. One convention: column t is completion token t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Ids [B, P] int64 and mask [B, P] bool of rows flushed to the right. The mask comes from lengths alone."""
    width = max((len(row) for row in rows), default=0)
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return _tensor(ids, torch.int64, width, device), _tensor(mask, torch.bool, width, device)


def pad_right(
    rows: Sequence[Sequence[float]], pad_value: float, dtype: torch.dtype = torch.int64, device: Any = None
) -> tuple[Tensor, Tensor]:
    """Values [B, T] of `dtype` and mask [B, T] bool of rows flushed to the left."""
    width = max((len(row) for row in rows), default=0)
    values = [list(row) + [pad_value] * (width - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return _tensor(values, dtype, width, device), _tensor(mask, torch.bool, width, device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, L] that count real tokens only, so that left padding shifts nothing."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _tensor(rows: list[list[Any]], dtype: torch.dtype, width: int, device: Any) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), width)


def budget_batches(lengths: Sequence[int], budget: int, *, packed: bool = False) -> list[list[int]]:
    """Row numbers cut into batches of like length, longest first, each at most `budget` tokens.

    A batch of n rows costs n · (longest row) with padding, and the sum of its lengths when `packed`. With padding the
    cuts are those of the least cost over all batches, where every batch costs a sixteenth of the budget on top: few
    batches, little padding. A row that is longer than the budget by itself gets a batch of its own. Every row is in
    exactly one batch.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    sizes = np.array([lengths[row] for row in order], dtype=np.int64)
    starts = _filled(sizes, budget) if packed else _least_padding(sizes, budget, overhead=budget // 16)
    return [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]


def _filled(sizes: np.ndarray, budget: int) -> list[int]:
    """First rows of batches that take rows as long as there is room."""
    starts: list[int] = []
    room = 0
    for row, size in enumerate(sizes.tolist()):
        if not starts or size > room:
            starts.append(row)
            room = budget
        room -= size
    return starts


def _least_padding(sizes: np.ndarray, budget: int, overhead: int) -> list[int]:
    """First rows of the batches, by dynamic programming over where the last batch begins."""
    number = len(sizes)
    best = np.zeros(number + 1, dtype=np.int64)
    begun = np.zeros(number + 1, dtype=np.int64)
    for end in range(1, number + 1):
        first = np.arange(end)
        cost = (end - first) * sizes[:end]
        cost = np.where((cost <= budget) | (first == end - 1), best[:end] + cost + overhead, np.iinfo(np.int64).max)
        begun[end] = int(cost.argmin())
        best[end] = cost[begun[end]]
    starts = []
    end = number
    while end > 0:
        end = int(begun[end])
        starts.append(end)
    return starts[::-1]
