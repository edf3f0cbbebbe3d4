"""The configuration of a run: typed, nested, validated; unknown keys are refused.

A YAML file, `key=value` overrides with dotted keys, and keyword arguments in Python all end in one
`StableOPDConfig`. The names that TRL users know (`learning_rate`, `max_completion_length`, ...) are accepted
at the top level and put where they belong.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator

from stableopd.errors import ConfigError
from stableopd.health.controller import Actions, ControllerSettings
from stableopd.health.monitor import MonitorSettings
from stableopd.notify import TIMEOUT_S, Notifier, url_problem
from stableopd.objective import (
    DistillConfig,
    Fraction,
    GoldConfig,
    NonNegative,
    NonNegativeInt,
    ObjectiveConfig,
    Positive,
    PositiveInt,
    ReferenceConfig,
    RewardConfig,
    Section,
)
from stableopd.types import Severity

__all__ = [
    "DistillConfig",
    "GoldConfig",
    "ObjectiveConfig",
    "ReferenceConfig",
    "RewardConfig",
    "StableOPDConfig",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["sft", "opd", "stableopd", "grpo"]

PRESETS: Mapping[str, Mapping[str, float]] = {
    "sft": {"distill": 0.0, "gold": 1.0, "reference": 0.0},
    "opd": {"distill": 1.0, "gold": 0.0, "reference": 0.0},
    "stableopd": {"distill": 1.0, "gold": 1.0, "reference": 0.1},
    "grpo": {"distill": 0.0, "gold": 0.0, "reference": 0.0, "reward": 1.0},
}
"""Coefficients that `method` fills in. The paper gives no values; docs/losses.md says what is known of these."""

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
    "use_vllm": "the rollout engine is rollout.engine",
    "trust_remote_code": "code from a model repository is never run",
}


_HOLD_SECRETS = {"health", "health.notify", "health.notify.url"}
"""Their values are never shown, not even in a complaint about them."""


class ModelConfig(Section):
    """A Hugging Face causal language model: a local folder or a hub id."""

    model_name_or_path: str | None = None
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None


class LoraSettings(Section):
    """Low-rank adapters in place of full fine-tuning; the reference is then the model with its adapters off."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    merge: bool = False
    """When the run ends, also write the student with its adapters merged in, as `merged/` in the run folder."""


class StudentConfig(ModelConfig):
    lora: LoraSettings | None = None
    dtype: Dtype = "float32"
    """Weights are kept in this dtype; with `optimizer.bf16` the arithmetic is bfloat16 all the same."""


class DataConfig(Section):
    path: str | None = None
    """Local .jsonl, .json or .parquet file, a folder of them, or a hub dataset id."""
    split: str | None = None
    prompt_column: str = "prompt"
    gold_column: str = "gold"
    answer_column: str = "answer"
    gold_weights_column: str | None = None
    """Column with one loss weight per golden token, the end token included."""
    gold_path: str | None = None
    """A pool of prompts with gold, drawn from in place of the golden solution of each prompt."""
    max_prompt_length: PositiveInt | None = None
    """Longest prompt in tokens; without it, what the student's context leaves."""
    shuffle: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class RolloutConfig(Section):
    engine: Literal["hf"] = "hf"
    num_prompts: PositiveInt = 64
    """Prompts per step, all processes together."""
    num_generations: PositiveInt = 4
    max_completion_length: PositiveInt = 1024
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegativeInt = 0
    stop_loops_after: Annotated[int, Field(ge=2)] | None = None
    """End a rollout that has repeated one stretch of tokens so many times in a row; it counts as truncated."""
    max_batch_size: PositiveInt = 256
    """Most sequences generated at a time in one process."""


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


class ControllerConfig(Section):
    """Bounds of what the controller does; see docs/health.md."""

    max_gold_coef: NonNegative = 4.0
    max_reference_coef: NonNegative = 1.0
    cooldown_steps: PositiveInt = 10
    calm_steps: PositiveInt = 20
    max_rollbacks: NonNegativeInt = 3
    drop_loops: bool = False
    shorten_budget: bool = False


class NotifyConfig(Section):
    """Who is told of alerts while the run goes: a webhook, a command, or both; see docs/watching.md."""

    url: SecretStr | None = None
    """Written to config.yaml and to trackers as asterisks. Better is `url_env`."""
    url_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the URL."""
    command: tuple[str, ...] = ()
    """Program and arguments; no shell. The alert is JSON on its standard input."""
    min_severity: Severity = "warning"
    timeout_s: Positive = TIMEOUT_S

    @model_validator(mode="after")
    def _somebody_is_told(self) -> Self:
        if self.url is None and self.url_env is None and not self.command:
            raise ValueError("it tells nobody: set url_env, url or command")
        if self.url is not None and self.url_env is not None:
            raise ValueError("url and url_env are the same setting; give one of them")
        problem = url_problem(self.url.get_secret_value()) if self.url is not None else None
        if problem:
            raise ValueError(f"url {problem} (the URL is not shown, and a run folder's config.yaml does not hold it)")
        return self

    def notifier(self, run_name: str) -> Notifier:
        return Notifier(
            run_name,
            url=self.url.get_secret_value() if self.url is not None else None,
            url_env=self.url_env,
            command=self.command,
            min_severity=self.min_severity,
            timeout_s=self.timeout_s,
        )


class HealthConfig(Section):
    """Thresholds of the monitor; see docs/run_folder.md and `stableopd.health.MonitorSettings`."""

    max_expected_length: PositiveInt | None = None
    tail_chars: PositiveInt = 10_000
    compression_threshold: Positive = 10.0
    actions: Actions = "warn"
    """What an alarm leads to: nothing (`off`), alerts (`warn`), stronger stabilisation (`stabilise`), also a return to
    an earlier checkpoint (`rollback`), or the end of the run (`stop`)."""
    controller: ControllerConfig = ControllerConfig()
    probe_prompts: NonNegativeInt = 16
    """Golden solutions whose ending the student is asked for at each step; 0: none."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """Any other field of MonitorSettings, by name."""
    overlap_topk: NonNegativeInt = 0
    """Compare the likeliest tokens of student and teacher, so many of each, at every token: costs one forward pass of
    the student; 0: not. Where the loss takes the teacher's top-k, their number is that of objective.distill.topk."""
    notify: NotifyConfig | None = None

    @field_validator("actions", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML reads off as false

    @model_validator(mode="after")
    def _settings_are_possible(self) -> Self:
        self.monitor_settings()
        return self

    @property
    def may_stabilise(self) -> bool:
        """Whether golden solutions and the initial student are needed even where no term asks for them."""
        return self.controller_settings().may_stabilise

    def controller_settings(self) -> ControllerSettings:
        return ControllerSettings(actions=self.actions, **self.controller.model_dump())

    def monitor_settings(self) -> MonitorSettings:
        known = {name for name in MonitorSettings.__dataclass_fields__ if name not in type(self).model_fields}
        for name in self.thresholds:
            if name not in known:
                raise ValueError(
                    f"thresholds has no entry {name!r}{_nearest(name, known)}; known: {', '.join(sorted(known))}"
                )
        return MonitorSettings(
            max_expected_length=self.max_expected_length,
            tail_chars=self.tail_chars,
            compression_threshold=self.compression_threshold,
            **self.thresholds,  # type: ignore[arg-type]
        )


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
    temperature: Positive = 0.6
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    greedy: bool = True
    max_completion_length: PositiveInt | None = None
    """Without it, the one of `rollout`."""
    judge: str = "exact"
    """`exact`, `math` (Math-Verify), or `package.module:function` taking (completion, answer)."""


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
    teacher: ModelConfig = ModelConfig()
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

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError.of(_explain(error)) from None

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


def _explain(error: ValidationError) -> list[tuple[str, str]]:
    """(dotted key, what is wrong with it and what to do) for every problem."""
    problems = []
    for problem in error.errors():
        dotted = ".".join(str(part) for part in problem["loc"])
        unknown = problem["type"] == "extra_forbidden"
        problems.append((dotted, _unknown_key(dotted) if unknown else _wrong_value(dotted, problem)))
    return problems


def _unknown_key(dotted: str) -> str:
    leaf = dotted.rsplit(".", 1)[-1]
    if leaf in HINTS:
        return f"unknown key {dotted!r}: {HINTS[leaf]}"
    known = list(_dotted_keys(StableOPDConfig))
    return f"unknown key {dotted!r}{_nearest(dotted, [*known, *FLAT_NAMES])}"


def _wrong_value(dotted: str, problem: Any) -> str:
    given, message = problem["input"], str(problem["msg"]).removeprefix("Value error, ")
    if not dotted:
        return message
    if dotted in _HOLD_SECRETS:
        return f"{dotted}: {message[0].lower()}{message[1:]}"
    if problem["type"] == "model_type":
        message = "is a section: give its settings one by one, as a mapping"
    elif isinstance(given, float) and math.isnan(given):
        message = "input should be a finite number"
    shown = repr(given)
    return f"{dotted}: {message[0].lower()}{message[1:]} (got {shown if len(shown) < 80 else shown[:77] + '...'})"


def _dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        kinds = get_args(info.annotation) or (info.annotation,)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if sections:
            yield prefix + name
            yield from _dotted_keys(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def _nearest(name: str, known: Collection[str]) -> str:
    """' (did you mean ...?)' by the whole dotted key, else by its last part."""
    leaf = name.rsplit(".", 1)[-1]
    by_leaf: dict[str, str] = {}
    for key in known:
        by_leaf.setdefault(key.rsplit(".", 1)[-1], key)
    whole = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    found = whole or [by_leaf[match] for match in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)]
    return f" (did you mean {found[0]!r}?)" if found else ""
