"""From a model's last hidden states to its logits: the projection that the fused losses take apart.

Most causal language models end in one linear map over the vocabulary, perhaps scaled and soft-capped. Where that
is so, and a probe has shown it, losses are computed from hidden states and no [tokens, vocabulary] array outlives a
chunk. Any other model is asked for its logits, and those take the place of hidden states under an `IdentityHead`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopd.attention import PACKED_SDPA, Windows, packed_inputs, packing

_PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearHead:
    """logits = softcap · tanh(scale · (h Wᵀ + bias) / softcap), cut to the ids that a tokenizer knows.

    Ids from `vocab_size` on are padding of the embedding: no tokenizer produces them, so they get no
    probability, in the student as in the teacher, and no gradient.
    """

    weight: Tensor
    """[rows, H]; a tied head is the embedding itself."""
    vocab_size: int
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.vocab_size > self.weight.shape[0]:
            raise ValueError(
                f"the head has {self.weight.shape[0]} rows, fewer than the {self.vocab_size} ids asked for"
            )

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def logits(self, states: Tensor) -> Tensor:
        """[n, H] -> [n, vocab_size], by plain operations that autograd follows."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        logits = nn.functional.linear(states, self.weight[: self.vocab_size], bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityHead:
    """The "hidden states" are the logits [n, V] already: for models whose head is not a linear map."""

    vocab_size: int

    def parameters(self) -> tuple[Tensor, ...]:
        return ()

    def logits(self, states: Tensor) -> Tensor:
        return states[..., : self.vocab_size]


Head = LinearHead | IdentityHead


class HeadlessModel(nn.Module):
    """A causal language model seen as a backbone that gives states and a head over the vocabulary.

    The head is looked up anew at every use, so that moving or casting the model is no matter. Parameters are
    those of the model itself. Where the model's attention allows it, shown by a probe, sequences can be `packed`;
    for that a model that runs PyTorch's attention is given one that does the same and packs as well.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        with evaluating(model), torch.no_grad():
            spread = len({parameter.device for parameter in model.parameters()}) > 1  # a head on another device
            self._linear = not spread and _has_linear_head(model, vocab_size)
            self.packs = not spread and self._learn_to_pack()
        """Whether sequences can be handed over one after another, without padding."""

    @property
    def head(self) -> Head:
        head = _linear_head(self.model, self.vocab_size) if self._linear else None
        return head or IdentityHead(vocab_size=self.vocab_size)

    def forward(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """States [B, L, H] that `head` turns into the logits of the next token at each position.

        Args: with `lengths`, `input_ids` is one row [1, N] of packed sequences of these lengths.
        """
        return self._states(input_ids) if lengths is None else self._packed(input_ids, lengths)[0]

    def _packed(self, input_ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Windows]:
        flash = self._attention != PACKED_SDPA
        with packing() as windows:
            return self._states(input_ids, **packed_inputs(lengths, input_ids.device, flash=flash)), windows

    def _states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        if self._linear:
            states: Tensor = _backbone(self.model)(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
            return states
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **inputs).logits
        return logits.to(input_ids.device)

    @property
    def _attention(self) -> str:
        return str(getattr(self.model.config, "_attn_implementation", None))

    def _learn_to_pack(self) -> bool:
        model: Any = self.model
        if not _tokens_meet_in_attention_alone(model):
            return False
        before = self._attention
        if before == "sdpa" and model._can_set_attn_implementation():
            model.set_attn_implementation(PACKED_SDPA)
        if self._attention == PACKED_SDPA or "flash" in before:
            if self._keeps_packed_sequences_apart():
                return True
            if self._attention != before:
                model.set_attn_implementation(before)
        return False

    def _keeps_packed_sequences_apart(self) -> bool:
        """Whether packed sequences get the states that each gets by itself, tried on two.

        The two are shorter than most windows, so that a window that masks alone would apply is looked for as such.
        """
        device = next(self.model.parameters()).device
        ids = torch.arange(_PROBE_TOKENS + 5, device=device).remainder(self.vocab_size)[None]
        lengths = [_PROBE_TOKENS, 5]
        try:
            packed, windows = self._packed(ids, lengths)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):  # an attention that knows no packing
            return False
        if windows.masked - windows.applied:
            return False
        alone = torch.cat([self(part) for part in ids.split(lengths, dim=1)], dim=1)
        tolerance = 1e-4 if packed.dtype in (torch.float32, torch.float64) else 2e-2
        return packed.shape == alone.shape and bool((packed - alone).norm() <= tolerance * alone.norm())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every submodule in evaluation mode for a while, then each back in its own.

    Evaluation mode means no dropout, and no gradient checkpointing, which would switch off the key-value cache.
    """
    modules: list[nn.Module] = list(model.modules())
    modes = [(module, module.training) for module in modules]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tokens_meet_in_attention_alone(model: Any) -> bool:
    """Not in convolutions or recurrent states, which know no bounds of sequences."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    attention_alone = kinds <= {"full_attention", "sliding_attention"}
    return attention_alone and not any(isinstance(module, nn.Conv1d) for module in model.modules())


def _backbone(model: Any) -> Any:
    return model.base_model


def _linear_head(model: Any, vocab_size: int) -> LinearHead | None:
    """The head as its module and the model's configuration describe it; None where it is no plain linear map."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:  # also a head with adapters, whose weight alone is not the whole map
        return None
    config = model.config.get_text_config()
    scale = _first(config, "logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = _first(config, "logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return LinearHead(
        weight=layer.weight,
        bias=layer.bias,
        vocab_size=vocab_size,
        scale=1.0 if scale is None else float(scale),
        softcap=_first(config, "final_logit_softcapping", "logits_soft_cap"),
    )


def _first(config: Any, *names: str) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _has_linear_head(model: Any, vocab_size: int) -> bool:
    """Whether backbone and linear head together give the model's own logits, tried on a few tokens."""
    head = _linear_head(model, vocab_size)
    if head is None or _backbone(model) is model:
        return False
    ids = torch.arange(_PROBE_TOKENS, device=head.weight.device).remainder(vocab_size)[None]
    states = getattr(_backbone(model)(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if states is None or states.shape[-1] != head.weight.shape[1]:
        return False
    expected = model(input_ids=ids, use_cache=False).logits[..., :vocab_size].float()
    found = head.logits(states).float()
    tolerance = 1e-4 if states.dtype in (torch.float32, torch.float64) else 2e-2
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())
