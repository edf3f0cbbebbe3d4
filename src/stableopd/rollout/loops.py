"""Sees while a completion is drawn that it has fallen into an exact loop."""

from __future__ import annotations

import torch
from torch import Tensor

from stableopd.health.loops import MAX_PERIOD, MIN_LOOP_TOKENS


class LoopWatch:
    """Follows b growing completions, one token each at a time.

    A row loops when its last tokens are a loop in the sense of `stableopd.health.loop_mask` with `min_repeats` repeats:
    at least so many periods of one length up to 512, at least 16 tokens. For each period it keeps how many tokens in a
    row have equalled the one a period before, [b, periods] int32, so that a token costs one comparison a period.
    """

    def __init__(self, num_rows: int, min_repeats: int, max_new_tokens: int, device: torch.device) -> None:
        num_periods = min(MAX_PERIOD, max_new_tokens // min_repeats)
        self._periods = torch.arange(1, num_periods + 1, device=device)
        self._needed = torch.maximum((min_repeats - 1) * self._periods, MIN_LOOP_TOKENS - self._periods)
        self._matches = torch.zeros(num_rows, num_periods, dtype=torch.int32, device=device)

    def push(self, completions: Tensor, slots: Tensor, counts: Tensor | None = None) -> Tensor:
        """Whether each row loops now, [b] bool.

        Args:
            completions: [rows, t] int64, tokens so far.
            slots: [b] which of its rows are followed.
            counts: [b] int64, how many tokens each of these has; its last one is new. None: all have t.
        """
        longest = completions.shape[1]
        reach = min(len(self._periods), longest - 1)
        if not reach:
            return torch.zeros(len(slots), dtype=torch.bool, device=completions.device)
        if counts is None:
            recent = completions[:, longest - 1 - reach :][slots]
            same = recent[:, :-1].flip(1) == recent[:, -1:]  # period 1 first
        else:
            before = counts[:, None] - 1 - self._periods[:reach]
            newest = completions[slots, counts - 1][:, None]
            same = (completions[slots[:, None], before.clamp(min=0)] == newest) & (before >= 0)
        self._matches[:, :reach] = (self._matches[:, :reach] + 1) * same
        return (self._matches >= self._needed).any(dim=1)

    def keep(self, kept: Tensor) -> None:
        """Drops all rows but `kept`."""
        self._matches = self._matches[kept]

    def join(self, other: LoopWatch) -> None:
        """Takes the rows of another watch with the same settings behind its own."""
        self._matches = torch.cat([self._matches, other._matches])
