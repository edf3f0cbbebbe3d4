"""The pass itself: every chunk projected once, every term and its gradient taken from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stableopd.fused.chunks import Chunk, Distribution, Workspace
from stableopd.fused.projection import HeadGradient, Projector
from stableopd.fused.records import DivergenceTerm, Projected, SampledTerm, SupportTerm, Term
from stableopd.losses import candidate_set, support_divergence
from stableopd.losses._numerics import IMPOSSIBLE

CHUNK_ELEMENTS = 2**23
"""Logits of a chunk, 32 MiB in float32, where the vocabulary is small enough for `MIN_ROWS`."""
MIN_ROWS = 256
"""Fewer tokens a chunk would make the projection inefficient."""


class FusedPass:
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
        self.rows = max(1, min(self.num_tokens, chunk_rows or max(MIN_ROWS, CHUNK_ELEMENTS // self.vocab_size)))
        self.dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        self.device = states.device
        self._workspace = Workspace(self.rows, self.vocab_size, self.dtype, self.device, temperature)
        self.loss = torch.zeros((), dtype=self.dtype, device=self.device)
        self.logprobs = self._per_token()
        self.entropy = self._per_token() if entropy else None
        self.topk = self._topk_arrays(min(topk, self.vocab_size)) if topk else None
        self.values = {term.name: self._per_token() for term in terms}
        self.other_logprobs = {name: self._per_token() for name in others}
        projected = {"": student, **others}
        self._heads = {name: Projector(model, self._workspace) for name, model in projected.items()}
        self._backward = HeadGradient(self._heads[""], self._workspace) if with_gradient else None

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

    def _student_chunk(self, rows: slice) -> Chunk:
        student = self._distribution("", rows, "student", "s")
        self.logprobs[rows] = self._at_token(student, rows)
        if self.entropy is not None:
            surprise = torch.sub(student.lse, student.logits, out=self.buffer("product", len(student.logits)))
            self.entropy[rows] = surprise.mul_(student.p).sum(dim=-1)
        if self.topk is not None:
            top = student.logits.topk(self.topk[0].shape[-1], dim=-1)
            self.topk[0][rows], self.topk[1][rows] = top.indices, top.values - student.lse
        return Chunk(rows=rows, student=student)

    def _distribution(self, model: str, rows: slice, logits_buffer: str, p_buffer: str) -> Distribution:
        logits = self._heads[model].tempered_logits(rows, logits_buffer)
        p = torch.softmax(logits, dim=-1, out=self.buffer(p_buffer, len(logits)))
        # the likeliest token has a probability of at least 1/V, so its logarithm is safe
        lse = logits.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log()
        return Distribution(logits=logits, p=p, lse=lse)

    def _at_token(self, distribution: Distribution, rows: slice) -> Tensor:
        return distribution.logprobs_at(self.token_ids[rows].unsqueeze(-1)).squeeze(-1)

    def _expectation(self, p: Tensor, values: Tensor) -> Tensor:
        """Σ_v p(v) values(v): [c, V] -> [c], in a buffer of its own."""
        return torch.mul(p, values, out=self.buffer("product", len(p))).sum(dim=-1)

    def _sampled(self, chunk: Chunk, term: SampledTerm, others: Tensor | None) -> None:
        logprobs, weight = self.logprobs[chunk.rows], term.weight[chunk.rows]
        value, u = self._differentiate(lambda x: term.loss(x, chunk.rows, others), logprobs, weight)
        self._record(term, chunk.rows, value, weight)
        if u is not None:
            chunk.add_sparse(self.token_ids[chunk.rows].unsqueeze(-1), u.unsqueeze(-1))

    def _compare(self, chunk: Chunk, name: str, *, final: bool) -> None:
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

    def _support(self, chunk: Chunk, term: SupportTerm, other: Distribution | None) -> None:
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

    def _divergence(self, chunk: Chunk, term: DivergenceTerm, other: Distribution, *, last: bool, final: bool) -> None:
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

    def _jsd(self, chunk: Chunk, beta: float, weight: Tensor, other: Distribution) -> Tensor:
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

    def _tilt(self, chunk: Chunk, delta: Tensor, mean: Tensor, weight: Tensor, *, keep: bool) -> None:
        """Adds weight · s ∘ (δ − E_s δ) to the gradient; `keep`: nobody else needs the array δ."""
        if not self.with_gradient:
            return
        chunk.add_share(-weight * mean.unsqueeze(-1))
        if chunk.tilt is None:
            chunk.tilt = torch.mul(delta, weight, out=delta if keep else self.buffer("tilt", len(delta)))
        else:
            chunk.tilt.addcmul_(delta, weight)

    def _pull(self, chunk: Chunk, t: Tensor, weight: Tensor, *, keep: bool) -> None:
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
