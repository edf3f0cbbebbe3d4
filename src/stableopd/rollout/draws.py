"""Drawing tokens: one number per row and token, so that a row's luck is its own and not its batch's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stableopd.types import Sampling

_DRAWS_AT_A_TIME = 64
"""Tokens per refill of a row's random numbers."""

_BLOCK = 256
"""Ids whose mass is added up in float32 before the distribution function goes on in float64."""


def draw_tokens(logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token id [b] per row, and its log-probability [b] in nats under softmax(logits / temperature).

    Args:
        logits: [b, V], any floating dtype.
        sampling: `temperature` 0 takes the likeliest id. Else `top_k`, then `top_p` of what is left, cut
            the distribution: the fewest likeliest ids whose mass reaches top_p, one at least; of equally
            likely ids the lower ones stay.
        uniforms: [b] in [0, 1), one per row; the draw is the inverse of the distribution function there.

    Numerics: softmax in float32, distribution function in float64 over blocks of ids. An id of probability
        zero is never drawn.
    """
    scaled = logits.float()
    if sampling.logprob_temperature != 1.0:
        scaled = scaled / sampling.logprob_temperature
    probs = scaled.softmax(dim=-1)
    if uniforms is None:
        ids = scaled.argmax(dim=-1)
    elif sampling.top_k > 0 or sampling.top_p < 1:
        order = scaled.argsort(dim=-1, descending=True, stable=True)
        ids = order.gather(1, _inverse_cdf(truncate(probs.gather(1, order), sampling), uniforms)[:, None]).squeeze(1)
    else:
        ids = _inverse_cdf(probs, uniforms)
    return ids, probs.gather(1, ids[:, None]).squeeze(1).log()


def truncate(probs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [b, V], given in falling order, with those outside top-k and then top-p set to 0 (unnormalised)."""
    if sampling.top_k > 0:
        probs = probs[:, : sampling.top_k]
    if sampling.top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.where(before < sampling.top_p * probs.sum(dim=-1, keepdim=True), 0.0)
    return probs


def _inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first id [b] at which the distribution function of `probs` [b, V] exceeds `uniforms` [b] of its total.

    Looks for the block of ids first, then in the block: the whole function is never formed, which would cost
    more than the softmax.
    """
    short = -probs.shape[-1] % _BLOCK
    blocks = F.pad(probs, (0, short)) if short else probs
    blocks = blocks.unflatten(-1, (-1, _BLOCK))
    until = blocks.sum(dim=-1).cumsum(dim=-1, dtype=uniforms.dtype)
    target = uniforms[:, None] * until[:, -1:]
    block = torch.searchsorted(until, target, right=True).clamp(max=until.shape[-1] - 1)
    before = F.pad(until, (1, 0)).gather(1, block)
    fraction = (target - before) / (until.gather(1, block) - before)  # of the block: its sum in float32 is not exact
    inside = blocks.take_along_dim(block[:, :, None], dim=1).squeeze(1).cumsum(dim=-1, dtype=uniforms.dtype)
    ids = block * _BLOCK + torch.searchsorted(inside, fraction * inside[:, -1:], right=True)
    ids = ids.clamp(max=probs.shape[-1] - 1)
    possible = probs.gather(1, ids) > 0  # rounding may lead past the last possible id, or onto a step of height 0
    if not bool(possible.all()):
        ids = ids.where(possible, probs.argmax(dim=-1, keepdim=True))
    return ids.squeeze(1)


class Uniforms:
    """Random numbers in [0, 1), one per row and token; each row has a stream of its own."""

    def __init__(self, keys: Sequence[tuple[int, int, int, int]], device: torch.device) -> None:
        seeds = (np.random.SeedSequence(seed, spawn_key=rest) for seed, *rest in keys)
        self._streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._ahead = torch.empty(len(keys), 0, dtype=self._dtype, device=device)
        """[b, drawn]: the next numbers of each row, of which `_used` have been handed out."""
        self._used = 0

    def next(self) -> Tensor:
        """[b]: the next number of each row."""
        if self._used == self._ahead.shape[1]:
            self._look_ahead()
        self._used += 1
        return self._ahead[:, self._used - 1]

    def keep(self, kept: Tensor) -> None:
        self._ahead = self._ahead[kept]
        self._streams = [self._streams[row] for row in kept.tolist()]

    def join(self, other: Uniforms) -> None:
        """Takes the rows of `other` behind its own; every row goes on in its stream where it stood."""
        self._look_ahead()
        other._look_ahead()
        self._ahead = torch.cat([self._ahead, other._ahead])
        self._streams += other._streams

    def _look_ahead(self) -> None:
        """Draws until each row has `_DRAWS_AT_A_TIME` numbers that were not handed out."""
        left = self._ahead[:, self._used :]
        drawn = np.stack([stream.random(_DRAWS_AT_A_TIME - left.shape[1]) for stream in self._streams])
        fresh = torch.from_numpy(drawn).to(self._device, self._dtype)
        self._ahead, self._used = torch.cat([left, fresh], dim=1), 0
