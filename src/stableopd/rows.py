"""Rollouts and golden solutions as rows of one update: padded, weighted, and dealt out to minibatches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stableopd.advantages import RolloutSignals
from stableopd.config import OptimizerConfig
from stableopd.tokens import budget_batches, pad_left, pad_right
from stableopd.types import Example, RolloutBatch, TokenScores

_GOLD = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """Rollouts and golden solutions side by side. A row is one or the other; its weights say which.

    All arrays are [B, P] (prompts, padded on the left) or [B, T] (completions, padded on the right).
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    old_logprobs: Tensor
    """Of the policy that drew the tokens; 0 on gold."""
    teacher_logprobs: Tensor
    """0 on gold, and where the teacher gives its whole distribution instead."""
    advantages: Tensor
    """Of the distillation term, shaped."""
    reward_advantages: Tensor
    distill_weight: Tensor
    """What the distillation loss of each token is multiplied by; 0 leaves the token out."""
    reward_weight: Tensor
    reference_weight: Tensor
    gold_weight: Tensor
    index: Tensor
    """[B] int64: the row's number among the rollouts of this process; -1 on gold."""
    group: tuple[int, ...]
    """Prompt that each row belongs to, by its position in the step's prompts."""
    topk_ids: Tensor | None = None
    """[B, T, K] the teacher's likeliest tokens, where the distillation works on them."""
    topk_logprobs: Tensor | None = None
    teacher_states: tuple[Tensor | None, ...] | None = None
    """The teacher's hidden states [length, H] of each row, where its whole distribution is needed; None on gold."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def is_gold(self) -> Tensor:
        """[B] bool: golden solutions; the others are rollouts."""
        return self.index == _GOLD

    @property
    def rollout_mask(self) -> Tensor:
        """[B, T] bool: tokens of rollouts."""
        return self.completion_mask & ~self.is_gold[:, None]

    def select(self, rows: Sequence[int]) -> TrainingRows:
        """Some of the rows, without the padding that they have in common."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.completion_ids.device)
        prompt_width = int(self.prompt_mask[index].sum(dim=1).max()) if rows else 0
        width = int(self.completion_mask[index].sum(dim=1).max()) if rows else 0
        start = self.prompt_ids.shape[1] - prompt_width
        columns = {name: getattr(self, name) for name in (*_COMPLETION_COLUMNS, *_TOPK_COLUMNS)}
        return TrainingRows(
            prompt_ids=self.prompt_ids[index, start:],
            prompt_mask=self.prompt_mask[index, start:],
            index=self.index[index],
            group=tuple(self.group[row] for row in rows),
            teacher_states=None if self.teacher_states is None else tuple(self.teacher_states[row] for row in rows),
            **{name: None if array is None else array[index, :width] for name, array in columns.items()},  # type: ignore[arg-type]
        )

    def micro_batches(self, token_budget: int, *, packed: bool = False) -> Iterator[TrainingRows]:
        """All rows, in batches of like length with at most `token_budget` tokens, padding included unless `packed`.

        Rollouts and gold come in batches of their own, so that neither pays for the other's terms.
        """
        lengths = (self.prompt_mask.sum(dim=1) + self.completion_mask.sum(dim=1)).tolist()
        is_gold = self.is_gold.tolist()
        for kind in (False, True):
            of_kind = [row for row, gold in enumerate(is_gold) if gold == kind]
            for batch in budget_batches([lengths[row] for row in of_kind], token_budget, packed=packed):
                yield self.select([of_kind[row] for row in batch])


_COMPLETION_COLUMNS = (
    "completion_ids",
    "completion_mask",
    "old_logprobs",
    "teacher_logprobs",
    "advantages",
    "reward_advantages",
    "distill_weight",
    "reward_weight",
    "reference_weight",
    "gold_weight",
)
_TOPK_COLUMNS = ("topk_ids", "topk_logprobs")


def rollout_rows(
    rollouts: RolloutBatch, scores: TokenScores | None, signals: RolloutSignals, group: Sequence[int]
) -> TrainingRows:
    """Rows for the terms on rollouts. `group[i]` is the position of prompt i in the whole step."""
    zeros = torch.zeros_like(rollouts.sampling_logprobs)
    mask = rollouts.completion_mask.float()
    sampled = None if scores is None else scores.sampled_logprobs
    return TrainingRows(
        prompt_ids=rollouts.prompt_ids,
        prompt_mask=rollouts.prompt_mask,
        completion_ids=rollouts.completion_ids,
        completion_mask=rollouts.completion_mask,
        old_logprobs=signals.old_logprobs,
        teacher_logprobs=zeros if sampled is None else sampled,
        advantages=signals.advantages,
        reward_advantages=signals.reward_advantages,
        distill_weight=signals.distill_weight,
        reward_weight=mask,
        reference_weight=mask,
        gold_weight=zeros,
        index=torch.arange(len(rollouts), device=zeros.device),
        group=tuple(group[index] for index in rollouts.prompt_index),
        topk_ids=None if scores is None else scores.topk_ids,
        topk_logprobs=None if scores is None else scores.topk_logprobs,
        teacher_states=None if scores is None else scores.states,
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
        advantages=zeros,
        reward_advantages=zeros,
        distill_weight=zeros,
        reward_weight=zeros,
        reference_weight=zeros,
        gold_weight=gold_weight,
        index=torch.full((len(examples),), _GOLD, device=zeros.device),
        group=tuple(group),
    )


def concat_rows(parts: Sequence[TrainingRows], pad_id: int) -> TrainingRows:
    """All rows of `parts`, padded to one width."""
    prompt_width = max(part.prompt_ids.shape[1] for part in parts)
    width = max(part.completion_ids.shape[1] for part in parts)
    fill: dict[str, float] = {"prompt_ids": pad_id, "completion_ids": pad_id}

    def joined(name: str, width: int, left: bool = False) -> Tensor:
        return torch.cat([_widen(getattr(part, name), width, fill.get(name, 0.0), left) for part in parts])

    return TrainingRows(
        prompt_ids=joined("prompt_ids", prompt_width, left=True),
        prompt_mask=joined("prompt_mask", prompt_width, left=True),
        index=torch.cat([part.index for part in parts]),
        group=tuple(position for part in parts for position in part.group),
        topk_ids=_joined_topk(parts, "topk_ids", width),
        topk_logprobs=_joined_topk(parts, "topk_logprobs", width),
        teacher_states=_joined_states(parts),
        **{name: joined(name, width) for name in _COMPLETION_COLUMNS},
    )


def minibatches(
    rows: TrainingRows, num_prompts: int, settings: OptimizerConfig, key: Sequence[int]
) -> list[TrainingRows]:
    """The rows of each update of a step.

    In every epoch the step's `num_prompts` prompts are dealt out anew, by `key`, to `num_minibatches` updates; the
    rollouts of a prompt and its golden solution stay together. A process may have no row in an update.
    """
    dealt = []
    for epoch in range(settings.num_epochs):
        order = np.random.default_rng([*key, epoch]).permutation(num_prompts)
        for chosen in np.array_split(order, settings.num_minibatches):
            prompts = set(chosen.tolist())
            dealt.append(rows.select([row for row, position in enumerate(rows.group) if position in prompts]))
    return dealt


def _joined_topk(parts: Sequence[TrainingRows], name: str, width: int) -> Tensor | None:
    known = [array for part in parts if (array := getattr(part, name)) is not None]
    if not known:
        return None
    like = known[0]
    arrays = []
    for part in parts:
        array = getattr(part, name)
        if array is None:
            array = like.new_zeros(len(part), 0, like.shape[-1])
        arrays.append(nn.functional.pad(array, (0, 0, 0, width - array.shape[1])))
    return torch.cat(arrays)


def _joined_states(parts: Sequence[TrainingRows]) -> tuple[Tensor | None, ...] | None:
    if all(part.teacher_states is None for part in parts):
        return None
    return tuple(states for part in parts for states in (part.teacher_states or (None,) * len(part)))


def _widen(array: Tensor, width: int, fill: float, left: bool) -> Tensor:
    missing = width - array.shape[1]
    return nn.functional.pad(array, (missing, 0) if left else (0, missing), value=fill)
