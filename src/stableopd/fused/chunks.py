"""Chunks of tokens: distributions over them, the gradient that gathers on each, and the memory that all share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stableopd.losses._numerics import IMPOSSIBLE


@dataclass(slots=True)
class Distribution:
    """One model's distribution over a chunk of tokens."""

    logits: Tensor
    """[c, V], tempered."""
    p: Tensor
    """[c, V] probabilities."""
    lse: Tensor
    """[c, 1] log of the normaliser: log-probabilities are logits − lse."""

    def logprobs_at(self, ids: Tensor) -> Tensor:
        """[c, K] log-probabilities of the tokens `ids` [c, K]; −inf where a token is forbidden."""
        logits = self.logits.gather(-1, ids)
        return (logits - self.lse).masked_fill(logits <= IMPOSSIBLE, -torch.inf)


@dataclass(slots=True)
class Chunk:
    """One chunk of tokens: the student's distribution and the gradient that gathers on it."""

    rows: slice
    student: Distribution
    tilt: Tensor | None = None
    """[c, V] U and"""
    share: Tensor | None = None
    """[c, 1] r: s ∘ (U + r) is in the gradient."""
    pull: Tensor | None = None
    """[c, V] added as it stands."""
    sparse: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(ids [c, K], values [c, K]) added at those ids."""

    def add_share(self, amount: Tensor) -> None:
        self.share = amount if self.share is None else self.share + amount

    def add_sparse(self, ids: Tensor, u: Tensor) -> None:
        self.sparse.append((ids, u))
        self.add_share(-u.sum(dim=-1, keepdim=True))

    def gradient(self) -> Tensor:
        """[c, V] with respect to the tempered logits; overwrites probabilities and `tilt`."""
        share = self.share if self.share is not None else torch.zeros_like(self.student.lse)
        total = self.student.p.mul_(share) if self.tilt is None else self.tilt.add_(share).mul_(self.student.p)
        if self.pull is not None:
            total.add_(self.pull)
        for ids, values in self.sparse:
            total.scatter_add_(-1, ids, values)
        return total


class Workspace:
    """The buffers [rows, V] that all chunks of a pass share. It refers to nothing, so it goes when the pass ends."""

    def __init__(
        self, rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, temperature: float
    ) -> None:
        self.rows, self.vocab_size, self.dtype, self.device = rows, vocab_size, dtype, device
        self.temperature = temperature
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """[num_rows, V], the same memory for every chunk."""
        if name not in self._buffers:
            shape = (self.rows, self.vocab_size)
            self._buffers[name] = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return self._buffers[name][:num_rows]
