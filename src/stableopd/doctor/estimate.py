"""Will a run fit, and how long does a step take? From configurations alone, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.doctor.findings import Finding
from stableopd.doctor.hardware import GIB, Hardware
from stableopd.doctor.memory import CONTEXT_BYTES, Memory, memory_of, quantised_bits
from stableopd.doctor.plan import Plan
from stableopd.doctor.timing import LAYER_S, UTILISATION, Seconds, seconds_of

TIGHT = 0.9
"""Share of the memory above which fragmentation and uneven lengths may break a run."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory and time of one process of a run."""

    hardware: str
    num_processes: int
    fits: str
    """The memory in one line."""
    step: str
    """The time in one line."""
    memory: Memory
    """Bytes per process."""
    seconds: Seconds | None
    """Per step; None where only the memory of the hardware is known."""
    assumptions: tuple[str, ...]
    """What the figures rest on, in words."""
    remedies: tuple[str, ...]
    """What would take less memory, the easiest first."""


def estimate(
    config: StableOPDConfig,
    student_config: Any,
    teacher_config: Any,
    hardware: Hardware | str,
    *,
    prompt_tokens: int | None = None,
    mean_completion: float | None = None,
) -> Estimate:
    """Memory by part and seconds by phase of one step.

    Args:
        student_config, teacher_config: of transformers; no teacher for one at a server, or whose size is not known.
        hardware: or its name, as `Hardware.parse` takes it.
        prompt_tokens: of each prompt; `data.max_prompt_length` or 256 if not given.
        mean_completion: mean number of tokens of a rollout; half of the longest if not given.

    Raises: ConfigError for hardware that is not known, ModelError for a configuration of no causal language model.
    """
    machine = Hardware.parse(hardware) if isinstance(hardware, str) else hardware
    plan = Plan.of(config, student_config, teacher_config, machine, prompt_tokens, mean_completion)
    memory, seconds = memory_of(plan), seconds_of(plan)
    return Estimate(
        hardware=machine.name,
        num_processes=machine.num_devices,
        fits=_fits(memory),
        step=_step(seconds),
        memory=memory,
        seconds=seconds,
        assumptions=_assumptions(plan, seconds),
        remedies=_remedies(plan, memory),
    )


def estimate_findings(estimate: Estimate) -> list[Finding]:
    """Fatal where the memory is not enough, a problem where it is nearly used up."""
    memory = estimate.memory
    if memory.share <= TIGHT:
        return []
    fits = memory.share <= 1
    largest = sorted(memory.parts().items(), key=lambda part: -part[1])[:4]
    return [
        Finding(
            check="memory",
            danger="problem" if fits else "fatal",
            summary=f"the run {'nearly fills' if fits else 'does not fit'} {estimate.hardware}: {estimate.fits}",
            evidence="largest parts: " + ", ".join(f"{_words(name)} {_gib(size)}" for name, size in largest),
            remedy="; or ".join(estimate.remedies) or "take devices with more memory",
            figures={"share": memory.share, "total_bytes": memory.total, "available_bytes": memory.available},
        )
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _fits(memory: Memory) -> str:
    return (
        f"{_gib(memory.total)} of {_gib(memory.available)} per device ({memory.share:.0%}), most in the {memory.phase}"
    )


def _step(seconds: Seconds | None) -> str:
    if seconds is None:
        return "not known: only the memory of the hardware is"
    return (
        f"{seconds.total:.3g} s: rollout {seconds.rollout:.3g}, teacher {seconds.teacher:.3g}, "
        f"update {seconds.update:.3g}"
    )


def _assumptions(plan: Plan, seconds: Seconds | None) -> tuple[str, ...]:
    config = plan.config
    lines = [
        f"processes: {plan.hardware.num_devices}, one per device; each holds everything and its share of the prompts",
        f"prompts of {plan.prompt_tokens:,} tokens; memory for rollouts that all run to "
        f"{config.rollout.max_completion_length:,} tokens",
    ]
    if not plan.hardware.is_cpu:
        lines.append(f"{_gib(CONTEXT_BYTES)} of each device is the context's; AdamW works on all tensors at once")
    if plan.narrows:
        lines.append("autocast keeps bfloat16 copies of trained weights while it is on")
    if plan.uses_vllm and config.rollout.vllm.mode == "colocate":
        lines.append("vLLM takes its share of each device throughout, its copy of the weights included")
    if config.rollout.pipeline:
        lines.append("the next rollouts are generated, from a copy of the student, while this step is trained on")
    lines += _teacher_lines(plan)
    if seconds is not None:
        lines.append(
            f"time: rollouts of {plan.mean_completion:,.0f} tokens in the mean, evenly spread; gold as long; "
            f"{UTILISATION:.0%} of the device's FLOP/s and bandwidth; {LAYER_S * 1e3:g} ms to start a layer in Python; "
            "no communication, evaluation or checkpoint"
        )
    return tuple(lines)


def _teacher_lines(plan: Plan) -> list[str]:
    config = plan.config
    if not config.objective.needs_teacher:
        return []
    if not plan.local_teachers:
        at_server = all(teacher.is_remote for teacher in config.named_teachers.values())
        where = "at a server" if at_server else "of unknown size"
        return [f"the teacher is {where}: neither its memory nor its time is counted"]
    lines = []
    if plan.local_teachers > 1:
        lines.append(f"{plan.local_teachers} teachers, all as large as the first")
    settings = plan.teacher_config
    if settings.device_map not in (None, "cpu"):
        lines.append("the teacher is counted on one device, whatever device_map spreads")
    if settings.quantization:
        lines.append(f"{quantised_bits(settings.quantization):g} bits per quantised weight of the teacher")
    return lines


def _remedies(plan: Plan, memory: Memory) -> tuple[str, ...]:
    """Settings that this run has left, the easiest first."""
    config, longest = plan.config, plan.longest
    optimizer, teacher = config.optimizer, plan.teacher_config
    over = [name for name, size in memory.by_phase.items() if size > TIGHT * memory.available] or [memory.phase]
    in_rollout, in_update = "rollout" in over, "update" in over
    known: Mapping[str, bool] = {
        f"lower optimizer.micro_batch_tokens (now {optimizer.micro_batch_tokens:,}; one rollout has up to "
        f"{longest:,})": in_update and optimizer.micro_batch_tokens > longest,
        "set optimizer.gradient_checkpointing=true": in_update and not optimizer.gradient_checkpointing,
        f"lower rollout.max_batch_size (now {plan.decoded_rows} sequences at a time)": memory.cache > 0
        and (in_rollout or config.rollout.pipeline)
        and plan.decoded_rows > 1,
        "lower rollout.vllm.gpu_memory_utilization": plan.uses_vllm and memory.engine > 0,
        "set teacher.offload=true": memory.teacher > 0
        and not (teacher.offload or teacher.device_map or teacher.quantization)
        and over != ["teacher"],
        "train adapters (student.lora.r=16)": config.student.lora is None,
        "move the teacher to a server (teacher.server_url)": memory.teacher > 0,
    }
    return tuple(remedy for remedy, applies in known.items() if applies)
