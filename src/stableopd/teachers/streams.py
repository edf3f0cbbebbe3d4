"""Scoring that begins while rollouts are still being made, for teachers that can, and at their end for others."""

from __future__ import annotations

from stableopd.protocols import ScoringStream, StreamingTeacher, Teacher
from stableopd.types import FinishedRollout, RolloutBatch, TokenScores


def begin_scoring(teacher: Teacher, *, temperature: float, topk: int = 0, states: bool = False) -> ScoringStream:
    """A stream of the teacher's own, or one that scores all rows when the result is asked for.

    A teacher in this process shares its device with generation and is faster on whole batches, so it waits.
    """
    if isinstance(teacher, StreamingTeacher) and not states:
        return teacher.begin(temperature=temperature, topk=topk)
    return AtTheEnd(teacher, temperature=temperature, topk=topk, states=states)


class AtTheEnd:
    """A `ScoringStream` that scores everything when the result is asked for."""

    def __init__(self, teacher: Teacher, *, temperature: float, topk: int, states: bool) -> None:
        self._teacher = teacher
        self._temperature = temperature
        self._topk = topk
        self._states = states

    def add(self, rollout: FinishedRollout) -> None: ...

    def result(self, rollouts: RolloutBatch) -> TokenScores:
        return self._teacher.score(rollouts, temperature=self._temperature, topk=self._topk, states=self._states)

    def close(self) -> None: ...
