"""Health of rollouts that stream by: figures by step in bounded memory, and the worst samples.

What is kept of a step are sums and a histogram of lengths; of texts, the few worst alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stableopd.health.loops import classify_tokens, find_loops
from stableopd.health.monitor import MonitorSettings
from stableopd.health.pieces import TextLoop, find_text_loops, piece_ids, split_pieces
from stableopd.health.signals import TRUNCATED_REASONS, is_repetitive
from stableopd.reading import Place
from stableopd.rollout_rows import RolloutRecord
from stableopd.types import FinishReason

Unit = Literal["tokens", "characters"]

MAX_STEPS = 4096
"""More steps than this are taken two at a time, then four, and so on."""
MAX_LENGTHS = 256
"""More different lengths than this in a step are taken two at a time, then four, and so on."""
MAX_SEARCHED = 200_000
"""Loops are looked for in so many characters or tokens at the end of a completion."""


class Lengths:
    """Lengths of a set of rollouts: exact sums and extremes, and a histogram with at most `MAX_LENGTHS` entries.

    Quantiles are exact for up to so many different lengths; beyond, they are off by less than 1% of the greatest.
    """

    __slots__ = ("counts", "max", "min", "num", "shift", "total")

    def __init__(self) -> None:
        self.num = self.total = self.max = self.shift = 0
        self.min: int | None = None
        self.counts: dict[int, int] = {}

    def add(self, length: int) -> None:
        self.num, self.total = self.num + 1, self.total + length
        self.max = max(self.max, length)
        self.min = length if self.min is None else min(self.min, length)
        self._count(length >> self.shift, 1)

    def merge(self, other: Lengths) -> None:
        if not other.num or other.min is None:
            return
        self.num, self.total = self.num + other.num, self.total + other.total
        self.max = max(self.max, other.max)
        self.min = other.min if self.min is None else min(self.min, other.min)
        while self.shift < other.shift:
            self._coarsen()
        for key, count in other.counts.items():
            # Merging may coarsen these counts while it goes.
            self._count(key << other.shift >> self.shift, count)

    def quantile(self, share: float) -> float:
        """Interpolated linearly between neighbours, as numpy does."""
        keys = np.array(sorted(self.counts))
        ends = np.cumsum([self.counts[int(key)] for key in keys])
        # A class of several lengths stands for its middle.
        values = np.clip((keys << self.shift) + ((1 << self.shift) - 1) / 2, self.min, self.max)
        at = share * (self.num - 1)
        low, high = (
            values[np.searchsorted(ends, rank, side="right")] for rank in (int(at), min(int(at) + 1, self.num - 1))
        )
        return float(low + (at - int(at)) * (high - low))

    def _count(self, key: int, count: int) -> None:
        self.counts[key] = self.counts.get(key, 0) + count
        while len(self.counts) > MAX_LENGTHS:
            self._coarsen()

    def _coarsen(self) -> None:
        halved: dict[int, int] = {}
        for key, count in self.counts.items():
            halved[key >> 1] = halved.get(key >> 1, 0) + count
        self.counts, self.shift = halved, self.shift + 1


_SUMS = (
    "num", "reasons", "truncated", "ended", "ended_tokens", "ended_characters", "cut_tokens",
    "cut_characters", "texts", "repetitive",
    "units", "loop", "near_loop", "repeated", "rewards", "reward_sum", "right", "judged", "judged_right",
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class StepFigures:
    """Sums over the rollouts of a step, or of several."""

    num: int = 0
    tokens: Lengths = field(default_factory=Lengths)
    characters: Lengths = field(default_factory=Lengths)
    reasons: int = 0
    """Rollouts of which it is known how they ended."""
    truncated: int = 0
    ended: int = 0
    ended_tokens: int = 0
    ended_characters: int = 0
    cut_tokens: int = 0
    """Of the truncated rollouts."""
    cut_characters: int = 0
    texts: int = 0
    repetitive: int = 0
    units: int = 0
    """Tokens, or pieces of text, in which loops were looked for; so are the next three."""
    loop: int = 0
    near_loop: int = 0
    repeated: int = 0
    rewards: int = 0
    reward_sum: float = 0.0
    right: int = 0
    """Rollouts with a reward of 1."""
    judged: int = 0
    judged_right: int = 0

    def merge(self, other: StepFigures) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.tokens.merge(other.tokens)
        self.characters.merge(other.characters)

    def metrics(self, unit: Unit, *, rewards_are_accuracy: bool = False) -> dict[str, float]:
        """The figures by metric key, as far as they are known."""
        figures: dict[str, float] = {}
        lengths = self.tokens if unit == "tokens" else self.characters
        if lengths.num and lengths.min is not None:
            figures |= {
                "completions/mean_length": lengths.total / lengths.num,
                "completions/min_length": float(lengths.min),
                "completions/max_length": float(lengths.max),
            }
            figures |= {f"completions/length_p{q}": lengths.quantile(q / 100) for q in (50, 90, 99)}
        if self.reasons:
            figures["completions/clipped_ratio"] = self.truncated / self.reasons
        if self.ended:
            ended = self.ended_tokens if unit == "tokens" else self.ended_characters
            figures["completions/mean_terminated_length"] = ended / self.ended
        if self.truncated:
            cut = self.cut_tokens if unit == "tokens" else self.cut_characters
            figures["completions/mean_truncated_length"] = cut / self.truncated
        if self.texts:
            figures["health/repetition_rate"] = self.repetitive / self.texts
        if self.units:
            figures["health/loop_token_fraction"] = self.loop / self.units
            figures["health/near_loop_token_fraction"] = self.near_loop / self.units
            figures["health/repeated_token_fraction"] = self.repeated / self.units
        if self.rewards:
            figures["reward"] = self.reward_sum / self.rewards
        if self.judged:
            figures["completions/accuracy"] = self.judged_right / self.judged
        elif self.rewards and rewards_are_accuracy:
            figures["completions/accuracy"] = self.right / self.rewards
        return figures


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownLoop:
    """The longest loop of a sample."""

    unit: Unit
    """Of the next three: characters of the text, tokens where there is no text."""
    start: int
    end: int
    period: int
    num_repeats: float
    text: str
    """What repeats: one turn of it. Token ids where there is no text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One of the worst rollouts; texts are shortened."""

    place: Place
    step: int | None
    prompt: str | None
    answer: str | None
    finish_reason: FinishReason | None
    num_tokens: int | None
    num_characters: int | None
    loop_fraction: float
    near_loop_fraction: float
    repetitive: bool
    loop: ShownLoop | None
    before: str
    """The text before the loop; all of the text, where there is no loop. What is left out is marked by " … "."""
    after: str


@dataclass(kw_only=True)
class RolloutFigures:
    """Takes in rollouts one by one; holds the figures of each step and the worst samples.

    Args: max_length in tokens where a rollout's tokens are known, else characters: as long or longer counts as
    truncated where it is not known how a rollout ended.
    """

    settings: MonitorSettings
    max_length: int | None = None
    num_samples: int = 3
    steps: dict[int | None, StepFigures] = field(default_factory=dict)
    width: int = 1
    """Steps that are taken together."""
    with_ids: int = 0
    without_step: int = 0
    guessed: int = 0
    """Rollouts of which `max_length` told how they ended."""
    at_longest: int = 0
    """Rollouts that have exactly the greatest number of tokens."""
    _reward_values: set[float] = field(default_factory=set)
    _worst: list[tuple[tuple[float, ...], int, Sample]] = field(default_factory=list)
    _num: int = 0
    _longest: int = 0

    def add(self, record: RolloutRecord) -> None:
        self._num += 1
        own = StepFigures(num=1)
        self._add_ending(own, record)
        self._add_repetition(own, record)
        self._add_reward(own, record)
        self._step(record.step).merge(own)
        self._keep_if_bad(own, record)

    @property
    def num_rollouts(self) -> int:
        return self._num

    @property
    def rewards_are_accuracy(self) -> bool:
        """Whether every reward is 0 or 1, so that their mean is a share of right answers."""
        return bool(self._reward_values) and self._reward_values <= {0.0, 1.0}

    @property
    def unit(self) -> Unit:
        """What lengths are counted in: tokens, unless the text is all that is known of more of the rollouts."""
        total = self.total()
        return "tokens" if total.tokens.num and total.tokens.num >= total.characters.num else "characters"

    def total(self) -> StepFigures:
        together = StepFigures()
        for figures in self.steps.values():
            together.merge(figures)
        return together

    def samples(self) -> tuple[Sample, ...]:
        """The worst first."""
        return tuple(sample for *_, sample in sorted(self._worst, reverse=True))

    # -------------------------------------------------------------------------------- one rollout

    def _add_ending(self, own: StepFigures, record: RolloutRecord) -> None:
        if record.num_tokens is not None:
            own.tokens.add(record.num_tokens)
            self.at_longest = 0 if record.num_tokens > self._longest else self.at_longest
            self._longest = max(self._longest, record.num_tokens)
            self.at_longest += record.num_tokens == self._longest
        if record.completion is not None:
            own.characters.add(len(record.completion))
        reason = self._finish_reason(record)
        if reason is not None:
            own.reasons = 1
            own.truncated = int(reason in TRUNCATED_REASONS)
        if own.truncated:
            own.cut_tokens, own.cut_characters = own.tokens.total, own.characters.total
        if reason == "stop":
            own.ended, own.ended_tokens, own.ended_characters = 1, own.tokens.total, own.characters.total

    def _finish_reason(self, record: RolloutRecord) -> FinishReason | None:
        if record.finish_reason is not None or self.max_length is None:
            return record.finish_reason
        self.guessed += 1
        length = record.num_tokens if record.num_tokens is not None else len(record.completion or "")
        return "length" if length >= self.max_length else "stop"

    def _add_repetition(self, own: StepFigures, record: RolloutRecord) -> None:
        settings, text = self.settings, record.completion
        if text is not None:
            own.texts = 1
            compressible = is_repetitive(text, settings.tail_chars, settings.compression_threshold)
            own.repetitive = int(compressible or record.finish_reason == "loop")
        if record.token_ids is not None:
            self.with_ids += 1
            ids: NDArray[Any] = record.token_ids[-MAX_SEARCHED:]
        else:
            ids = piece_ids(split_pieces((text or "")[-MAX_SEARCHED:]))
        found = classify_tokens(
            ids, settings.loop_max_period, settings.loop_min_repeats, settings.loop_min_tokens, settings.ngram
        )
        own.units, own.loop = len(ids), int(found.loop.sum())
        own.near_loop, own.repeated = int(found.near_loop.sum()), int(found.repeated.sum())

    def _add_reward(self, own: StepFigures, record: RolloutRecord) -> None:
        if record.correct is not None:
            own.judged, own.judged_right = 1, int(record.correct)
        if record.reward is not None:
            own.rewards, own.reward_sum, own.right = 1, record.reward, int(record.reward == 1.0)
            if len(self._reward_values) < 3:
                self._reward_values.add(record.reward)

    # -------------------------------------------------------------------------------- steps

    def _step(self, step: int | None) -> StepFigures:
        if step is None:
            self.without_step += 1
        key = None if step is None else step // self.width * self.width
        if key not in self.steps:
            self.steps[key] = StepFigures()
            while len(self.steps) > MAX_STEPS:
                self._widen()
                key = None if step is None else step // self.width * self.width
        return self.steps[key]

    def _widen(self) -> None:
        self.width *= 2
        before, self.steps = self.steps, {}
        for step, figures in before.items():
            key = None if step is None else step // self.width * self.width
            self.steps.setdefault(key, StepFigures()).merge(figures)

    # -------------------------------------------------------------------------------- samples

    def _keep_if_bad(self, own: StepFigures, record: RolloutRecord) -> None:
        score = (own.loop, own.repetitive, own.truncated * own.near_loop, own.truncated, own.units)
        if not self.num_samples or not any(score[:4]):
            return
        entry = (score, -self._num)  # of two alike, the first
        if len(self._worst) < self.num_samples or entry > self._worst[0][:2]:
            kept = (*entry, _sample(own, record, self._finish_reason_shown(record), self.settings))
            (heapq.heappush if len(self._worst) < self.num_samples else heapq.heapreplace)(self._worst, kept)

    def _finish_reason_shown(self, record: RolloutRecord) -> FinishReason | None:
        guessed, reason = self.guessed, self._finish_reason(record)
        self.guessed = guessed
        return reason


# ------------------------------------------------------------------------------------ samples

MAX_LOOP_CHARS = 400
BEFORE_CHARS, AFTER_CHARS = 240, 120
PROMPT_CHARS = 200


def _sample(own: StepFigures, record: RolloutRecord, reason: FinishReason | None, settings: MonitorSettings) -> Sample:
    text = record.completion
    loop = _longest_loop(record, settings)
    shown = text or ""
    marked = loop if loop and loop.unit == "characters" else None
    before = shown[: marked.start] if marked else shown
    after = shown[marked.end :] if marked else ""
    return Sample(
        place=record.place,
        step=record.step,
        prompt=None if record.prompt is None else shorten(record.prompt, PROMPT_CHARS),
        answer=None if record.answer is None else shorten(record.answer, PROMPT_CHARS),
        finish_reason=reason,
        num_tokens=record.num_tokens,
        num_characters=None if text is None else len(text),
        loop_fraction=own.loop / max(own.units, 1),
        near_loop_fraction=own.near_loop / max(own.units, 1),
        repetitive=bool(own.repetitive),
        loop=loop,
        before=shorten(before, BEFORE_CHARS if marked else BEFORE_CHARS + AFTER_CHARS + MAX_LOOP_CHARS),
        after=shorten(after, AFTER_CHARS),
    )


def _longest_loop(record: RolloutRecord, settings: MonitorSettings) -> ShownLoop | None:
    limits = (settings.loop_max_period, settings.loop_min_repeats, settings.loop_min_tokens)
    if record.completion is not None:
        left_out = max(len(record.completion) - MAX_SEARCHED, 0)
        loops: Iterable[Any] = (
            TextLoop(loop.start + left_out, loop.end + left_out, loop.period)
            for loop in find_text_loops(record.completion[left_out:], *limits)
        )
        unit: Unit = "characters"
    else:
        assert record.token_ids is not None
        left_out, unit = max(len(record.token_ids) - MAX_SEARCHED, 0), "tokens"
        loops = (
            loop._replace(start=loop.start + left_out, end=loop.end + left_out)
            for loop in find_loops(record.token_ids[left_out:], *limits)
        )
    loop = max(loops, key=lambda loop: (loop.end - loop.start, -loop.start), default=None)
    if loop is None:
        return None
    if record.completion is not None:
        turn = record.completion[loop.start : loop.start + loop.period]
    else:
        assert record.token_ids is not None
        turn = " ".join(map(str, record.token_ids[loop.start : loop.start + loop.period].tolist()))
    return ShownLoop(
        unit=unit,
        start=loop.start,
        end=loop.end,
        period=loop.period,
        num_repeats=loop.num_repeats,
        text=shorten(turn, MAX_LOOP_CHARS),
    )


def shorten(text: str, max_chars: int) -> str:
    """The text, without its middle where it is longer than `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    half = (max_chars - 3) // 2
    return f"{text[:half]} … {text[len(text) - half :]}"
