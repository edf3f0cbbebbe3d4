"""From the rewards of whole completions to advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stableopd.losses._numerics import check_choice

RewardScale = Literal["group", "none"]

_EPSILON = 1e-6
"""Added to a group's standard deviation. Rewards that differ by less than about this count as equal."""


def group_advantages(rewards: Tensor, groups: Sequence[int] | Tensor, scale: RewardScale = "group") -> Tensor:
    """Each completion's reward against the mean of its group, the completions of one prompt.

    Definition: A_i = r_i − mean(group); for scale = "group" divided by std(group) + 1e-6, the standard deviation with
    denominator n. A positive advantage makes the completion's tokens more likely.

    Args:
        rewards: [B], one per completion, finite.
        groups: the group of each completion, B of them (a sequence, or a tensor [B]), in any order. All of a group must
            be here.
        scale: "group" makes every group count alike; "none" lets groups count by how far their rewards spread.

    Returns: [B], float32 (float64 for float64 rewards), detached. Exactly 0 in a group of one, or of equal rewards.
    Raises: ValueError when rewards are not [B], the numbers of rewards and groups differ, or the scale is unknown.
    Source: Shao et al. 2024, arXiv 2402.03300 (GRPO; "group"); Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO; "none").
    Numerics: float64 inside, from each group's lowest reward on, so that equal rewards cancel exactly.
    """
    check_choice("scale", scale, RewardScale)
    shape = tuple(groups.shape) if isinstance(groups, Tensor) else (len(groups),)
    if len(shape) != 1 or rewards.shape != shape:
        raise ValueError(f"rewards are {tuple(rewards.shape)} and groups are {shape}; one of each per row")
    groups = groups.tolist() if isinstance(groups, Tensor) else groups  # elements of a tensor are equal to none
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([names[name] for name in groups], dtype=torch.long, device=rewards.device)
    values = rewards.detach().double()
    zeros = values.new_zeros(len(names))
    size = zeros.index_add(0, group, torch.ones_like(values))
    values = values - zeros.scatter_reduce(0, group, values, "amin", include_self=False)[group]
    values = values - (zeros.index_add(0, group, values) / size)[group]
    if scale == "group":
        spread = (zeros.index_add(0, group, values.square()) / size).sqrt()
        values = values / (spread[group] + _EPSILON)
    return values if rewards.dtype == torch.float64 else values.float()
