"""The half of the doctor that runs the models: what they do on a few rollouts and on gold, and what that forebodes.

Thresholds are for pairs that share a vocabulary. They were set on pairs measured here (docs/doctor.md has the figures):
a pair that learns shares most of its likeliest tokens and differs by fractions of a nat per token; a teacher whose
output rows are permuted, or that was trained on nothing, is several nats away and shares hardly any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopd.config import StableOPDConfig
from stableopd.doctor.findings import Finding, in_order
from stableopd.doctor.sample import Bench, Sample, last_tokens
from stableopd.evaluate import decode
from stableopd.health.signals import repetition_rate, truncation_rate
from stableopd.judges import get_judge
from stableopd.observation import overlap
from stableopd.protocols import Teacher
from stableopd.rollout.subsets import select_rollouts
from stableopd.types import Example

NEVER_ENDS = 0.05
"""Mean probability of the end token at the end of gold below which the teacher does not end there."""
NEVER_SAYS = 1e-4
INCOMPATIBLE_OVERLAP, INCOMPATIBLE_KL = 0.3, 2.0
SAME_OVERLAP, SAME_KL = 0.99, 1e-3
MANY_TRUNCATED, MANY_REPETITIVE = 0.5, 0.2
OFF_STYLE = 1.0
"""Nats per token by which the teacher likes gold less than the student does."""


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
    sample = bench.sample(examples, progress or (lambda _: None))
    figures: dict[str, float] = {}
    findings = list(_not_finite(sample))
    if not findings:
        findings += _teacher_ends(sample, bench, figures)
        findings += _special_tokens(sample, bench)
        findings += _agreement(sample, figures)
        findings += _gold_style(sample, figures)
        findings += _consistency(sample, bench, figures)
    findings += _step_zero(sample, bench, figures)
    return in_order(findings), figures


def _not_finite(sample: Sample) -> Iterator[Finding]:
    """A model whose log-probabilities are NaN or −inf cannot be learnt from, and cannot learn."""
    mask = sample.rollouts.completion_mask
    sides: dict[str, Tensor | None] = {
        "student": sample.student.logprobs,
        "teacher": None if sample.teacher is None else sample.teacher.sampled_logprobs,
    }
    for side, logprobs in sides.items():
        if logprobs is None:
            continue
        broken = float((~torch.isfinite(logprobs[mask])).double().mean())
        if broken:
            yield Finding(
                check="not_finite",
                danger="fatal",
                summary=f"the {side} gives log-probabilities that are no numbers",
                evidence=f"{broken:.0%} of the rollouts' tokens",
                remedy=f"load the {side} in float32 or bfloat16 instead of float16, and check its weights for NaN",
                figures={"not_finite_fraction": broken},
            )


def _teacher_ends(sample: Sample, bench: Bench, figures: dict[str, float]) -> Iterator[Finding]:
    """Does the teacher end an answer where the student's answers end?"""
    if sample.teacher is None:
        return
    stopped = [
        row
        for row, (ids, reason) in enumerate(
            zip(sample.rollouts.completions(), sample.rollouts.finish_reason, strict=True)
        )
        if reason == "stop" and ids[-1] in bench.end_ids
    ]
    if stopped and sample.teacher.sampled_logprobs is not None:
        ends = last_tokens(sample.teacher.sampled_logprobs, sample.rollouts, stopped).exp()
        figures["teacher_end_at_rollouts"] = float(ends.mean())
    if sample.gold is None or sample.gold_teacher is None or sample.gold_teacher.sampled_logprobs is None:
        return
    rows = range(len(sample.gold))
    at_gold = last_tokens(sample.gold_teacher.sampled_logprobs, sample.gold, rows).exp()
    figures["teacher_end_at_gold"] = mean = float(at_gold.mean())
    if mean >= NEVER_ENDS:
        return
    end_ids = sorted({ids[-1] for ids in sample.gold.completions()})
    instead = ""
    if sample.gold_teacher.topk_ids is not None:
        likeliest = last_tokens(sample.gold_teacher.topk_ids[..., 0], sample.gold, rows)
        token = int(likeliest.mode().values)
        instead = f"; there it says {_named(bench, [token])} most often"
    yield Finding(
        check="teacher_ends",
        danger="fatal",
        summary="the teacher does not end answers where the student's end: rollouts would learn to go on",
        evidence=f"mean probability of {_named(bench, end_ids)} at the end of gold: {mean:.2g}{instead}",
        remedy="let gold end in what the teacher ends with: its chat template and eos_token in the student's "
        "tokenizer, eos_token_id in generation_config.json, rollout.stop_token_ids",
        figures={"teacher_end_at_gold": mean},
    )


def _special_tokens(sample: Sample, bench: Bench) -> Iterator[Finding]:
    """Special tokens in rollouts or gold to which the teacher gives no chance."""
    special = set(bench.tokenizer.all_special_ids) | set(bench.tokenizer.added_tokens_decoder)
    special -= bench.end_ids
    chances: dict[int, list[float]] = {}
    for batch, scores in ((sample.rollouts, sample.teacher), (sample.gold, sample.gold_teacher)):
        if batch is None or scores is None or scores.sampled_logprobs is None:
            continue
        ids, logprobs = batch.completion_ids[batch.completion_mask], scores.sampled_logprobs[batch.completion_mask]
        for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            if token in special:
                chances.setdefault(token, []).append(math.exp(logprob))
    never = {token: sum(found) / len(found) for token, found in chances.items()}
    never = {token: chance for token, chance in never.items() if chance < NEVER_SAYS}
    if never:
        yield Finding(
            check="special_tokens",
            danger="problem",
            summary="the student's answers hold special tokens that the teacher never says",
            evidence=f"{_named(bench, sorted(never))}, mean probability {max(never.values()):.1g} at most",
            remedy="set objective.distill.tokens.mask_special=true, or prompt with the teacher's chat template",
        )


def _agreement(sample: Sample, figures: dict[str, float]) -> Iterator[Finding]:
    """How alike the two are at the states that the student visits, and what that forebodes."""
    teacher, mask = sample.teacher, sample.rollouts.completion_mask
    if teacher is None or teacher.sampled_logprobs is None:
        return
    count = max(1.0, float(mask.sum()))
    kl = float(((sample.student.logprobs - teacher.sampled_logprobs) * mask).sum()) / count
    figures["reverse_kl"] = kl
    shared = None
    if teacher.topk_ids is not None and sample.student.topk_ids is not None:
        found = overlap(sample.student, teacher, mask)
        figures["topk_overlap"] = shared = float(found["health/topk_overlap"].sum()) / count
        if teacher.entropy is not None and sample.student.entropy is not None:
            gap = (teacher.entropy - sample.student.entropy) * mask
            figures["entropy_gap"] = float(gap.sum()) / count
    measured = f"reverse KL {kl:.3g} nats per token"
    measured += "" if shared is None else f", {shared:.0%} of the likeliest tokens in common"
    largest = float(((sample.student.logprobs - teacher.sampled_logprobs).abs() * mask).max())
    if kl > INCOMPATIBLE_KL and (shared is None or shared < INCOMPATIBLE_OVERLAP):
        yield Finding(
            check="agreement",
            danger="problem",
            summary="forecast: incompatible. What the student writes means next to nothing to the teacher",
            evidence=measured,
            remedy="check that both use the same token ids and prompt format; else begin with a cold start on the "
            "teacher's own answers (method=sft), or take a teacher of the student's family",
        )
    elif largest < SAME_KL or (abs(kl) < SAME_KL and shared is not None and shared > SAME_OVERLAP):
        yield Finding(
            check="agreement",
            danger="problem",
            summary="forecast: nothing to learn. Student and teacher say the same on the student's rollouts",
            evidence=measured,
            remedy="take a teacher that can do more (is it the student itself?), or harder prompts",
        )


def _gold_style(sample: Sample, figures: dict[str, float]) -> Iterator[Finding]:
    if sample.gold is None or sample.gold_teacher is None or sample.gold_student is None:
        return
    if sample.gold_teacher.sampled_logprobs is None:
        return
    mask = sample.gold.completion_mask
    figures["gold_logprob_teacher"] = teacher = float(sample.gold_teacher.sampled_logprobs[mask].mean())
    figures["gold_logprob_student"] = student = float(sample.gold_student.logprobs[mask].mean())
    if teacher < student - OFF_STYLE:
        yield Finding(
            check="gold_style",
            danger="note",
            summary="gold is not in the teacher's style: it and the teacher will pull the student apart",
            evidence=f"mean log-probability of gold: teacher {teacher:.2f}, student {student:.2f} nats per token",
            remedy="take gold from the teacher itself (its right answers), or a smaller lambda_gold",
        )


def _consistency(sample: Sample, bench: Bench, figures: dict[str, float]) -> Iterator[Finding]:
    """Do scores depend on what is scored beside them, and does the engine say what the trainer says?"""
    rollouts, mask = sample.rollouts, sample.rollouts.completion_mask
    some = list(range(len(rollouts)))[::-2]  # in another order, beside others
    tolerance = 1e-3 if _is_exact(bench) else 0.1
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
        if gap > tolerance:
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
    dtypes = {parameter.dtype for module in bench.modules() for parameter in module.parameters()}
    return dtypes <= {torch.float32, torch.float64}


def _named(bench: Bench, ids: Sequence[int]) -> str:
    tokens = bench.tokenizer.convert_ids_to_tokens(list(ids))
    return ", ".join(f"{token!r} ({index})" for token, index in zip(tokens, ids, strict=True))
