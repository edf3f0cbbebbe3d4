"""The pipelined step: the next batch of rollouts is made in a thread while this one is scored and trained on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stableopd.protocols import RolloutEngine, ScoringStream
from stableopd.types import Example, FinishedRollout, RolloutBatch, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The rollouts of one step, and the scoring that began with the first of them that ended."""

    rollouts: RolloutBatch
    max_new_tokens: int
    """The budget that they were drawn with."""
    scoring: ScoringStream | None


def generate_and_score(
    engine: RolloutEngine,
    examples: Sequence[Example],
    sampling: Sampling,
    *,
    step: int,
    scoring: ScoringStream | None,
    stop: threading.Event | None = None,
) -> Generated:
    """Rollouts whose scoring begins as they end. With `stop` set, gives up at the next rollout that ends."""

    def on_finished(rollout: FinishedRollout) -> None:
        if stop is not None and stop.is_set():
            raise _NotWantedError
        if scoring is not None:
            scoring.add(rollout)

    try:
        rollouts = engine.generate(examples, sampling, step=step, on_finished=on_finished)
    except BaseException:
        if scoring is not None:
            scoring.close()
        raise
    return Generated(rollouts=rollouts, max_new_tokens=sampling.max_new_tokens, scoring=scoring)


class _NotWantedError(Exception):
    """Ends a generation that nobody waits for any more."""


class Ahead:
    """One generation under way for one step. At most one at a time, so rollouts are never older than one step.

    The engine must not be synced or used between `start` and `take` or `drop`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._step: int | None = None
        self._made: Generated | None = None
        self._error: Exception | None = None

    def start(
        self,
        engine: RolloutEngine,
        examples: Sequence[Example],
        sampling: Sampling,
        *,
        step: int,
        scoring: ScoringStream | None,
    ) -> None:
        """Begin to make the rollouts of `step`."""
        assert self._step is None, "one generation at a time"
        self._step, self._made, self._error = step, None, None
        self._stop = threading.Event()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def work() -> None:
            try:
                if device is not None:  # each thread begins on the first device
                    torch.cuda.set_device(device)
                self._made = generate_and_score(engine, examples, sampling, step=step, scoring=scoring, stop=self._stop)
            except Exception as error:  # told to whoever asks for the rollouts
                self._error = error

        self._thread = threading.Thread(target=work, name=f"rollouts-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the engine is free again. Errors are kept for `take`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take(self, step: int) -> Generated | None:
        """The rollouts of `step`; None when none were begun for it. Raises what went wrong in making them."""
        if self._step is None:
            return None
        assert self._step == step, f"rollouts were made for step {self._step}, not {step}"
        self.wait()
        made, error = self._made, self._error
        self._step = self._made = self._error = None
        if error is not None:
            raise error
        return made

    def drop(self) -> None:
        """Give up what is under way or made: nobody will train on it."""
        self._stop.set()
        self.wait()
        if self._made is not None and self._made.scoring is not None:
            self._made.scoring.close()
        self._step = self._made = self._error = None
