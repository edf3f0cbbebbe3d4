"""Sequences one after another without padding: attention that keeps them apart.

A packed batch is one row [1, N] of tokens with positions that start anew at every sequence. Flash kernels of
transformers take such a row with the bounds of its sequences (`cu_seq_lens_q`). PyTorch's own kernels do not, so that
transformers would build a mask of N x N for them; here each sequence, or each run of sequences of one length, goes
through them by itself, with causal attention that needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "stableopd_sdpa"
"""Name under which the attention is registered: `sdpa` for ordinary batches, sequence by sequence for packed ones."""


@dataclass(slots=True)
class Windows:
    """How many tokens back the attention of a packed batch looks, where that is bounded."""

    masked: set[int] = field(default_factory=set)
    """What the model wanted masks for (sliding windows, chunks). No mask is built for a packed batch."""
    applied: set[int] = field(default_factory=set)
    """What its attention was told, and so kept to."""


_packing: ContextVar[Windows | None] = ContextVar("stableopd_packing", default=None)


def packed_inputs(lengths: Sequence[int], device: torch.device, *, flash: bool) -> dict[str, Any]:
    """What a model needs beside the token ids [1, N] of sequences of these lengths."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    bounds = bounds.to(device) if flash else bounds  # ours reads it on the processor, without waiting for a device
    longest = max(lengths)
    return {
        "position_ids": positions[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@contextmanager
def packing() -> Iterator[Windows]:
    """While a packed batch goes through a model: no mask is built for it."""
    windows = Windows()
    token = _packing.set(windows)
    try:
        yield windows
    finally:
        _packing.reset(token)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention [1, N, heads, dim] over a packed batch; transformers' `sdpa` over any other.

    Args: query, key, value [batch, heads, N, dim]; `cu_seq_lens_q` [sequences + 1] marks a packed batch (also when
        gradient checkpointing computes a layer once more).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal"):
        options.pop(name, None)
    window = options.pop("sliding_window", None)
    if window is not None and (seen := _packing.get()) is not None:
        seen.applied.add(window)
    outputs = []
    start = 0
    for length, run in groupby(cu_seq_lens_q.diff().tolist()):
        count = len(list(run))
        end = start + count * length
        parts = [array[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for array in (query, key, value)]
        mask = _window_mask(length, window, query.device) if window is not None and length > window else None
        found, _ = sdpa_attention_forward(module, *parts, mask, is_causal=True, **options)  # type: ignore[call-arg,misc]
        outputs.append(found.reshape(1, count * length, *found.shape[2:]))
        start = end
    return torch.cat(outputs, dim=1), None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, L, L] bool: causal, and at most `window` tokens back, the token itself included."""
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return ((back >= 0) & (back < window))[None, None]


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    seen = _packing.get()
    if seen is None:
        return sdpa_mask(*arguments, **options)
    if options.get("local_size") is not None:
        seen.masked.add(options["local_size"])
    return None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _mask)
