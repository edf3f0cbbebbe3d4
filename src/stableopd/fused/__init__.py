"""The losses from hidden states, the vocabulary never materialised for more than one chunk of tokens.

A chunk of tokens is projected by the student's head once, and by the teacher's and the reference's where a term
needs them; every active term and its gradient come out of that one pass, and the gradient is formed at once, so
nothing of size [tokens, vocabulary] is kept for a backward pass. What is kept is the gradient of the summed loss with
respect to the states [n, H] and the head.

With s the student's distribution and u = ∂loss/∂log s, the gradient with respect to the student's (tempered) logits
is u − s Σ_v u(v). Terms of a few entries (the sampled token, a top-k set) get their u from autograd through the pure
losses; divergences over the whole vocabulary have it in closed form:

    KL(S ‖ T)        s ∘ (δ − E_s δ),                 δ = log s − log t
    KL(T ‖ S)        s − t
    JSD_β            (1 − β) s ∘ (μ − E_s μ),         μ = log s − log(β t + (1 − β) s)

Equal to the unfused losses of `stableopd.losses` to rounding; sums are in float32 (float64 for float64 states).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stableopd.fused.checks import check_fused
from stableopd.fused.records import (
    Divergence,
    DivergenceTerm,
    FusedOutput,
    Projected,
    SampledTerm,
    SupportTerm,
    Tail,
    Term,
)
from stableopd.fused.sweep import FusedPass

__all__ = [
    "Divergence",
    "DivergenceTerm",
    "FusedOutput",
    "Projected",
    "SampledTerm",
    "SupportTerm",
    "Tail",
    "Term",
    "fused_loss",
]


def fused_loss(
    student: Projected,
    token_ids: Tensor,
    terms: Sequence[Term],
    *,
    others: Mapping[str, Projected] | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    topk: int = 0,
    chunk_rows: int | None = None,
) -> FusedOutput:
    """All terms of the loss of n tokens, and its gradient, in one pass over chunks of tokens.

    Args:
        student: states [n, H] and head; the gradient reaches both.
        token_ids: [n] int64, the tokens whose log-probabilities the sampled terms see; below the vocabulary's size.
        terms: what to sum. Gradients of divergences reach the student alone.
        others: the teacher, the reference: states [n, H'] (any width), a head over the same vocabulary.
        temperature: > 0; all distributions are softmax(logits / temperature).
        entropy: whether to return the student's entropy.
        topk: how many of the student's likeliest tokens to return at each position.
        chunk_rows: tokens of a chunk; changes memory and rounding only.

    Raises: ValueError when temperature is not positive, vocabularies or the numbers of rows differ, ids are outside the
        vocabulary, an option of a term is none that there is, a term names a model that is not among `others`, or two
        terms have one name.
    Numerics: the matrix products run in the dtype of the states (under autocast, in autocast's) and round the logits to
        it; what follows is float32, float64 for float64 states. Peak memory beyond the results: a few [chunk, V]
        arrays. A divergence is infinite where one side forbids what the other allows in its direction; the gradient
        is then huge or infinite, and no update can be made of it.
    """
    others = dict(others or {})
    check_fused(student, token_ids, terms, others, temperature, topk, chunk_rows)
    wanted = _wants_gradient(student) and bool(terms)
    with torch.no_grad():
        run = FusedPass(student, token_ids, terms, others, temperature, entropy, topk, wanted, chunk_rows)
        run.run()
    loss = run.loss
    if wanted:
        loss = _WithGradient.apply(loss, run.gradients, student.states, *student.head.parameters())
    return FusedOutput(
        loss=loss,
        values=run.values,
        logprobs=run.logprobs,
        entropy=run.entropy,
        topk=run.topk,
        other_logprobs=run.other_logprobs,
    )


def _wants_gradient(student: Projected) -> bool:
    inputs = (student.states, *student.head.parameters())
    return torch.is_grad_enabled() and any(array.requires_grad for array in inputs)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a fused loss can be differentiated once; compute it again for a second backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        if bool(grad != 1):
            gradients = [None if array is None else array.mul_(grad) for array in gradients]
        return (None, None, *gradients)
