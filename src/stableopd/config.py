"""The configuration of a run: typed, nested, validated; unknown keys are refused.

A YAML file, `key=value` overrides with dotted keys, and keyword arguments in Python all end in one
`StableOPDConfig`. The names that TRL users know (`learning_rate`, `max_completion_length`, ...) are accepted
at the top level and put where they belong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from stableopd.errors import ConfigError
from stableopd.health_config import ControllerConfig, HealthConfig, NotifyConfig
from stableopd.model_config import LoraSettings, ModelConfig, StudentConfig, TeacherConfig
from stableopd.names import nearest
from stableopd.objective import DistillConfig, GoldConfig, ObjectiveConfig, ReferenceConfig, RewardConfig
from stableopd.rollout_config import RolloutConfig, VllmConfig
from stableopd.sections import (
    Fraction,
    JudgeTime,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    Temperature,
)

__all__ = [
    "ControllerConfig",
    "DistillConfig",
    "GoldConfig",
    "HealthConfig",
    "LoraSettings",
    "ModelConfig",
    "NotifyConfig",
    "ObjectiveConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RolloutConfig",
    "StableOPDConfig",
    "StudentConfig",
    "TeacherConfig",
    "VllmConfig",
]

Method = Literal["sft", "opd", "stableopd", "grpo"]
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]

PRESETS: Mapping[str, Mapping[str, float]] = {
    "sft": {"distill": 0.0, "gold": 1.0, "reference": 0.0},
    "opd": {"distill": 1.0, "gold": 0.0, "reference": 0.0},
    "stableopd": {"distill": 1.0, "gold": 1.0, "reference": 0.3},
    "grpo": {"distill": 0.0, "gold": 0.0, "reference": 0.0, "reward": 1.0},
}
"""Coefficients that `method` fills in. The paper gives no values; those of StableOPD are from docs/study.md."""

FLAT_NAMES: Mapping[str, str] = {
    "lambda_gold": "objective.gold.coef",
    "beta_kl": "objective.reference.coef",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "warmup_steps": "optimizer.warmup_steps",
    "lr_scheduler_type": "optimizer.schedule",
    "bf16": "optimizer.bf16",
    "gradient_checkpointing": "optimizer.gradient_checkpointing",
    "max_completion_length": "rollout.max_completion_length",
    "num_generations": "rollout.num_generations",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "vllm_mode": "rollout.vllm.mode",
    "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "teacher_model_name_or_path": "teacher.model_name_or_path",
    "eval_steps": "evaluation.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "logging_steps": "logging.every_steps",
    "report_to": "logging.report_to",
}
"""Names known from TRL (and the two of the paper), and where they live here."""

HINTS: Mapping[str, str] = {
    "per_device_train_batch_size": "set rollout.num_prompts (all processes together) and optimizer.micro_batch_tokens",
    "gradient_accumulation_steps": "micro-batches follow from optimizer.micro_batch_tokens; the result does not change",
    "num_train_epochs": "set max_steps; one step is one rollout batch of rollout.num_prompts prompts",
    "lr": "say learning_rate",
    "beta": "say beta_kl (KL to the initial student) or lambda_gold (golden solutions)",
    "use_vllm": "the rollout engine is rollout.engine (hf or vllm)",
    "vllm_server_base_url": "set rollout.vllm.server_url",
    "teacher_model_init_kwargs": "set teacher.dtype, teacher.device_map, teacher.quantization, ...",
    "teacher_model_server_url": "set teacher.server_url",
    "trust_remote_code": "code from a model repository is never run",
}


_HOLD_SECRETS = {"health", "health.notify", "health.notify.url", "rollout", "rollout.vllm"}
"""Their values are never shown, not even in a complaint about them; nor are those of teachers."""


class DataConfig(Section):
    path: str | None = None
    """Local .jsonl, .json or .parquet file, a folder of them, or a hub dataset id."""
    split: str | None = None
    prompt_column: str = "prompt"
    gold_column: str = "gold"
    answer_column: str = "answer"
    gold_weights_column: str | None = None
    """Column with one loss weight per golden token, the end token included."""
    teacher_column: str | None = None
    """Column that names the teacher of each prompt, one of `teachers`."""
    gold_path: str | None = None
    """A pool of prompts with gold, drawn from in place of the golden solution of each prompt."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt in tokens; without it, what the student's context leaves."""
    shuffle: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class OptimizerConfig(Section):
    """AdamW. The schedule counts steps (rollout batches)."""

    learning_rate: Positive = 1e-6
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    decay_start: Fraction = 0.0
    """Share of max_steps after which the linear or cosine decay begins."""
    num_minibatches: PositiveInt = 1
    """Optimizer updates per pass over a rollout batch."""
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    micro_batch_tokens: PositiveInt = 4_096
    """Most tokens, padding included, in one forward pass. Changes memory and speed, not the result."""
    bf16: bool = False
    gradient_checkpointing: bool = False


class EvaluationConfig(Section):
    """Held-out prompts, answered by sampling and greedily while the run goes."""

    path: str | None = None
    split: str | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "validation"
    every_steps: PositiveInt = 50
    at_start: bool = True
    num_prompts: PositiveInt | None = None
    """The first so many prompts; all of them without it."""
    num_samples: PositiveInt = 1
    temperature: Temperature = 0.6
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    greedy: bool = True
    max_completion_length: PositiveInt | None = None
    """Without it, the one of `rollout`."""
    judge: str = "exact"
    """`exact`, `math` (Math-Verify), or `package.module:function` taking (completion, answer)."""
    judge_timeout_s: JudgeTime = 10.0
    """Seconds that the judge may take for one answer, which is wrong then; `exact` needs none."""
    benchmarks: tuple[str, ...] = ()
    """More to answer at every evaluation: names of the registry (docs/evaluation.md), or files; `num_prompts`,
    `num_samples` and `judge` hold for them, too."""
    chat: bool = True
    """Questions of benchmarks go through the chat template, where the tokenizer has one. For a student that is trained
    on plain text: false. Prompts of `path` are asked as they stand."""


class CheckpointConfig(Section):
    every_steps: PositiveInt = 100
    keep_last: PositiveInt = 2
    keep_best: bool = True
    """Also keep the checkpoint with the best held-out accuracy (sampled)."""


class LoggingConfig(Section):
    every_steps: PositiveInt = 1
    """How often a line goes to the console; metrics.jsonl has every step."""
    rollouts_every_steps: PositiveInt = 10
    num_rollouts: NonNegativeInt = 64
    """Rollouts written to rollouts/ at those steps; 0 writes none."""
    report_to: tuple[str, ...] = ()
    """Trackers of accelerate: tensorboard, wandb, trackio, ..."""

    @model_validator(mode="before")
    @classmethod
    def _one_tracker_is_a_list(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("report_to"), str):
            name = raw["report_to"]
            return {**raw, "report_to": () if name == "none" else (name,)}
        return raw


class StableOPDConfig(Section):
    """One run: loss = distill + reward + gold + reference, each with its coefficient, on rollouts of the student.

    `method` fills the coefficients of `objective`; each can be set by itself.
    """

    method: Method = "stableopd"
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[TeacherName, TeacherConfig] = Field(default_factory=dict)
    """Several teachers by name, in place of `teacher`; `data.teacher_column` says which one scores a prompt."""
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    health: HealthConfig = HealthConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    seed: NonNegativeInt = 0
    max_steps: PositiveInt = 500
    num_processes: PositiveInt | None = None
    """Refuse to start on another number of processes than this."""
    output_dir: str = "runs/{method}"
    doctor: Literal["refuse", "warn", "off"] = "refuse"
    """What becomes of a fatal finding of the cheap half of `stableopd doctor`, which looks at every run before its
    first step."""

    @field_validator("doctor", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML reads off as false

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError.of(explain(error, [*_dotted_keys(StableOPDConfig), *FLAT_NAMES])) from None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, raw: Any) -> Any:
        return _fill_preset(_lift_flat_names(raw)) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        objective, optimizer = self.objective, self.optimizer
        if not (objective.needs_rollouts or objective.needs_gold):
            raise ValueError("every coefficient of objective is 0: there is nothing to train on")
        if objective.needs_rewards and self.rollout.num_generations == 1:
            raise ValueError(
                "rollout.num_generations is 1, but a reward counts against the other rollouts of its prompt and would "
                "do nothing; take 2 or more, or set objective.reward.coef=0"
            )
        self._teachers_are_clear()
        if self.rollout.pipeline and not objective.needs_rollouts:
            raise ValueError("rollout.pipeline is on, but no term of objective uses rollouts; leave it out")
        if self.rollout.pipeline and objective.has_policy_gradient and objective.correction.kind == "none":
            raise ValueError(
                "rollout.pipeline trains on rollouts of an older policy, which a policy gradient must correct for: set "
                "objective.correction.kind=truncate (or mask)"
            )
        if optimizer.num_minibatches > self.rollout.num_prompts:
            raise ValueError(
                f"optimizer.num_minibatches is {optimizer.num_minibatches}, more than the "
                f"{self.rollout.num_prompts} prompts of a step (rollout.num_prompts)"
            )
        if optimizer.warmup_steps >= self.max_steps:
            raise ValueError(
                f"optimizer.warmup_steps ({optimizer.warmup_steps}) leaves none of max_steps ({self.max_steps})"
            )
        return self

    def _teachers_are_clear(self) -> None:
        if not self.teachers:
            if self.data.teacher_column:
                raise ValueError("data.teacher_column names teachers, and there are none: set teachers")
            return
        if self.teacher.is_set:
            raise ValueError("teacher and teachers are both given; give one of them")
        if len(self.teachers) > 1 and not self.data.teacher_column:
            raise ValueError(
                f"there are {len(self.teachers)} teachers, and nothing says which one scores a prompt's rollouts: set "
                "data.teacher_column to the column that names them"
            )
        unplaced = [name for name, teacher in self.teachers.items() if not teacher.is_set]
        if unplaced:
            raise ValueError(f"teachers.{unplaced[0]} has neither model_name_or_path nor server_url")
        if self.objective.needs_teacher and self.objective.distill.needs_states and len(self.teachers) > 1:
            raise ValueError(
                f"objective.distill.divergence={self.objective.distill.divergence} with "
                f"support={self.objective.distill.support} needs the whole distribution of one teacher; with several "
                "set divergence=sampled_reverse_kl or support=teacher_topk"
            )

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher by name; the only one of a run without `teachers` is called "teacher"."""
        return self.teachers or {"teacher": self.teacher}

    @property
    def needs_reference(self) -> bool:
        """Whether the initial student is kept at hand: for the reference term, or for the controller to turn it on."""
        return self.objective.needs_reference or (self.health.may_stabilise and self.objective.needs_rollouts)

    @property
    def may_need_gold(self) -> bool:
        """Whether golden solutions may come into the loss at some step."""
        return self.objective.needs_gold or (self.health.may_stabilise and self.objective.needs_rollouts)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir.replace("{method}", self.method))

    @property
    def eval_max_completion_length(self) -> int:
        return self.evaluation.max_completion_length or self.rollout.max_completion_length


def set_path(raw: dict[str, Any], dotted: str, value: Any, why: str) -> None:
    *parents, leaf = dotted.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        elif not isinstance(child, dict):
            raise ConfigError(f"{why}: {parent!r} is a value, not a section")
        node = child
    node[leaf] = value


def _lift_flat_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    lifted = _plain_copy(raw)
    for name, dotted in FLAT_NAMES.items():
        if name not in lifted:
            continue
        value = lifted.pop(name)
        if _has_path(lifted, dotted):
            raise ValueError(f"{name!r} and {dotted!r} are the same setting; give one of them")
        set_path(lifted, dotted, value, why=f"{name!r}")
    return lifted


def _plain_copy(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain_copy(value.model_dump(exclude_unset=True))
    if isinstance(value, Mapping):
        return {key: _plain_copy(item) for key, item in value.items()}
    return value


def _has_path(raw: Mapping[str, Any], dotted: str) -> bool:
    node: Any = raw
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _fill_preset(raw: dict[str, Any]) -> dict[str, Any]:
    preset = PRESETS.get(str(raw.get("method", "stableopd")), {})
    for term, coef in preset.items():
        objective = raw.get("objective") or {}
        section = objective.get(term) or {} if isinstance(objective, dict) else None
        if isinstance(section, dict) and section.get("coef") is None:
            raw["objective"] = {**objective, term: {**section, "coef": coef}}
    return raw


def _dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        kinds = get_args(info.annotation) or (info.annotation,)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if sections:
            yield prefix + name
            yield from _dotted_keys(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def explain(error: ValidationError, known: Collection[str]) -> list[tuple[str, str]]:
    """(dotted key, what is wrong with it and what to do) for every problem; `known` keys are those to have meant."""
    problems = []
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        unknown = problem["type"] == "extra_forbidden"
        problems.append((dotted, _unknown_key(dotted, known) if unknown else _wrong_value(dotted, problem)))
    return problems


def holds_secrets(dotted: str) -> bool:
    """Whether what is given under a key may hold one, so that a complaint must not show it."""
    section, _, leaf = dotted.rpartition(".")
    whole_teacher = dotted in ("teacher", "teachers") or section == "teachers"
    return whole_teacher or dotted in _HOLD_SECRETS or leaf in ("server_url", "api_key_env")


def _unknown_key(dotted: str, known: Collection[str]) -> str:
    leaf = dotted.rsplit(".", 1)[-1]
    if leaf in HINTS:
        return f"unknown key {dotted!r}: {HINTS[leaf]}"
    return f"unknown key {dotted!r}{nearest(dotted, known)}"


def _wrong_value(dotted: str, problem: Any) -> str:
    given, message = problem["input"], str(problem["msg"]).removeprefix("Value error, ")
    if not dotted:
        return message
    if problem["type"] == "missing":
        return f"{dotted} is required and not given"
    if holds_secrets(dotted):
        return f"{dotted}: {message[0].lower()}{message[1:]}"
    if problem["type"] == "model_type":
        message = "is a section: give its settings one by one, as a mapping"
    elif problem["type"] == "tuple_type":
        message = "input should be a list"
    elif isinstance(given, float) and math.isnan(given):
        message = "input should be a finite number"
    shown = repr(given)
    return f"{dotted}: {message[0].lower()}{message[1:]} (got {shown if len(shown) < 80 else shown[:77] + '...'})"
