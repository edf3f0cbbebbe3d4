"""Rollouts with a Hugging Face model inside the training process: a decode loop that refills its slots.

The weights are the student's own, so nothing has to be copied to an engine. Lengths of completions are
heavy-tailed: most rows of a batch end early, and a loop that goes on computing them wastes most of
its work. Here finished rows leave the batch and its key-value cache and waiting ones take their slots, a prompt is
read once however many completions it gets, and the cache is written in place instead of copied for every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from stableopd.errors import ModelError
from stableopd.heads import evaluating
from stableopd.protocols import OnFinished
from stableopd.rollout.cache import can_be_joined, growing_cache
from stableopd.rollout.drawn import Drawn
from stableopd.rollout.draws import Uniforms, draw_tokens
from stableopd.rollout.loops import LoopWatch
from stableopd.rollout.queue import Queue, request_rows
from stableopd.rollout.slots import Prompts, Slots, settled
from stableopd.rollout.stops import StopWatch
from stableopd.scoring import Autocast
from stableopd.tokens import pad_left, position_ids
from stableopd.types import Example, RolloutBatch, Sampling


class HFEngine:
    """Draws completions from a Hugging Face causal language model (`RolloutEngine`).

    Args:
        model: the student itself, unwrapped; its weights are read in place.
        end_token_ids: every id that ends a completion. Empty: all completions run to their budget.
        pad_token_id: fills the padding; may be an end token, as masks come from lengths.
        vocab_size: ids from here on are padding of the embedding and are never drawn. None: all ids are real.
        tokenizer: makes the text in which stop strings are looked for; needed for those alone.
        max_batch_size: rows decoded at a time; bounds the memory of cache and logits. With sliding windows or recurrent
            states waiting rows do not join those under way: they start when all of these have finished.
        compact_below: finished rows leave the batch, and waiting ones come in, when the fraction still alive is at
            most this. In [0, 1]; 0 waits until all have finished, 1 drops and refills at each one.
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
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_batch_size: int = 256,
        compact_below: float = 0.85,
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
        self.tokenizer = tokenizer
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
            vocabulary, before top-p and top-k; `stop` for rows that drew an end token or completed a stop string,
            `loop` for those ended in one (`sampling.stop_loops_after`), else `length`.

        Raises:
            ValueError: no examples, an empty prompt, an impossible `sampling`, or stop strings without a tokenizer.
            ModelError: see the class.
        """
        _check_request(examples, sampling, self.tokenizer)
        rows = request_rows(examples, sampling, step)
        ends = torch.tensor(sorted(self.end_token_ids), dtype=torch.int64, device=self._device)
        drawn = Drawn(rows, examples, sampling.max_new_tokens, ends, on_finished)
        with torch.no_grad(), evaluating(self.model), self.autocast():
            self._decode(Queue(rows), drawn, sampling)
        return drawn.batch(self.pad_token_id, self.policy_version)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _decode(self, queue: Queue, drawn: Drawn, sampling: Sampling) -> None:
        slots = self._refilled(None, queue, drawn, sampling)
        while slots is not None:
            logits = self._logits(slots.token[:, None], slots.mask(), positions=slots.positions(), cache=slots.cache)
            slots.width += 1
            self._draw(slots, logits, drawn, sampling)
            if slots.num_alive < len(slots) and slots.num_alive <= self.compact_below * len(slots):
                slots = self._refilled(slots, queue, drawn, sampling)

    def _refilled(self, slots: Slots | None, queue: Queue, drawn: Drawn, sampling: Sampling) -> Slots | None:
        """What is alive of `slots`, with rows of the queue in the free ones; None when nothing is left to do."""
        parts = [slots] if slots and slots.num_alive else []
        free = self.max_batch_size - sum(part.num_alive for part in parts)
        if parts and not can_be_joined(parts[0].cache):
            free = 0
        while queue.waiting and free:
            newcomers = self._started(queue, free, drawn, sampling)
            if newcomers.num_alive:
                parts.append(newcomers)
                break
        return settled(parts) if parts else None

    def _started(self, queue: Queue, free: int, drawn: Drawn, sampling: Sampling) -> Slots:
        """Up to `free` rows of the queue with their first tokens; each distinct prompt is read once."""
        rows = queue.take(free)
        known = queue.prompts
        unread = {row.prompt: row.prompt_ids for row in rows if known is None or row.prompt not in known.place}
        prompts = known
        if unread:
            read = self._read(unread)
            prompts = read if known is None else known.and_also(read)
        assert prompts is not None
        queue.keep_for_the_rest(prompts)
        keys = [row.key for row in rows]
        slots = Slots.starting(
            rows,
            prompts,
            uniforms=Uniforms(keys, self._device) if sampling.temperature else None,
            loops=_loop_watch(len(rows), sampling, self._device),
            stops=_stop_watch(len(rows), sampling, self.tokenizer),
        )
        self._draw(slots, prompts.logits[slots.place], drawn, sampling)
        return slots

    def _read(self, prompts: dict[int, tuple[int, ...]]) -> Prompts:
        """The prompts, in a cache, with logits [p, V] for their first tokens."""
        ids, mask = pad_left(list(prompts.values()), self.pad_token_id, self._device)
        padded = any(len(prompt) < ids.shape[1] for prompt in prompts.values())
        cache = growing_cache(self.model)
        logits = self._logits(ids, mask if padded else None, positions=position_ids(mask), cache=cache)
        self._check_ends(logits)
        return Prompts(
            cache=cache,
            width=ids.shape[1],
            start=ids.shape[1] - mask.sum(dim=1),
            logits=logits,
            place={prompt: at for at, prompt in enumerate(prompts)},
        )

    def _draw(self, slots: Slots, logits: Tensor, drawn: Drawn, sampling: Sampling) -> None:
        """Draws the next token of each row from logits [b, V], and sees which rows end with it."""
        token, logprob = draw_tokens(logits, sampling, slots.uniforms.next() if slots.uniforms else None)
        drawn.write(slots, token, logprob)
        if self.on_tokens:
            self.on_tokens(slots.num_alive)
        alive = slots.alive & ~drawn.is_end(token)
        if slots.stops:
            stopped = slots.stops.push(token, alive)
            drawn.mark_stopped(slots, stopped)
            alive = alive & ~stopped
        if slots.loops:
            looped = alive & slots.loops.push(drawn.ids[:, : slots.longest], slots.rows, slots.counts)
            drawn.mark_looped(slots, looped)
            alive = alive & ~looped
        alive = alive & (slots.counts < sampling.max_new_tokens)
        num_alive = int(alive.sum())  # the one time per token that a device is waited for
        if num_alive < slots.num_alive:
            drawn.close(slots, slots.alive & ~alive)
        slots.token, slots.alive, slots.num_alive = token, alive, num_alive

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
        returned = getattr(outputs, "cache", None)  # older transformers call it past_key_values
        if (returned if returned is not None else getattr(outputs, "past_key_values", None)) is not cache:
            raise ModelError(
                f"{type(self.model).__name__} does not decode with the DynamicCache it is given, as it keeps its state "
                "elsewhere or adds a prefix of its own. Use another rollout engine, such as vllm, for this model."
            )
        logits: Tensor = outputs.logits[:, -1, : self.vocab_size]
        return logits

    def _check_ends(self, logits: Tensor) -> None:
        size = logits.shape[-1]
        if self.end_token_ids and not any(0 <= end < size for end in self.end_token_ids):
            raise ModelError(
                f"None of the end tokens {sorted(self.end_token_ids)} lies in the vocabulary of {size} ids, so no "
                "completion could ever stop. Check that model and tokenizer belong together."
            )


def _loop_watch(num_rows: int, sampling: Sampling, device: torch.device) -> LoopWatch | None:
    repeats = sampling.stop_loops_after
    return LoopWatch(num_rows, repeats, sampling.max_new_tokens, device) if repeats else None


def _stop_watch(num_rows: int, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> StopWatch | None:
    if not sampling.stop_strings or tokenizer is None:
        return None
    return StopWatch(num_rows, sampling.stop_strings, tokenizer)


def _check_request(examples: Sequence[Example], sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> None:
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
    if "" in sampling.stop_strings:
        raise ValueError("One of the stop strings is empty. Every text holds it; leave it out.")
    if sampling.stop_strings and tokenizer is None:
        raise ValueError(
            f"The stop strings {list(sampling.stop_strings)} are looked for in the text of completions, and this "
            "engine has no tokenizer to make it with. Construct it with tokenizer=..., or leave stop_strings out."
        )


def _named_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the model's forward pass; of the base model's where an adapter wraps it."""
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    return frozenset(inspect.signature(base.forward).parameters)
