"""What a fused pass is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stableopd.heads import Head
from stableopd.losses import SupportKind

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "mixed_kl"]
Tail = Literal["renormalise", "bucket"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Projected:
    """Hidden states of n tokens and the head that turns them into logits."""

    states: Tensor
    """[n, H]."""
    head: Head


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTerm:
    """A loss of the sampled token's log-probability."""

    name: str
    weight: Tensor
    """[n]: what each token's loss is multiplied by in the sum; 0 leaves it out."""
    loss: Callable[[Tensor, slice, Tensor | None], Tensor]
    """(log-probabilities [c], which tokens, those of `other` [c]) -> per-token losses [c], differentiable."""
    other: str = ""
    """Name of the model whose log-probabilities the loss compares with, if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceTerm:
    """A divergence from another model's distribution over the whole vocabulary."""

    name: str
    weight: Tensor
    """[n]."""
    other: str
    """Name of the other model in `others`."""
    divergence: Divergence
    beta: float = 0.5
    """`jsd`: the other's share of the mixture."""
    forward_weight: float = 0.5
    """`mixed_kl`: weight of KL(other ‖ student)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportTerm:
    """A divergence on a few candidates: the other model's, the student's, or a combination of both top-k sets."""

    name: str
    weight: Tensor
    """[n]."""
    divergence: Divergence
    tail: Tail = "renormalise"
    beta: float = 0.5
    forward_weight: float = 0.5
    ids: Tensor | None = None
    """[n, K] int64 candidates that are known beforehand (a teacher's top-k), with their log-probabilities; else
    they are found in each chunk from `other`, `kind` and `k`."""
    logprobs: Tensor | None = None
    """[n, K] nats."""
    other: str = ""
    kind: SupportKind = "teacher_topk"
    k: int = 0


Term = SampledTerm | DivergenceTerm | SupportTerm


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedOutput:
    """What one pass over n tokens gives. Everything but `loss` is detached."""

    loss: Tensor
    """Scalar: Σ_terms Σ_tokens weight · loss; differentiable in the student's states and head."""
    values: Mapping[str, Tensor]
    """Per term, its loss [n] of each token, in nats; 0 where its weight is 0."""
    logprobs: Tensor
    """[n] log-probability of each token under the student."""
    entropy: Tensor | None
    """[n] entropy of the student."""
    topk: tuple[Tensor, Tensor] | None
    """[n, k] ids of the student's likeliest tokens and their log-probabilities."""
    other_logprobs: Mapping[str, Tensor]
    """Per other model, log-probability [n] of each token."""
