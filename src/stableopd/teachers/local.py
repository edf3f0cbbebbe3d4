"""A teacher in this process: a frozen Hugging Face causal language model."""

from __future__ import annotations

from torch import nn

from stableopd.scoring import Autocast, completion_logprobs
from stableopd.types import RolloutBatch, TokenScores


class LocalTeacher:
    """Scores the sampled tokens with its own weights, at the temperature that drew them."""

    def __init__(
        self, model: nn.Module, *, model_id: str, vocab_size: int, token_budget: int, autocast: Autocast
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model_id = model_id
        self._vocab_size = vocab_size
        self._token_budget = token_budget
        self._autocast = autocast

    def score(self, rollouts: RolloutBatch, *, temperature: float) -> TokenScores:
        logprobs = completion_logprobs(
            self.model,
            rollouts,
            vocab_size=self._vocab_size,
            temperature=temperature,
            token_budget=self._token_budget,
            autocast=self._autocast,
        )
        return TokenScores(sampled_logprobs=logprobs, temperature=temperature, model_id=self.model_id)
