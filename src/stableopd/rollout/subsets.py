"""Some rows of a rollout batch, and scores of some rows put back in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stableopd.types import FinishedRollout, RolloutBatch, TokenScores

Rows = Sequence[int]


def finished_rollouts(rollouts: RolloutBatch) -> list[FinishedRollout]:
    """Each row by itself, without padding, in order."""
    prompts = [
        tuple(ids[len(ids) - length :])
        for ids, length in zip(rollouts.prompt_ids.tolist(), rollouts.prompt_mask.sum(dim=1).tolist(), strict=True)
    ]
    teachers = rollouts.teachers or (None,) * len(rollouts)
    return [
        FinishedRollout(prompt_ids=prompt, completion_ids=tuple(completion), teacher=teacher)
        for prompt, completion, teacher in zip(prompts, rollouts.completions(), teachers, strict=True)
    ]


def select_rollouts(rollouts: RolloutBatch, rows: Rows) -> RolloutBatch:
    """The rows named, in that order; the padding stays as it is."""
    index = torch.tensor(list(rows), dtype=torch.long, device=rollouts.completion_ids.device)
    return replace(
        rollouts,
        prompt_ids=rollouts.prompt_ids[index],
        prompt_mask=rollouts.prompt_mask[index],
        completion_ids=rollouts.completion_ids[index],
        completion_mask=rollouts.completion_mask[index],
        sampling_logprobs=rollouts.sampling_logprobs[index],
        finish_reason=tuple(rollouts.finish_reason[row] for row in rows),
        prompt_index=tuple(rollouts.prompt_index[row] for row in rows),
        teachers=tuple(rollouts.teachers[row] for row in rows) if rollouts.teachers else (),
    )


def distinct_rows(rollouts: RolloutBatch) -> tuple[list[int], list[int]]:
    """(first row of each distinct prompt and completion, number of each row's like among them)."""
    first: dict[FinishedRollout, int] = {}
    place: list[int] = []
    kept: list[int] = []
    for row, rollout in enumerate(finished_rollouts(rollouts)):
        if rollout not in first:
            first[rollout] = len(kept)
            kept.append(row)
        place.append(first[rollout])
    return kept, place


def select_scores(scores: TokenScores, rows: Rows) -> TokenScores:
    """The scores of the rows named; a row may be named several times."""

    def chosen(array: Tensor | None) -> Tensor | None:
        return None if array is None else array[torch.tensor(list(rows), dtype=torch.long, device=array.device)]

    return replace(
        scores,
        sampled_logprobs=chosen(scores.sampled_logprobs),
        topk_ids=chosen(scores.topk_ids),
        topk_logprobs=chosen(scores.topk_logprobs),
        entropy=chosen(scores.entropy),
        states=None if scores.states is None else tuple(scores.states[row] for row in rows),
    )


def joined_scores(parts: Sequence[tuple[Rows, TokenScores]], num_rows: int) -> TokenScores:
    """Scores of disjoint sets of rows, in the order of the whole batch. What one part lacks, the whole lacks."""
    order = [row for rows, _ in parts for row in rows]
    assert sorted(order) == list(range(num_rows)), "every row is scored once"
    place = torch.tensor(order).argsort().tolist()

    def all_of(name: str) -> Tensor | None:
        arrays = [getattr(scores, name) for _, scores in parts]
        return None if any(array is None for array in arrays) else torch.cat(arrays)

    whole = TokenScores(
        sampled_logprobs=all_of("sampled_logprobs"),
        temperature=parts[0][1].temperature,
        model_id="+".join(scores.model_id for _, scores in parts),
        topk_ids=all_of("topk_ids"),
        topk_logprobs=all_of("topk_logprobs"),
        entropy=all_of("entropy"),
    )
    return select_scores(whole, place)
