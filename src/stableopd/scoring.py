"""Teacher-forced passes: the hidden states and log-probabilities that a model gives to completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stableopd.fused import Projected, fused_loss
from stableopd.heads import Head, evaluating
from stableopd.tokens import budget_batches

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


class StatesModel(Protocol):
    """A model that gives hidden states, and the head that turns them into logits (see `stableopd.heads`)."""

    @property
    def head(self) -> Head: ...

    @property
    def packs(self) -> bool: ...

    def __call__(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A model's figures for every completion token, in the order of the rows; 0 where masked."""

    logprobs: Tensor
    """[B, T] nats, float32."""
    entropy: Tensor | None = None
    """[B, T] nats."""
    topk_ids: Tensor | None = None
    """[B, T, K] int64."""
    topk_logprobs: Tensor | None = None
    """[B, T, K] nats."""


def completion_states(model: StatesModel, sequences: Sequences) -> Tensor:
    """Hidden states [n, H] that predict the completion tokens: row after row, without padding.

    Where the model can, all sequences are packed into one row and nothing is padding. Elsewhere each prompt is moved up
    to its completion and padding is on the right alone. Causal attention then needs no mask, as no real token
    comes after padding, and the kernels are the fastest there are.
    """
    prompts, completions = sequences.prompt_mask.sum(dim=1), sequences.completion_mask.sum(dim=1)
    ids = torch.cat([sequences.prompt_ids, sequences.completion_ids], dim=1)
    lengths = prompts + completions - 1  # the last token predicts nothing
    start = sequences.prompt_ids.shape[1] - prompts
    rows, tokens = sequences.completion_mask.nonzero(as_tuple=True)
    if model.packs:
        column = torch.arange(ids.shape[1], device=ids.device)
        read = (column >= start[:, None]) & (column < (start + lengths)[:, None])
        states = model(ids[read][None], lengths.tolist())[0]
        first = lengths.cumsum(0) - lengths
        return states[first[rows] + prompts[rows] + tokens - 1]
    columns = (start[:, None] + torch.arange(int(lengths.max()), device=ids.device)).clamp(max=ids.shape[1] - 1)
    states = model(ids.gather(1, columns))
    return states[rows, prompts[rows] + tokens - 1]


@torch.no_grad()
def completion_scores(
    model: StatesModel,
    sequences: Sequences,
    *,
    temperature: float,
    token_budget: int,
    autocast: Autocast,
    entropy: bool = False,
    topk: int = 0,
) -> Scores:
    """Log-probability of every completion token under softmax(logits / temperature), and what else is asked for.

    Rows are scored in batches of like length under `token_budget`; the result is in the rows' own order.
    """
    shape, device = sequences.completion_ids.shape, sequences.completion_ids.device
    k = min(topk, model.head.vocab_size)
    logprobs = torch.zeros(shape, device=device)
    entropies = torch.zeros(shape, device=device) if entropy else None
    ids = torch.zeros((*shape, k), dtype=torch.int64, device=device) if topk else None
    top = torch.zeros((*shape, k), device=device) if topk else None
    with evaluating(model), autocast():
        for rows, part in trimmed_batches(sequences, token_budget, packed=model.packs):
            projected = Projected(states=completion_states(model, part), head=model.head)
            tokens = part.completion_ids[part.completion_mask]
            found = fused_loss(projected, tokens, (), temperature=temperature, entropy=entropy, topk=topk)
            row, column = part.completion_mask.nonzero(as_tuple=True)
            place = rows[row], column
            logprobs[place] = found.logprobs.float()
            if entropies is not None and found.entropy is not None:
                entropies[place] = found.entropy.float()
            if ids is not None and top is not None and found.topk is not None:
                ids[place], top[place] = found.topk[0], found.topk[1].float()
    return Scores(logprobs=logprobs, entropy=entropies, topk_ids=ids, topk_logprobs=top)


@torch.no_grad()
def all_completion_states(
    model: StatesModel, sequences: Sequences, *, token_budget: int, autocast: Autocast
) -> tuple[Tensor, ...]:
    """Hidden states of the completion tokens of each row: one array [length, H] a row, in the rows' own order."""
    lengths = sequences.completion_mask.sum(dim=1).tolist()
    by_row: dict[int, Tensor] = {}
    with evaluating(model), autocast():
        for rows, part in trimmed_batches(sequences, token_budget, packed=model.packs):
            chosen = rows.tolist()
            pieces = completion_states(model, part).split([lengths[row] for row in chosen])
            by_row.update(zip(chosen, pieces, strict=True))
    return tuple(by_row[row] for row in range(len(lengths)))


def trimmed_batches(sequences: Sequences, token_budget: int, *, packed: bool) -> Iterator[tuple[Tensor, Trimmed]]:
    """(row numbers, those rows without common padding) in batches under a token budget."""
    prompts = sequences.prompt_mask.sum(dim=1).tolist()
    completions = sequences.completion_mask.sum(dim=1).tolist()
    lengths = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    for batch in budget_batches(lengths, token_budget, packed=packed):
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
