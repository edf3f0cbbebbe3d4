"""Where a step's rollouts and their scores come from: made when they are asked for, or one step ahead."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from stableopd.protocols import RolloutEngine, ScoringStream, Teacher
from stableopd.rollout.ahead import Ahead, generate_and_score
from stableopd.teachers.streams import begin_scoring
from stableopd.types import Example, RolloutBatch, Sampling, TokenScores


class RolloutSource:
    """Generates, and has the teacher score rollouts as they end.

    Args:
        teacher: None where no term needs one.
        temperature, topk, states: what is asked of the teacher (`stableopd.protocols.Teacher.score`).
    """

    def __init__(
        self, engine: RolloutEngine, teacher: Teacher | None, *, temperature: float, topk: int, states: bool
    ) -> None:
        self._engine = engine
        self._teacher = teacher
        self._temperature = temperature
        self._topk = topk
        self._states = states
        self._ahead = Ahead()
        self._scoring: ScoringStream | None = None
        self.budget: int | None = None
        """Most tokens that the rollouts handed out last could have."""

    def rollouts(self, examples: Sequence[Example], sampling: Sampling, *, step: int) -> RolloutBatch:
        """Those that were begun for this step, or new ones."""
        made = self._ahead.take(step) or generate_and_score(
            self._engine, examples, sampling, step=step, scoring=self._begin_scoring()
        )
        self._scoring = made.scoring
        self.budget = made.max_new_tokens
        return made.rollouts

    def begin(self, examples: Sequence[Example], sampling: Sampling, *, step: int) -> None:
        """Begin to make the rollouts of a coming step. Until `wait` or `drop`, the engine is in use."""
        self._ahead.start(self._engine, examples, sampling, step=step, scoring=self._begin_scoring())

    def scores(self, rollouts: RolloutBatch) -> TokenScores | None:
        """The teacher's scores of the rollouts that were handed out last."""
        if self._scoring is None:
            return None
        try:
            return self._scoring.result(rollouts)
        finally:
            self._scoring.close()
            self._scoring = None

    def sync(self, student: nn.Module, policy_version: int) -> None:
        """The engine's next rollouts come from these weights. Waits for rollouts that are being made."""
        self._ahead.wait()
        self._engine.sync_weights(student, policy_version)

    def wait(self) -> None:
        """Until nothing is being made."""
        self._ahead.wait()

    def drop(self) -> None:
        """Give up rollouts that are being made or wait to be taken, and scores that nobody asked for."""
        self._ahead.drop()
        if self._scoring is not None:
            self._scoring.close()
            self._scoring = None

    def _begin_scoring(self) -> ScoringStream | None:
        if self._teacher is None:
            return None
        return begin_scoring(self._teacher, temperature=self._temperature, topk=self._topk, states=self._states)
