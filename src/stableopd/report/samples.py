"""Sample rollouts for the report: texts of bearable length with their repeated stretches marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup, escape

from stableopd.health.loops import loop_spans
from stableopd.runfolder import Rollout, RolloutSample, RunRecord

MAX_CHARS = 2_400
"""A longer text is shown without its middle."""
MAX_SEARCHED = 40_000
"""Loops are looked for in so many characters at either end of a very long text."""
HEADINGS = {"first": "early", "middle": "half-way", "worst": "at the worst", "last": "at the end"}
ENDINGS = {
    "stop": "ended by itself",
    "length": "cut off at the length limit",
    "loop": "cut short while looping",
    "abort": "aborted",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRollout:
    """One rollout, ready to print."""

    prompt: Markup
    completion: Markup
    ending: str
    failed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSample:
    heading: str
    rollouts: tuple[ShownRollout, ...]


def shown_samples(run: RunRecord) -> list[ShownSample]:
    """The run's sampled steps, each with its few rollouts."""
    return [
        ShownSample(heading=_heading(sample), rollouts=tuple(map(_shown, sample.rollouts))) for sample in run.rollouts
    ]


def _heading(sample: RolloutSample) -> str:
    return f"Step {sample.step}, {HEADINGS.get(sample.label, sample.label)}"


def _shown(rollout: Rollout) -> ShownRollout:
    notes = []
    if rollout.num_tokens is not None:
        notes.append(f"{rollout.num_tokens} tokens")
    if rollout.mean_advantage is not None:
        notes.append(f"mean advantage {rollout.mean_advantage:+.2f}".replace("-", "−"))
    if rollout.answer is not None:
        notes.append(f"reference answer {rollout.answer[:80]}")
    return ShownRollout(
        prompt=_abridged(rollout.prompt, []),
        completion=mark_loops(rollout.completion),
        ending=ENDINGS.get(rollout.finish_reason, rollout.finish_reason)
        + (", repetitive" if rollout.repetitive else ""),
        failed=rollout.failed,
        notes=tuple(notes),
    )


def mark_loops(text: str) -> Markup:
    """The text as HTML, its repeated stretches in <mark>; the middle of a long one left out.

    Holds: without tags and with entities resolved it is the text again, up to the part left out and
    to characters that HTML cannot hold, which become U+FFFD.
    """
    return _abridged(text, list(_spans(text)))


def _spans(text: str) -> Iterator[tuple[int, int]]:
    if len(text) <= 2 * MAX_SEARCHED:
        yield from loop_spans(text)
        return
    tail = len(text) - MAX_SEARCHED
    yield from loop_spans(text[:MAX_SEARCHED])
    yield from ((start + tail, end + tail) for start, end in loop_spans(text[tail:]))


def _abridged(text: str, spans: list[tuple[int, int]]) -> Markup:
    if len(text) <= MAX_CHARS:
        return _marked(text, 0, len(text), spans)
    half = MAX_CHARS // 2
    return excerpt(text, spans, [(0, half), (len(text) - half, len(text))])


def excerpt(text: str, spans: list[tuple[int, int]], parts: list[tuple[int, int]]) -> Markup:
    """The parts of the text as HTML, the spans in <mark>; what lies before, between and after them is counted."""
    pieces, at = [], 0
    for start, end in [*parts, (len(text), len(text))]:
        if start > at:
            pieces.append(Markup('<span class="gap">… {:,} characters left out …</span>').format(start - at))
        pieces.append(_marked(text, start, end, spans))
        at = end
    return Markup("").join(pieces)


def _marked(text: str, start: int, end: int, spans: list[tuple[int, int]]) -> Markup:
    """text[start:end] with those parts of the spans that lie in it marked."""
    pieces, at = [], start
    for first, last in spans:
        first, last = max(first, start), min(last, end)
        if first < last:
            pieces += [_safe(text[at:first]), Markup("<mark>{}</mark>").format(_safe(text[first:last]))]
            at = last
    return Markup("").join([*pieces, _safe(text[at:end])])


def _safe(text: str) -> Markup:
    return escape(printable(text))


def printable(text: str) -> str:
    """The text with U+FFFD for what an HTML file cannot hold: lone surrogates and control characters."""
    return re.sub(r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text)
