"""Rollouts with a Hugging Face model inside the training process: a decode loop that drops finished rows.

The weights are the student's own, so nothing has to be copied to an engine. Lengths of completions are
heavy-tailed: most rows of a batch end early, and a loop that goes on computing them wastes most of
its work. Here finished rows leave the batch and its key-value cache, a prompt is read once however
many completions it gets, and the cache is written in place instead of copied for every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from stableopd.errors import ModelError
from stableopd.heads import evaluating
from stableopd.protocols import OnFinished
from stableopd.rollout.cache import growing_cache, select_rows
from stableopd.rollout.draws import Uniforms, draw_tokens
from stableopd.rollout.loops import LoopWatch
from stableopd.scoring import Autocast
from stableopd.tokens import pad_left, position_ids
from stableopd.types import Example, FinishedRollout, FinishReason, RolloutBatch, Sampling


class HFEngine:
    """Draws completions from a Hugging Face causal language model (`RolloutEngine`).

    Args:
        model: the student itself, unwrapped; its weights are read in place.
        end_token_ids: every id that ends a completion. Empty: all completions run to their budget.
        pad_token_id: fills the padding; may be an end token, as masks come from lengths.
        vocab_size: ids from here on are padding of the embedding and are never drawn. None: all ids are real.
        max_batch_size: rows decoded at a time; bounds the memory of cache and logits.
        compact_below: finished rows leave the batch when the fraction still alive is at most this. In [0, 1];
            0 never drops a row, 1 drops each at once.
        autocast: makes the context manager around forward passes, such as `torch.autocast` with its arguments bound.
        on_tokens: called after each decoded token position with the number of completion tokens it added.

    Raises:
        ModelError: no end token lies in the vocabulary, the model cannot use a `DynamicCache`, or its
            logits are not finite.

    Holds: a completion depends on the weights and on (seed, step, example.index, number of the
        generation), not on the other rows, their order, `max_batch_size` or `compact_below` (up to
        rounding of the forward pass). The model's modes are as before afterwards.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        end_token_ids: Collection[int],
        pad_token_id: int,
        vocab_size: int | None = None,
        max_batch_size: int = 256,
        compact_below: float = 0.75,
        autocast: Autocast = nullcontext,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}.")
        if not 0 <= compact_below <= 1:
            raise ValueError(f"compact_below is a fraction of rows and must be in [0, 1], got {compact_below}.")
        self.end_token_ids = frozenset(end_token_ids)
        self.pad_token_id = pad_token_id
        self.vocab_size = vocab_size
        self.max_batch_size = max_batch_size
        self.compact_below = compact_below
        self.autocast = autocast
        self.on_tokens = on_tokens
        self.sync_weights(model, policy_version=0)

    def sync_weights(self, student: nn.Module, policy_version: int) -> None:
        """Decode with `student` from now on; its weights are shared, so only the version is noted."""
        self.model = student
        self.policy_version = policy_version
        self._accepted = _named_arguments(student)

    def generate(
        self, examples: Sequence[Example], sampling: Sampling, *, step: int, on_finished: OnFinished | None = None
    ) -> RolloutBatch:
        """`sampling.num_generations` completions for each example, grouped by example, in the order asked for.

        Returns: log-probabilities [B, T] in nats under softmax(logits / temperature) over the whole
            vocabulary, before top-p and top-k; `stop` for rows that drew an end token, `loop` for those ended
            in one (`sampling.stop_loops_after`), else `length`.

        Raises:
            ValueError: no examples, an empty prompt, or an impossible `sampling`.
            ModelError: see the class.
        """
        _check_request(examples, sampling)
        rows = [
            _Row(prompt, example.prompt_ids, (sampling.seed, step, example.index, generation))
            for prompt, example in enumerate(examples)
            for generation in range(sampling.num_generations)
        ]
        by_length = sorted(range(len(rows)), key=lambda row: len(rows[row].prompt_ids))
        starts = range(0, len(rows), self.max_batch_size)
        chunks = [by_length[start : start + self.max_batch_size] for start in starts]
        with torch.no_grad(), evaluating(self.model), self.autocast():
            pieces = [self._decode([rows[row] for row in chunk], sampling) for chunk in chunks]
        batch = _assemble(rows, chunks, pieces, self.pad_token_id, self.policy_version)
        for row, completion in zip(rows, batch.completions(), strict=True):
            if on_finished:
                teacher = examples[row.prompt].teacher
                on_finished(
                    FinishedRollout(prompt_ids=row.prompt_ids, completion_ids=tuple(completion), teacher=teacher)
                )
        return replace(batch, teachers=_teachers(examples, batch.prompt_index))

    def _decode(self, rows: list[_Row], sampling: Sampling) -> _Completions:
        batch, logits = self._prefill(rows, sampling)
        ends = self._end_table(logits)
        done = _Completions.empty(len(rows), sampling.max_new_tokens, logits.device)
        num_alive = len(rows)
        for column in range(sampling.max_new_tokens):
            token, logprob = draw_tokens(logits, sampling, batch.next_uniforms())
            done.record(batch, column, token, logprob)
            if self.on_tokens:
                self.on_tokens(num_alive)
            batch.alive &= ~ends[token]
            if batch.loops:
                done.looped[batch.slots] |= batch.alive & batch.loops.push(done.ids[:, : column + 1], batch.slots)
                batch.alive &= ~done.looped[batch.slots]
            num_alive = int(batch.alive.sum())
            if num_alive == 0 or column + 1 == sampling.max_new_tokens:
                break
            if num_alive < len(token) and num_alive <= self.compact_below * len(token):
                kept = batch.alive.nonzero().squeeze(1)
                batch.keep(kept)
                token = token[kept]
            logits = self._logits(token[:, None], batch.advance(), positions=batch.position, cache=batch.cache)
        done.stopped[batch.slots] = ~batch.alive
        done.stopped &= ~done.looped
        return done.trimmed()

    def _prefill(self, rows: list[_Row], sampling: Sampling) -> tuple[_Batch, Tensor]:
        """Reads each distinct prompt once; returns the batch of all rows, and logits [b, V] for their first token."""
        device = next(self.model.parameters()).device
        prompts = {row.prompt: row.prompt_ids for row in rows}
        ids, mask = pad_left(list(prompts.values()), self.pad_token_id, device)
        padded = any(len(prompt) < ids.shape[1] for prompt in prompts.values())
        cache = growing_cache(self.model)
        logits = self._logits(ids, mask if padded else None, positions=position_ids(mask), cache=cache)

        place = {prompt: at for at, prompt in enumerate(prompts)}
        source = torch.tensor([place[row.prompt] for row in rows], device=device)
        if len(prompts) < len(rows):
            select_rows(cache, source)
        batch = _Batch(
            cache=cache,
            width=ids.shape[1],
            position=position_ids(mask)[source, -1:],
            mask=F.pad(mask, (0, sampling.max_new_tokens), value=True)[source] if padded else None,
            slots=torch.arange(len(rows), device=device),
            alive=torch.ones(len(rows), dtype=torch.bool, device=device),
            uniforms=Uniforms([row.key for row in rows], device) if sampling.temperature else None,
            loops=_loop_watch(len(rows), sampling, device),
        )
        return batch, logits[source]

    def _logits(self, ids: Tensor, mask: Tensor | None, *, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [b, V] after the last column of `ids`, whose keys and values are added to the cache."""
        optional = {"position_ids": positions, "logits_to_keep": 1}
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask,
            **{"cache" if "cache" in self._accepted else "past_key_values": cache},
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepted},
        )
        if getattr(outputs, "past_key_values", None) is not cache:
            raise ModelError(
                f"{type(self.model).__name__} does not decode with the DynamicCache it is given, as it keeps its state "
                "elsewhere or adds a prefix of its own. Use another rollout engine, such as vllm, for this model."
            )
        logits: Tensor = outputs.logits[:, -1, : self.vocab_size]
        return logits

    def _end_table(self, logits: Tensor) -> Tensor:
        """[V] bool: is this id an end token?"""
        size = logits.shape[-1]
        ends = [end for end in self.end_token_ids if 0 <= end < size]
        if self.end_token_ids and not ends:
            raise ModelError(
                f"None of the end tokens {sorted(self.end_token_ids)} lies in the vocabulary of {size} ids, so no "
                "completion could ever stop. Check that model and tokenizer belong together."
            )
        table = torch.zeros(size, dtype=torch.bool, device=logits.device)
        table[ends] = True
        return table


class _Row(NamedTuple):
    """One completion to draw."""

    prompt: int
    """Position of its example in the request."""
    prompt_ids: tuple[int, ...]
    key: tuple[int, int, int, int]
    """(seed, step, example.index, generation): names the row's stream of random numbers."""


@dataclass(kw_only=True, slots=True)
class _Batch:
    """The rows under decoding; b shrinks as they finish."""

    cache: DynamicCache
    width: int
    """Columns in the cache, the padding of prompts included."""
    position: Tensor
    """[b, 1] int64: position of the newest token, padding not counted."""
    mask: Tensor | None
    """[b, P + max_new_tokens] bool, False on padding; None where no prompt is padded."""
    slots: Tensor
    """[b] int64: where the row's completion is recorded."""
    alive: Tensor
    """[b] bool: has not drawn an end token."""
    uniforms: Uniforms | None
    loops: LoopWatch | None

    def next_uniforms(self) -> Tensor | None:
        return self.uniforms.next() if self.uniforms else None

    def advance(self) -> Tensor | None:
        """Makes place for one more token; returns the attention mask [b, width] with it."""
        self.position = self.position + 1
        self.width += 1
        return None if self.mask is None else self.mask[:, : self.width]

    def keep(self, kept: Tensor) -> None:
        """Drops all rows but `kept` [b'], from the cache too."""
        select_rows(self.cache, kept)
        self.position = self.position[kept]
        self.mask = None if self.mask is None else self.mask[kept]
        self.slots = self.slots[kept]
        self.alive = self.alive[kept]
        if self.uniforms:
            self.uniforms.keep(kept)
        if self.loops:
            self.loops.keep(kept)


@dataclass(kw_only=True, slots=True)
class _Completions:
    """What the rows of one chunk have drawn. Beyond a row's length its columns are arbitrary."""

    ids: Tensor
    """[b, T] int64."""
    logprobs: Tensor
    """[b, T] float32, nats."""
    lengths: Tensor
    """[b] int64, the end token included."""
    stopped: Tensor
    """[b] bool: drew an end token."""
    looped: Tensor
    """[b] bool: was ended in a loop."""

    @classmethod
    def empty(cls, num_rows: int, max_new_tokens: int, device: torch.device) -> _Completions:
        return cls(
            ids=torch.zeros(num_rows, max_new_tokens, dtype=torch.int64, device=device),
            logprobs=torch.zeros(num_rows, max_new_tokens, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.int64, device=device),
            stopped=torch.ones(num_rows, dtype=torch.bool, device=device),
            looped=torch.zeros(num_rows, dtype=torch.bool, device=device),
        )

    def record(self, batch: _Batch, column: int, token: Tensor, logprob: Tensor) -> None:
        self.ids[batch.slots, column] = token
        self.logprobs[batch.slots, column] = logprob
        self.lengths[batch.slots] += batch.alive

    def trimmed(self) -> _Completions:
        longest = int(self.lengths.max())
        return _Completions(
            ids=self.ids[:, :longest],
            logprobs=self.logprobs[:, :longest],
            lengths=self.lengths,
            stopped=self.stopped,
            looped=self.looped,
        )


def _teachers(examples: Sequence[Example], prompt_index: Sequence[int]) -> tuple[str | None, ...]:
    names = tuple(examples[prompt].teacher for prompt in prompt_index)
    return names if any(names) else ()


def _loop_watch(num_rows: int, sampling: Sampling, device: torch.device) -> LoopWatch | None:
    repeats = sampling.stop_loops_after
    return LoopWatch(num_rows, repeats, sampling.max_new_tokens, device) if repeats else None


def _assemble(
    rows: list[_Row], chunks: list[list[int]], pieces: list[_Completions], pad_id: int, policy_version: int
) -> RolloutBatch:
    """One batch in the order of `rows` from pieces whose rows are those named in `chunks`."""
    device = pieces[0].ids.device
    width = max(piece.ids.shape[1] for piece in pieces)
    ids = torch.full((len(rows), width), pad_id, device=device)
    logprobs = torch.zeros(len(rows), width, device=device)
    lengths = torch.zeros(len(rows), dtype=torch.int64, device=device)
    stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
    looped = torch.zeros_like(stopped)
    for chunk, piece in zip(chunks, pieces, strict=True):
        index = torch.tensor(chunk, device=device)
        ids[index, : piece.ids.shape[1]] = piece.ids
        logprobs[index, : piece.ids.shape[1]] = piece.logprobs
        lengths[index] = piece.lengths
        stopped[index] = piece.stopped
        looped[index] = piece.looped
    prompt_ids, prompt_mask = pad_left([row.prompt_ids for row in rows], pad_id, device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    finish_reason: list[FinishReason] = [
        "stop" if stop else "loop" if loop else "length"
        for stop, loop in zip(stopped.tolist(), looped.tolist(), strict=True)
    ]
    return RolloutBatch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=ids.where(mask, pad_id),
        completion_mask=mask,
        sampling_logprobs=_require_finite(logprobs.where(mask, 0.0)),
        finish_reason=tuple(finish_reason),
        prompt_index=tuple(row.prompt for row in rows),
        policy_version=policy_version,
    )


def _require_finite(logprobs: Tensor) -> Tensor:
    if not bool(logprobs.isfinite().all()):
        raise ModelError(
            "The student's logits are not finite (NaN or infinity), so nothing can be drawn from them. Its weights "
            "have probably diverged: go back to an earlier checkpoint, with a lower learning rate or a wider dtype."
        )
    return logprobs


def _check_request(examples: Sequence[Example], sampling: Sampling) -> None:
    if not examples:
        raise ValueError("There are no examples to generate from.")
    for example in examples:
        if example.index < 0:
            raise ValueError(f"Example {example.index}: the index names the random numbers and must not be negative.")
        if not example.prompt_ids:
            raise ValueError(f"The prompt of example {example.index} has no tokens. Generation needs at least one.")
    if sampling.max_new_tokens < 1 or sampling.num_generations < 1:
        raise ValueError(f"max_new_tokens and num_generations must be at least 1: {sampling}.")
    if sampling.stop_loops_after is not None and sampling.stop_loops_after < 2:
        raise ValueError(f"stop_loops_after counts repeats and must be at least 2, got {sampling.stop_loops_after}.")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise ValueError(f"temperature and top_k must be 0 or more, and top_p in (0, 1]: {sampling}.")


def _named_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the model's forward pass; of the base model's where an adapter wraps it."""
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    return frozenset(inspect.signature(base.forward).parameters)
