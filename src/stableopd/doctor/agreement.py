"""What the teacher makes of the student's answers: where it ends, what it never says, how alike the two are.

Thresholds are for pairs that share a vocabulary. They were set on pairs measured here (docs/doctor.md has the figures):
a pair that learns shares most of its likeliest tokens and differs by fractions of a nat per token; a teacher whose
output rows are permuted, or that was trained on nothing, is several nats away and shares hardly any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stableopd.doctor.findings import Finding
from stableopd.doctor.sample import Bench, Sample, last_tokens
from stableopd.observation import overlap
from stableopd.types import RolloutBatch, TokenScores

NEVER_ENDS = 0.05
"""Mean probability of the end token at the end of gold below which the teacher does not end there."""
_ENOUGH = 8
"""Rollouts that ended by themselves from which something can be told."""
NEVER_SAYS = 1e-4
INCOMPATIBLE_OVERLAP, INCOMPATIBLE_KL = 0.3, 2.0
SAME_OVERLAP, SAME_KL = 0.99, 1e-3
OFF_STYLE = 1.0
"""Nats per token by which the teacher likes gold less than the student does."""


def teacher_ends(sample: Sample, bench: Bench, figures: dict[str, float]) -> Iterator[Finding]:
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
        figures["teacher_end_at_rollouts"] = mean = float(ends.mean())
        if mean < NEVER_ENDS and len(stopped) >= _ENOUGH and sample.gold is None:
            yield Finding(
                check="teacher_ends",
                danger="problem",
                summary="the teacher does not end answers where the student's rollouts end",
                evidence=f"mean probability of the end token at the end of {len(stopped)} rollouts: {mean:.2g}",
                remedy="compare eos_token_id and chat templates of the two; give gold, whose ends are a surer sign",
                figures={"teacher_end_at_rollouts": mean},
            )
    if sample.gold is None or sample.gold_teacher is None or sample.gold_teacher.sampled_logprobs is None:
        return
    rows = range(len(sample.gold))
    figures["teacher_end_at_gold"] = mean = float(_end_probability(sample.gold_teacher, sample.gold, bench).mean())
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


def _end_probability(scores: TokenScores, gold: RolloutBatch, bench: Bench) -> Tensor:
    """[B]: how likely the teacher ends at the end of gold, in whichever end token.

    Of the other end tokens those among its likeliest are counted; a sampled log-probability alone gives gold's own.
    """
    assert scores.sampled_logprobs is not None
    rows = range(len(gold))
    chance = last_tokens(scores.sampled_logprobs, gold, rows).exp()
    if scores.topk_ids is None or scores.topk_logprobs is None:
        return chance
    own = last_tokens(gold.completion_ids, gold, rows)
    ids, logprobs = last_tokens(scores.topk_ids, gold, rows), last_tokens(scores.topk_logprobs, gold, rows)
    others = torch.isin(ids, torch.tensor(sorted(bench.end_ids), device=ids.device)) & (ids != own[:, None])
    return chance + (logprobs.exp() * others).sum(dim=-1)


def special_tokens(sample: Sample, bench: Bench) -> Iterator[Finding]:
    """Special tokens in rollouts or gold to which the teacher gives no chance."""
    if bench.config.objective.distill.tokens.mask_special:
        return
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


def agreement(sample: Sample, figures: dict[str, float]) -> Iterator[Finding]:
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
    else:
        yield Finding(check="agreement", danger="note", summary="forecast: fine", evidence=measured)


def gold_style(sample: Sample, figures: dict[str, float]) -> Iterator[Finding]:
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


def _named(bench: Bench, ids: Sequence[int]) -> str:
    tokens = bench.tokenizer.convert_ids_to_tokens(list(ids))
    return ", ".join(f"{token!r} ({index})" for token, index in zip(tokens, ids, strict=True))
