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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stableopd.heads import Head, LinearHead
from stableopd.losses import SupportKind, candidate_set, support_divergence
from stableopd.losses._numerics import IMPOSSIBLE, check_choice, check_share

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "mixed_kl"]
Tail = Literal["renormalise", "bucket"]

_CHUNK_ELEMENTS = 2**23
"""Logits of a chunk, 32 MiB in float32, where the vocabulary is small enough for `_MIN_ROWS`."""
_MIN_ROWS = 256
"""Fewer tokens a chunk would make the projection inefficient."""
_LEAST_LOGIT = -1e30
"""In place of −inf where a model forbids a token by itself: 0 · −inf would be no number."""
_GROUP = 2
"""Chunks whose gradients, rounded to a narrow dtype, go through the matrix products of the backward pass together:
each time the head's gradient, which is large, is walked over once."""
_TILE_ROWS = 8_192
"""Rows of the head's gradient that are summed at a time where the arithmetic is not float32."""


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
    _check(student, token_ids, terms, others, temperature, topk, chunk_rows)
    wanted = _wants_gradient(student) and bool(terms)
    with torch.no_grad():
        run = _Pass(student, token_ids, terms, others, temperature, entropy, topk, wanted, chunk_rows)
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


def _check(
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


@dataclass(slots=True)
class _Distribution:
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
class _Chunk:
    """One chunk of tokens: the student's distribution and the gradient that gathers on it."""

    rows: slice
    student: _Distribution
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


class _Workspace:
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


class _Pass:
    """One fused pass and its results."""

    def __init__(
        self,
        student: Projected,
        token_ids: Tensor,
        terms: Sequence[Term],
        others: Mapping[str, Projected],
        temperature: float,
        entropy: bool,
        topk: int,
        with_gradient: bool,
        chunk_rows: int | None,
    ) -> None:
        states = student.states
        self.student, self.token_ids, self.terms, self.others = student, token_ids, terms, others
        self.with_gradient = with_gradient
        self.num_tokens, self.vocab_size = states.shape[0], student.head.vocab_size
        self.rows = max(1, min(self.num_tokens, chunk_rows or max(_MIN_ROWS, _CHUNK_ELEMENTS // self.vocab_size)))
        self.dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        self.device = states.device
        self._workspace = _Workspace(self.rows, self.vocab_size, self.dtype, self.device, temperature)
        self.loss = torch.zeros((), dtype=self.dtype, device=self.device)
        self.logprobs = self._per_token()
        self.entropy = self._per_token() if entropy else None
        self.topk = self._topk_arrays(min(topk, self.vocab_size)) if topk else None
        self.values = {term.name: self._per_token() for term in terms}
        self.other_logprobs = {name: self._per_token() for name in others}
        projected = {"": student, **others}
        self._heads = {name: _Projector(model, self._workspace) for name, model in projected.items()}
        self._backward = _HeadGradient(self._heads[""], self._workspace) if with_gradient else None

    @property
    def gradients(self) -> list[Tensor | None]:
        assert self._backward is not None
        return self._backward.results()

    def run(self) -> None:
        for start in range(0, self.num_tokens, self.rows):
            chunk = self._student_chunk(slice(start, min(start + self.rows, self.num_tokens)))
            for term in self.terms:
                if isinstance(term, SampledTerm) and not term.other:
                    self._sampled(chunk, term, None)
            for number, name in enumerate(self.others):
                self._compare(chunk, name, final=number == len(self.others) - 1)
            for term in self.terms:
                if isinstance(term, SupportTerm) and term.ids is not None:
                    self._support(chunk, term, None)
            if self._backward is not None:
                self._backward.add(chunk)
        if self._backward is not None:
            self._backward.flush()

    def buffer(self, name: str, num_rows: int) -> Tensor:
        return self._workspace.buffer(name, num_rows)

    def _per_token(self) -> Tensor:
        return torch.zeros(self.num_tokens, dtype=self.dtype, device=self.device)

    def _topk_arrays(self, k: int) -> tuple[Tensor, Tensor]:
        shape = (self.num_tokens, k)
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        return ids, torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _student_chunk(self, rows: slice) -> _Chunk:
        student = self._distribution("", rows, "student", "s")
        self.logprobs[rows] = self._at_token(student, rows)
        if self.entropy is not None:
            surprise = torch.sub(student.lse, student.logits, out=self.buffer("product", len(student.logits)))
            self.entropy[rows] = surprise.mul_(student.p).sum(dim=-1)
        if self.topk is not None:
            top = student.logits.topk(self.topk[0].shape[-1], dim=-1)
            self.topk[0][rows], self.topk[1][rows] = top.indices, top.values - student.lse
        return _Chunk(rows=rows, student=student)

    def _distribution(self, model: str, rows: slice, logits_buffer: str, p_buffer: str) -> _Distribution:
        logits = self._heads[model].tempered_logits(rows, logits_buffer)
        p = torch.softmax(logits, dim=-1, out=self.buffer(p_buffer, len(logits)))
        # the likeliest token has a probability of at least 1/V, so its logarithm is safe
        lse = logits.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log()
        return _Distribution(logits=logits, p=p, lse=lse)

    def _at_token(self, distribution: _Distribution, rows: slice) -> Tensor:
        return distribution.logprobs_at(self.token_ids[rows].unsqueeze(-1)).squeeze(-1)

    def _expectation(self, p: Tensor, values: Tensor) -> Tensor:
        """Σ_v p(v) values(v): [c, V] -> [c], in a buffer of its own."""
        return torch.mul(p, values, out=self.buffer("product", len(p))).sum(dim=-1)

    def _sampled(self, chunk: _Chunk, term: SampledTerm, others: Tensor | None) -> None:
        logprobs, weight = self.logprobs[chunk.rows], term.weight[chunk.rows]
        value, u = self._differentiate(lambda x: term.loss(x, chunk.rows, others), logprobs, weight)
        self._record(term, chunk.rows, value, weight)
        if u is not None:
            chunk.add_sparse(self.token_ids[chunk.rows].unsqueeze(-1), u.unsqueeze(-1))

    def _compare(self, chunk: _Chunk, name: str, *, final: bool) -> None:
        """Every term that needs the other model `name`, from one projection of it; `final`: no other comes after."""
        dense = [term for term in self.terms if isinstance(term, DivergenceTerm) and term.other == name]
        needs_p = any(term.divergence != "reverse_kl" for term in dense)
        other = self._distribution(name, chunk.rows, "other", "t" if needs_p else "product")
        at_token = self.other_logprobs[name][chunk.rows] = self._at_token(other, chunk.rows)
        for term in self.terms:
            if isinstance(term, SampledTerm) and term.other == name:
                self._sampled(chunk, term, at_token)
            if isinstance(term, SupportTerm) and term.ids is None and term.other == name:
                self._support(chunk, term, other)
        for number, term in enumerate(dense, start=1):
            last = number == len(dense)
            self._divergence(chunk, term, other, last=last, final=final and last)

    def _support(self, chunk: _Chunk, term: SupportTerm, other: _Distribution | None) -> None:
        weight = term.weight[chunk.rows]
        if other is None:
            assert term.ids is not None
            assert term.logprobs is not None
            ids, known = term.ids[chunk.rows], term.logprobs[chunk.rows].to(self.dtype)
            member = torch.ones_like(ids, dtype=torch.bool)
        else:
            ids, member = candidate_set(chunk.student.logits, other.logits, term.k, term.kind)
            known = other.logprobs_at(ids)
        value, u = self._differentiate(
            lambda x: support_divergence(x, known, member, term.divergence, term.tail, term.beta, term.forward_weight),
            chunk.student.logprobs_at(ids),
            weight,
        )
        self._record(term, chunk.rows, value, weight)
        if u is not None:
            chunk.add_sparse(ids, u)

    def _divergence(
        self, chunk: _Chunk, term: DivergenceTerm, other: _Distribution, *, last: bool, final: bool
    ) -> None:
        """Value and gradient of a divergence over the vocabulary.

        The last one of another model may spoil its logits; the final one of all may keep the buffers.
        """
        weight = term.weight[chunk.rows].to(self.dtype).unsqueeze(-1)
        student = chunk.student
        spare = other.logits if last else self.buffer("work", len(other.logits))
        if term.divergence == "jsd":
            value = self._jsd(chunk, term.beta, weight, other)
        else:
            forward = {"forward_kl": 1.0, "mixed_kl": term.forward_weight}.get(term.divergence, 0.0)
            # Normalised before it is weighed: Σ p is 1 up to rounding only, which a large constant would multiply.
            delta = torch.sub(student.logits, other.logits, out=spare).sub_(student.lse - other.lse)
            value = torch.zeros_like(self.logprobs[chunk.rows])
            if forward:
                value = value - forward * self._expectation(other.p, delta)
                self._pull(chunk, other.p, forward * weight, keep=final)
            if forward < 1:
                mean = self._expectation(student.p, delta)
                value = value + (1 - forward) * mean
                self._tilt(chunk, delta, mean, (1 - forward) * weight, keep=final)
        self._record(term, chunk.rows, value, term.weight[chunk.rows])

    def _jsd(self, chunk: _Chunk, beta: float, weight: Tensor, other: _Distribution) -> Tensor:
        """β KL(T ‖ M) + (1 − β) KL(S ‖ M), M = β T + (1 − β) S."""
        student = chunk.student
        if beta in (0.0, 1.0):
            return torch.zeros_like(self.logprobs[chunk.rows])
        log_m = torch.mul(other.p, beta, out=self.buffer("mixture", len(other.p)))
        log_m.add_(student.p, alpha=1 - beta).clamp_(min=torch.finfo(self.dtype).tiny).log_()
        gap = torch.sub(other.logits, other.lse, out=self.buffer("gap", len(log_m))).sub_(log_m)
        value = beta * self._expectation(other.p, gap)
        torch.sub(student.logits, student.lse, out=gap).sub_(log_m)
        mean = self._expectation(student.p, gap)
        value = value + (1 - beta) * mean
        self._tilt(chunk, gap, mean, (1 - beta) * weight, keep=False)
        return value

    def _tilt(self, chunk: _Chunk, delta: Tensor, mean: Tensor, weight: Tensor, *, keep: bool) -> None:
        """Adds weight · s ∘ (δ − E_s δ) to the gradient; `keep`: nobody else needs the array δ."""
        if not self.with_gradient:
            return
        chunk.add_share(-weight * mean.unsqueeze(-1))
        if chunk.tilt is None:
            chunk.tilt = torch.mul(delta, weight, out=delta if keep else self.buffer("tilt", len(delta)))
        else:
            chunk.tilt.addcmul_(delta, weight)

    def _pull(self, chunk: _Chunk, t: Tensor, weight: Tensor, *, keep: bool) -> None:
        """Adds weight · (s − t) to the gradient; `keep`: nobody else needs the array t."""
        if not self.with_gradient:
            return
        chunk.add_share(weight)
        if chunk.pull is None:
            chunk.pull = torch.mul(t, -weight, out=t if keep else self.buffer("pull", len(t)))
        else:
            chunk.pull.addcmul_(t, -weight)

    def _differentiate(
        self, loss: Callable[[Tensor], Tensor], logprobs: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(losses [c], ∂(Σ weight · loss)/∂logprobs), by autograd on a few entries per token."""
        if not self.with_gradient:
            return loss(logprobs), None
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            value = loss(leaf)
            kept = torch.where(weight != 0, value, torch.zeros_like(value))
            (u,) = torch.autograd.grad((kept * weight).sum(), leaf)
        unread = (weight == 0).view(-1, *[1] * (u.dim() - 1))
        return value.detach(), u.masked_fill(unread, 0.0)

    def _record(self, term: Term, rows: slice, value: Tensor, weight: Tensor) -> None:
        value = torch.where(weight != 0, value, torch.zeros_like(value))
        value = value.masked_fill(value > -IMPOSSIBLE, torch.inf)
        self.values[term.name][rows] = value
        self.loss += (value * weight).sum()


class _Projector:
    """Logits of one model, chunk by chunk."""

    def __init__(self, projected: Projected, workspace: _Workspace) -> None:
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


class _HeadGradient:
    """Gradients of the student's states and head, summed over chunks."""

    def __init__(self, projector: _Projector, workspace: _Workspace) -> None:
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

    def add(self, chunk: _Chunk) -> None:
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
            capacity = min(_GROUP * work.rows, self._projector.states.shape[0])
            shape = (capacity, work.vocab_size)
            self._narrow = torch.empty(shape, dtype=self._projector.dtype, device=work.device)
        start = rows.start - self._group[0].start if self._group else 0
        self._narrow[start : start + len(grad)] = grad
        self._group.append(rows)
        if len(self._group) == _GROUP:
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

    def _through_softcap(self, grad: Tensor, chunk: _Chunk, head: LinearHead) -> None:
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
