"""The rows under decoding: each has a slot with its place in the cache, its random numbers and its watches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from stableopd.rollout.cache import CachePart, can_be_joined, joined, select_rows
from stableopd.rollout.draws import Uniforms
from stableopd.rollout.loops import LoopWatch
from stableopd.rollout.stops import StopWatch


class Row(NamedTuple):
    """One completion to draw."""

    number: int
    """Its place in the batch that was asked for."""
    prompt: int
    """Position of its example in the request."""
    prompt_ids: tuple[int, ...]
    key: tuple[int, int, int, int]
    """(seed, step, example.index, generation): names the row's stream of random numbers."""


@dataclass(kw_only=True, slots=True)
class Prompts:
    """Prompts that the model has read, each once, however many completions it gets."""

    cache: DynamicCache
    width: int
    """Columns in the cache."""
    start: Tensor
    """[p] int64: column of each prompt's first token; padding is before it."""
    logits: Tensor
    """[p, V] for the first token of a completion."""
    place: dict[int, int]
    """Prompt -> its row here."""

    def only(self, prompt: int) -> Self:
        """The one prompt alone, in a cache of its own, so that the memory of the others is free."""
        row = torch.tensor([self.place[prompt]], device=self.start.device)
        skip = int(self.start[row])
        return type(self)(
            cache=joined([CachePart(cache=self.cache, rows=row, skip=skip)], self.width - skip),
            width=self.width - skip,
            start=self.start[row] - skip,
            logits=self.logits[row],
            place={prompt: 0},
        )

    def and_also(self, others: Self) -> Self:
        """These prompts and `others` behind them."""
        width = max(self.width, others.width)
        parts = [
            CachePart(cache=read.cache, rows=torch.arange(len(read.start), device=read.start.device))
            for read in (self, others)
        ]
        behind = {prompt: len(self.start) + row for prompt, row in others.place.items()}
        return type(self)(
            cache=joined(parts, width),
            width=width,
            start=torch.cat([read.start + width - read.width for read in (self, others)]),
            logits=torch.cat([self.logits, others.logits]),
            place=self.place | behind,
        )


@dataclass(kw_only=True, slots=True)
class Slots:
    """The rows under decoding, b of them."""

    cache: DynamicCache
    place: Tensor | None
    """[b] int64: which sequence of the cache each row goes on from; None: row by row."""
    width: int
    """Columns in the cache; the newest token of each row is not in it yet."""
    start: Tensor
    """[b] int64: column of each row's first token; padding is before it."""
    padded: bool
    """Whether any row begins behind column 0."""
    rows: Tensor
    """[b] int64: number of the row in each slot."""
    token: Tensor
    """[b] int64: the newest token of each row."""
    counts: Tensor
    """[b] int64: completion tokens so far."""
    longest: int
    """At least the largest of `counts`, known without asking the device."""
    alive: Tensor
    """[b] bool: has not ended."""
    num_alive: int
    uniforms: Uniforms | None
    loops: LoopWatch | None
    stops: StopWatch | None

    @classmethod
    def starting(
        cls,
        rows: Sequence[Row],
        prompts: Prompts,
        *,
        uniforms: Uniforms | None,
        loops: LoopWatch | None,
        stops: StopWatch | None,
    ) -> Self:
        """Rows without a token yet, whose prompts are among `prompts`; its cache is shared until `settled`."""
        at = [prompts.place[row.prompt] for row in rows]
        place = torch.tensor(at, device=prompts.start.device)
        numbers = torch.tensor([row.number for row in rows], device=place.device)
        return cls(
            cache=prompts.cache,
            place=place,
            width=prompts.width,
            start=prompts.start[place],
            padded=True,
            rows=numbers,
            token=torch.zeros_like(numbers),
            counts=torch.zeros_like(numbers),
            longest=0,
            alive=torch.ones_like(numbers, dtype=torch.bool),
            num_alive=len(rows),
            uniforms=uniforms,
            loops=loops,
            stops=stops,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def positions(self) -> Tensor:
        """[b, 1] int64: position of the newest token, padding not counted."""
        return (self.width - self.start)[:, None]

    def mask(self) -> Tensor | None:
        """[b, width + 1] bool: what the newest token attends to, itself included; None: all there is."""
        if not self.padded:
            return None
        return torch.arange(self.width + 1, device=self.start.device) >= self.start[:, None]

    def drop_ended(self) -> CachePart:
        """Ended rows leave, and columns that are padding in all others. Returns what to keep of the cache."""
        kept = self.alive.nonzero().squeeze(1)
        part = CachePart(cache=self.cache, rows=kept if self.place is None else self.place[kept])
        self.start = self.start[kept]
        if self.padded and can_be_joined(self.cache):
            part = replace(part, skip=int(self.start.min()))
            self.start, self.width = self.start - part.skip, self.width - part.skip
        self.place = None
        self.rows, self.token, self.counts = self.rows[kept], self.token[kept], self.counts[kept]
        self.alive = self.alive[kept]
        for watch in (self.uniforms, self.loops, self.stops):
            if watch:
                watch.keep(kept)
        return part

    def move_right(self, width: int) -> None:
        """The cache has `width` columns now, with more padding at the front."""
        self.start, self.width = self.start + (width - self.width), width

    def append(self, other: Slots) -> None:
        """Takes the rows of `other` behind its own, all but the cache."""
        self.start = torch.cat([self.start, other.start])
        self.rows = torch.cat([self.rows, other.rows])
        self.token = torch.cat([self.token, other.token])
        self.counts = torch.cat([self.counts, other.counts])
        self.alive = torch.cat([self.alive, other.alive])
        self.longest = max(self.longest, other.longest)
        self.num_alive += other.num_alive
        if self.uniforms and other.uniforms:
            self.uniforms.join(other.uniforms)
        if self.loops and other.loops:
            self.loops.join(other.loops)
        if self.stops and other.stops:
            self.stops.join(other.stops)


def settled(parts: Sequence[Slots]) -> Slots:
    """The rows of all parts that are alive, of which there must be some, in one cache. The parts are used up.

    A cache that cannot be joined allows one part only.
    """
    first, *others = (part for part in parts if part.num_alive)
    pieces = [part.drop_ended() for part in (first, *others)]
    if can_be_joined(first.cache):
        width = max(part.width for part in (first, *others))
        for part in (first, *others):
            part.move_right(width)
        first.cache = joined(pieces, width)
    else:
        assert not others, "rows cannot join this cache"
        select_rows(first.cache, pieces[0].rows)
    for other in others:
        first.append(other)
    first.padded = bool((first.start > 0).any())
    return first
