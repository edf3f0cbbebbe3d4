"""A teacher in this process: a frozen Hugging Face causal language model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from stableopd.heads import Head, HeadlessModel
from stableopd.rollout.subsets import distinct_rows, select_rollouts, select_scores
from stableopd.scoring import Autocast, all_completion_states, completion_scores
from stableopd.teachers.offload import Offloaded
from stableopd.types import RolloutBatch, TokenScores


class LocalTeacher:
    """Scores the sampled tokens with its own weights, at the temperature that drew them (`Teacher`).

    Args:
        model: on its device already, or in CPU memory with `offload_from`.
        offload_from: the device on which it works; between scorings only its head stays there.

    Rows that are equal, prompt and completion, are scored once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        model_id: str,
        vocab_size: int,
        token_budget: int,
        autocast: Autocast,
        offload_from: torch.device | None = None,
    ) -> None:
        self.model = HeadlessModel(model.eval().requires_grad_(False), vocab_size).eval()
        self.model_id = model_id
        self._token_budget = token_budget
        self._autocast = autocast
        kept = self.model.head.parameters()
        self._offloaded = None if offload_from is None else Offloaded(model, offload_from, kept=kept)

    @property
    def head(self) -> Head:
        """What turns its hidden states into logits."""
        return self.model.head

    def score(self, rollouts: RolloutBatch, *, temperature: float, topk: int = 0, states: bool = False) -> TokenScores:
        """As `stableopd.protocols.Teacher`. Hidden states skip the head, which the loss then projects once."""
        kept, place = distinct_rows(rollouts)
        if len(kept) < len(rollouts):
            rollouts = select_rollouts(rollouts, kept)
        with self._at_work():
            scores = self._score(rollouts, temperature, topk, states)
        return scores if len(kept) == len(place) else select_scores(scores, place)

    def _score(self, rollouts: RolloutBatch, temperature: float, topk: int, states: bool) -> TokenScores:
        if states:
            found = all_completion_states(
                self.model, rollouts, token_budget=self._token_budget, autocast=self._autocast
            )
            return TokenScores(sampled_logprobs=None, temperature=temperature, model_id=self.model_id, states=found)
        scores = completion_scores(
            self.model,
            rollouts,
            temperature=temperature,
            token_budget=self._token_budget,
            autocast=self._autocast,
            topk=topk,
            entropy=topk > 0,
        )
        return TokenScores(
            sampled_logprobs=scores.logprobs,
            temperature=temperature,
            model_id=self.model_id,
            topk_ids=scores.topk_ids,
            topk_logprobs=scores.topk_logprobs,
            entropy=scores.entropy,
        )

    def _at_work(self) -> AbstractContextManager[None]:
        return nullcontext() if self._offloaded is None else self._offloaded.at_work()
