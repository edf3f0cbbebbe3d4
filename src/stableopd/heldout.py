"""Everything that a run answers at an evaluation: its held-out prompts and its benchmarks, sampled and greedily."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from stableopd.config import StableOPDConfig
from stableopd.evaluate import evaluate
from stableopd.protocols import Judge, RolloutEngine
from stableopd.types import Example, Sampling


def evaluate_all(
    config: StableOPDConfig,
    engine: RolloutEngine,
    sets: Mapping[str, Sequence[Example]],
    *,
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int],
    seed: int,
    rank: int = 0,
    num_processes: int = 1,
) -> dict[str, float]:
    """`eval/NAME/...` of every set, and `eval/NAME_greedy/...`; each process answers its share of the prompts."""
    metrics: dict[str, float] = {}
    for name, examples in sets.items():
        for kind, sampling in _samplings(config, seed).items():
            metrics |= evaluate(
                engine,
                examples[rank::num_processes],
                sampling,
                name=name + kind,
                judge=judge,
                tokenizer=tokenizer,
                tail_chars=config.health.tail_chars,
                compression_threshold=config.health.compression_threshold,
                end_ids=end_ids,
            )
    return metrics


def _samplings(config: StableOPDConfig, seed: int) -> dict[str, Sampling]:
    settings = config.evaluation
    sampled = Sampling(
        max_new_tokens=config.eval_max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        num_generations=settings.num_samples,
        stop_strings=config.rollout.stop_strings,
        seed=seed,
    )
    greedy = Sampling(max_new_tokens=sampled.max_new_tokens, temperature=0.0, stop_strings=sampled.stop_strings)
    return {"": sampled, "_greedy": greedy} if settings.greedy else {"": sampled}
