"""What a fused pass cannot be asked for is refused before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stableopd.fused.records import Divergence, Projected, SampledTerm, SupportTerm, Tail, Term
from stableopd.heads import LinearHead
from stableopd.losses import SupportKind
from stableopd.losses._numerics import check_choice, check_share


def check_fused(
    student: Projected,
    token_ids: Tensor,
    terms: Sequence[Term],
    others: Mapping[str, Projected],
    temperature: float,
    topk: int,
    chunk_rows: int | None,
) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need a temperature above 0")
    if topk < 0 or (chunk_rows is not None and chunk_rows < 1):
        raise ValueError(
            f"topk is {topk} and chunk_rows {chunk_rows}; topk must be 0 (none) or more, chunk_rows None (as memory "
            "allows) or 1 and more"
        )
    num_tokens, vocab_size = len(student.states), student.head.vocab_size
    _check_states("the student", student, num_tokens)
    _check_shape("token_ids", token_ids, (num_tokens,))
    _check_ids("token_ids", token_ids, vocab_size)
    for name, other in others.items():
        if other.head.vocab_size != vocab_size:
            raise ValueError(
                f"the student's head is cut to {vocab_size} ids and that of {name} to "
                f"{other.head.vocab_size}; cut both to the common vocabulary"
            )
        _check_states(name, other, num_tokens)
    names = [term.name for term in terms]
    for term in terms:
        known_beforehand = isinstance(term, SupportTerm) and term.ids is not None
        needs_other = not isinstance(term, SampledTerm) and not known_beforehand
        if (term.other or needs_other) and term.other not in others:
            raise ValueError(f"term {term.name} compares with {term.other!r}, which is not among {sorted(others)}")
        if names.count(term.name) > 1:
            raise ValueError(f"two terms are named {term.name}; their values would be one another's")
        _check_term(term, num_tokens, vocab_size)


def _check_term(term: Term, num_tokens: int, vocab_size: int) -> None:
    what = f"term {term.name}:"
    _check_shape(f"{what} weight", term.weight, (num_tokens,))
    if isinstance(term, SampledTerm):
        return
    check_choice(f"{what} divergence", term.divergence, Divergence)
    if term.divergence == "jsd":
        check_share(f"{what} beta", term.beta, "the other model's share of the mixture")
    if term.divergence == "mixed_kl":
        check_share(f"{what} forward_weight", term.forward_weight, "the share of KL(other ‖ student)")
    if not isinstance(term, SupportTerm):
        return
    check_choice(f"{what} tail", term.tail, Tail)
    if (term.ids is None) != (term.logprobs is None):
        raise ValueError(f"{what} ids and logprobs belong together: give both, or neither with other, kind and k")
    if term.ids is not None and term.logprobs is not None:
        shape = (num_tokens, term.ids.shape[-1]) if term.ids.dim() == 2 else (num_tokens, "K")
        _check_shape(f"{what} ids", term.ids, shape)
        _check_shape(f"{what} logprobs", term.logprobs, shape)
        _check_ids(f"{what} ids", term.ids, vocab_size)
        return
    check_choice(f"{what} kind", term.kind, SupportKind)
    if term.k < 1:
        raise ValueError(f"{what} k is {term.k}; a support needs at least one candidate")


def _check_states(name: str, model: Projected, num_tokens: int) -> None:
    width = model.head.weight.shape[1] if isinstance(model.head, LinearHead) else model.states.shape[-1]
    _check_shape(f"{name}: states", model.states, (num_tokens, width))


def _check_shape(name: str, array: Tensor, shape: tuple[object, ...]) -> None:
    if array.shape != shape:
        wanted = str(shape).replace("'", "")
        raise ValueError(
            f"{name} is {tuple(array.shape)} and must be {wanted}: one row for each of the student's states, whose "
            "width is that of the head"
        )


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} are {ids.dtype}; token ids are torch.int64, so convert them with .long()")
    if not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} go from {low} to {high}, but the head has the ids 0 to {vocab_size - 1}; leave padding out of the "
            "packed tokens, and cut the heads to the tokenizer's vocabulary, not below"
        )
