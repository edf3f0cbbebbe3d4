"""Several teachers: each scores the rollouts of the prompts that name it."""

from __future__ import annotations

from collections.abc import Mapping

from stableopd.errors import ConfigError
from stableopd.protocols import ScoringStream, Teacher
from stableopd.rollout.subsets import joined_scores, select_rollouts
from stableopd.teachers.streams import begin_scoring
from stableopd.types import FinishedRollout, RolloutBatch, TokenScores


class TeacherRouter:
    """A teacher made of several (`StreamingTeacher`). Rows carry the name of theirs, so that no list can slip.

    Args: `teachers` by the name that `Example.teacher` uses.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = dict(teachers)

    def score(self, rollouts: RolloutBatch, *, temperature: float, topk: int = 0, states: bool = False) -> TokenScores:
        """As `stableopd.protocols.Teacher`. Raises: ConfigError for `states`, which have one head for all rows."""
        if states:
            raise ConfigError(
                "a divergence over the whole vocabulary needs one teacher, and there are several; set "
                "objective.distill.divergence=sampled_reverse_kl or support=teacher_topk"
            )
        return self.begin(temperature=temperature, topk=topk).result(rollouts)

    def begin(self, *, temperature: float, topk: int = 0) -> RoutedStream:
        return RoutedStream(
            {
                name: begin_scoring(teacher, temperature=temperature, topk=topk)
                for name, teacher in self.teachers.items()
            }
        )


class RoutedStream:
    """The scoring of one step's rollouts by several teachers (`ScoringStream`)."""

    def __init__(self, streams: Mapping[str, ScoringStream]) -> None:
        self._streams = streams

    def add(self, rollout: FinishedRollout) -> None:
        self._streams[self._known(rollout.teacher)].add(rollout)

    def result(self, rollouts: RolloutBatch) -> TokenScores:
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(rollouts.teachers or (None,) * len(rollouts)):
            rows_of.setdefault(self._known(name), []).append(row)
        parts = [(rows, self._streams[name].result(select_rollouts(rollouts, rows))) for name, rows in rows_of.items()]
        return joined_scores(parts, len(rollouts))

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _known(self, name: str | None) -> str:
        if name is None or name not in self._streams:
            raise ConfigError(f"a rollout names the teacher {name!r}; known: {', '.join(sorted(self._streams))}")
        return name
