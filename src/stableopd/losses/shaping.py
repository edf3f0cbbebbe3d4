"""What is done to advantages and to the weights of tokens before the loss. All of it detached from the policy.

Advantages are [B, T] in nats, A = log T − log S_old, column t about completion token t; a positive advantage makes
its token more likely, which is the direction of KL(student ‖ teacher).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from stableopd.losses._numerics import check_share
from stableopd.types import FinishReason


def clamp_advantages(advantages: Tensor, limit: float) -> Tensor:
    """Each advantage cut to [−limit, limit].

    Args: advantages [B, T]; limit > 0, in nats.
    Returns: [B, T], detached.
    Raises: ValueError when limit is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"limit is {limit}; advantages are cut to [-limit, limit], which needs a limit above 0")
    return advantages.detach().clamp(-limit, limit)


def compress_advantages(advantages: Tensor) -> Tensor:
    """sign(A) · log(1 + |A|) of each advantage: small ones stay, large ones grow with their logarithm.

    Args: advantages [B, T].
    Returns: [B, T], detached; odd and increasing in A.
    Source: arXiv 2607.13399.
    """
    advantages = advantages.detach()
    return advantages.sign() * advantages.abs().log1p()


def discounted_advantages(advantages: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Each token's advantage with the discounted ones of the tokens that follow: Σ_{i ≥ t} γ^{i−t} A_i.

    Args:
        advantages: [B, T]; masked entries are never read.
        mask: [B, T] bool (or 0 and 1 in any dtype), the real tokens, without holes.
        gamma: in [0, 1]; 0 leaves the advantages as they are, 1 gives the sum to go.

    Returns: [B, T], detached, 0 where masked.
    Raises: ValueError when gamma is outside [0, 1].
    """
    check_share("gamma", gamma, "a discount")
    advantages, mask = advantages.detach(), mask.bool()
    total = torch.where(mask, advantages, torch.zeros_like(advantages))
    reach, width = 1, advantages.shape[1]
    while reach < width and gamma > 0:  # sums over 1, 2, 4, ... tokens ahead
        ahead = torch.nn.functional.pad(total[:, reach:], (0, reach))
        total, reach = total + gamma**reach * ahead, 2 * reach
    return torch.where(mask, total, torch.zeros_like(total))


def prefix_weights(advantages: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Weight of each token, falling from 1 + γ to 1 as the disagreement with the teacher before it adds up.

    Definition: w_t = 1 + γ (1 − Σ_{i<t} |A_i| / Σ_i |A_i|), sums over the row's tokens; 1 + γ where all are 0.

    Args:
        advantages: [B, T], finite; masked entries are never read.
        mask: [B, T] bool, or 0 and 1 in any dtype.
        gamma: ≥ 0; 0 gives 1 everywhere.

    Returns: [B, T], detached, in [1, 1 + γ]; 0 where masked. Never increases along a row.
    Raises: ValueError when gamma is below 0 or not finite.
    Source: Xie et al. 2026, arXiv 2606.22600 (IW-OPD, position bias of on-policy distillation).
    """
    if not 0.0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma}; it is the extra weight of a row's first token, a finite number from 0 on")
    mask = mask.bool()
    size = torch.where(mask, advantages.detach().abs(), torch.zeros_like(advantages))
    so_far = torch.nn.functional.pad(size.cumsum(dim=1), (1, 0))
    total = so_far[:, -1:]
    share = so_far[:, :-1] / torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(mask, 1.0 + gamma * (1.0 - share), torch.zeros_like(share))


def high_entropy_mask(entropy: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The given fraction of all tokens of the batch, those at which the policy is least sure.

    Over the whole batch, not per row: call it before the batch is cut into micro-batches.

    Args:
        entropy: [B, T] in nats; masked entries are never read.
        mask: [B, T] bool, or 0 and 1 in any dtype.
        fraction: in (0, 1].

    Returns: [B, T] bool, True at exactly ⌈fraction · n⌉ of the n unmasked tokens (the product up to rounding). Of
        equal entropies the earlier row, then the earlier token, comes first.
    Raises: ValueError when fraction is outside (0, 1].
    Source: Wang et al. 2025, arXiv 2506.01939 (forking tokens).
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it is the share of tokens that are kept and lies in (0, 1]")
    mask = mask.bool()
    values = entropy.detach()[mask]
    number = values.numel()
    wanted = min(number, max(1, math.ceil(round(fraction * number, 6))))
    order = values.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[order[:wanted]] = True
    return torch.zeros_like(mask, dtype=torch.bool).masked_scatter(mask, chosen)


def special_token_mask(token_ids: Tensor, special_ids: Collection[int]) -> Tensor:
    """Whether each token is one of the special ones, whose probabilities compare templates rather than answers.

    Args: token_ids of any shape, int64; special_ids may be empty.
    Returns: bool, the shape of token_ids; True at special tokens.
    Source: Fu et al. 2026, arXiv 2603.25562 (special-token mask).
    """
    wanted = torch.tensor(sorted(special_ids), dtype=token_ids.dtype, device=token_ids.device)
    return torch.isin(token_ids, wanted)


def truncation_weights(finish_reasons: Sequence[FinishReason], weight: float, device: Any = None) -> Tensor:
    """Weight of each row: 1 when it ended by itself, `weight` when it was cut ("length", "loop", "abort").

    Args:
        finish_reasons: one per row, B of them.
        weight: in [0, 1]; 0 drops cut rows, 1 keeps them in full.

    Returns: [B] float32.
    Raises: ValueError when weight is outside [0, 1] or a reason is unknown.
    """
    check_share("weight", weight, "what a truncated row counts")
    unknown = set(finish_reasons) - set(get_args(FinishReason))
    if unknown:
        raise ValueError(
            f"finish reasons {sorted(unknown)} are unknown; they must be among {', '.join(get_args(FinishReason))}"
        )
    weights = [1.0 if reason == "stop" else weight for reason in finish_reasons]
    return torch.tensor(weights, dtype=torch.float32, device=device)
