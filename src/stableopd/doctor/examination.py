"""A whole examination, as `stableopd doctor` makes it: loads what a configuration names and asks every check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from stableopd.config import ModelConfig, StableOPDConfig, TeacherConfig
from stableopd.data import load_examples, read_rows
from stableopd.doctor.behaviour import behaviour_findings
from stableopd.doctor.checkup import cheap_findings
from stableopd.doctor.estimate import estimate, estimate_findings
from stableopd.doctor.findings import Finding, in_order
from stableopd.doctor.sides import Side, spread
from stableopd.errors import DataError, ModelError, StableOPDError, TeacherError
from stableopd.judges import get_judge
from stableopd.models import load_model, load_model_config, load_tokenizer
from stableopd.protocols import Teacher
from stableopd.teaching import is_placed, role_of
from stableopd.types import Example
from stableopd.vocabulary import vocab_size

JUDGE_BUDGET_S = 20.0
NUM_TEXTS = 256
NO_DATA = Finding(
    check="data",
    danger="fatal",
    summary="no data is given to train on",
    remedy="set data.path to a .jsonl, .json or .parquet file or a hub dataset id",
)
Say = Callable[[str], None]
"""Told what is being done."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What the doctor found, and what it measured."""

    findings: list[Finding]
    figures: Mapping[str, float] = field(default_factory=dict)
    """Of the models' behaviour, by name; empty where they were not run."""
    estimate: Any = None
    """Memory and time of a step on the given hardware."""
    looked_at: tuple[str, ...] = ()
    """What was read, in words."""
    left_out: tuple[str, ...] = ()
    """What was not looked at, and why."""

    @property
    def healthy(self) -> bool:
        return all(finding.danger == "note" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        counts = {danger: self.count(danger) for danger in ("fatal", "problem", "note")}
        estimate = asdict(self.estimate) if is_dataclass(self.estimate) else None  # type: ignore[arg-type]
        return {
            "healthy": self.healthy,
            "counts": counts,
            "findings": [finding.to_json() for finding in self.findings],
            "figures": dict(self.figures),
            "estimate": estimate,
            "looked_at": list(self.looked_at),
            "left_out": list(self.left_out),
        }

    def count(self, danger: str) -> int:
        return sum(finding.danger == danger for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the checks read."""

    student: Side
    teachers: tuple[Side, ...]
    examples: tuple[Example, ...] = ()
    held_out: tuple[Example, ...] = ()
    gold_pool: tuple[Example, ...] | None = None
    chat: bool | None = None
    findings: tuple[Finding, ...] = ()
    """What reading itself brought up."""


def examine(
    config: StableOPDConfig,
    *,
    quick: bool = False,
    num_prompts: int = 16,
    hardware: str = "auto",
    seed: int = 0,
    assumed: bool = False,
    say: Say = lambda _: None,
) -> Examination:
    """All findings about a run, the most dangerous first.

    Args:
        quick: load no weights and run no model.
        num_prompts: prompts that the student answers where models are run.
        hardware: what the estimate is for.
        assumed: the configuration is not that of a run: a pair was named, and perhaps data.

    Raises: ConfigError, DataError or ModelError for what cannot be read at all.
    """
    say("reading tokenizers, configurations and data")
    judge = get_judge(config.evaluation.judge)
    material = read_material(config)
    say("looking at the pair and the data")
    findings = list(material.findings)
    left_out = []
    if not config.data.path:
        left_out.append("no data was given: prompts and gold were not looked at")
        findings += [] if assumed else [NO_DATA]
    findings += cheap_findings(
        config,
        material.student,
        material.teachers,
        material.examples,
        material.held_out,
        material.gold_pool,
        judge=judge,
        judge_budget_s=JUDGE_BUDGET_S,
        chat=material.chat,
        num_texts=NUM_TEXTS,
    )
    if assumed:
        findings = [finding for finding in findings if finding.check != "num_prompts"]
    cost, more = _estimated(config, material, hardware)
    findings += more
    reason = _why_not_run(config, material, findings, quick)
    figures: Mapping[str, float] = {}
    if reason is not None:
        left_out.append(reason)
    else:
        try:
            more, figures = _behaviour(config, material, num_prompts, seed, say)
        except TeacherError as error:
            more = [_server_fails(error)]
        findings += more
    return Examination(
        findings=in_order(findings),
        figures=figures,
        estimate=cost,
        looked_at=_looked_at(material),
        left_out=tuple(left_out),
    )


# ------------------------------------------------------------------------------------ reading


def read_material(config: StableOPDConfig) -> Material:
    """Tokenizers, configurations and data that a run names. Rows that cannot be used become findings.

    Raises: DataError or ModelError for files that are missing or not to be read.
    """
    student = read_side(config.student, "student")
    tokenizer = student.tokenizer
    assert tokenizer is not None
    teachers = []
    if config.objective.needs_teacher:
        for name, teacher in config.named_teachers.items():
            if teacher.is_set:
                teachers.append(read_side(teacher, f"teacher {name}" if config.teachers else "teacher"))
    found: list[Finding] = []
    examples, chat = _read_examples(config, tokenizer, "data.path", found)
    held_out, _ = _read_examples(config, tokenizer, "evaluation.path", found)
    pool = None
    if config.data.gold_path and config.may_need_gold:
        pool, _ = _read_examples(config, tokenizer, "data.gold_path", found)
    return Material(
        student=student,
        teachers=tuple(teachers),
        examples=examples,
        held_out=held_out[: config.evaluation.num_prompts],
        gold_pool=pool,
        chat=chat,
        findings=tuple(found),
    )


def read_side(config: ModelConfig, role: str) -> Side:
    """Tokenizer and configurations of a model; of one at a server only what `model_name_or_path` gives.

    Raises: ModelError when they cannot be loaded.
    """
    if isinstance(config, TeacherConfig) and config.is_remote and not config.model_name_or_path:
        return Side(name=role)
    tokenizer = load_tokenizer(config, role)
    try:
        model_config = load_model_config(config, role)
    except ModelError:
        adapters = (Path(str(config.model_name_or_path)) / "adapter_config.json").is_file()
        if not adapters and not (isinstance(config, TeacherConfig) and config.is_remote):
            raise
        model_config = None  # adapters have none of their own; beside a server a folder with the tokenizer is enough
    return Side(
        name=role,
        tokenizer=tokenizer,
        model_config=model_config,
        generation_config=_generation_config(config, model_config),
    )


def _generation_config(config: ModelConfig, model_config: Any) -> Any:
    """As loading the model would make it: the file beside the weights, or else what the model's configuration says."""
    assert config.model_name_or_path
    try:
        return GenerationConfig.from_pretrained(config.model_name_or_path, revision=config.revision or "main")
    except (OSError, ValueError):
        return None if model_config is None else GenerationConfig.from_model_config(model_config)


def _read_examples(
    config: StableOPDConfig, tokenizer: Any, setting: str, found: list[Finding]
) -> tuple[tuple[Example, ...], bool | None]:
    """Rows of the data under a setting, and whether most prompts are chats.

    Nothing is asked of lengths, gold and answers here: checks of their own do, and all of them shall speak.
    """
    section, name = setting.split(".")
    path, split = getattr(getattr(config, section), name), getattr(config, section).split
    if not path:
        return (), None
    rows = read_rows(path, split, setting=setting)
    data = config.data
    chats = sum(isinstance(row.get(data.prompt_column), list) for row in rows)
    chat = chats * 2 > len(rows)
    if chat and not tokenizer.chat_template:
        return (), True  # the check of templates says so
    trained = setting != "evaluation.path"
    try:
        examples = load_examples(
            rows,
            tokenizer,
            prompt_column=data.prompt_column,
            gold_column=data.gold_column,
            answer_column=data.answer_column,
            gold_weights_column=data.gold_weights_column if trained and config.may_need_gold else None,
            source=path,
            chat_template_kwargs=data.chat_template_kwargs,
            teacher_column=data.teacher_column if name == "path" and trained else None,
            teachers=config.named_teachers,
        )
    except (DataError, ModelError) as error:
        found.append(_unusable(setting, error))
        return (), chat or None
    return tuple(examples), chat or None


def _server_fails(error: TeacherError) -> Finding:
    return Finding(
        check="teacher_server",
        danger="fatal",
        summary="the teacher's server cannot score",
        evidence=str(error).partition(". ")[0],
        remedy="start it, check teacher.server_url and what it says; then run the doctor again",
    )


def _unusable(setting: str, error: StableOPDError) -> Finding:
    what, _, how = str(error).partition(". ")
    return Finding(
        check="data",
        danger="fatal",
        summary=f"the rows of {setting} cannot be used, and a run refuses them",
        evidence=what,
        remedy=how or "correct the rows",
    )


# ------------------------------------------------------------------------------------ running models


def _estimated(config: StableOPDConfig, material: Material, hardware: str) -> tuple[Any, list[Finding]]:
    """Memory and time of a step, where both models' configurations are known."""
    teacher = material.teachers[0].model_config if material.teachers else None
    prompts = [len(example.prompt_ids) for example in material.examples]
    golds = [len(example.gold_ids) for example in material.gold_pool or material.examples if example.gold_ids]
    longest = config.rollout.max_completion_length
    made = estimate(
        config,
        material.student.model_config,
        teacher,
        hardware,
        prompt_tokens=max(prompts, default=None),
        mean_completion=min(sum(golds) / len(golds), longest) if golds else None,
    )
    return made, estimate_findings(made)


def _why_not_run(config: StableOPDConfig, material: Material, findings: Sequence[Finding], quick: bool) -> str | None:
    """Why the models are not run; None if they can be."""
    if quick:
        return "the models were not run (--quick)"
    fatal = [finding.check for finding in findings if finding.danger == "fatal"]
    if fatal:
        return f"the models were not run: first mend {', '.join(dict.fromkeys(fatal))}"
    if not material.examples:
        return "the models were not run: no prompts were given"
    return None


def _behaviour(
    config: StableOPDConfig, material: Material, num_prompts: int, seed: int, say: Say
) -> tuple[list[Finding], Mapping[str, float]]:
    """Findings and figures of rollouts of the student, scored by the first teacher."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("loading the student")
    student = load_model(config.student, "student").to(device).eval()
    name, teacher = _teacher(config, material, device, say) if config.objective.needs_teacher else (None, None)
    examples = [example for example in material.examples if example.teacher in (None, name)]
    say("running the student and the teacher")
    findings, figures = behaviour_findings(
        student=student,
        teacher=teacher,
        tokenizer=material.student.tokenizer,
        examples=spread(examples, num_prompts),
        end_ids=material.student.end_ids | frozenset(config.rollout.stop_token_ids),
        config=config,
        device=device,
        seed=seed,
        progress=say,
    )
    return list(findings), figures


def _teacher(
    config: StableOPDConfig, material: Material, device: torch.device, say: Say
) -> tuple[str, nn.Module | Teacher]:
    """The first teacher of the run, loaded or asked at its server."""
    name, settings = next(iter(config.named_teachers.items()))
    if settings.is_remote:
        from stableopd.teachers.server import ServerTeacher

        say("asking the teacher's server")
        assert material.student.tokenizer is not None
        server = ServerTeacher(settings, vocab_size=vocab_size(material.student.tokenizer))
        server.check(temperature=config.rollout.temperature)
        return name, server
    say("loading the teacher")
    model = load_model(settings, role_of(config, name))
    return name, (model if is_placed(settings) else model.to(device)).eval()


def _looked_at(material: Material) -> tuple[str, ...]:
    counts = (
        ("prompts", len(material.examples)),
        ("golden solutions", sum(bool(example.gold_ids) for example in material.gold_pool or material.examples)),
        ("held-out prompts", len(material.held_out)),
    )
    sides = [material.student, *material.teachers]
    names = [f"{side.name} {side.tokenizer.name_or_path}" for side in sides if side.tokenizer is not None]
    return (*names, *(f"{number:,} {what}" for what, number in counts if number))
