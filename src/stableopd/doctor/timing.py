"""Seconds of one step by phase: what the arithmetic and the memory of a device allow, at an assumed utilisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stableopd.doctor.memory import quantised_bits
from stableopd.doctor.plan import Plan
from stableopd.doctor.shapes import ModelShape

UTILISATION = 0.4
"""Share of the FLOP/s of large matrix products, and of the bandwidth, that a model reaches."""
LAYER_S = 4e-4
"""Starting the work of one layer from Python, forward; more than what it does where a batch is small."""
VLLM_LAYER_S = 3e-5
"""The same where whole decode steps are recorded beforehand."""
OFFLOAD_BYTES_PER_S = 12e9
"""Between CPU memory and a device."""
_ADAM_BYTES = 28
"""Read and written per trained parameter: weight, gradient and two moments in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Of a step, for the process with most work. Evaluation, checkpoints and communication are left out."""

    rollout: float
    teacher: float
    update: float

    @property
    def total(self) -> float:
        return self.rollout + self.teacher + self.update


def seconds_of(plan: Plan) -> Seconds | None:
    """None where only the memory of the hardware is known."""
    hardware = plan.hardware
    if plan.flops is None or hardware.bandwidth is None or hardware.flops_bf16 is None:
        return None
    return Seconds(
        rollout=_rollout(plan, plan.flops * UTILISATION, hardware.bandwidth * UTILISATION),
        teacher=_teacher(plan, hardware.bandwidth * UTILISATION),
        update=_update(plan, plan.flops * UTILISATION, hardware.bandwidth * UTILISATION),
    )


def forward_flops(shape: ModelShape, tokens: float, length: float) -> float:
    """Of reading `tokens` tokens in sequences of `length`: every weight, and causal attention."""
    attention = 2 * shape.num_layers * shape.query_width * length
    return tokens * (2 * shape.num_multiplied + attention)


def _rollout(plan: Plan, flops: float, bandwidth: float) -> float:
    """Prompts are read once each; then a step per token, as long as the longest sequence of a batch."""
    if not plan.num_rollouts:
        return 0.0
    shape, settings = plan.student, plan.config.rollout
    weight = 2 if plan.bf16 else plan.student_bytes
    per_token = shape.token_cache_bytes(bf16=plan.bf16, weight_bytes=plan.student_bytes)
    launch = shape.num_layers * (VLLM_LAYER_S if plan.uses_vllm else LAYER_S)
    batches = 1 if plan.uses_vllm else math.ceil(plan.num_rollouts / plan.decoded_rows)
    steps = batches * min(settings.max_completion_length, math.ceil(2 * plan.mean_completion))
    prompts = max(plan.num_prompts, batches)
    reading = forward_flops(shape, prompts * plan.prompt_tokens, plan.prompt_tokens) / flops + batches * launch
    mean = plan.mean_completion
    cached = plan.num_rollouts * (mean * plan.prompt_tokens + 2 / 3 * mean**2)  # lengths evenly spread
    moving = (steps * weight * shape.num_multiplied + cached * per_token) / bandwidth
    reckoning = forward_flops(shape, plan.num_rollouts * mean, plan.mean_length) / flops
    return reading + max(moving, reckoning) + steps * launch


def _teacher(plan: Plan, bandwidth: float) -> float:
    """0 for a teacher at a server, whose speed is not known."""
    if not plan.local_teachers or plan.teacher is None:
        return 0.0
    shape, dtype = plan.teacher, plan.teacher_bytes
    narrow = dtype == 2 or plan.bf16
    flops = plan.hardware.flops_bf16 if narrow else plan.hardware.flops_float32
    assert flops is not None
    passes = _passes(plan, plan.rollout_tokens)
    seconds = forward_flops(shape, plan.rollout_tokens, plan.mean_length) / (flops * UTILISATION)
    bits = quantised_bits(plan.teacher_config.quantization) if plan.teacher_config.quantization else 8 * dtype
    seconds = max(seconds, passes * shape.num_parameters * bits / 8 / bandwidth) + passes * shape.num_layers * LAYER_S
    if plan.teacher_config.offload:
        seconds += shape.num_parameters * dtype / OFFLOAD_BYTES_PER_S
    return seconds


def _update(plan: Plan, flops: float, bandwidth: float) -> float:
    shape, optimizer, objective = plan.student, plan.config.optimizer, plan.config.objective
    tokens = plan.rollout_tokens + plan.gold_tokens
    forward = forward_flops(shape, tokens, plan.mean_length)
    times = 2.0 if plan.config.student.lora else 3.0  # frozen weights have no gradient of their own
    times += 1.0 if optimizer.gradient_checkpointing else 0.0
    passes = _passes(plan, plan.rollout_tokens) + _passes(plan, plan.gold_tokens)
    work = times * forward
    if objective.needs_reference:
        work += forward_flops(shape, plan.rollout_tokens, plan.mean_length)
    work *= optimizer.num_epochs
    if objective.needs_student_scores:
        work += forward_flops(shape, plan.rollout_tokens, plan.mean_length)
    launch = passes * optimizer.num_epochs * shape.num_layers * LAYER_S * times
    updates = optimizer.num_epochs * optimizer.num_minibatches
    return work / flops + launch + updates * plan.adapters.num_trained * _ADAM_BYTES / bandwidth


def _passes(plan: Plan, tokens: float) -> int:
    return math.ceil(tokens / plan.forward_tokens)
