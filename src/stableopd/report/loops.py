"""The loops themselves: where a rollout began to go round, in what words, and which words come back most.

Rollout files hold texts, so everything here counts characters; the curves count tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from markupsafe import Markup

from stableopd.health.loops import Loop, find_loops
from stableopd.report.samples import ENDINGS, excerpt
from stableopd.runfolder import Rollout, RunRecord, read_rollouts, rollout_steps

STEPS_READ = 8
"""Rollout files read per run."""
MAX_SEARCHED = 20_000
"""Loops are looked for in so many characters at the end of a text: a loop that matters lasts until there."""
MAX_EXAMPLES = 4
MAX_UNITS = 8
LOOPS_COUNTED = 5
"""Loops of one rollout that count for the table of units: the longest."""

BEFORE, BEGINNING, ENDING, AFTER = 240, 360, 90, 120
"""Characters shown: before the loop, of its beginning, of its end, after it."""
UNIT_CHARS = 120
PROMPT_CHARS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopingRollout:
    """A rollout with a loop in it."""

    step: int
    rollout: Rollout
    loops: tuple[Loop, ...]
    """In characters of the completion; the longest first."""

    @property
    def looping_chars(self) -> int:
        return sum(end - start for start, end in merged(self.loops))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopExample:
    """One looping rollout, shortened around its loop, ready to print."""

    step: int
    prompt: Markup
    completion: Markup
    ending: str
    facts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopUnit:
    """What repeats, in how many rollouts, and how often."""

    text: str
    period: int
    rollouts: int
    repeats: float
    """Median over those rollouts."""
    first_step: int
    last_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLoops:
    """The loops of one run's saved rollouts."""

    number: int
    name: str
    steps: tuple[int, ...]
    looked_at: int
    looping: int
    examples: tuple[LoopExample, ...]
    units: tuple[LoopUnit, ...]


def run_loops(number: int, run: RunRecord) -> RunLoops | None:
    """The loops in a few steps of the run; None where no rollouts were saved. Raises: as `read_rollouts`."""
    steps, looked_at = rollout_steps(run, STEPS_READ), 0
    found: list[LoopingRollout] = []
    for step in steps:
        rollouts = read_rollouts(run, step)
        looked_at += len(rollouts)
        found += [hit for rollout in rollouts if (hit := _looping(step, rollout))]
    if not looked_at:
        return None
    return RunLoops(
        number=number,
        name=run.name,
        steps=tuple(steps),
        looked_at=looked_at,
        looping=len(found),
        examples=tuple(map(_example, _worst_of_some_steps(found))),
        units=tuple(common_units(found)),
    )


def _looping(step: int, rollout: Rollout) -> LoopingRollout | None:
    loops = sorted(loops_of(rollout.completion), key=lambda loop: loop.start - loop.end)
    return LoopingRollout(step=step, rollout=rollout, loops=tuple(loops)) if loops else None


def loops_of(text: str) -> list[Loop]:
    """The loops in the last characters of a text; one that reaches back further is followed to its start."""
    offset = max(0, len(text) - MAX_SEARCHED)
    found = [loop._replace(start=loop.start + offset, end=loop.end + offset) for loop in find_loops(text[offset:])]
    return [_followed_back(text, loop) if offset and loop.start == offset else loop for loop in found]


def _followed_back(text: str, loop: Loop) -> Loop:
    start = loop.start
    while start and text[start - 1] == text[start - 1 + loop.period]:
        start -= 1
    return loop._replace(start=start)


def _worst_of_some_steps(found: Sequence[LoopingRollout]) -> list[LoopingRollout]:
    """The rollout that loops most in each of a few steps, in order; first, last and worst step among them."""
    worst: dict[int, LoopingRollout] = {}
    for hit in found:
        if hit.step not in worst or hit.looping_chars > worst[hit.step].looping_chars:
            worst[hit.step] = hit
    hits = list(worst.values())
    if len(hits) <= MAX_EXAMPLES:
        return hits
    chosen = {round(place * (len(hits) - 1) / (MAX_EXAMPLES - 1)) for place in range(MAX_EXAMPLES)}
    top = max(range(len(hits)), key=lambda place: hits[place].looping_chars)
    if top not in chosen:
        chosen.remove(min(chosen - {0, len(hits) - 1}, key=lambda place: abs(place - top)))
    return [hits[place] for place in sorted(chosen | {top})]


def _example(hit: LoopingRollout) -> LoopExample:
    text, loop = hit.rollout.completion, hit.loops[0]
    return LoopExample(
        step=hit.step,
        prompt=_head(hit.rollout.prompt),
        completion=excerpt(text, merged(hit.loops), shown_parts(len(text), loop)),
        ending=ENDINGS.get(hit.rollout.finish_reason, hit.rollout.finish_reason[:40]),
        facts=(
            f"{loop.num_repeats:.1f} turns of {loop.period:,} characters",
            f"begins at character {loop.start:,} of {len(text):,}",
            f"{hit.looping_chars / len(text):.0%} of the text",
        ),
    )


def _head(prompt: str) -> Markup:
    return excerpt(prompt, [], [(0, min(len(prompt), PROMPT_CHARS))])


def shown_parts(length: int, loop: Loop) -> list[tuple[int, int]]:
    """What is shown of a text: a little before the loop, its beginning, its end, and a little after it."""
    first = (max(0, loop.start - BEFORE), min(loop.start + BEGINNING, loop.end))
    last = (max(loop.end - ENDING, loop.start), min(length, loop.end + AFTER))
    if last[0] <= first[1] + ENDING:
        return [(first[0], last[1])]
    return [first, last]


def merged(loops: Iterable[Loop]) -> list[tuple[int, int]]:
    """The stretches that the loops cover, in order and apart."""
    spans: list[tuple[int, int]] = []
    for loop in sorted(loops):
        if spans and loop.start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], loop.end))
        else:
            spans.append((loop.start, loop.end))
    return spans


# ------------------------------------------------------------------------------------ what repeats


def common_units(found: Sequence[LoopingRollout]) -> list[LoopUnit]:
    """What repeats in most of the rollouts; the same words begun elsewhere in the turn are the same unit."""
    units: dict[str, LoopUnit] = {}
    repeats: dict[str, list[float]] = {}
    for hit in found:
        for key, (text, loop) in _units_of(hit).items():
            repeats.setdefault(key, []).append(loop.num_repeats)
            before = units.get(key)
            units[key] = LoopUnit(
                text=before.text if before else text,
                period=loop.period,
                rollouts=len(repeats[key]),
                repeats=0.0,
                first_step=before.first_step if before else hit.step,
                last_step=hit.step,
            )
    ranked = sorted(units, key=lambda key: (-units[key].rollouts, -median(repeats[key]) * len(key), key))
    return [replace(units[key], repeats=median(repeats[key])) for key in ranked[:MAX_UNITS]]


def _units_of(hit: LoopingRollout) -> dict[str, tuple[str, Loop]]:
    """The units of a rollout's longest loops, each once."""
    units: dict[str, tuple[str, Loop]] = {}
    for loop in hit.loops[:LOOPS_COUNTED]:
        unit = hit.rollout.completion[loop.start : loop.start + loop.period]
        units.setdefault(least_rotation(unit), (one_line(unit), loop))
    return units


def least_rotation(unit: str) -> str:
    """The rotation that comes first in the alphabet: the same for a loop wherever it was entered."""
    doubled = unit + unit
    return min(doubled[start : start + len(unit)] for start in range(len(unit)))


def one_line(unit: str) -> str:
    """The unit in one short line, its line breaks to be seen."""
    shown = unit.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥")
    return shown if len(shown) <= UNIT_CHARS else f"{shown[: UNIT_CHARS // 2]} … {shown[-UNIT_CHARS // 2 :]}"
