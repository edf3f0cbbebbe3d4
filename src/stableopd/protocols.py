"""The seams of a run: what an engine, a teacher, a judge, a callback and a metric sink must offer.

Plain structural protocols. Anything with these methods fits; nothing has to inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from stableopd.types import Alert, Example, FinishedRollout, RolloutBatch, Sampling, TokenScores

if TYPE_CHECKING:
    from torch import nn

Judge = Callable[[str, str], bool]
"""(completion text, reference answer) -> is the completion right?"""

OnFinished = Callable[[FinishedRollout], None]
"""Told of each rollout as it ends. Must return at once."""

RewardFunction = Callable[[str, str], float]
"""(completion text, reference answer) -> what the completion is worth. A judge is one: right is 1, wrong is 0."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws completions from the student."""

    def generate(
        self, examples: Sequence[Example], sampling: Sampling, *, step: int, on_finished: OnFinished | None = None
    ) -> RolloutBatch:
        """`sampling.num_generations` completions for each example, grouped by example.

        `on_finished` is told of each as it ends, in any order. A completion depends on the weights and on
        (sampling.seed, step, example.index, number of the generation) alone: not on the other rows, nor on their order.
        """
        ...

    def sync_weights(self, student: nn.Module, policy_version: int) -> None:
        """Make the next rollouts come from these weights."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Scores tokens that the student has generated."""

    def score(self, rollouts: RolloutBatch, *, temperature: float, topk: int = 0, states: bool = False) -> TokenScores:
        """Log-probability of every completion token under softmax(logits / temperature).

        With `topk`, the likeliest tokens at each position as well. With `states`, hidden states in place of all that:
        the whole distribution, for losses over the vocabulary; a teacher that cannot give them raises ConfigError.
        """
        ...


@runtime_checkable
class StreamingTeacher(Teacher, Protocol):
    """A teacher elsewhere, that can score rollouts while others are still being generated."""

    def begin(self, *, temperature: float, topk: int = 0) -> ScoringStream:
        """Takes rollouts as they finish; one stream per step."""
        ...


class ScoringStream(Protocol):
    """The scoring of one step's rollouts."""

    def add(self, rollout: FinishedRollout) -> None:
        """Begins to score it; returns at once. Equal rollouts are scored once."""
        ...

    def result(self, rollouts: RolloutBatch) -> TokenScores:
        """Scores of all rows, those that were never added included. Raises: TeacherError when they cannot be had."""
        ...

    def close(self) -> None:
        """Gives up what is still under way; nothing after `result`."""
        ...


@runtime_checkable
class MetricSink(Protocol):
    """Takes one flat record of metrics per step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Callback:
    """Looks on while a run goes. Override what you need; return values are ignored."""

    def on_train_begin(self, trainer: Any) -> None: ...

    def on_phase(self, trainer: Any, step: int, phase: str) -> None:
        """A phase of a step begins: rollout, teacher, health, update or evaluation."""

    def on_step_end(self, trainer: Any, metrics: Mapping[str, float], alerts: Sequence[Alert]) -> None: ...

    def on_note(self, trainer: Any, text: str) -> None:
        """Something that the user ought to know and that no metric says, in plain text."""

    def on_evaluate(self, trainer: Any, metrics: Mapping[str, float]) -> None: ...

    def on_save(self, trainer: Any, path: str) -> None: ...

    def on_train_end(self, trainer: Any) -> None: ...
