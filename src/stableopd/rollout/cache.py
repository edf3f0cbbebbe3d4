"""A key-value cache that is written in place and from which rows can be dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

_CACHE_ROOM = 64
"""Tokens by which the cache grows at a time."""


def growing_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for the model, whose full-attention layers are written in place."""
    cache = DynamicCache(config=getattr(model, "config", None))
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = _RoomyLayer
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values [b, heads, width, dim] as views of larger buffers, so that a token is written, not appended.

    The layer that it replaces copies all earlier tokens for each new one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            room = end + _CACHE_ROOM
            self._buffers = _enlarged(self.keys, key_states, room), _enlarged(self.values, value_states, room)
        keys, values = self._buffers
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._buffers = None


def _enlarged(old: Tensor | None, new: Tensor, room: int) -> Tensor:
    """A buffer [b, heads, room, dim] for states like `new`, which starts with the columns of `old`."""
    batch, heads, _, dim = new.shape
    buffer = new.new_empty(batch, heads, room, dim)
    if old is not None and old.numel() > 0:
        buffer[:, :, : old.shape[-2]] = old
    return buffer


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Makes the cache hold the sequences `rows`, which may repeat. Unlike its namesakes, `reorder_cache` is there for
    every kind of layer, sliding-window and recurrent ones included."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]
