"""What an engine outside the trainer is asked for, what it answers, and how answers become a rollout batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stableopd.errors import EngineError
from stableopd.tokens import pad_left, pad_right
from stableopd.types import Example, FinishReason, RolloutBatch, Sampling

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to draw. Its seed is its own, so that its draws do not depend on its neighbours'."""

    row: int
    prompt: int
    """Position of its example in the call."""
    prompt_ids: tuple[int, ...]
    seed: int
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion as the engine tells it."""

    row: int
    token_ids: tuple[int, ...]
    """The end token included."""
    logprobs: tuple[float, ...]
    """Nats, one per token, under softmax(logits / temperature) unless the engine was set up otherwise."""
    finish_reason: str


class Backend(Protocol):
    """A running engine: in this process or behind a server."""

    def run(self, requests: Sequence[Request], on_answer: Callable[[Answer], None]) -> None:
        """Answers every request; `on_answer` is told of each as it is complete. Raises: EngineError."""
        ...

    def prompt_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """log softmax(logits) of each token but the first of each sequence, at temperature 1."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over these weights, in the checkpoint's names."""
        ...

    def mend(self) -> bool:
        """Tries to put right what loading left stale; whether there was something to try."""
        ...

    def close(self) -> None: ...


def requests_for(examples: Sequence[Example], sampling: Sampling, step: int) -> list[Request]:
    """`sampling.num_generations` requests for each example, grouped by example."""
    return [
        Request(
            row=prompt * sampling.num_generations + generation,
            prompt=prompt,
            prompt_ids=example.prompt_ids,
            seed=_seed(sampling.seed, step, example.index, sampling.first_generation + generation),
            sampling=sampling,
        )
        for prompt, example in enumerate(examples)
        for generation in range(sampling.num_generations)
    ]


def _seed(seed: int, *key: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint32)[0])


def rollout_batch(
    examples: Sequence[Example],
    requests: Sequence[Request],
    answers: Sequence[Answer],
    *,
    pad_id: int,
    vocab_size: int | None,
    policy_version: int,
    device: torch.device,
) -> RolloutBatch:
    """The answers, in any order, as one batch in the order of the requests.

    Raises: EngineError when a request has no answer or several, or an answer is no completion of this vocabulary.
    """
    by_row = {answer.row: answer for answer in answers}
    if len(by_row) != len(answers) or by_row.keys() != {request.row for request in requests}:
        raise EngineError(
            f"the rollout engine gave {len(answers)} answers to {len(requests)} requests; nothing was trained on them"
        )
    ordered = [_checked(by_row[request.row], vocab_size) for request in requests]
    prompt_ids, prompt_mask = pad_left([request.prompt_ids for request in requests], pad_id, device)
    completion_ids, completion_mask = pad_right([answer.token_ids for answer in ordered], pad_id, device=device)
    logprobs, _ = pad_right([answer.logprobs for answer in ordered], 0.0, torch.float32, device)
    teachers = tuple(examples[request.prompt].teacher for request in requests)
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        sampling_logprobs=logprobs,
        finish_reason=tuple(_REASONS.get(answer.finish_reason, "abort") for answer in ordered),
        prompt_index=tuple(request.prompt for request in requests),
        policy_version=policy_version,
        teachers=teachers if any(teachers) else (),
    )


def _checked(answer: Answer, vocab_size: int | None) -> Answer:
    if not answer.token_ids or len(answer.token_ids) != len(answer.logprobs):
        raise EngineError(
            f"the rollout engine answered with {len(answer.token_ids)} tokens and {len(answer.logprobs)} "
            f"log-probabilities (finish reason {answer.finish_reason!r}); nothing was trained on it"
        )
    beyond = [token for token in answer.token_ids if vocab_size is not None and token >= vocab_size]
    if beyond:
        raise EngineError(
            f"the rollout engine drew the id {beyond[0]}, which the tokenizer does not know ({vocab_size} ids); engine "
            "and student do not belong together"
        )
    return answer


def padding_ids(vocab_size: int | None, num_rows: int) -> Iterator[int]:
    """Ids of embedding rows that no text uses."""
    return iter(range(vocab_size, num_rows)) if vocab_size is not None else iter(())
