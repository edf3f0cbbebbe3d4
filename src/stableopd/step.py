"""One optimizer update: rows of rollouts and gold in, weighted terms, one backward pass per micro-batch.

The loss of a minibatch is the sum of the active terms, each divided by its own total of token weights over
all micro-batches and processes, fixed before the first backward pass:

    distill    coef · Σ_rollout tokens  clipped policy loss with A = log T − log S_old      / number of rollout tokens
    gold       coef · Σ_gold tokens     weight · (−log S)                                  / Σ weight
    reference  coef · Σ_rollout tokens  KL(student ‖ initial student)                      / number of rollout tokens

Source: Luo et al. 2026, arXiv 2604.08527 (StableOPD). How rows are cut into micro-batches changes nothing but
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stableopd.config import ObjectiveConfig, OptimizerConfig
from stableopd.losses import (
    clipped_policy_loss,
    kl_penalty,
    reduce_tokens,
    reverse_kl,
    sampled_reverse_kl,
    token_entropy,
    token_logprobs,
)
from stableopd.scoring import Autocast, completion_logits
from stableopd.tokens import budget_batches, pad_left, pad_right
from stableopd.types import Example, LossPart, LossTerms, RolloutBatch, TokenScores

_PIECE_ELEMENTS = 2**27
"""Logits turned to float32 at a time: half a GiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """Rollouts and golden solutions side by side. A row is one or the other; its weights say which."""

    prompt_ids: Tensor
    """[B, P] int64, padded on the left."""
    prompt_mask: Tensor
    completion_ids: Tensor
    """[B, T] int64, padded on the right."""
    completion_mask: Tensor
    old_logprobs: Tensor
    """[B, T] of the policy that drew the tokens; 0 on gold."""
    teacher_logprobs: Tensor
    """[B, T]; 0 on gold."""
    rollout_weight: Tensor
    """[B, T] float: 1 on rollout tokens, else 0."""
    gold_weight: Tensor
    """[B, T] float: the loss weight of golden tokens, else 0."""
    group: tuple[int, ...]
    """Prompt that each row belongs to, by its position in the step's prompts."""

    def __len__(self) -> int:
        return len(self.group)

    def select(self, rows: Sequence[int]) -> TrainingRows:
        """Some of the rows, without the padding that they have in common."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.completion_ids.device)
        prompt_width = int(self.prompt_mask[index].sum(dim=1).max()) if rows else 0
        width = int(self.completion_mask[index].sum(dim=1).max()) if rows else 0
        start = self.prompt_ids.shape[1] - prompt_width
        return TrainingRows(
            prompt_ids=self.prompt_ids[index, start:],
            prompt_mask=self.prompt_mask[index, start:],
            completion_ids=self.completion_ids[index, :width],
            completion_mask=self.completion_mask[index, :width],
            old_logprobs=self.old_logprobs[index, :width],
            teacher_logprobs=self.teacher_logprobs[index, :width],
            rollout_weight=self.rollout_weight[index, :width],
            gold_weight=self.gold_weight[index, :width],
            group=tuple(self.group[row] for row in rows),
        )

    def without_weight(self) -> TrainingRows:
        """The same rows, counting nothing: what a process brings to an update in which it has no prompt."""
        nothing = torch.zeros_like(self.gold_weight)
        return replace(self, rollout_weight=nothing, gold_weight=nothing)

    def micro_batches(self, token_budget: int) -> Iterator[TrainingRows]:
        """All rows, in batches of like length with at most `token_budget` tokens, padding included.

        Rollouts and gold come in batches of their own, so that neither pays for the other's terms.
        """
        prompts = self.prompt_mask.sum(dim=1).tolist()
        completions = self.completion_mask.sum(dim=1).tolist()
        is_gold = self.gold_weight.any(dim=1).tolist()
        for kind in (False, True):
            of_kind = [row for row, gold in enumerate(is_gold) if gold == kind]
            lengths = [prompts[row] for row in of_kind], [completions[row] for row in of_kind]
            for batch in budget_batches(*lengths, token_budget):
                yield self.select([of_kind[row] for row in batch])


def rollout_rows(rollouts: RolloutBatch, scores: TokenScores | None, group: Sequence[int]) -> TrainingRows:
    """Rows for the distillation and reference terms. `group[i]` is the position of prompt i in the whole step."""
    zeros = torch.zeros_like(rollouts.sampling_logprobs)
    return TrainingRows(
        prompt_ids=rollouts.prompt_ids,
        prompt_mask=rollouts.prompt_mask,
        completion_ids=rollouts.completion_ids,
        completion_mask=rollouts.completion_mask,
        old_logprobs=rollouts.sampling_logprobs,
        teacher_logprobs=zeros if scores is None else scores.sampled_logprobs,
        rollout_weight=rollouts.completion_mask.float(),
        gold_weight=zeros,
        group=tuple(group[index] for index in rollouts.prompt_index),
    )


def gold_rows(examples: Sequence[Example], group: Sequence[int], pad_id: int, device: Any = None) -> TrainingRows:
    """Rows for the gold term: one golden solution for each example, weighted by its `gold_weights`."""
    gold = [example.gold_ids or () for example in examples]
    weights = [
        (1.0,) * len(ids) if example.gold_weights is None else example.gold_weights
        for example, ids in zip(examples, gold, strict=True)
    ]
    prompt_ids, prompt_mask = pad_left([example.prompt_ids for example in examples], pad_id, device)
    completion_ids, completion_mask = pad_right(gold, pad_id, device=device)
    gold_weight, _ = pad_right(weights, 0.0, torch.float32, device)
    zeros = torch.zeros_like(gold_weight)
    return TrainingRows(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        old_logprobs=zeros,
        teacher_logprobs=zeros,
        rollout_weight=zeros,
        gold_weight=gold_weight,
        group=tuple(group),
    )


def concat_rows(parts: Sequence[TrainingRows], pad_id: int) -> TrainingRows:
    """All rows of `parts`, padded to one width."""
    prompt_width = max(part.prompt_ids.shape[1] for part in parts)
    width = max(part.completion_ids.shape[1] for part in parts)

    def left(name: str, fill: float) -> Tensor:
        return torch.cat([_widen(getattr(p, name), prompt_width, fill, left=True) for p in parts])

    def right(name: str, fill: float) -> Tensor:
        return torch.cat([_widen(getattr(p, name), width, fill, left=False) for p in parts])

    return TrainingRows(
        prompt_ids=left("prompt_ids", pad_id),
        prompt_mask=left("prompt_mask", False),
        completion_ids=right("completion_ids", pad_id),
        completion_mask=right("completion_mask", False),
        old_logprobs=right("old_logprobs", 0.0),
        teacher_logprobs=right("teacher_logprobs", 0.0),
        rollout_weight=right("rollout_weight", 0.0),
        gold_weight=right("gold_weight", 0.0),
        group=tuple(position for part in parts for position in part.group),
    )


def minibatches(
    rows: TrainingRows, num_prompts: int, settings: OptimizerConfig, key: Sequence[int]
) -> list[TrainingRows]:
    """The rows of each update of a step.

    In every epoch the step's `num_prompts` prompts are dealt out anew, by `key`, to `num_minibatches` updates; the
    rollouts of a prompt and its golden solution stay together. A process without a prompt in an update brings
    a row without weight, so that all processes make the same number of updates.
    """
    dealt = []
    for epoch in range(settings.num_epochs):
        order = np.random.default_rng([*key, epoch]).permutation(num_prompts)
        for chosen in np.array_split(order, settings.num_minibatches):
            prompts = set(chosen.tolist())
            picked = [row for row, position in enumerate(rows.group) if position in prompts]
            dealt.append(rows.select(picked) if picked else rows.select([0]).without_weight())
    return dealt


def _widen(array: Tensor, width: int, fill: float, left: bool) -> Tensor:
    missing = width - array.shape[1]
    return nn.functional.pad(array, (missing, 0) if left else (0, missing), value=fill)


def loss_terms(
    student: nn.Module,
    rows: TrainingRows,
    objective: ObjectiveConfig,
    *,
    totals: Mapping[str, float],
    temperature: float,
    vocab_size: int,
    reference: nn.Module | None = None,
) -> LossTerms:
    """Every active term on one micro-batch, unreduced, from one forward pass of the student.

    Args:
        totals: weight of all rollout tokens ("rollout") and of all golden tokens ("gold") of the minibatch, over
            all processes.
        temperature: of the rollouts. Distillation and reference terms see softmax(logits / temperature), the
            policy that drew the tokens; the gold term is the likelihood at temperature 1.
        reference: the initial student; needed when `objective.reference.coef` > 0.
    """
    logits = completion_logits(student, rows, vocab_size)
    parts: dict[str, LossPart] = {}
    figures: dict[str, Tensor] = {}
    has_rollouts = objective.needs_rollouts and bool(rows.rollout_weight.any())
    has_gold = objective.needs_gold and bool(rows.gold_weight.any())
    # Rows that count nothing go through every term: all processes must log the same figures.
    if objective.needs_gold and totals["gold"] > 0 and (has_gold or not has_rollouts):
        nll = -_in_pieces(token_logprobs, logits, rows.completion_ids)
        parts["gold"] = LossPart(
            token_loss=nll, weight=rows.gold_weight, denominator=totals["gold"], coef=objective.gold.coef
        )
    if objective.needs_rollouts and totals["rollout"] > 0 and (has_rollouts or not has_gold):
        logprobs = _in_pieces(partial(token_logprobs, temperature=temperature), logits, rows.completion_ids)
        figures = _rollout_figures(logits, logprobs, rows, objective, temperature)
        if objective.distill.coef > 0:
            parts["distill"] = _distill_part(logprobs, rows, objective, totals["rollout"])
        if objective.reference.coef > 0:
            assert reference is not None, "a reference term needs the initial student"
            divergence = _reference_kl(reference, logits, logprobs, rows, objective, temperature, vocab_size)
            parts["reference"] = LossPart(
                token_loss=divergence,
                weight=rows.rollout_weight,
                denominator=totals["rollout"],
                coef=objective.reference.coef,
            )
            figures["reference/kl"] = divergence.detach()
    return LossTerms(parts=parts, figures=figures)


def _distill_part(logprobs: Tensor, rows: TrainingRows, objective: ObjectiveConfig, total: float) -> LossPart:
    advantages = -sampled_reverse_kl(rows.old_logprobs, rows.teacher_logprobs)
    token_loss = clipped_policy_loss(
        logprobs, rows.old_logprobs, advantages, objective.distill.epsilon_low, objective.distill.epsilon_high
    )
    return LossPart(token_loss=token_loss, weight=rows.rollout_weight, denominator=total, coef=objective.distill.coef)


def _reference_kl(
    reference: nn.Module,
    logits: Tensor,
    logprobs: Tensor,
    rows: TrainingRows,
    objective: ObjectiveConfig,
    temperature: float,
    vocab_size: int,
) -> Tensor:
    with torch.no_grad():
        ref_logits = completion_logits(reference, rows, vocab_size)
    if objective.reference.estimator == "exact":
        return _in_pieces(partial(reverse_kl, temperature=temperature), logits, ref_logits)
    with torch.no_grad():
        score = partial(token_logprobs, temperature=temperature)
        ref_logprobs = _in_pieces(score, ref_logits, rows.completion_ids)
    return kl_penalty(logprobs, ref_logprobs)


@torch.no_grad()
def _rollout_figures(
    logits: Tensor, logprobs: Tensor, rows: TrainingRows, objective: ObjectiveConfig, temperature: float
) -> dict[str, Tensor]:
    log_ratio = logprobs - rows.old_logprobs
    ratio = log_ratio.exp()
    outside = (ratio < 1 - objective.distill.epsilon_low) | (ratio > 1 + objective.distill.epsilon_high)
    return {
        "entropy": _in_pieces(partial(token_entropy, temperature=temperature), logits),
        "sampling/logprob_gap": log_ratio.abs(),
        "clip_ratio/region_mean": outside.float(),
    }


def _in_pieces(loss: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """loss(logits, *others) [B, T], a few columns at a time where [B, T, V] is large.

    Float32 copies of the logits, and what the backward pass would keep of them, then exist for one piece at a time.
    """
    num_rows, width, size = logits.shape
    columns = max(1, _PIECE_ELEMENTS // (num_rows * size))
    if columns >= width:
        return loss(logits, *others)
    pieces = zip(*(array.split(columns, dim=1) for array in (logits, *others)), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([loss(*piece) for piece in pieces], dim=1)
    return torch.cat([checkpoint(loss, *piece, use_reentrant=False) for piece in pieces], dim=1)


class Updater:
    """Owns the optimizer and makes updates from rows. Knows nothing of rollouts, teachers or logs."""

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: ObjectiveConfig,
        accelerator: Accelerator,
        *,
        vocab_size: int,
        temperature: float,
        max_grad_norm: float,
        token_budget: int,
        autocast: Autocast = nullcontext,
        reference: nn.Module | None = None,
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self._objective = objective
        self._accelerator = accelerator
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._max_grad_norm = max_grad_norm
        self._token_budget = token_budget
        self._autocast = autocast
        self._reference = reference

    def update(self, rows: TrainingRows, learning_rate: float) -> dict[str, float]:
        """One optimizer step on all `rows` of all processes; returns figures for the log.

        Every process must call it the same number of times; a process may bring rows without any weight.
        An update whose gradient is not finite, or in which no token counts, is not made: `skipped_updates` is 1.
        """
        totals = self._totals(rows)
        if not any(totals.values()):
            return {"skipped_updates": 1.0}
        sums: dict[str, Tensor] = {}
        micro_batches = list(rows.micro_batches(self._token_budget))
        self.student.train()
        for number, micro in enumerate(micro_batches):
            with self._gradient_sync(last=number == len(micro_batches) - 1):
                self._backward(micro, totals, sums)
        grad_norm = nn.utils.clip_grad_norm_(self.student.parameters(), self._max_grad_norm)
        finite = math.isfinite(float(grad_norm))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**self._reduced(sums), "grad_norm": float(grad_norm), "skipped_updates": float(not finite)}

    def _backward(self, micro: TrainingRows, totals: Mapping[str, float], sums: dict[str, Tensor]) -> None:
        with self._autocast():
            terms = loss_terms(
                self.student,
                micro,
                self._objective,
                totals=totals,
                temperature=self._temperature,
                vocab_size=self._vocab_size,
                reference=self._reference,
            )
        loss = torch.zeros((), device=micro.completion_ids.device)
        for name, part in terms.parts.items():
            term = reduce_tokens(part.token_loss, part.weight, part.denominator)
            loss = loss + part.coef * term
            _add(sums, f"loss/{name}", term.detach())
        _add(sums, "loss", loss.detach())
        for name, figure in terms.figures.items():
            _add(sums, name, reduce_tokens(figure, micro.rollout_weight, totals["rollout"]))
        # Gradients are averaged over processes, while the denominators already count all of them.
        (loss * self._accelerator.num_processes).backward()

    def _totals(self, rows: TrainingRows) -> dict[str, float]:
        local = torch.stack([rows.rollout_weight.sum(), rows.gold_weight.sum()]).double()
        rollout, gold = self._accelerator.reduce(local, reduction="sum").tolist()
        return {"rollout": rollout, "gold": gold}

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._accelerator.no_sync(self.student)

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        if not names:
            return {}
        total = self._accelerator.reduce(torch.stack([sums[name].double() for name in names]), reduction="sum")
        return dict(zip(names, total.tolist(), strict=True))


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
