"""A teacher in this process: a frozen Hugging Face causal language model."""

from __future__ import annotations

from torch import nn

from stableopd.heads import Head, HeadlessModel
from stableopd.scoring import Autocast, all_completion_states, completion_scores
from stableopd.types import RolloutBatch, TokenScores


class LocalTeacher:
    """Scores the sampled tokens with its own weights, at the temperature that drew them."""

    def __init__(
        self, model: nn.Module, *, model_id: str, vocab_size: int, token_budget: int, autocast: Autocast
    ) -> None:
        self.model = HeadlessModel(model.eval().requires_grad_(False), vocab_size).eval()
        self.model_id = model_id
        self._token_budget = token_budget
        self._autocast = autocast

    @property
    def head(self) -> Head:
        """What turns its hidden states into logits."""
        return self.model.head

    def score(self, rollouts: RolloutBatch, *, temperature: float, topk: int = 0, states: bool = False) -> TokenScores:
        """As `stableopd.protocols.Teacher`. Hidden states skip the head, which the loss then projects once."""
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
