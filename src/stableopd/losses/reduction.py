"""From values per token to one number: the only place where tokens are summed.

An aggregate is Σ weight · loss / denominator. The denominator is a total over all micro-batches and processes, fixed
before the first backward pass, so that it does not matter how a batch is cut.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stableopd.losses._numerics import check_choice

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


def aggregation_weights(
    weight: Tensor, aggregation: Aggregation, constant: float | None = None
) -> tuple[Tensor, float]:
    """Weights of tokens, and this part's share of the denominator, that make one kind of average.

    Definition: the aggregate is Σ weights · loss / Σ share, the latter over all micro-batches and processes.

    | aggregation | weights | share | the aggregate |
    |---|---|---|---|
    | token_mean | weight | Σ weight | every token counts alike; long rows count more |
    | sequence_mean | weight / Σ_row weight | number of rows | every row counts alike; tokens of long rows count less |
    | sequence_sum | weight | constant · number of rows | Σ of each row over a constant length, averaged over rows |

    Args:
        weight: [B, T], bool or non-negative; 0 where a token does not count. Rows without any weight are no rows.
        constant: sequence_sum only, > 0: the length that a row's sum is divided by.

    Returns: weights [B, T], float, detached, 0 where weight is; share ≥ 0.
    Raises: ValueError when the aggregation is unknown, or sequence_sum has no constant above 0.
    Source: sequence_mean: Shao et al. 2024, arXiv 2402.03300 (GRPO); token_mean: Yu et al. 2025, arXiv 2503.14476
        (DAPO); sequence_sum: Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO).
    Holds: any split of the rows gives the same weights and shares that add up. A factor common to a row's weights
        cancels in sequence_mean: what is to count a row less, without dropping it, belongs into the loss.
    """
    check_choice("aggregation", aggregation, Aggregation)
    weight = weight.detach()
    weight = weight if weight.is_floating_point() else weight.float()
    per_row = weight.sum(dim=1, keepdim=True)
    num_rows = float((per_row > 0).sum())
    if aggregation == "token_mean":
        return weight, float(weight.double().sum())
    if aggregation == "sequence_mean":
        return weight / torch.where(per_row > 0, per_row, torch.ones_like(per_row)), num_rows
    if constant is None or not constant > 0:
        raise ValueError(f"constant is {constant}; sequence_sum divides each row's sum by a fixed length above 0")
    return weight, constant * num_rows


def reduce_tokens(token_loss: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """Σ(token_loss · mask) / denominator, with masked entries never read.

    Args:
        token_loss: [B, T], unreduced. Masked entries may hold anything, also inf and nan.
        mask: [B, T], bool or non-negative weights.
        denominator: total weight over all micro-batches and processes, fixed before the backward pass.

    Returns: scalar; 0 with zero gradient when the mask is empty.
    Raises: ValueError when denominator is not positive.
    Holds: summing over any split of the rows with one denominator gives the loss of the whole batch.
    """
    if not denominator > 0:
        raise ValueError(f"denominator is {denominator}; it must be the positive total weight of the tokens")
    weight = mask.to(token_loss.dtype)
    kept = torch.where(weight != 0, token_loss, torch.zeros_like(token_loss))
    return (kept * weight).sum() / denominator
