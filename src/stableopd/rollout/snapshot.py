"""An engine that decodes with a copy of the student, so that the student may be trained meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from stableopd.protocols import OnFinished, RolloutEngine
from stableopd.types import Example, RolloutBatch, Sampling


class SnapshotEngine:
    """A `RolloutEngine` over a copy of the student's weights as they were at the last sync.

    Args:
        make: builds an engine that decodes with the model it is given.
        copy: a model of the student's kind, overwritten at every sync. Costs the student's weights once more.
    """

    def __init__(self, make: Callable[[nn.Module], RolloutEngine], copy: nn.Module) -> None:
        self._copy = copy
        self._engine = make(copy)

    def generate(
        self, examples: Sequence[Example], sampling: Sampling, *, step: int, on_finished: OnFinished | None = None
    ) -> RolloutBatch:
        """As `RolloutEngine`, with the weights of the last sync."""
        return self._engine.generate(examples, sampling, step=step, on_finished=on_finished)

    @torch.no_grad()
    def sync_weights(self, student: nn.Module, policy_version: int) -> None:
        """Copy the student's parameters and buffers. Must not be called while rollouts are being made."""
        pairs = zip(
            (*self._copy.parameters(), *self._copy.buffers()), (*student.parameters(), *student.buffers()), strict=True
        )
        for mine, theirs in pairs:
            mine.copy_(theirs)
        self._engine.sync_weights(self._copy, policy_version)
