"""AdamW and its learning-rate schedule, as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from stableopd.config import OptimizerConfig
from stableopd.errors import ModelError


def adamw(student: nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what is to be trained; weight decay spares what has one dimension (norms, biases).

    Raises: ModelError when no parameter requires a gradient.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError("the student has no parameter to train: every one has requires_grad=False. Unfreeze some")
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )


def learning_rate_at(step: int, settings: OptimizerConfig, max_steps: int) -> float:
    """Learning rate of a step (1 to max_steps): linear warm-up, level, then the schedule's decay towards 0."""
    peak = settings.learning_rate
    if step <= settings.warmup_steps:
        return peak * step / settings.warmup_steps
    start = max(settings.warmup_steps, settings.decay_start * max_steps)
    if settings.schedule == "constant" or step <= start:
        return peak
    left = (max_steps - step + 1) / (max_steps - start + 1)
    return peak * (left if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
