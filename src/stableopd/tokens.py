"""Padding, masks and alignment of token sequences. One convention: column t is completion token t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers cut into batches of like length, longest first, each at most `budget` tokens with padding.

    A batch of n rows costs n · (longest row). A row that is longer than the budget by itself gets a batch of its
    own. Every row is in exactly one batch.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
