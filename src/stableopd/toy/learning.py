"""How the models of an embedded world learn from scratch: the library's own update on sequences drawn on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.config import DistillConfig, GoldConfig, ObjectiveConfig
from stableopd.evaluate import evaluate
from stableopd.heads import HeadlessModel
from stableopd.protocols import Judge, RolloutEngine
from stableopd.rollout.hf import HFEngine
from stableopd.rows import gold_rows
from stableopd.step import Updater
from stableopd.types import Example, Sampling

Progress = Callable[[str, int, int, float], None]
"""(what is being trained, step, steps in all, loss)"""

_SFT = ObjectiveConfig(distill=DistillConfig(coef=0.0), gold=GoldConfig(coef=1.0))


class Learner:
    """Teaches a model golden sequences with their weights, a batch at a time.

    Args:
        token_budget: most tokens, padding included, in one forward pass.
        bf16: arithmetic in bfloat16; the weights stay as they are.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, token_budget: int, bf16: bool = False
    ) -> None:
        device = next(model.parameters()).device
        autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16) if bf16 else nullcontext
        self._device, self._pad_id = device, tokenizer.pad_token_id
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self._updater = Updater(
            HeadlessModel(model, len(tokenizer)),
            optimizer,
            _SFT,
            Accelerator(cpu=device.type == "cpu"),
            temperature=1.0,
            max_grad_norm=1.0,
            token_budget=token_budget,
            autocast=autocast,
        )

    def learn(self, batch: Sequence[Example], learning_rate: float) -> float:
        """One update on a batch of golden sequences of all lengths; returns its loss.

        A batch is not sorted by length: lengths would give verdicts away.
        """
        rows = gold_rows(batch, range(len(batch)), self._pad_id, self._device)
        return self._updater.update(rows, learning_rate)["loss"]


def share_begun_right(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    beginnings: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
) -> float:
    """Share of completions at temperature 1 that begin as they should: example i with `beginnings[i]`."""
    rollouts = engine.generate(examples, Sampling(max_new_tokens=max_new_tokens, seed=seed), step=0)
    texts = tokenizer.batch_decode(rollouts.completions())
    return sum(text.startswith(right) for text, right in zip(texts, beginnings, strict=True)) / len(examples)


def held_out_figures(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    judge: Judge,
    max_new_tokens: int,
    tail_chars: int,
    compression_threshold: float,
) -> dict[str, float]:
    """`sampled/...` (temperature 1: how a teacher speaks) and `greedy/...`: accuracy, truncation, repetition."""
    figures: dict[str, float] = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        figures |= evaluate(
            engine,
            examples,
            Sampling(max_new_tokens=max_new_tokens, temperature=temperature),
            name=name,
            judge=judge,
            tokenizer=tokenizer,
            tail_chars=tail_chars,
            compression_threshold=compression_threshold,
        )
    return {key.removeprefix("eval/"): value for key, value in figures.items()}


def engine_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_batch_size: int = 512, *, bf16: bool = False
) -> HFEngine:
    """Rollouts of a model on its own device."""
    device = next(model.parameters()).device
    return HFEngine(
        model=model,
        end_token_ids=frozenset({tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        max_batch_size=max_batch_size,
        autocast=partial(torch.autocast, device.type, dtype=torch.bfloat16) if bf16 else nullcontext,
    )


def ramp(step: int, warmup: int, decay_from: float, total: int) -> float:
    """Factor of the learning rate: up over `warmup` steps, level, then linearly down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < decay_from else (total - step) / (total - decay_from)
