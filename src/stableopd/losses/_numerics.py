"""What the losses share: precision, checks, and divergences between log-probabilities along the last axis.

The divergences take distributions as log-probabilities [..., M], −inf for what is impossible, and return [...].
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor

Temperature = float | Tensor
"""One for all positions, or a tensor that broadcasts to them: [n] or [1] for logits [n, V]."""

MAX_LOG_RATIO = 20.0
"""exp(20) is finite in every dtype used here; beyond it a ratio carries no information."""


IMPOSSIBLE = -1e28
"""A logit at or below this forbids its token, like −inf: masks are often written with a huge finite number."""


def upcast(logits: Tensor, temperature: Temperature) -> Tensor:
    """logits / temperature in float32, or in float64 when the logits are."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, Tensor):
        return logits / _per_position(temperature, logits)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need a temperature above 0")
    return logits if temperature == 1.0 else logits / temperature


def _per_position(temperature: Tensor, logits: Tensor) -> Tensor:
    positions = logits.shape[:-1]
    try:
        fits = torch.broadcast_shapes(temperature.shape, positions) == positions
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"temperature is {tuple(temperature.shape)} and the logits are {tuple(logits.shape)}; "
            "give one number, or a tensor that broadcasts to the logits without their last axis"
        )
    if not bool((temperature > 0).all()):
        raise ValueError(
            f"the lowest temperature is {temperature.min().item()}; log-probabilities need a temperature above 0"
        )
    return temperature.to(logits).unsqueeze(-1)


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), kept finite."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, without cancellation at either end."""
    return torch.where(x > -math.log(2.0), (-x.expm1()).log(), (-x.exp()).log1p())


def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Σ_v p(v) · values(v) over the last axis; entries with p = 0 count nothing, in the gradient too.

    An infinite value makes the sum infinite and brings no gradient of its own, so that a mask over the sum also masks
    its gradient.
    """
    p = log_p.exp()
    infinite = (values == torch.inf) & (p > 0)
    total = (p * values.masked_fill((p == 0) | infinite, 0.0)).sum(dim=-1)
    return total.masked_fill(infinite.any(dim=-1), torch.inf)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q); infinite where q forbids what p allows."""
    return expectation(log_p, log_p - log_q)


def mixed(log_s: Tensor, log_t: Tensor, forward_weight: float) -> Tensor:
    """w · KL(T ‖ S) + (1 − w) · KL(S ‖ T); a part with weight 0 is left out, were it infinite."""
    if forward_weight == 0.0:
        return kl(log_s, log_t)
    if forward_weight == 1.0:
        return kl(log_t, log_s)
    return forward_weight * kl(log_t, log_s) + (1.0 - forward_weight) * kl(log_s, log_t)


def jensen_shannon(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """β KL(T ‖ M) + (1 − β) KL(S ‖ M) with M = β T + (1 − β) S; 0 at both ends of β."""
    if beta in (0.0, 1.0):
        return (log_s * 0.0).nan_to_num(0.0).sum(dim=-1)
    nowhere = (log_s == -torch.inf) & (log_t == -torch.inf)  # logaddexp has no gradient there
    log_s_safe, log_t_safe = log_s.masked_fill(nowhere, 0.0), log_t.masked_fill(nowhere, 0.0)
    log_m = torch.logaddexp(log_t_safe + math.log(beta), log_s_safe + math.log1p(-beta))
    return beta * expectation(log_t, log_t - log_m) + (1.0 - beta) * expectation(log_s, log_s - log_m)


def check_same_vocabulary(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}; "
            "cut both to the common vocabulary first"
        )


def check_share(name: str, value: float, meaning: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; it is {meaning} and lies in [0, 1]")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuses a value that the Literal `choices` does not list."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(choices))}")
