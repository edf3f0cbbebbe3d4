"""What gold, the teacher and the student's cold start write below a problem, with loss weights.

    5 + 3 = 8, 8 - 2 = 6.\\n</think>\\n\\\\boxed{6}                       a golden solution
    \\n</think>\\n\\\\boxed{6}                                          a terse one: right, without working
    5 + 3 = 9, 9 - 2 = 7.\\nWait, let me check that again.\\n5 + 3 = 8, 8 - 2 = 6.\\n</think>\\n\\\\boxed{6}
                                                                   a slip, which propagates; noticed and mended

The prompt has opened `<think>`. An attempt is a line; behind it comes the verdict: `</think>` and the answer, or
"Wait".
The habits are those of the toy world (stableopd.toy.task), in words. Samplers draw from the generator they are given
and return segments of text with one weight each; `weighted_ids` turns them into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase

from stableopd.words.problems import Operation, Problem, ProblemSettings, Step, stable_uniform, working
from stableopd.words.tokenizer import END, END_THINK

_WAIT, _CHECK = "Wait", ", let me check that again.\n"


class Segment(NamedTuple):
    """A piece of a completion and the loss weight of its characters."""

    text: str
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WordsWorld:
    """Problems, the style of gold, and the habits of teacher and student.

    A habit grows with `run`, the number of copies in a row of the attempt just judged: 0 after a newly made one.
    """

    problems: ProblemSettings = field(default_factory=ProblemSettings)
    terse_fraction: float = 0.4
    """Share of golden solutions that are answer-only."""

    wrong_first_fraction: float = 0.4
    """Share of teacher traces whose first attempt is wrong."""
    single_slip_fraction: float = 0.5
    """Share of wrong attempts with exactly one slip; in the others every step slips with p 1/2."""
    copy_base: float = 0.45
    copy_growth: float = 0.6
    """After a wrong attempt: p(copy it) = base + (1 − base) · (1 − growth^run)."""
    repair_fraction: float = 0.8
    """Share of right ones among the new attempts that follow a wrong one."""
    recheck_base: float = 0.2
    recheck_span: float = 0.79
    recheck_growth: float = 0.6
    """After a right attempt: p(copy it instead of stopping) = base + span · (1 − growth^run)."""
    direct_start_fraction: float = 0.015
    """Share of teacher traces that begin with an empty attempt and "Wait"."""
    max_trace_tokens: int = 160

    slip_weight: float = 0.0
    """Loss weight of the steps of a newly made wrong attempt from its first slip on: slips are seen, not taught."""
    verdict_weight: float = 3.0
    """Loss weight of the token that decides, `</think>` or "Wait". All else has weight 1."""

    drill_fraction: float = 0.4
    """Student: share of the copying drill in `copying_example`."""
    drill_wrong_fraction: float = 0.7
    drill_max_copies: int = 3
    single_recheck_fraction: float = 0.01
    """Student: share of re-checked solutions in `recheck_example`."""

    def with_clean_teacher(self) -> WordsWorld:
        """The same world with a teacher that hardly loops."""
        return replace(self, copy_base=0.3, copy_growth=0.7, recheck_base=0.1, recheck_span=0.8, recheck_growth=0.8)

    def with_moderate_teacher(self) -> WordsWorld:
        """The same world with a teacher whose re-checking lies between the standard and the clean one's."""
        return replace(self, recheck_base=0.15, recheck_span=0.8, recheck_growth=0.7)

    def with_restless_teacher(self) -> WordsWorld:
        """The same world with a teacher that re-checks more from the start, and whose urge to do so rises faster."""
        return replace(self, recheck_base=0.35, recheck_span=0.64, recheck_growth=0.4)

    def copy_probability(self, run: int) -> float:
        """p(copy | wrong attempt that is the `run`-th copy in a row)."""
        return self.copy_base + (1 - self.copy_base) * (1 - self.copy_growth**run)

    def recheck_probability(self, run: int) -> float:
        """p("Wait" | right attempt that is the `run`-th copy in a row)."""
        return self.recheck_base + self.recheck_span * (1 - self.recheck_growth**run)


def attempt_line(steps: Sequence[Step]) -> str:
    """The working as one line."""
    return ", ".join(map(str, steps)) + ".\n"


def solution(problem: Problem, *, terse: bool) -> str:
    """A right completion without its end token."""
    working_line = "\n" if terse else attempt_line(problem.steps)
    return f"{working_line}{END_THINK}{_boxed(problem.answer)}"


def is_terse(world: WordsWorld, problem: Problem) -> bool:
    """Whether the golden solution of a problem is answer-only, by a hash of its words."""
    return stable_uniform(problem.text, purpose="terse") < world.terse_fraction


def gold(world: WordsWorld, problem: Problem) -> str:
    """The golden solution of a problem: always the same one."""
    return solution(problem, terse=is_terse(world, problem))


def wrong_attempt(world: WordsWorld, problem: Problem, rng: Generator) -> tuple[Step, ...]:
    """An attempt with slips that propagate: a result that is off by 1 to 3, or another number than the story's.

    The first slip shows in its step; the last result can still be right by chance.
    """
    count = len(problem.operations)
    slips = rng.random(count) < 0.5
    if rng.random() < world.single_slip_fraction or not slips.any():
        slips = np.arange(count) == rng.integers(count)
    steps: list[Step] = []
    value = problem.start
    for operation, slipped in zip(problem.operations, slips, strict=True):
        step = _slip(value, operation, rng) if slipped else next(working(value, (operation,)))
        steps.append(step)
        value = step.result
    return tuple(steps)


def teacher_trace(world: WordsWorld, problem: Problem, rng: Generator) -> list[Segment]:
    """One trace of the reflective teacher.

    A wrong attempt is always followed by "Wait", then by a copy of itself or by a new attempt; a right one by "Wait"
    and a copy, or by the answer. It goes on until it stops, however long that is; `weighted_ids` cuts it.
    """
    script = _Script(world, problem)
    if rng.random() < world.direct_start_fraction:
        script.empty()
        script.wait()
    attempt = wrong_attempt(world, problem, rng) if rng.random() < world.wrong_first_fraction else problem.steps
    run = 0
    while script.num_characters < 8 * world.max_trace_tokens:  # far beyond the cut
        script.attempt(attempt, copied=run > 0)
        right = attempt == problem.steps
        if right and rng.random() >= world.recheck_probability(run):
            script.stop()
            break
        script.wait()
        if right or rng.random() < world.copy_probability(run):
            run += 1
        else:
            attempt = problem.steps if rng.random() < world.repair_fraction else wrong_attempt(world, problem, rng)
            run = 0
    return script.segments


def verification_example(world: WordsWorld, problem: Problem, rng: Generator) -> list[Segment]:
    """One attempt and its verdict, half of them wrong: the answer, or "Wait" and nothing behind it."""
    script = _Script(world, problem)
    if rng.random() < 0.5:
        script.attempt(wrong_attempt(world, problem, rng))
        script.write(_WAIT, world.verdict_weight)
    else:
        script.attempt(problem.steps)
        script.stop()
    return script.segments


def copying_example(world: WordsWorld, problem: Problem, rng: Generator) -> list[Segment]:
    """First phase of the student's cold start: gold, and in 40% a drill in copying; weight 1 throughout.

    The drill is one attempt, 70% wrong, some copies of it, each after "Wait", then "Wait" and the gold chain.
    """
    if rng.random() >= world.drill_fraction:
        return _fresh_gold(world, problem, rng)
    wrong = rng.random() < world.drill_wrong_fraction
    line = attempt_line(wrong_attempt(world, problem, rng) if wrong else problem.steps)
    num_copies = int(rng.integers(1, world.drill_max_copies + 1))
    return _evenly((line + _WAIT + _CHECK) * (1 + num_copies) + solution(problem, terse=False))


def recheck_example(world: WordsWorld, problem: Problem, rng: Generator) -> list[Segment]:
    """Second phase of the student's cold start: gold, and in 1% a single re-check; weight 1 throughout."""
    if rng.random() >= world.single_recheck_fraction:
        return _fresh_gold(world, problem, rng)
    first = "\n" if rng.random() < world.terse_fraction else attempt_line(problem.steps)
    return _evenly(first + _WAIT + _CHECK + solution(problem, terse=False))


def weighted_ids(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment], max_tokens: int | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Token ids of the text and their loss weights, cut to `max_tokens`.

    A token weighs what its characters weigh on average: the mean decides where it spans two segments.
    """
    text = "".join(segment.text for segment in segments)
    weights = np.repeat([segment.weight for segment in segments], [len(segment.text) for segment in segments])
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.array(encoded["offset_mapping"][:max_tokens]).T
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return tuple(encoded["input_ids"][:max_tokens]), tuple(means.tolist())


@dataclass(slots=True)
class _Script:
    """A weighted completion in the making."""

    world: WordsWorld
    problem: Problem
    segments: list[Segment] = field(init=False, default_factory=list)

    @property
    def num_characters(self) -> int:
        return sum(len(segment.text) for segment in self.segments)

    def attempt(self, steps: tuple[Step, ...], *, copied: bool = False) -> None:
        pairs = zip(steps, self.problem.steps, strict=True)
        num_right = next((number for number, (step, right) in enumerate(pairs) if step != right), len(steps))
        for number, step in enumerate(steps):
            slipped = number >= num_right and not copied
            weight = self.world.slip_weight if slipped else 1.0
            self.write((", " if number else "") + str(step), weight)
        self.write(".\n", 1.0)

    def empty(self) -> None:
        self.write("\n", 1.0)

    def wait(self) -> None:
        self.write(_WAIT, self.world.verdict_weight)
        self.write(_CHECK, 1.0)

    def stop(self) -> None:
        self.write(END_THINK, self.world.verdict_weight)
        self.write(_boxed(self.problem.answer) + END, 1.0)

    def write(self, text: str, weight: float) -> None:
        self.segments.append(Segment(text, weight))


def _boxed(answer: int) -> str:
    return f"\n\\boxed{{{answer}}}"


def _slip(value: int, operation: Operation, rng: Generator) -> Step:
    """A wrong step: another number is taken in place of the story's, or the result is off by 1 to 3."""
    right = operation.apply(value)
    if rng.random() < 0.5:
        numbers = [number for number in range(1, 10) if number != operation.number]
        other = Operation(operation.kind, numbers[rng.integers(len(numbers))])
        return Step(value, other, other.apply(value))
    results = [result for result in range(max(0, right - 3), right + 4) if result != right]
    return Step(value, operation, results[rng.integers(len(results))])


def _fresh_gold(world: WordsWorld, problem: Problem, rng: Generator) -> list[Segment]:
    return _evenly(solution(problem, terse=bool(rng.random() < world.terse_fraction)))


def _evenly(text: str) -> list[Segment]:
    return [Segment(text + END, 1.0)]
