"""Rollouts by vLLM: the engine that a `RolloutEngine` of ours drives, in this process or behind a server."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stableopd.errors import ConfigError, EngineError
from stableopd.protocols import OnFinished
from stableopd.rollout.requests import Answer, Backend, Request, requests_for, rollout_batch
from stableopd.rollout.weight_sync import SyncCheck, SyncReport, plain_weights, trainer_logprobs
from stableopd.scoring import Autocast
from stableopd.types import Example, FinishedRollout, RolloutBatch, Sampling


class VllmEngine:
    """Draws completions with vLLM (`RolloutEngine`).

    Args:
        backend: the running engine, built from the student's weights as they are now.
        student: compared with the engine at once, and again after every sync.
        sequences: token ids that both sides score for the comparison; none: nothing is compared.
        tolerance: largest mean |difference| of log-probabilities, in nats.
        trial: how the run samples; one short completion shows whether log-probabilities follow our convention.
        raw_logprobs: the backend gives log-probabilities at temperature 1 before top-p and top-k, instead of those of
            the distribution that was drawn from. Where a call's sampling fits neither, its `sampling_logprobs` are NaN.

    Raises: EngineError when the engine's weights are not the student's: nothing is ever drawn from those.

    Holds: a completion depends on the weights and on (seed, step, example.index, generation), not on the other rows,
        up to rounding of the engine's batches.
    """

    def __init__(
        self,
        backend: Backend,
        student: nn.Module,
        *,
        pad_token_id: int,
        vocab_size: int | None,
        sequences: Sequence[tuple[int, ...]],
        tolerance: float,
        raw_logprobs: bool,
        trial: Sampling,
        autocast: Autocast,
    ) -> None:
        self._backend = backend
        self._pad_id = pad_token_id
        self._vocab_size = vocab_size
        self._raw_logprobs = raw_logprobs
        self._autocast = autocast
        self._device = next(student.parameters()).device
        self._check = SyncCheck(sequences, tolerance)
        self._version = 0
        self.last_sync: SyncReport | None = None
        if self._check.sequences:
            self.last_sync = self._check.start(
                trainer_logprobs(student, self._check.sequences, autocast), self._engine_logprobs()
            )
            self._require_sync(self.last_sync, "after it was built")
            self._check_convention(student, trial, tolerance)

    def generate(
        self, examples: Sequence[Example], sampling: Sampling, *, step: int, on_finished: OnFinished | None = None
    ) -> RolloutBatch:
        """As `RolloutEngine`. Raises: EngineError; ConfigError for what vLLM cannot do."""
        if sampling.stop_loops_after:
            raise ConfigError(
                "rollout.stop_loops_after is not possible with rollout.engine=vllm; leave it out, or use hf"
            )
        requests = requests_for(examples, sampling, step)
        answers: list[Answer] = []

        def on_answer(answer: Answer) -> None:
            answers.append(answer)
            if on_finished:
                on_finished(_finished(requests[answer.row], answer, examples))

        self._backend.run(requests, on_answer)
        batch = rollout_batch(
            examples,
            requests,
            answers,
            pad_id=self._pad_id,
            vocab_size=self._vocab_size,
            policy_version=self._version,
            device=self._device,
        )
        if not self._tells_logprobs(sampling):
            batch.sampling_logprobs.fill_(torch.nan)
        return batch

    def sync_weights(self, student: nn.Module, policy_version: int) -> None:
        """Load the student's weights into the engine and make sure that they are there.

        Raises: EngineError when the engine does not follow; nothing is drawn from it then.
        """
        self._backend.load_weights(plain_weights(student))
        self._version = policy_version
        if not self._check.sequences:
            return
        expected = trainer_logprobs(student, self._check.sequences, self._autocast)
        report = self._check.compare(expected, self._engine_logprobs())
        if not report.in_sync and self._backend.mend():
            report = self._check.compare(expected, self._engine_logprobs())
        self.last_sync = report
        self._require_sync(report, f"after the sync to policy version {policy_version}")

    def close(self) -> None:
        self._backend.close()

    def _engine_logprobs(self) -> list[list[float]]:
        return self._backend.prompt_logprobs(self._check.sequences)

    def _tells_logprobs(self, sampling: Sampling) -> bool:
        cut = sampling.top_p < 1 or sampling.top_k > 0
        if self._raw_logprobs:
            return sampling.logprob_temperature == 1.0
        return not cut or sampling.temperature == 0

    def _check_convention(self, student: nn.Module, trial: Sampling, tolerance: float) -> None:
        """Raises: EngineError when a drawn completion's log-probabilities are not those of softmax(logits / T)."""
        example = Example(index=0, prompt="", prompt_ids=self._check.sequences[0])
        drawn: list[Answer] = []
        self._backend.run(requests_for([example], trial, 0), drawn.append)
        temperature = trial.logprob_temperature
        ids = None if self._raw_logprobs else self._vocab_size  # raw ones know of no ban on padding rows
        sequence = (*example.prompt_ids, *drawn[0].token_ids)
        [expected] = trainer_logprobs(student, [sequence], self._autocast, temperature=temperature, ids=ids)
        ours = expected[len(example.prompt_ids) - 1 :]
        gap = sum(abs(a - b) for a, b in zip(ours, drawn[0].logprobs, strict=True)) / len(ours)
        if gap > tolerance:
            mode = "raw_logprobs" if self._raw_logprobs else "processed_logprobs"
            raise EngineError(
                f"vLLM's log-probabilities of a drawn completion are off by {gap:.2g} nats on average: they are not of "
                f"softmax(logits / {temperature:g}). Start the server with --logprobs-mode {mode} "
                "--generation-config vllm"
            )

    def _require_sync(self, report: SyncReport, when: str) -> None:
        if not report.in_sync:
            raise EngineError(
                f"vLLM does not have the student's weights {when}: {report}. Rollouts of other weights are never "
                "trained on. Use rollout.engine=hf or another version of vLLM; where the difference is rounding (an "
                "engine in bfloat16), raise rollout.vllm.sync_tolerance or set rollout.vllm.dtype=float32"
            )


def _finished(request: Request, answer: Answer, examples: Sequence[Example]) -> FinishedRollout:
    return FinishedRollout(
        prompt_ids=request.prompt_ids, completion_ids=answer.token_ids, teacher=examples[request.prompt].teacher
    )
