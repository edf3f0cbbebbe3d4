"""Held-out evaluation: accuracy beside length, truncation and repetition, sampled and greedy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from stableopd.benchmarking.scores import majority_at_k
from stableopd.benchmarking.timed import Judged, verdict_of
from stableopd.bootstrap import mean_of_answers
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

    `accuracy` is the share of right completions among those whose example has an answer, with the 95% interval
    `accuracy_low`, `accuracy_high` over prompts; it is left out when no example has an answer. With k > 1 completions
    a prompt it is told as `avg_at_k` too, beside `pass_at_k` (any of the k is right) and, where the judge tells votes,
    `maj_at_k` (the most frequent one is). An answer on which the judge fails counts as wrong: `judge_failures`, of
    which `judge_timeouts` took too long. The draws do not depend on the step, so that two checkpoints answer with the
    same luck.
    """
    completions: list[Completion] = []
    if examples:
        completions = decode(engine.generate(examples, sampling, step=0), examples, tokenizer, end_ids)
    answers: list[_Answer] = gather_object([_judged(completion, judge) for completion in completions])
    metrics = {
        "mean_length": sum(answer.length for answer in answers) / len(answers),
        "truncation_rate": truncation_rate([answer.finish_reason for answer in answers]),
        "repetition_rate": repetition_rate([answer.text for answer in answers], tail_chars, compression_threshold),
        **_scores(answers, sampling.num_generations),
    }
    return {f"eval/{name}/{key}": value for key, value in metrics.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What is gathered of one completion."""

    prompt: int
    verdict: Judged | None
    """None: there is no answer to compare with."""
    length: int
    finish_reason: str
    text: str


def _scores(answers: Sequence[_Answer], num_samples: int) -> dict[str, float]:
    """What answers with a verdict are worth, prompt by prompt."""
    prompts: dict[int, list[Judged]] = {}
    for answer in answers:
        if answer.verdict is not None:
            prompts.setdefault(answer.prompt, []).append(answer.verdict)
    if not prompts:
        return {}
    right = [[verdict.right for verdict in verdicts] for verdicts in prompts.values()]
    found = mean_of_answers({"": [[float(np.mean(verdicts)) for verdicts in right]]})
    scores = {"accuracy": found.mean}
    if found.low is not None and found.high is not None:
        scores |= {"accuracy_low": found.low, "accuracy_high": found.high}
    if num_samples > 1:
        scores["avg_at_k"] = found.mean
        scores["pass_at_k"] = float(np.mean([any(verdicts) for verdicts in right]))
        votes = [[verdict.vote for verdict in verdicts] for verdicts in prompts.values()]
        if any(vote is not None for of_prompt in votes for vote in of_prompt):
            pairs = zip(votes, right, strict=True)
            scores["maj_at_k"] = float(np.mean([majority_at_k(vote, verdicts) for vote, verdicts in pairs]))
    failures = [verdict.failure for verdicts in prompts.values() for verdict in verdicts if verdict.failure]
    if failures:
        scores |= {"judge_failures": float(len(failures)), "judge_timeouts": float(failures.count("timeout"))}
    return scores


def _judged(completion: Completion, judge: Judge) -> _Answer:
    answer = completion.example.answer
    return _Answer(
        prompt=completion.example.index,
        verdict=None if answer is None else verdict_of(judge, completion.text, answer),
        length=completion.num_tokens,
        finish_reason=completion.finish_reason,
        text=completion.text,
    )
