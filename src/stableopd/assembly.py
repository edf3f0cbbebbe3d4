"""Puts a run together from its configuration: models, data, engine, teacher, update. Refuses what cannot work."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.benchmarking.timed import TimedJudge
from stableopd.config import StableOPDConfig
from stableopd.distributed import share_weights
from stableopd.doctor.checkup import cheap_findings, refuse_fatal, student_side
from stableopd.doctor.examination import read_side
from stableopd.doctor.findings import Finding
from stableopd.doctor.sides import Side
from stableopd.engines import make_engine
from stableopd.errors import ModelError
from stableopd.heads import Head, HeadlessModel
from stableopd.judges import get_judge
from stableopd.models import (
    check_is_whole,
    computing_module,
    context_length,
    digest_of_weights,
    is_adapted,
    load_model,
    load_tokenizer,
    lora_config,
    reference_of,
    with_adapters,
)
from stableopd.optimizer import adamw
from stableopd.preparation import Dataset, RunData, check_model, check_processes, check_trackers, prepare_data
from stableopd.probe import probe_examples
from stableopd.protocols import Judge, RewardFunction, RolloutEngine, Teacher
from stableopd.rows import TrainingRows, gold_rows
from stableopd.scoring import Autocast
from stableopd.step import Updater
from stableopd.teaching import local_models, put_to_work, role_of, servers_of, teachers_context
from stableopd.vocabulary import end_token_ids, pad_token_id, vocab_size

Model = str | nn.Module | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """What a run works with."""

    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    student: nn.Module
    teacher: Teacher | None
    engine: RolloutEngine
    end_ids: frozenset[int]
    """Every id that ends a completion."""
    updater: Updater
    judge: Judge
    reward: RewardFunction | None
    special_ids: frozenset[int]
    """Special tokens that end no answer."""
    probe_rows: TrainingRows | None
    """This process's share of the golden solutions that the stop probe asks for; None where there is no gold."""
    findings: tuple[Finding, ...]
    """What the cheap half of the doctor found, none of it fatal (or told to go on)."""
    digests: dict[str, str]
    """Of the initial student and of the data, so that a resumed run can tell that it is the same."""


def assemble(
    config: StableOPDConfig,
    model: Model,
    teacher_model: Model,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: Any,
) -> RunParts:
    """Load, check and connect everything; the cheapest checks come first.

    Raises: ConfigError, DataError or ModelError when the run cannot work.
    """
    check_trackers(config.logging.report_to)
    # Ours is `optimizer.bf16`; a launcher's environment must not add to it, a caller's own accelerator may stand.
    fresh = not AcceleratorState._shared_state
    accelerator = Accelerator(
        mixed_precision="no" if fresh else None,
        log_with=list(config.logging.report_to) or None,
        project_dir=str(config.run_dir),
    )
    check_processes(accelerator, config)
    get_judge(config.evaluation.judge)  # a name that is none is told before anything is loaded
    judge = TimedJudge(config.evaluation.judge, timeout_s=config.evaluation.judge_timeout_s, setting="evaluation.judge")
    reward = get_judge(config.objective.reward.function, "objective.reward.function")
    tokenizer = processing_class or load_tokenizer(config.student, "student")
    student = model if isinstance(model, nn.Module) else load_model(config.student, "student")
    end_ids = end_token_ids(tokenizer, getattr(student, "generation_config", None)) | {*config.rollout.stop_token_ids}
    check_model("student", student, tokenizer, config)
    servers = servers_of(config, tokenizer)
    own, others = context_length(student.config), teachers_context(config, teacher_model, servers)
    shared = min((context for context in (own, others) if context is not None), default=None)
    data = prepare_data(config, tokenizer, shared, own, train_dataset, eval_dataset)
    findings = check_up(config, student, tokenizer, teacher_model, data)
    models = local_models(config, teacher_model, tokenizer)

    autocast = _autocast(accelerator, config.optimizer.bf16)
    student = _trainable(student, config, peft_config)
    student = student.to(accelerator.device)
    share_weights(student)
    digests = {"student": digest_of_weights(student), "dataset": data.digest()}
    teacher, teacher_head = put_to_work(
        config,
        models,
        servers,
        device=accelerator.device,
        vocab_size=vocab_size(tokenizer),
        autocast=autocast,
    )
    return RunParts(
        accelerator=accelerator,
        tokenizer=tokenizer,
        data=data,
        student=student,
        teacher=teacher,
        engine=make_engine(student, config, tokenizer, end_ids, data.stream.examples, autocast),
        end_ids=end_ids,
        updater=_updater(student, teacher_head, config, tokenizer, accelerator, autocast),
        judge=judge,
        reward=reward if config.objective.needs_rewards else None,
        special_ids=frozenset(tokenizer.all_special_ids) - end_ids,
        probe_rows=_probe_rows(data, config, tokenizer, accelerator, own),
        findings=findings,
        digests=digests,
    )


def with_names(config: StableOPDConfig, model: Model, teacher: Model) -> StableOPDConfig:
    """The configuration with the names of models that were given by name in Python."""
    update: dict[str, Any] = {}
    if isinstance(model, str):
        update["student"] = config.student.model_copy(update={"model_name_or_path": model})
    if isinstance(teacher, str):
        update["teacher"] = config.teacher.model_copy(update={"model_name_or_path": teacher})
    return config.model_copy(update=update)


def check_up(
    config: StableOPDConfig, student: nn.Module, tokenizer: PreTrainedTokenizerBase, teacher: Model, data: RunData
) -> tuple[Finding, ...]:
    """What the doctor sees without a forward pass.

    Raises: ModelError for fatal findings, unless `doctor` says to go on.
    """
    if config.doctor == "off":
        return ()
    pool = data.gold_pool.examples if data.gold_pool else None
    sides = _teacher_sides(config, tokenizer, teacher)
    findings = cheap_findings(
        config, student_side(student, tokenizer), sides, data.stream.examples, data.held_out, pool
    )
    refuse_fatal(findings, ignore=config.doctor == "warn")
    return tuple(findings)


def _teacher_sides(config: StableOPDConfig, tokenizer: PreTrainedTokenizerBase, teacher: Model) -> list[Side]:
    if not config.objective.needs_teacher:
        return []
    if isinstance(teacher, nn.Module):  # comes without a tokenizer: it is taken at its word
        generation = getattr(teacher, "generation_config", None)
        return [Side(name="teacher", tokenizer=tokenizer, model_config=teacher.config, generation_config=generation)]
    return [
        read_side(settings, role_of(config, name))
        for name, settings in config.named_teachers.items()
        if settings.is_set
    ]


def _trainable(student: nn.Module, config: StableOPDConfig, peft_config: Any) -> nn.Module:
    check_is_whole(student)
    if peft_config is None and config.student.lora is not None:
        peft_config = lora_config(config.student.lora)
    if peft_config is not None:
        student = with_adapters(student, peft_config, seed=config.seed)
    _check_trained_dtype(student)
    if config.optimizer.gradient_checkpointing:
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable()  # type: ignore[operator]
        if is_adapted(student):
            student.enable_input_require_grads()  # type: ignore[operator]
    return student


def _check_trained_dtype(student: nn.Module) -> None:
    """Raises: ModelError when weights are trained in a dtype in which small updates are lost or overflow."""
    dtypes = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    for dtype in sorted(dtypes - {torch.float32, torch.float64}, key=str):
        raise ModelError(
            f"the student would be trained in {str(dtype).removeprefix('torch.')}, in which small updates are rounded "
            "away. Set student.dtype=float32 and optimizer.bf16=true: the arithmetic is then bfloat16 and the weights "
            "stay exact"
        )


def _updater(
    student: nn.Module,
    teacher_head: Head | None,
    config: StableOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    autocast: Autocast,
) -> Updater:
    headless = HeadlessModel(computing_module(student), vocab_size(tokenizer))
    return Updater(
        headless,
        adamw(student, config.optimizer),
        config.objective,
        accelerator,
        temperature=config.rollout.temperature,
        max_grad_norm=config.optimizer.max_grad_norm,
        token_budget=config.optimizer.micro_batch_tokens,
        sequence_length=config.rollout.max_completion_length,
        autocast=autocast,
        reference=reference_of(student, headless) if config.needs_reference else None,
        teacher_head=teacher_head,
    )


def _probe_rows(
    data: RunData,
    config: StableOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    context: int | None,
) -> TrainingRows | None:
    pool = data.gold_pool.examples if data.gold_pool else data.stream.examples
    examples = probe_examples(pool, config.health.probe_prompts, config.seed, context)
    if len(examples) < accelerator.num_processes:
        return None
    mine = examples[accelerator.process_index :: accelerator.num_processes]
    return gold_rows(mine, range(len(mine)), pad_token_id(tokenizer), accelerator.device)


def _autocast(accelerator: Accelerator, bf16: bool) -> Autocast:
    return partial(torch.autocast, accelerator.device.type, dtype=torch.bfloat16) if bf16 else nullcontext
