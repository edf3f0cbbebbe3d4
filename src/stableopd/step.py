"""One optimizer update: rows of rollouts and gold in, one fused pass and one backward per micro-batch.

The loss of a minibatch is the sum of the active terms, each the aggregate of its token losses over all micro-batches
and processes, with a denominator that is fixed before the first backward pass:

    distill    coef · mean over rollout tokens of the distillation loss (docs/losses.md)
    reward     coef · mean over rollout tokens of the clipped policy loss with A = group-normalised reward
    reference  coef · mean over rollout tokens of KL(student ‖ initial student)
    gold       coef · Σ_gold tokens weight · (−log S) / Σ weight

Source: Luo et al. 2026, arXiv 2604.08527 (StableOPD). How rows are cut into micro-batches and over processes changes
nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stableopd.distributed import sum_gradients
from stableopd.fused import FusedOutput, Projected, fused_loss
from stableopd.heads import Head, HeadlessModel
from stableopd.objective import ObjectiveConfig
from stableopd.probe import probe_sums
from stableopd.rows import TrainingRows
from stableopd.scoring import Autocast, Scores, Sequences, StatesModel, completion_scores, completion_states
from stableopd.terms import (
    REFERENCE,
    TEACHER,
    coefficients,
    gold_terms,
    rollout_figures,
    rollout_terms,
    token_weights,
    weighted,
)

_ROLLOUT_FIGURES = ("entropy", "sampling/logprob_gap", "clip_ratio/region_mean")

_NO_TOKENS = {"skipped_updates": 1.0, "skipped_updates/no_tokens": 1.0}


class Updater:
    """Owns the optimizer and makes updates from rows. Knows nothing of rollouts, teachers or logs.

    Args:
        student: whose parameters with `requires_grad` are trained.
        sequence_length: the length that `aggregation: sequence_sum` divides by where the objective gives none.
        temperature: of the rollouts. Terms on rollouts see softmax(logits / temperature), the policy that drew the
            tokens; the gold term is the likelihood at temperature 1.
        reference: the initial student; needed when `objective.reference.coef` > 0.
        teacher_head: needed when rows bring the teacher's hidden states.
    """

    def __init__(
        self,
        student: HeadlessModel,
        optimizer: torch.optim.Optimizer,
        objective: ObjectiveConfig,
        accelerator: Accelerator,
        *,
        temperature: float,
        max_grad_norm: float,
        token_budget: int,
        sequence_length: int = 1,
        autocast: Autocast = nullcontext,
        reference: StatesModel | None = None,
        teacher_head: Head | None = None,
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self.objective = objective  # its coefficients may be changed between updates
        self._accelerator = accelerator
        self._temperature = temperature
        self._max_grad_norm = max_grad_norm
        self._token_budget = token_budget
        self._sequence_length = sequence_length
        self._autocast = autocast
        self._reference = reference
        self._teacher_head = teacher_head

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def score(self, rollouts: Sequences, *, entropy: bool = False, topk: int = 0) -> Scores:
        """The student's own figures for its rollouts, before an update."""
        return completion_scores(
            self.student,
            rollouts,
            temperature=self._temperature,
            token_budget=self._token_budget,
            autocast=self._autocast,
            entropy=entropy,
            topk=topk,
        )

    def probe(self, rows: TrainingRows) -> dict[str, float]:
        """The stop probe on golden solutions: means over all processes' `rows`, by metric key."""
        scores = completion_scores(
            self.student, rows, temperature=1.0, token_budget=self._token_budget, autocast=self._autocast
        )
        sums = probe_sums(scores.logprobs[rows.completion_mask], rows.completion_mask)
        *totals, count = self._sum([*sums.values(), float(len(rows))])
        return {name: total / count for name, total in zip(sums, totals, strict=True)} if count else {}

    def update(
        self, rows: TrainingRows, learning_rate: float, teacher_logprobs: Tensor | None = None
    ) -> dict[str, float]:
        """One optimizer step on all `rows` of all processes; returns figures for the log.

        Every process must call it the same number of times; a process may bring no rows at all. An update whose
        gradient is not finite, or in which no token counts, is not made: `skipped_updates` is 1, and
        `skipped_updates/no_tokens` tells the second from the first.

        Args:
            teacher_logprobs: [rollouts, T], filled in with the teacher's log-probability of each sampled token where
                the teacher's whole distribution passes by here.
        """
        coefs = coefficients(self.objective)
        weights = token_weights(rows, self.objective, self._sequence_length)
        shares = self._sum([*(weights[name][1] for name in coefs), float(rows.rollout_mask.sum())])
        totals = dict(zip((*coefs, "rollout"), shares, strict=True))
        nothing_counts = not any(totals[name] for name in coefs)
        if nothing_counts and teacher_logprobs is None:
            return {**_NO_TOKENS}
        rows = weighted(rows, weights, totals, coefs)
        names = [f"loss/{name}" for name in coefs if totals[name] > 0]
        names += _ROLLOUT_FIGURES if totals["rollout"] and self.objective.needs_rollouts else ()
        names += ["reference/kl"] if "loss/reference" in names else []
        sums = dict.fromkeys(names, 0.0)
        self.student.train()
        for micro in rows.micro_batches(self._token_budget, packed=self.student.packs):
            self._backward(micro, coefs, totals, sums, teacher_logprobs)
        figures = dict(zip(sums, self._sum(list(sums.values())), strict=True))
        if nothing_counts:  # but the teacher's log-probabilities were wanted
            self.optimizer.zero_grad(set_to_none=True)
            return {**figures, **_NO_TOKENS}
        sum_gradients(self.trained)
        grad_norm = float(nn.utils.clip_grad_norm_(self.trained, self._max_grad_norm))
        finite = math.isfinite(grad_norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum(coef * figures.get(f"loss/{name}", 0.0) for name, coef in coefs.items())
        skipped = {"skipped_updates": float(not finite), "skipped_updates/no_tokens": 0.0}
        return {**figures, "loss": loss, "grad_norm": grad_norm, **skipped}

    def _backward(
        self,
        micro: TrainingRows,
        coefs: dict[str, float],
        totals: dict[str, float],
        sums: dict[str, float],
        teacher_logprobs: Tensor | None,
    ) -> None:
        is_gold = not bool(micro.rollout_mask.any())
        if (is_gold and "gold" not in coefs) or (not is_gold and not self.objective.needs_rollouts):
            return
        with self._autocast():
            states = completion_states(self.student, micro)
            passed = self._gold_pass(states, micro) if is_gold else self._rollout_pass(states, micro)
        for name, values in passed.values.items():
            weight = getattr(micro, f"{name}_weight")[micro.completion_mask]
            if f"loss/{name}" in sums:
                sums[f"loss/{name}"] += float((values * weight).sum()) / coefs[name]
        if not is_gold:
            assert passed.entropy is not None
            figures = rollout_figures(micro, passed.logprobs, passed.entropy, self.objective.distill)
            if "reference/kl" in sums:
                figures["reference/kl"] = passed.values["reference"]
            for name, figure in figures.items():
                sums[name] += float(figure.double().sum()) / totals["rollout"]
            if teacher_logprobs is not None and TEACHER in passed.other_logprobs:
                row, column = micro.completion_mask.nonzero(as_tuple=True)
                teacher_logprobs[micro.index[row], column] = passed.other_logprobs[TEACHER].to(teacher_logprobs)
        passed.loss.backward()

    def _gold_pass(self, states: Tensor, micro: TrainingRows) -> FusedOutput:
        student = Projected(states=states, head=self.student.head)
        return fused_loss(student, micro.completion_ids[micro.completion_mask], gold_terms(micro))

    def _rollout_pass(self, states: Tensor, micro: TrainingRows) -> FusedOutput:
        others: dict[str, Projected] = {}
        if self.objective.needs_teacher and self.objective.distill.needs_states:
            assert self._teacher_head is not None, "the teacher's states come with its head"
            others[TEACHER] = Projected(states=_joined(micro.teacher_states), head=self._teacher_head)
        if self.objective.needs_reference:
            assert self._reference is not None, "a reference term needs the initial student"
            with torch.no_grad():
                others[REFERENCE] = Projected(
                    states=completion_states(self._reference, micro), head=self._reference.head
                )
        return fused_loss(
            Projected(states=states, head=self.student.head),
            micro.completion_ids[micro.completion_mask],
            rollout_terms(micro, self.objective),
            others=others,
            temperature=self._temperature,
            entropy=True,
        )

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self._accelerator.num_processes == 1:
            return list(values)
        local = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
        total: list[float] = self._accelerator.reduce(local, reduction="sum").tolist()
        return total


def _joined(states: tuple[Tensor | None, ...] | None) -> Tensor:
    assert states is not None, "the teacher's states were not scored"
    present = [array for array in states if array is not None]
    assert len(present) == len(states), "a rollout without the teacher's states"
    return torch.cat(present)
