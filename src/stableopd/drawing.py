"""Prompts and golden answers, drawn step by step.

Whatever a step draws is a pure function of (seed, step), so that a resumed run needs its step and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from stableopd.errors import DataError
from stableopd.types import Example


class PromptStream:
    """The prompts of every step: a pure function of (seed, step), epoch after epoch.

    Each epoch is a permutation of its own, of which the rest that fills no batch is left out.

    Holds: no batch straddles two epochs; no prompt comes twice in an epoch.
    """

    def __init__(self, examples: Sequence[Example], *, num_prompts: int, seed: int, shuffle: bool = True) -> None:
        assert num_prompts > 0
        if len(examples) < num_prompts:
            raise DataError(
                f"the dataset has {len(examples)} prompts, fewer than the {num_prompts} of one step. Give more data or "
                f"set rollout.num_prompts to at most {len(examples)}"
            )
        self.examples = examples
        self.num_prompts = num_prompts
        self.seed = seed
        self.shuffle = shuffle

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // self.num_prompts

    def batch(self, step: int) -> list[Example]:
        """The `num_prompts` examples of a step, counted from 1."""
        return _draw(self.examples, step, self.num_prompts, (self.seed, 0) if self.shuffle else None)

    def cursor(self, step: int) -> int:
        """Number of prompts drawn by the end of a step; 0 before the first."""
        return step * self.num_prompts


class GoldPool:
    """Golden answers from a separate and maybe scarce pool: a pure function of (seed, step, count).

    Holds: what a step draws is distinct while the pool is large enough, and as even as can be when it is not.
    """

    def __init__(self, examples: Sequence[Example], *, seed: int) -> None:
        if not examples:
            raise DataError("the gold pool is empty. Give at least one golden answer, or turn gold off")
        lacking = next((example for example in examples if example.gold_ids is None), None)
        if lacking is not None:
            raise DataError(
                f"row {lacking.index + 1} of the gold pool has no golden answer. Give one or remove the row"
            )
        self.examples = examples
        self.seed = seed

    def batch(self, step: int, count: int) -> list[Example]:
        """`count` golden examples for a step, counted from 1."""
        return _draw(self.examples, step, count, (self.seed, 1)) if count else []


def _draw(examples: Sequence[Example], step: int, count: int, key: tuple[int, int] | None) -> list[Example]:
    """`count` examples: a stretch of the epoch's order, which starts anew only where it has too few."""
    assert step >= 1
    size = len(examples)
    epoch, position = divmod(step - 1, max(1, size // count))
    order = range(size) if key is None else _permutation(size, (*key, epoch))
    return [examples[order[(position * count + offset) % size]] for offset in range(count)]


@lru_cache(maxsize=4)  # an epoch's order serves all of its steps, of the prompts and of the gold pool
def _permutation(size: int, key: tuple[int, ...]) -> tuple[int, ...]:
    """Made from raw bits, whose stream NumPy guarantees, so that an upgrade does not reorder a resumed run."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return tuple(np.argsort(bits, kind="stable").tolist())
