"""The half of the doctor that runs the models: what they do on a few rollouts and on gold, and what that forebodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopd.config import StableOPDConfig
from stableopd.doctor.agreement import agreement, gold_style, special_tokens, teacher_ends
from stableopd.doctor.findings import Finding, in_order
from stableopd.doctor.sample import Bench, Sample
from stableopd.errors import ModelError
from stableopd.evaluate import decode
from stableopd.health.signals import repetition_rate, truncation_rate
from stableopd.judges import get_judge
from stableopd.protocols import Teacher
from stableopd.rollout.subsets import select_rollouts
from stableopd.types import Example, RolloutBatch

MANY_TRUNCATED, MANY_REPETITIVE = 0.5, 0.2


def behaviour_findings(
    *,
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    tokenizer: Any,
    examples: Sequence[Example],
    end_ids: frozenset[int],
    config: StableOPDConfig,
    device: Any,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Finding], dict[str, float]]:
    """What is wrong with how student and teacher behave, the most dangerous first, and the figures behind it.

    Args:
        student, teacher: on `device`; a teacher that is no module only has to score. None: the run has none.
        examples: prompts for the student's rollouts, two of each; golden solutions among them are scored as they are.
        end_ids: every id that ends an answer.
    """
    bench = Bench(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        end_ids=end_ids,
        config=config,
        device=torch.device(device),
        seed=seed,
    )
    try:
        sample = bench.sample(examples, progress or (lambda _: None))
    except ModelError as error:  # logits that are no numbers end a generation
        return [_does_not_run(error)], {}
    figures: dict[str, float] = {}
    findings = list(_not_finite(sample))
    if not findings:
        findings += teacher_ends(sample, bench, figures)
        findings += special_tokens(sample, bench)
        findings += agreement(sample, figures)
        findings += gold_style(sample, figures)
        findings += _consistency(sample, bench, figures)
    findings += _step_zero(sample, bench, figures)
    return in_order(findings), figures


def _does_not_run(error: ModelError) -> Finding:
    return Finding(
        check="not_finite",
        danger="fatal",
        summary="the student cannot generate",
        evidence=str(error),
        remedy="load the student in float32 (student.dtype=float32), and check its weights for NaN",
    )


def _not_finite(sample: Sample) -> Iterator[Finding]:
    """A model whose log-probabilities are NaN or −inf cannot be learnt from, and cannot learn."""
    gold = sample.gold
    passes: list[tuple[str, RolloutBatch | None, Tensor | None]] = [
        ("student", sample.rollouts, sample.student.logprobs),
        ("teacher", sample.rollouts, None if sample.teacher is None else sample.teacher.sampled_logprobs),
        ("student", gold, None if sample.gold_student is None else sample.gold_student.logprobs),
        ("teacher", gold, None if sample.gold_teacher is None else sample.gold_teacher.sampled_logprobs),
    ]
    for side, batch, logprobs in passes:
        if batch is None or logprobs is None:
            continue
        broken = float((~torch.isfinite(logprobs[batch.completion_mask])).double().mean())
        if broken:
            yield Finding(
                check="not_finite",
                danger="fatal",
                summary=f"the {side} gives log-probabilities that are no numbers",
                evidence=f"{broken:.0%} of the tokens of {'gold' if batch is gold else 'rollouts'}",
                remedy=f"load the {side} in float32 or bfloat16 instead of float16, and check its weights for NaN",
                figures={"not_finite_fraction": broken},
            )


def _consistency(sample: Sample, bench: Bench, figures: dict[str, float]) -> Iterator[Finding]:
    """Do scores depend on what is scored beside them, and does the engine say what the trainer says?"""
    rollouts, mask = sample.rollouts, sample.rollouts.completion_mask
    some = list(range(len(rollouts)))[::-2]  # in another order, beside others
    exact, exact_teacher = _is_exact(bench), _is_exact(bench) and bench.teacher_is_here
    tolerance = 1e-3 if exact else 0.5
    again = bench.student_scores(select_rollouts(rollouts, some), token_budget=1)
    pairs: dict[str, tuple[Tensor, Tensor | None]] = {"student": (sample.student.logprobs[some], again.logprobs)}
    if sample.teacher is not None and sample.teacher.sampled_logprobs is not None:
        scores = bench.teacher_scores(select_rollouts(rollouts, some))
        assert scores is not None
        pairs["teacher"] = sample.teacher.sampled_logprobs[some], scores.sampled_logprobs
    for side, (one, other) in pairs.items():
        if other is None:
            continue
        gap = float(((one - other).abs() * mask[some]).max())
        figures[f"rescoring_gap_{side}"] = gap
        if gap > (1e-3 if (exact_teacher if side == "teacher" else exact) else 0.5):
            yield Finding(
                check="consistency",
                danger="problem",
                summary=f"the {side} scores the same tokens differently in another batch",
                evidence=f"largest difference {gap:.2g} nats",
                remedy="set attn_implementation=sdpa or eager, dtype=float32; look for dropout or batch statistics",
            )
    figures["engine_gap"] = engine = float(((sample.student.logprobs - rollouts.sampling_logprobs).abs() * mask).max())
    if engine > tolerance:
        yield Finding(
            check="engine_gap",
            danger="problem",
            summary="decoding and training disagree about the student's own log-probabilities",
            evidence=f"largest difference {engine:.2g} nats",
            remedy="set student.attn_implementation=eager; if it stays, objective.correction.kind=truncate",
        )


def _step_zero(sample: Sample, bench: Bench, figures: dict[str, float]) -> Iterator[Finding]:
    """Health of the rollouts before anything is trained."""
    health, rollouts = bench.config.health, sample.rollouts
    completions = decode(rollouts, sample.examples, bench.tokenizer, bench.end_ids)
    texts = [completion.text for completion in completions]
    figures["truncated_fraction"] = truncated = truncation_rate(rollouts.finish_reason)
    figures["repetitive_fraction"] = repetitive = repetition_rate(
        texts, health.tail_chars, health.compression_threshold
    )
    lengths = rollouts.lengths()
    figures["mean_length"] = sum(lengths) / len(lengths)
    figures |= _right_fraction(bench, sample, texts)
    if truncated > MANY_TRUNCATED:
        yield Finding(
            check="truncated_at_start",
            danger="problem",
            summary="most rollouts run into the length limit before anything is trained",
            evidence=f"{truncated:.0%} of {len(rollouts)}, limit {bench.config.rollout.max_completion_length} tokens",
            remedy="begin with a cold start (method=sft), raise rollout.max_completion_length, or check the end tokens",
        )
    if repetitive > MANY_REPETITIVE:
        yield Finding(
            check="repetitive_at_start",
            danger="problem",
            summary="rollouts repeat themselves before anything is trained",
            evidence=f"{repetitive:.0%} of {len(rollouts)}",
            remedy="begin with a cold start on complete solutions (method=sft), then distil",
        )


def _right_fraction(bench: Bench, sample: Sample, texts: Sequence[str]) -> dict[str, float]:
    judge = get_judge(bench.config.evaluation.judge)
    right: list[bool] = []
    for text, prompt in zip(texts, sample.rollouts.prompt_index, strict=True):
        answer = sample.examples[prompt].answer
        if answer is not None:
            try:
                right.append(bool(judge(text, answer)))
            except Exception:  # a user's judge on a model's text: it must not end the examination
                right.append(False)
    return {"right_fraction": sum(right) / len(right)} if right else {}


def _is_exact(bench: Bench) -> bool:
    if bench.config.optimizer.bf16:
        return False
    dtypes = {parameter.dtype for module in bench.modules() for parameter in module.parameters()}
    return dtypes <= {torch.float32, torch.float64}
