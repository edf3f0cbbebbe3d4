"""Rows that wait for a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from stableopd.rollout.cache import can_be_joined
from stableopd.rollout.slots import Prompts, Row
from stableopd.types import Example, Sampling


def request_rows(examples: Sequence[Example], sampling: Sampling, step: int) -> list[Row]:
    """One row per completion, grouped by example."""
    return [
        Row(
            number=prompt * sampling.num_generations + generation,
            prompt=prompt,
            prompt_ids=example.prompt_ids,
            key=(sampling.seed, step, example.index, sampling.first_generation + generation),
        )
        for prompt, example in enumerate(examples)
        for generation in range(sampling.num_generations)
    ]


class Queue:
    """Waiting rows, those with short prompts first, so that prompts read together are of like length.

    The generations of a prompt follow one another. Where the free slots end among them, the prompt is kept as it was
    read, until the last of them has started.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.waiting = deque(sorted(rows, key=lambda row: len(row.prompt_ids)))
        self.prompts: Prompts | None = None
        """What was read for rows that still wait."""

    def take(self, number: int) -> list[Row]:
        """The next rows, at most `number`."""
        return [self.waiting.popleft() for _ in range(min(number, len(self.waiting)))]

    def keep_for_the_rest(self, prompts: Prompts) -> None:
        """Of the prompts just read keeps the one whose generations have not all been taken, if there is one."""
        following = self.waiting[0].prompt if self.waiting else None
        is_read = following in prompts.place and can_be_joined(prompts.cache)
        self.prompts = prompts.only(following) if following is not None and is_read else None
