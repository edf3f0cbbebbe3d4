"""From states to logits, and from the gradient of the logits to those of states and head."""

from __future__ import annotations

import torch
from torch import Tensor

from stableopd.fused.chunks import Chunk, Workspace
from stableopd.fused.records import Projected
from stableopd.heads import LinearHead

_LEAST_LOGIT = -1e30
"""In place of −inf where a model forbids a token by itself: 0 · −inf would be no number."""
GROUP = 2
"""Chunks whose gradients, rounded to a narrow dtype, go through the matrix products of the backward pass together:
each time the head's gradient, which is large, is walked over once."""
_TILE_ROWS = 8_192
"""Rows of the head's gradient that are summed at a time where the arithmetic is not float32."""


class Projector:
    """Logits of one model, chunk by chunk."""

    def __init__(self, projected: Projected, workspace: Workspace) -> None:
        self.states, self.head, self._workspace = projected.states, projected.head, workspace
        self.dtype = _arithmetic_dtype(self.states)
        self.weight = None
        if isinstance(self.head, LinearHead):
            self.weight = self.head.weight[: self.head.vocab_size].detach().to(self.dtype)

    def tempered_logits(self, rows: slice, name: str) -> Tensor:
        """[c, V] in float32 (float64), in a buffer of that name."""
        work, head, states = self._workspace, self.head, self.states[rows].detach()
        logits = work.buffer(name, len(states))
        if self.weight is None:
            logits.copy_(head.logits(states)).clamp_(min=_LEAST_LOGIT)
        elif self.dtype == work.dtype:
            torch.mm(states.to(self.dtype), self.weight.T, out=logits)
        else:
            narrow = work.buffer(f"narrow {self.dtype}", len(states), self.dtype)
            logits.copy_(torch.mm(states.to(self.dtype), self.weight.T, out=narrow))
        if isinstance(head, LinearHead):
            if head.bias is not None:
                logits.add_(head.bias[: head.vocab_size].detach()).clamp_(min=_LEAST_LOGIT)
            if head.scale != 1.0:
                logits.mul_(head.scale)
            if head.softcap is not None:
                logits.div_(head.softcap).tanh_().mul_(head.softcap)
        if work.temperature != 1.0:
            logits.div_(work.temperature)
        return logits


class HeadGradient:
    """Gradients of the student's states and head, summed over chunks."""

    def __init__(self, projector: Projector, workspace: Workspace) -> None:
        self._projector, self._workspace, head = projector, workspace, projector.head
        self._states = torch.zeros_like(projector.states) if projector.states.requires_grad else None
        self._weight = self._bias = None
        self._group: list[slice] = []
        self._narrow: Tensor | None = None
        if isinstance(head, LinearHead):
            if head.weight.requires_grad:
                self._weight = torch.zeros(head.weight.shape, dtype=workspace.dtype, device=workspace.device)
            if head.bias is not None and head.bias.requires_grad:
                self._bias = torch.zeros(head.bias.shape, dtype=workspace.dtype, device=workspace.device)

    def add(self, chunk: Chunk) -> None:
        work, head, projector = self._workspace, self._projector.head, self._projector
        grad = chunk.gradient()
        if isinstance(head, LinearHead):
            self._through_softcap(grad, chunk, head)
        if work.temperature != 1.0:
            grad.div_(work.temperature)
        if projector.weight is None:
            if self._states is not None:
                self._states[chunk.rows, : work.vocab_size] = grad.to(self._states.dtype)
            return
        assert isinstance(head, LinearHead)
        if self._bias is not None:
            self._bias[: head.vocab_size] += grad.sum(dim=0)
        if projector.dtype == work.dtype:
            self._multiply(grad, chunk.rows)
        else:
            self._collect(grad, chunk.rows)

    def flush(self) -> None:
        """Multiplies what has been collected."""
        if self._group:
            assert self._narrow is not None
            rows = slice(self._group[0].start, self._group[-1].stop)
            self._multiply(self._narrow[: rows.stop - rows.start], rows)
            self._group = []

    def _collect(self, grad: Tensor, rows: slice) -> None:
        work = self._workspace
        if self._narrow is None:
            capacity = min(GROUP * work.rows, self._projector.states.shape[0])
            shape = (capacity, work.vocab_size)
            self._narrow = torch.empty(shape, dtype=self._projector.dtype, device=work.device)
        start = rows.start - self._group[0].start if self._group else 0
        self._narrow[start : start + len(grad)] = grad
        self._group.append(rows)
        if len(self._group) == GROUP:
            self.flush()

    def _multiply(self, grad: Tensor, rows: slice) -> None:
        """Through the projection, to states and head; `grad` is in the dtype of the arithmetic."""
        projector = self._projector
        assert projector.weight is not None
        if self._states is not None:
            self._states[rows] = torch.mm(grad, projector.weight).to(self._states.dtype)
        if self._weight is not None:
            self._add_outer(grad, projector.states[rows].detach().to(projector.dtype))

    def results(self) -> list[Tensor | None]:
        """In the order of states and `head.parameters()`, in their dtypes."""
        head = self._projector.head
        if not isinstance(head, LinearHead):
            return [self._states]
        weight = None if self._weight is None else self._weight.to(head.weight.dtype)
        if head.bias is None:
            return [self._states, weight]
        return [self._states, weight, None if self._bias is None else self._bias.to(head.bias.dtype)]

    def _through_softcap(self, grad: Tensor, chunk: Chunk, head: LinearHead) -> None:
        if head.softcap is not None:
            capped = chunk.student.logits.mul_(self._workspace.temperature / head.softcap)
            grad.mul_(1.0 - capped.square_())
        if head.scale != 1.0:
            grad.mul_(head.scale)

    def _add_outer(self, grad: Tensor, states: Tensor) -> None:
        """Adds gradᵀ states to the head's gradient, in float32 whatever the arithmetic."""
        assert self._weight is not None
        if grad.dtype == self._weight.dtype:
            self._weight[: grad.shape[1]].addmm_(grad.T, states)
            return
        for start in range(0, grad.shape[1], _TILE_ROWS):
            tile = grad[:, start : start + _TILE_ROWS]
            self._weight[start : start + tile.shape[1]] += torch.mm(tile.T, states)


def _arithmetic_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return states.dtype
