"""What one process of a run has to hold and to do in a step, in numbers: read from configurations alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stableopd.config import StableOPDConfig, TeacherConfig
from stableopd.doctor.hardware import Hardware
from stableopd.doctor.shapes import Adapters, ModelShape, trained

ASSUMED_PROMPT = 256
"""Tokens of a prompt where nobody says."""
_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """A run on some hardware. One process per device; each holds everything and has its share of the prompts."""

    config: StableOPDConfig
    student: ModelShape
    adapters: Adapters
    teacher: ModelShape | None
    """None without a teacher in this process, or where its configuration is not known."""
    hardware: Hardware
    prompt_tokens: int
    mean_completion: float

    @classmethod
    def of(
        cls,
        config: StableOPDConfig,
        student_config: Any,
        teacher_config: Any,
        hardware: Hardware,
        prompt_tokens: int | None = None,
        mean_completion: float | None = None,
    ) -> Plan:
        student = ModelShape(student_config, "student")
        needed = teacher_config is not None and config.objective.needs_teacher
        limit = config.data.max_prompt_length or ASSUMED_PROMPT
        return cls(
            config=config,
            student=student,
            adapters=trained(student, config.student.lora),
            teacher=ModelShape(teacher_config, "teacher") if needed else None,
            hardware=hardware,
            prompt_tokens=prompt_tokens or limit,
            mean_completion=mean_completion or config.rollout.max_completion_length / 2,
        )

    # -------------------------------------------------------------------------------- dtypes

    @property
    def bf16(self) -> bool:
        return self.config.optimizer.bf16

    @cached_property
    def student_bytes(self) -> int:
        """Of one of the student's weights."""
        return _bytes_of(self.config.student.dtype, self.student)

    @property
    def narrows(self) -> bool:
        """Whether the arithmetic is in a narrower dtype than the student's weights."""
        return self.bf16 and self.student_bytes > 2

    @property
    def teacher_bytes(self) -> int:
        assert self.teacher is not None
        return _bytes_of(self.teacher_config.dtype, self.teacher)

    @property
    def flops(self) -> float | None:
        """FLOP/s of the student's arithmetic."""
        narrow = self.bf16 or self.student_bytes == 2
        return self.hardware.flops_bf16 if narrow else self.hardware.flops_float32

    # -------------------------------------------------------------------------------- teachers

    @property
    def teacher_config(self) -> TeacherConfig:
        """The one whose size is known: the first."""
        return next(iter(self.config.named_teachers.values()))

    @property
    def local_teachers(self) -> int:
        """Teachers whose weights these processes hold; all are taken to be as large as the first."""
        if self.teacher is None:
            return 0
        return sum(not teacher.is_remote for teacher in self.config.named_teachers.values())

    # -------------------------------------------------------------------------------- work

    @property
    def num_prompts(self) -> int:
        """Of a step, for one process: the one that has most."""
        return math.ceil(self.config.rollout.num_prompts / self.hardware.num_devices)

    @property
    def num_rollouts(self) -> int:
        return self.num_prompts * self.config.rollout.num_generations if self.config.objective.needs_rollouts else 0

    @property
    def decoded_rows(self) -> int:
        """Sequences generated at a time."""
        return min(self.num_rollouts, self.config.rollout.max_batch_size)

    @property
    def longest(self) -> int:
        """Most tokens of a rollout, prompt included."""
        return self.prompt_tokens + self.config.rollout.max_completion_length

    @property
    def forward_tokens(self) -> int:
        """Most tokens of one forward pass with a backward pass: a micro-batch, or one row that is longer."""
        rows = self.num_rollouts + (self.num_prompts if self.config.objective.needs_gold else 0)
        budget = self.config.optimizer.micro_batch_tokens
        return max(self.longest, min(budget, rows * self.longest))

    @property
    def mean_length(self) -> float:
        return self.prompt_tokens + self.mean_completion

    @property
    def rollout_tokens(self) -> float:
        """Of the rollouts of a step, prompts included, as a teacher or an update reads them."""
        return self.num_rollouts * self.mean_length

    @property
    def gold_tokens(self) -> float:
        return self.num_prompts * self.mean_length if self.config.objective.needs_gold else 0.0

    @property
    def uses_vllm(self) -> bool:
        return self.config.rollout.engine == "vllm"

    @property
    def eager(self) -> bool:
        return self.config.student.attn_implementation == "eager"


def _bytes_of(dtype: str, shape: ModelShape) -> int:
    """Bytes of a weight; `auto` is the dtype that the checkpoint's configuration names."""
    name = str(getattr(shape.config, "dtype", None) or "float32") if dtype == "auto" else dtype
    return _BYTES.get(name.removeprefix("torch."), 4)
