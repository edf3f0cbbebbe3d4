"""The stop probe: how likely the student is to end a golden solution where and as it ends.

A student that starts to unlearn stopping shows it here before its rollouts grow. The solutions are the same for the
whole run: those that a batch brings along anyway would cost nothing, but they change from step to step, and the figure
with them, by more than the drift that is to be seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from stableopd.health.history import ENDING_PROBE, STOP_PROBE
from stableopd.types import Example

ENDING_TOKENS = 4
"""Tokens of an ending, end token included: enough to hold the verdict that comes before it."""


def probe_sums(logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Sums over golden solutions, by metric key: probability of the end token after the whole solution, and of the
    last `ENDING_TOKENS` tokens after what precedes them.

    Args:
        logprobs: [n] nats at temperature 1, the tokens of all rows without padding.
        mask: [B, T] bool, n of them set, padded on the right; no row is empty.
    """
    padded = logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs).double()
    to_go = mask.flip(1).cumsum(dim=1).flip(1) * mask  # tokens up to the end, this one included
    sums = {
        STOP_PROBE: (padded * (to_go == 1)).sum(dim=1).exp().sum(),
        ENDING_PROBE: (padded * (mask & (to_go <= ENDING_TOKENS))).sum(dim=1).exp().sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def probe_examples(
    examples: Sequence[Example], num_prompts: int, seed: int, max_total_tokens: int | None = None
) -> list[Example]:
    """The same `num_prompts` examples with gold for the whole run, or all where there are fewer.

    Those whose prompt and gold have more than `max_total_tokens` tokens together are passed over.
    """
    limit = math.inf if max_total_tokens is None else max_total_tokens
    with_gold = [e for e in examples if e.gold_ids and len(e.prompt_ids) + len(e.gold_ids) <= limit]
    chosen = np.random.default_rng(seed).permutation(len(with_gold))[:num_prompts]
    return [with_gold[place] for place in sorted(chosen.tolist())]
