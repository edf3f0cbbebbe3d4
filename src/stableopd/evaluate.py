"""Held-out evaluation: accuracy beside length, truncation and repetition, sampled and greedy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from stableopd.health.signals import repetition_rate, truncation_rate
from stableopd.protocols import Judge, RolloutEngine
from stableopd.types import Example, RolloutBatch, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One completion as people and files see it; `text` is without its end token."""

    example: Example
    text: str
    token_ids: list[int]
    finish_reason: str

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def decode(
    rollouts: RolloutBatch,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int] | None = None,
) -> list[Completion]:
    """The rollouts as text. Special tokens inside are shown; only the end token is left off.

    Args: `end_ids` tells end tokens from tokens that completed a stop string; None: there are no stop strings.
    """
    completions = rollouts.completions()
    ended = [
        reason == "stop" and (end_ids is None or ids[-1] in end_ids)
        for ids, reason in zip(completions, rollouts.finish_reason, strict=True)
    ]
    shown = [ids[:-1] if end else ids for ids, end in zip(completions, ended, strict=True)]
    texts = tokenizer.batch_decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [
        Completion(example=examples[index], text=text, token_ids=ids, finish_reason=reason)
        for index, text, ids, reason in zip(
            rollouts.prompt_index, texts, completions, rollouts.finish_reason, strict=True
        )
    ]


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    sampling: Sampling,
    *,
    name: str,
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase,
    tail_chars: int,
    compression_threshold: float,
    end_ids: Collection[int] | None = None,
) -> dict[str, float]:
    """`eval/NAME/...` over all completions of all processes; each process brings its own examples.

    `accuracy` is the share of right completions among those whose example has an answer (avg@k when there are
    k completions a prompt) and is left out when no example has one. An answer on which the judge raises counts as
    wrong, and `judge_failures` says how many there were. The draws do not depend on the step, so
    that two checkpoints answer with the same luck.
    """
    completions: list[Completion] = []
    if examples:
        completions = decode(engine.generate(examples, sampling, step=0), examples, tokenizer, end_ids)
    judged = gather_object([_judged(completion, judge) for completion in completions])
    verdicts = [record["right"] for record in judged if record["right"] is not None]
    lengths = [record["length"] for record in judged]
    metrics = {
        "mean_length": sum(lengths) / len(lengths),
        "truncation_rate": truncation_rate([record["finish_reason"] for record in judged]),
        "repetition_rate": repetition_rate([record["text"] for record in judged], tail_chars, compression_threshold),
    }
    if verdicts:
        metrics["accuracy"] = sum(verdicts) / len(verdicts)
        if sampling.num_generations > 1:
            metrics["avg_at_k"] = metrics["accuracy"]
    failures = sum(record["judge_failed"] for record in judged)
    if failures:
        metrics["judge_failures"] = float(failures)
    return {f"eval/{name}/{key}": value for key, value in metrics.items()}


def _judged(completion: Completion, judge: Judge) -> dict[str, Any]:
    answer = completion.example.answer
    right, failed = None, False
    if answer is not None:
        try:
            verdict: object = judge(completion.text, answer)
            if not isinstance(verdict, bool | int | np.bool_):
                raise TypeError(f"a judge says True or False, not {verdict!r}")
            right = bool(verdict)
        except Exception:  # a judge is a user's code on a model's text: it must not end a run of days
            right, failed = False, True
    return {
        "right": right,
        "judge_failed": failed,
        "length": completion.num_tokens,
        "finish_reason": completion.finish_reason,
        "text": completion.text,
    }
