"""The cheap half of the doctor: all that can be told without a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.doctor.budget import context_findings, gold_length_findings, prompt_length_findings
from stableopd.doctor.data import gold_findings, gold_text, presence_findings, prompt_findings
from stableopd.doctor.findings import Finding, in_order
from stableopd.doctor.judging import judge_findings
from stableopd.doctor.sides import Side, spread
from stableopd.doctor.templates import bos_findings, is_chat, pair_template_findings, template_findings
from stableopd.doctor.tokens import end_findings, pair_end_findings, size_findings, token_findings
from stableopd.errors import ModelError
from stableopd.protocols import Judge
from stableopd.types import Example
from stableopd.vocabulary import vocab_size

_MOST_EXAMPLES = 10_000
_MOST_LOOKED_AT = 256
_LOW_TEMPERATURE = 0.2


def cheap_findings(
    config: StableOPDConfig,
    student: Side,
    teachers: Sequence[Side],
    examples: Sequence[Example],
    held_out: Sequence[Example] = (),
    gold_pool: Sequence[Example] | None = None,
    *,
    judge: Judge | None = None,
    judge_budget_s: float = 0.5,
    chat: bool | None = None,
    num_texts: int = 64,
) -> list[Finding]:
    """What is wrong with a run before its first step, the most dangerous first. No weights are touched.

    Args:
        student: with its tokenizer.
        teachers: as many as are known; one whose tokenizer is None is compared by its configuration alone.
        examples: training prompts; of more than 10,000 an even sample is read. Empty: what concerns data is left out.
        gold_pool: where gold comes from, if not from the prompts' own rows.
        judge: gold is held to it; without one it is not judged.
        num_texts: golden solutions that are read as text, spread evenly over all.
        chat: whether prompts are rendered by the chat template; without it that is told by the prompts.
    """
    assert student.tokenizer is not None
    sample = spread(examples, _MOST_EXAMPLES)
    template_kwargs = config.data.chat_template_kwargs
    if chat is None:
        chat = is_chat(student.tokenizer, spread(sample, _MOST_LOOKED_AT), template_kwargs)
    golds = [example for example in (sample if gold_pool is None else gold_pool) if example.gold_ids]
    golds = spread(golds, _MOST_EXAMPLES)
    known = [teacher for teacher in teachers if teacher.tokenizer is not None]

    num_ids = vocab_size(student.tokenizer)
    findings = [*_teacher_findings(config, teachers), *size_findings(student, teachers, num_ids)]
    findings += end_findings(student, config.rollout.stop_token_ids, num_ids)
    findings += template_findings(student, template_kwargs, chat=chat)
    used = _used_ids(student, sample, config.rollout.stop_token_ids)
    for teacher in known:
        findings += token_findings(student, teacher, [example.prompt for example in sample], used)
        findings += pair_end_findings(student, teacher, config.rollout.stop_token_ids, chat=chat)
        findings += pair_template_findings(student, teacher, template_kwargs, chat=chat)
    findings += bos_findings(student, known, sample)
    findings += context_findings(config, [student, *teachers])
    findings += sampling_findings(config)
    if examples:
        findings += prompt_length_findings(config, [student, *teachers], sample)
        findings += prompt_length_findings(config, [student], held_out, "held-out prompts")
        findings += prompt_findings(config, examples, held_out)
        findings += presence_findings(config, examples, has_pool=gold_pool is not None)
        findings += gold_length_findings(config, student, golds)
        findings += gold_findings(config, student.tokenizer, golds, num_texts)
        findings += _judged(config, student.tokenizer, spread(_with_answer(golds), num_texts), judge, judge_budget_s)
    return in_order(findings)


def refuse_fatal(findings: Sequence[Finding], *, ignore: bool = False) -> None:
    """Raises: ModelError that lists every fatal finding with its remedy; nothing with `ignore`."""
    fatal = [finding for finding in findings if finding.danger == "fatal"]
    if not fatal or ignore:
        return
    lines = [
        f"{finding.check}: {finding.summary}{f' ({finding.evidence})' if finding.evidence else ''}. "
        f"Remedy: {finding.remedy}"
        for finding in fatal
    ]
    raise ModelError(
        "the run would fail or collapse, by the checks of `stableopd doctor`:\n"
        + "\n".join(lines)
        + "\nTo go on all the same, where a run can: doctor=warn"
    )


def student_side(model: Any, tokenizer: Any) -> Side:
    """The side of a student that is loaded, adapters or not."""
    return Side(
        name="student",
        tokenizer=tokenizer,
        model_config=getattr(model, "config", None),
        generation_config=getattr(model, "generation_config", None),
    )


def sampling_findings(config: StableOPDConfig) -> Iterator[Finding]:
    """Ways of drawing rollouts under which the objective learns little, or not what it says."""
    rollout, objective = config.rollout, config.objective
    if not objective.needs_rollouts:
        return
    if rollout.temperature < _LOW_TEMPERATURE:
        yield Finding(
            check="sampling",
            danger="problem",
            summary="rollouts are drawn almost greedily: the student sees next to nothing but its first choice",
            evidence=f"rollout.temperature={rollout.temperature:g}",
            remedy="set rollout.temperature=1.0",
        )
    cut = [
        f"rollout.{name}={getattr(rollout, name):g}"
        for name, off in (("top_p", 1.0), ("top_k", 0))
        if getattr(rollout, name) != off
    ]
    if cut and objective.has_policy_gradient and objective.correction.kind == "none":
        yield Finding(
            check="sampling",
            danger="note",
            summary="rollouts are drawn from a cut distribution, and the policy gradient takes them for the whole one",
            evidence=", ".join(cut),
            remedy="set rollout.top_p=1 and rollout.top_k=0, or keep the cut for its effect on quality",
        )


def _teacher_findings(config: StableOPDConfig, teachers: Sequence[Side]) -> Iterator[Finding]:
    if not config.objective.needs_teacher:
        return
    if not teachers:
        yield Finding(
            check="teacher_missing",
            danger="fatal",
            summary=f"method={config.method} distils a teacher, and none is given",
            remedy="set teacher.model_name_or_path or teacher.server_url, or objective.distill.coef=0",
        )
    for teacher in teachers:
        if teacher.tokenizer is None:
            yield Finding(
                check="teacher_unknown",
                danger="note",
                summary=f"the tokenizer of the {teacher.name} is not known here, so the pair is not compared",
                evidence="it lives at a server, and model_name_or_path is not set",
                remedy="set model_name_or_path beside server_url: only its tokenizer and configuration are read",
            )


def _used_ids(student: Side, examples: Sequence[Example], stop_ids: Sequence[int]) -> frozenset[int]:
    """Ids that prompts hold or that end the student's answers."""
    ends = student.end_ids | frozenset(stop_ids)
    return ends.union(*(example.prompt_ids for example in spread(examples, _MOST_LOOKED_AT)))


def _with_answer(golds: Sequence[Example]) -> list[Example]:
    return [example for example in golds if example.answer]


def _judged(
    config: StableOPDConfig, tokenizer: Any, golds: Sequence[Example], judge: Judge | None, budget_s: float
) -> Iterator[Finding]:
    if judge is not None and golds:
        yield from judge_findings(judge, config.evaluation.judge, golds, gold_text(tokenizer, golds), budget_s)
