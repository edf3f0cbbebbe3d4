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
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerBase

from stableopd.toy.habits import Habits, reflect
from stableopd.words.problems import Operation, Problem, ProblemSettings, Step, stable_uniform, working
from stableopd.words.tokenizer import END, END_THINK

_WAIT, _CHECK = "Wait", ", let me check that again.\n"


class Segment(NamedTuple):
    """A piece of a completion and the loss weight of its characters."""

    text: str
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WordsWorld(Habits):
    """Problems, the style of gold, and the habits of teacher and student."""

    problems: ProblemSettings = field(default_factory=ProblemSettings)
    terse_fraction: float = 0.4
    direct_start_fraction: float = 0.015
    max_trace_tokens: int = 160
    drill_max_copies: int = 3


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
    """One trace of the reflective teacher (`reflect`), longer than the cap where it does not stop before.

    `weighted_ids` cuts it.
    """
    script = _Script(world, problem)
    reflect(world, script, problem.steps, lambda: wrong_attempt(world, problem, rng), rng)
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
    def is_full(self) -> bool:
        """Far beyond the cap: no token of the world's text has as many as 8 characters on average."""
        return sum(len(segment.text) for segment in self.segments) >= 8 * self.world.max_trace_tokens

    def guess(self) -> None:
        self.write("\n", 1.0)
        self.wait()

    def attempt(self, attempt: tuple[Step, ...], *, copied: bool = False) -> None:
        pairs = zip(attempt, self.problem.steps, strict=True)
        num_right = next((number for number, (step, right) in enumerate(pairs) if step != right), len(attempt))
        for number, step in enumerate(attempt):
            slipped = number >= num_right and not copied
            weight = self.world.slip_weight if slipped else 1.0
            self.write((", " if number else "") + str(step), weight)
        self.write(".\n", 1.0)

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
