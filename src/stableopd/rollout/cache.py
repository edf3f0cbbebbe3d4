"""A key-value cache that is written in place, from which rows can be dropped and which other rows can join."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePart:
    """Some sequences of a cache, without their first columns."""

    cache: DynamicCache
    rows: Tensor
    """[n] int64: which sequences; may repeat."""
    skip: int = 0
    """Leading columns to leave out: padding in all of these rows."""


def can_be_joined(cache: DynamicCache) -> bool:
    """Whether every layer keeps all columns, so that sequences of other widths can be set beside each other.

    Sliding windows and recurrent states cannot: what they hold depends on the columns that have passed.
    """
    return all(type(layer) is _RoomyLayer for layer in cache.layers)


def joined(parts: Sequence[CachePart], width: int) -> DynamicCache:
    """A new cache of the rows of all parts, flushed to the right in `width` columns; zeros stand before shorter ones.

    One copy, with room for tokens to come.
    """
    cache = copy(parts[0].cache)
    layers: list[Any] = [copy(layer) for layer in cache.layers]
    cache.layers = layers
    for number, layer in enumerate(layers):
        sources: list[Any] = [part.cache.layers[number] for part in parts]
        if layer.is_initialized:  # a layer may use the keys of another one and hold none
            keys = _side_by_side([source.keys for source in sources], parts, width)
            values = _side_by_side([source.values for source in sources], parts, width)
            layer.hold(keys, values, width)
    return cache


def _side_by_side(states: Sequence[Tensor], parts: Sequence[CachePart], width: int) -> Tensor:
    _, heads, _, dim = states[0].shape
    batch = sum(len(part.rows) for part in parts)
    buffer = states[0].new_empty(batch, heads, width + _CACHE_ROOM, dim)
    first = 0
    for state, part in zip(states, parts, strict=True):
        rows, columns = slice(first, first + len(part.rows)), width - (state.shape[-2] - part.skip)
        buffer[rows, :, :columns] = 0.0  # never attended to, but 0 times what memory held before may be NaN
        buffer[rows, :, columns:width] = state[:, :, part.skip :].index_select(0, part.rows)
        first += len(part.rows)
    return buffer


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Makes the cache hold the sequences `rows`, which may repeat. Unlike its namesakes, `reorder_cache` is there for
    every kind of layer, sliding-window and recurrent ones included."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


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

    def hold(self, keys: Tensor, values: Tensor, width: int) -> None:
        """Takes buffers [b, heads, room, dim] whose first `width` columns are filled."""
        self._buffers = keys, values
        self.keys, self.values = keys[:, :, :width], values[:, :, :width]

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
