"""Whether an engine's weights are the trainer's: told by log-probabilities of the same tokens, never by trust.

An engine keeps weights of its own, and loading new ones may silently leave some as they were (a tied head, a layer
prepacked for fast kernels). Rollouts of such an engine come from a policy that nobody has. So after every sync a few
fixed sequences are scored by both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stableopd.heads import evaluating
from stableopd.scoring import Autocast

Sequences = Sequence[tuple[int, ...]]

_ROUNDING = 1e-5
"""Nats that two exact float32 implementations may differ by on average."""
_ROUNDINGS = 4
"""How many times its first gap an engine may be off by rounding alone."""


def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights in the checkpoint's names; adapters are added to what they adapt, in copies."""
    adapted: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
    }
    for name, array in model.state_dict(keep_vars=False).items():
        owner = next((prefix for prefix in adapted if name.startswith(f"{prefix}.")), None)
        if owner is None:
            yield name, array
            continue
        rest = name.removeprefix(f"{owner}.base_layer.")
        if rest == name:  # a part of the adapter
            continue
        yield f"{owner}.{rest}", _merged(adapted[owner], array) if rest == "weight" else array


@torch.no_grad()
def _merged(layer: nn.Module, weight: Tensor) -> Tensor:
    merged = weight
    for adapter in layer.active_adapters:  # type: ignore[union-attr]
        merged = merged + layer.get_delta_weight(adapter).to(weight)  # type: ignore[operator]
    return merged


@torch.no_grad()
def trainer_logprobs(
    student: nn.Module,
    sequences: Sequences,
    autocast: Autocast,
    *,
    temperature: float = 1.0,
    ids: int | None = None,
) -> list[list[float]]:
    """log softmax(logits / temperature) of each token but the first, over so many ids; None: all rows of the head."""
    device = next(student.parameters()).device
    found = []
    with evaluating(student), autocast():
        for sequence in sequences:
            tokens = torch.tensor([sequence], device=device)
            logits = student(input_ids=tokens, use_cache=False).logits[0, :-1, :ids].float()
            logprobs = (logits / temperature).log_softmax(dim=-1)
            found.append(logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What a comparison found, in nats, means over tokens."""

    gap: float
    """|engine − trainer|."""
    change: float
    """|trainer now − trainer when the engine was last shown to follow|: what a stale engine would be off by."""
    noise: float
    """The gap right after the engine was built from the same weights."""
    in_sync: bool

    def __str__(self) -> str:
        return (
            f"log-probabilities differ by {self.gap:.2g} nats on average; the weights' own change is "
            f"{self.change:.2g}, the engine's rounding {self.noise:.2g}"
        )


class SyncCheck:
    """Compares an engine with the trainer on fixed sequences.

    In sync means that the gap is within `tolerance` and within four times the engine's own rounding. What stays behind
    by less than that cannot be seen yet; it adds up over steps until it can.
    """

    def __init__(self, sequences: Sequences, tolerance: float) -> None:
        self.sequences = [sequence for sequence in sequences if len(sequence) > 1]
        self._tolerance = tolerance
        self._anchor: list[float] | None = None
        self._noise = _ROUNDING

    def start(self, trainer: Sequence[Sequence[float]], engine: Sequence[Sequence[float]]) -> SyncReport:
        """The comparison of an engine that was just built from the trainer's weights."""
        ours, theirs = _flat(trainer), _flat(engine)
        gap = _distance(ours, theirs)
        self._noise = max(gap, _ROUNDING)
        self._anchor = ours
        return SyncReport(gap=gap, change=0.0, noise=self._noise, in_sync=gap <= self._tolerance)

    def compare(self, trainer: Sequence[Sequence[float]], engine: Sequence[Sequence[float]]) -> SyncReport:
        """The comparison after a sync."""
        assert self._anchor is not None, "start comes first"
        ours, theirs = _flat(trainer), _flat(engine)
        gap, change = _distance(ours, theirs), _distance(ours, self._anchor)
        in_sync = gap <= min(self._tolerance, _ROUNDINGS * self._noise)
        if in_sync and change > 2 * _ROUNDINGS * self._noise:
            self._anchor = ours
        return SyncReport(gap=gap, change=change, noise=self._noise, in_sync=in_sync)


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    assert len(one) == len(other)
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(1, len(one))
