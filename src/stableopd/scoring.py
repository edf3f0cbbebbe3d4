"""Teacher-forced passes: the logits and log-probabilities that a model gives to completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stableopd.losses import token_logprobs
from stableopd.tokens import budget_batches, position_ids

Autocast = Callable[[], AbstractContextManager[Any]]


class Sequences(Protocol):
    """Prompts padded on the left, completions on the right."""

    @property
    def prompt_ids(self) -> Tensor: ...
    @property
    def prompt_mask(self) -> Tensor: ...
    @property
    def completion_ids(self) -> Tensor: ...
    @property
    def completion_mask(self) -> Tensor: ...


def completion_logits(model: nn.Module, sequences: Sequences, vocab_size: int) -> Tensor:
    """Logits [B, T, V] that predict each completion token, cut to the first `vocab_size` ids.

    Ids from `vocab_size` on are padding of the embedding: no tokenizer ever produces them, so they get
    no probability, in the student as in the teacher.
    """
    width = sequences.completion_ids.shape[1]
    mask = torch.cat([sequences.prompt_mask, sequences.completion_mask], dim=1)
    output = model(
        input_ids=torch.cat([sequences.prompt_ids, sequences.completion_ids], dim=1),
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        logits_to_keep=width + 1,
        use_cache=False,
    )
    logits: Tensor = output.logits[:, :-1, :vocab_size]
    return logits


@torch.no_grad()
def completion_logprobs(
    model: nn.Module,
    sequences: Sequences,
    *,
    vocab_size: int,
    temperature: float,
    token_budget: int,
    autocast: Autocast,
) -> Tensor:
    """Log-probability [B, T] (nats, float32, 0 where masked) of every completion token.

    Rows are scored in batches of like length under `token_budget`; the result is in the rows' own order.
    """
    scores = torch.zeros(sequences.completion_ids.shape, dtype=torch.float32, device=sequences.completion_ids.device)
    with evaluating(model), autocast():
        for rows, part in trimmed_batches(sequences, token_budget):
            logits = completion_logits(model, part, vocab_size)
            logprobs = token_logprobs(logits, part.completion_ids, temperature)
            scores[rows, : logprobs.shape[1]] = logprobs.masked_fill(~part.completion_mask, 0.0).float()
    return scores


def trimmed_batches(sequences: Sequences, token_budget: int) -> Iterator[tuple[Tensor, Trimmed]]:
    """(row numbers, those rows without common padding) in batches under a token budget."""
    prompts = sequences.prompt_mask.sum(dim=1).tolist()
    completions = sequences.completion_mask.sum(dim=1).tolist()
    for batch in budget_batches(prompts, completions, token_budget):
        rows = torch.tensor(batch, device=sequences.completion_ids.device)
        yield rows, Trimmed(sequences, rows, max(prompts[r] for r in batch), max(completions[r] for r in batch))


class Trimmed:
    """Some rows of `sequences`, cut to the widest prompt and the widest completion among them."""

    def __init__(self, sequences: Sequences, rows: Tensor, prompt_width: int, completion_width: int) -> None:
        start = sequences.prompt_ids.shape[1] - prompt_width
        self.prompt_ids = sequences.prompt_ids[rows, start:]
        self.prompt_mask = sequences.prompt_mask[rows, start:]
        self.completion_ids = sequences.completion_ids[rows, :completion_width]
        self.completion_mask = sequences.completion_mask[rows, :completion_width]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode for a while, then each back in its own.

    Evaluation mode means no dropout, and no gradient checkpointing, which would switch off the key-value cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
