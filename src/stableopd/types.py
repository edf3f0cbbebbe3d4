"""The records that pass between the parts of a run.

Conventions, everywhere: B sequences, P prompt width, T completion width, K top-k entries.
Prompts are padded on the left, completions on the right, so that column t of every [B, T] array is
about completion token t. Log-probabilities are natural logarithms (nats). This module needs no torch
at run time: records only hold arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "loop", "abort"]
"""Why a rollout ended: an end token, the length budget, a loop cut short, or an aborted request."""

Severity = Literal["info", "warning", "critical"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row of data, tokenised. `index` is its row in the dataset and names it in every seed."""

    index: int
    prompt: str
    prompt_ids: tuple[int, ...]
    gold_ids: tuple[int, ...] | None = None
    """Golden solution, ending in an end token."""
    gold_weights: tuple[float, ...] | None = None
    """Loss weight of each golden token; None means 1 for all."""
    answer: str | None = None
    teacher: str | None = None
    """Name of the teacher that scores its rollouts; None: the only one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are drawn. `temperature=0` means greedy decoding.

    Log-probabilities belong to the distribution softmax(logits / temperature) over the whole
    vocabulary, before `top_p` and `top_k` cut it (greedy: temperature 1), so that they can be
    compared with a teacher-forced pass and with another policy's.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_generations: int = 1
    first_generation: int = 0
    """Number of the first completion of each prompt: those before it were drawn already."""
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    """A completion ends with the token that completes one of these in its text (finish reason `stop`)."""
    stop_loops_after: int | None = None
    """End a completion that has been in an exact loop for so many repeats (finish reason `loop`); None: never."""

    @property
    def logprob_temperature(self) -> float:
        return self.temperature or 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """Completions of one policy version. Row r belongs to prompt `prompt_index[r]` of the request."""

    prompt_ids: Tensor
    """[B, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[B, P] bool."""
    completion_ids: Tensor
    """[B, T] int64, padded on the right."""
    completion_mask: Tensor
    """[B, T] bool; includes the end token when there is one. Made from lengths, never from ids."""
    sampling_logprobs: Tensor
    """[B, T] float32, nats; 0 where masked."""
    finish_reason: tuple[FinishReason, ...]
    prompt_index: tuple[int, ...]
    """Position of each row's prompt in the list of examples that was asked for."""
    policy_version: int = 0
    teachers: tuple[str | None, ...] = ()
    """`Example.teacher` of each row; empty where there is only one teacher."""

    def __len__(self) -> int:
        return len(self.finish_reason)

    def lengths(self) -> list[int]:
        """Number of completion tokens of each row, the end token included."""
        lengths: list[int] = self.completion_mask.sum(dim=1).tolist()
        return lengths

    def completions(self) -> list[list[int]]:
        """Completion token ids of each row, without padding."""
        ids = self.completion_ids.tolist()
        return [row[:length] for row, length in zip(ids, self.lengths(), strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRollout:
    """One row of a batch under way, told of as soon as it ends so that it can be scored while others go on."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """The end token included."""
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """A model's opinion of the tokens of a `RolloutBatch`, at the temperature they were drawn with."""

    sampled_logprobs: Tensor | None
    """[B, T] float32, nats; 0 where masked. None where the whole distribution is given as `states` instead."""
    temperature: float
    model_id: str
    topk_ids: Tensor | None = None
    """[B, T, K] int64: the likeliest tokens at each position."""
    topk_logprobs: Tensor | None = None
    """[B, T, K] float32, nats."""
    entropy: Tensor | None = None
    """[B, T] float32, nats; where top-k are given."""
    states: tuple[Tensor, ...] | None = None
    """Per row its hidden states [length, H]: with the model's head, the whole distribution at each position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """One thing that the monitor saw, with what it was compared to and what to do about it."""

    rule: str
    severity: Severity
    signal: str
    """Metric key of the signal."""
    value: float
    threshold: float
    step: int
    since: int
    """First step of the unbroken stretch in which the signal was beyond its threshold."""
    message: str
    """What was seen, against what; the likely cause; what to do."""
    cause: str = ""
    """Name of the likely cause (`stableopd.health.causes`)."""
    action: str = "none"
    """What the software did: the controller's alerts name it, those of the monitor say "none"."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthReport:
    """Health of one step's rollouts: figures by metric key, and the alerts they raised."""

    step: int
    metrics: Mapping[str, float]
    alerts: tuple[Alert, ...] = ()

    @property
    def healthy(self) -> bool:
        return not any(alert.severity != "info" for alert in self.alerts)


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Everything a run knows beside its tensors. JSON only."""

    step: int = 0
    """Finished steps; a step is one rollout batch."""
    policy_version: int = 0
    """Optimizer updates so far."""
    num_tokens: int = 0
    """Completion tokens generated so far, all processes."""
    prompt_cursor: int = 0
    """Prompts drawn from the stream so far."""
    best_metric: float | None = None
    best_step: int | None = None
    monitor: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] = field(default_factory=dict)
    steps_without_update: int = 0
    """Steps in a row, up to now, none of whose updates could be made."""
    stopped: bool = False
    """The controller has ended the run."""
    begun_with: dict[str, str] = field(default_factory=dict)
    """Digests of the student and the data that the run began with."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
