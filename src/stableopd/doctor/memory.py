"""Bytes that one process of a run holds on its device, part by part, and the phase in which they are most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stableopd.doctor.hardware import GIB
from stableopd.doctor.plan import Plan

CONTEXT_BYTES = 1 * GIB
"""What a GPU's context, kernels and libraries take before a model is there."""
_CHUNK_ELEMENTS, _MIN_ROWS, _GROUP = 2**23, 256, 2  # of stableopd.fused.sweep and .projection
_ADAM_STATES = 2
_STATE_BYTES = 4
"""Of what is trained, its gradient and each of its moments: always float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one process. The parts of different phases are never there at the same time."""

    weights: int
    """Of the student, with its adapters."""
    gradients: int
    optimizer: int
    """AdamW's two moments, and a step count per tensor."""
    reference: int
    teacher: int
    engine: int
    """What a vLLM engine in this process takes, or the copy of the student that a pipeline generates from."""
    cache: int
    """Keys and values of rollouts at their longest."""
    sampling: int
    """Logits while drawing tokens, and the reading of prompts."""
    narrow_weights: int
    """Copies of weights in bfloat16 that autocast makes."""
    activations: int
    """Kept for the backward pass of one micro-batch."""
    loss: int
    """Logits of a chunk and the gradient of the head."""
    optimizer_step: int
    """Of AdamW's arithmetic over all tensors at once."""
    by_phase: Mapping[str, int]
    """Bytes in each phase of a step."""
    available: int

    @property
    def total(self) -> int:
        """Most bytes at a time."""
        return max(self.by_phase.values())

    @property
    def phase(self) -> str:
        """The phase in which they are most."""
        return max(self.by_phase, key=lambda name: self.by_phase[name])

    @property
    def share(self) -> float:
        """Of what is available."""
        return self.total / max(self.available, 1)

    def parts(self) -> dict[str, int]:
        names = [name for name in self.__dataclass_fields__ if name not in ("by_phase", "available")]
        return {name: getattr(self, name) for name in names}


def memory_of(plan: Plan) -> Memory:
    """All parts, and their sums over what each phase holds."""
    trained = plan.adapters.num_trained
    added = trained if plan.config.student.lora else 0
    weights = plan.student.num_parameters * plan.student_bytes + added * _STATE_BYTES
    gradients = trained * _STATE_BYTES
    optimizer = _ADAM_STATES * trained * _STATE_BYTES + plan.adapters.num_tensors * 4
    is_copied = plan.config.needs_reference and not plan.config.student.lora
    reference = weights if is_copied else 0
    teacher, teacher_elsewhere = _teacher(plan)
    engine = _engine(plan, weights)
    cache, sampling = _rollouts(plan)
    narrow, narrow_update = _narrow_weights(plan)
    activations, loss, scoring = _activations(plan), _loss(plan), _scoring(plan)
    step = gradients if not plan.hardware.is_cpu else 0
    always = weights + optimizer + reference + engine
    resident = always + (0 if teacher_elsewhere else teacher)
    generating = cache + sampling + narrow
    training = gradients + max(narrow_update + activations + loss, step) + _teacher_states(plan)
    by_phase = {
        "rollout": resident + generating,
        "teacher": always + teacher + scoring + _teacher_states(plan),
        "update": resident + training + (_teacher_head(plan) if teacher_elsewhere else 0),
    }
    if plan.config.rollout.pipeline:  # the next batch is generated meanwhile
        by_phase["teacher"] += generating
        by_phase["update"] += generating
    context = 0 if plan.hardware.is_cpu else CONTEXT_BYTES
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        teacher=teacher,
        engine=engine,
        cache=cache,
        sampling=sampling,
        narrow_weights=max(narrow, narrow_update),
        activations=activations,
        loss=loss,
        optimizer_step=step,
        by_phase=by_phase,
        available=plan.hardware.memory_bytes - context,
    )


def _teacher(plan: Plan) -> tuple[int, bool]:
    """(bytes of all local teachers while they score, whether they are away from the device otherwise)."""
    if not plan.local_teachers:
        return 0, False
    settings = plan.teacher_config
    if settings.device_map == "cpu":
        return 0, True
    assert plan.teacher is not None
    dtype = plan.teacher_bytes
    if settings.quantization:
        bits = quantised_bits(settings.quantization)
        size = round(plan.teacher.num_linear * bits / 8) + plan.teacher.num_outside * min(dtype, 2)
    else:
        size = plan.teacher.num_parameters * dtype
    if settings.offload:
        return size, True  # one at a time
    return size * plan.local_teachers, False


def quantised_bits(quantization: Mapping[str, Any]) -> float:
    """Bits of a quantised weight, scales included; 16 where the settings do not say."""
    if quantization.get("load_in_4bit"):
        return 4.5
    if quantization.get("load_in_8bit"):
        return 8.0
    for name in ("bits", "weight_bits", "nbits", "w_bit"):
        if isinstance(quantization.get(name), int):
            return float(quantization[name]) + 0.5
    text = " ".join(str(quantization.get(name, "")) for name in ("quant_method", "quant_type", "weights")).lower()
    known = {"fp8": 8.0, "int8": 8.0, "float8": 8.0, "mxfp4": 4.25, "int4": 4.5, "fp4": 4.5, "gptq": 4.5, "awq": 4.5}
    return next((bits for name, bits in known.items() if name in text), 16.0)


def _teacher_states(plan: Plan) -> int:
    """Hidden states of all rollouts at their longest, where the whole distribution of the teacher is needed."""
    if plan.teacher is None or not plan.config.objective.distill.needs_states:
        return 0
    tokens = plan.num_rollouts * plan.config.rollout.max_completion_length
    return tokens * plan.teacher.hidden * plan.teacher_bytes


def _teacher_head(plan: Plan) -> int:
    needed = plan.teacher is not None and plan.config.objective.distill.needs_states
    return plan.teacher.head_elements * plan.teacher_bytes if needed and plan.teacher else 0


def _engine(plan: Plan, weights: int) -> int:
    vllm = plan.config.rollout.vllm
    if not plan.config.objective.needs_rollouts:
        return 0
    if plan.uses_vllm:
        copy = plan.student.num_parameters * (2 if plan.bf16 else plan.student_bytes)
        if vllm.mode == "server":
            return 0
        return max(copy, int(vllm.gpu_memory_utilization * plan.hardware.memory_bytes))
    return weights if plan.config.rollout.pipeline else 0


def _rollouts(plan: Plan) -> tuple[int, int]:
    """(key-value cache, scratch) of generation in this process by Hugging Face."""
    if plan.uses_vllm or not plan.num_rollouts:
        return 0, 0
    rows, shape = plan.decoded_rows, plan.student
    cache = shape.cache_bytes(
        rows,
        plan.prompt_tokens,
        plan.config.rollout.max_completion_length,
        bf16=plan.bf16,
        weight_bytes=plan.student_bytes,
    )
    drawing = rows * shape.vocab_size * 4 * 3
    prompts = min(plan.num_prompts, rows) * plan.prompt_tokens
    narrow = 2 if plan.narrows else plan.student_bytes
    reading = prompts * (3 * shape.hidden * plan.student_bytes + 3 * shape.intermediate * narrow)
    return cache, max(drawing, reading)


def _narrow_weights(plan: Plan) -> tuple[int, int]:
    """Bfloat16 copies by autocast (while generating, while updating). Frozen weights are narrowed one by one."""
    if not plan.narrows:
        return 0, 0
    shape, checkpoints = plan.student, plan.config.optimizer.gradient_checkpointing
    linear = 2 * shape.num_linear
    layer = linear // max(shape.num_layers, 1)
    if plan.config.student.lora:
        return layer, layer if checkpoints else linear
    return linear + 2 * shape.head_elements, linear


def _activations(plan: Plan) -> int:
    shape, tokens = plan.student, plan.forward_tokens
    layer = shape.layer_bytes(plan.longest, bf16=plan.narrows, weight_bytes=plan.student_bytes, eager=plan.eager)
    wide = plan.student_bytes
    ends = 3 * shape.hidden * wide
    if plan.config.optimizer.gradient_checkpointing:
        return round(tokens * (shape.num_layers * shape.hidden * wide + layer + ends))
    return round(tokens * (shape.num_layers * layer + ends))


def _loss(plan: Plan) -> int:
    """Buffers of the fused loss [chunk, vocabulary], narrow copies of heads, gradients of head and states."""
    shape, objective = plan.student, plan.config.objective
    distill = objective.distill
    rows = min(plan.forward_tokens, max(_MIN_ROWS, _CHUNK_ELEMENTS // shape.vocab_size))
    dense = objective.needs_teacher and distill.needs_states
    buffers = 3 + (1 if dense or plan.config.needs_reference else 0)
    if dense:
        buffers += {"jsd": 4, "forward_kl": 2, "mixed_kl": 3}.get(distill.divergence, 0)
        buffers += 1 if plan.config.needs_reference else 0
    chunk = rows * shape.vocab_size * 4 * buffers
    heads = 0
    if plan.narrows:
        chunk += (1 + _GROUP) * rows * shape.vocab_size * 2
        copies = 2 if plan.config.needs_reference and not plan.config.student.lora else 1
        heads = copies * 2 * shape.head_elements
    head_is_trained = plan.config.student.lora is None
    if head_is_trained:
        heads += shape.head_elements * _STATE_BYTES * (2 if shape.is_tied else 1)
    return chunk + heads + 2 * plan.forward_tokens * shape.hidden * plan.student_bytes


def _scoring(plan: Plan) -> int:
    """Scratch of the teacher's forward pass over one batch, and of its logits where it gives log-probabilities."""
    if not plan.local_teachers or plan.teacher is None:
        return 0
    shape, dtype = plan.teacher, plan.teacher_bytes
    tokens = max(plan.longest, plan.config.optimizer.micro_batch_tokens)
    layer = tokens * (4 * shape.hidden + 3 * shape.intermediate) * dtype
    rows = min(tokens, max(_MIN_ROWS, _CHUNK_ELEMENTS // shape.vocab_size))
    return layer + (0 if plan.config.objective.distill.needs_states else rows * shape.vocab_size * 4 * 3)
