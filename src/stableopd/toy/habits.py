"""The habits of a reflective teacher and of a student's cold start, whatever the world is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

from numpy.random import Generator

HABITS = ("standard", "moderate", "clean", "restless")
Attempt = TypeVar("Attempt")
_Written = TypeVar("_Written", contravariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Habits:
    """How often attempts go wrong, are copied, re-checked and mended; the weights of what is written.

    A habit grows with `run`, the number of copies in a row of the attempt just judged: 0 after a
    newly made attempt, so that `copy_base` and `recheck_base` are the habits at a first verdict.
    """

    terse_fraction: float = 0.0
    """Share of golden solutions that are answer-only."""

    wrong_first_fraction: float = 0.4
    """Share of teacher traces whose first attempt is wrong."""
    single_slip_fraction: float = 0.5
    """Share of wrong attempts with exactly one slip."""
    copy_base: float = 0.45
    copy_growth: float = 0.6
    """After a wrong attempt: p(copy it) = base + (1 − base) · (1 − growth^run)."""
    repair_fraction: float = 0.8
    """Share of right ones among the new attempts that follow a wrong one."""
    recheck_base: float = 0.2
    recheck_span: float = 0.79
    recheck_growth: float = 0.6
    """After a right attempt: p(copy it instead of stopping) = base + span · (1 − growth^run)."""
    direct_start_fraction: float = 0.0
    """Share of teacher traces that begin with a direct answer thought better of."""
    max_trace_tokens: int = 100

    slip_weight: float = 0.0
    """Loss weight of a newly made wrong attempt: slips are seen, but not taught."""
    verdict_weight: float = 3.0
    """Loss weight of the token that decides between another attempt and the answer. All else has weight 1."""

    drill_fraction: float = 0.4
    """Student: share of the copying drill in `copying_example`."""
    drill_wrong_fraction: float = 0.7
    drill_max_copies: int = 5
    single_recheck_fraction: float = 0.01
    """Student: share of re-checked solutions in `recheck_example`."""

    def with_teacher(self, habit: str) -> Self:
        """The same world with a teacher of that habit, one of `HABITS`."""
        made: Mapping[str, Callable[[], Self]] = {
            "standard": lambda: self,
            "moderate": self.with_moderate_teacher,
            "clean": self.with_clean_teacher,
            "restless": self.with_restless_teacher,
        }
        return made[habit]()

    def with_clean_teacher(self) -> Self:
        """The same world with a teacher that hardly loops, even when decoded greedily."""
        return replace(
            self,
            copy_base=0.3,
            copy_growth=0.7,
            recheck_base=0.1,
            recheck_span=0.8,
            recheck_growth=0.8,
        )

    def with_moderate_teacher(self) -> Self:
        """The same world with a teacher whose re-checking lies between the standard and the clean one's."""
        return replace(self, recheck_base=0.15, recheck_span=0.8, recheck_growth=0.7)

    def with_restless_teacher(self) -> Self:
        """The same world with a teacher that re-checks more from the start, and whose urge to do so rises faster."""
        return replace(self, recheck_base=0.35, recheck_span=0.64, recheck_growth=0.4)

    def copy_probability(self, run: int) -> float:
        """p(copy | wrong attempt that is the `run`-th copy in a row)."""
        return self.copy_base + (1 - self.copy_base) * (1 - self.copy_growth**run)

    def recheck_probability(self, run: int) -> float:
        """p(another look | right attempt that is the `run`-th copy in a row)."""
        return self.recheck_base + self.recheck_span * (1 - self.recheck_growth**run)


class Script(Protocol[_Written]):
    """A completion in the making."""

    @property
    def is_full(self) -> bool:
        """Whether it is long enough to be cut."""

    def guess(self) -> None:
        """A direct answer, thought better of."""

    def attempt(self, attempt: _Written, *, copied: bool) -> None: ...

    def wait(self) -> None: ...

    def stop(self) -> None: ...


def reflect(
    habits: Habits, script: Script[Attempt], right: Attempt, make_wrong: Callable[[], Attempt], rng: Generator
) -> None:
    """Write one trace of the reflective teacher into `script`.

    A wrong attempt is always followed by a wait, then by a copy of itself or by a new attempt; a right
    one by a wait and a copy, or by the answer. A copy is taught even where it copies a slip.
    """
    if rng.random() < habits.direct_start_fraction:
        script.guess()
    attempt = make_wrong() if rng.random() < habits.wrong_first_fraction else right
    run = 0
    while not script.is_full:
        script.attempt(attempt, copied=run > 0)
        is_right = attempt == right
        if is_right and rng.random() >= habits.recheck_probability(run):
            script.stop()
            break
        script.wait()
        if is_right or rng.random() < habits.copy_probability(run):
            run += 1
        else:
            attempt = right if rng.random() < habits.repair_fraction else make_wrong()
            run = 0
