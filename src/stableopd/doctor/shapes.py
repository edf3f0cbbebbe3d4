"""What a model's configuration says of its size: parameters, widths, key-value cache, saved activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from stableopd.errors import ModelError

_CACHE_ROOM = 64
"""Columns by which the cache of rollouts grows at a time, as in `stableopd.rollout.cache`."""


class ModelShape:
    """Sizes of a model that is built without memory for its weights, so that every architecture counts exactly."""

    def __init__(self, config: Any, role: str = "model") -> None:
        """Raises: ModelError when no causal language model can be built from the configuration."""
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        try:
            with torch.device("meta"):
                self.model: nn.Module = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, ImportError, AttributeError, RuntimeError, TypeError) as error:
            raise ModelError(f"the size of the {role} cannot be told from its configuration: {error}") from error
        self._sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}

    @cached_property
    def num_parameters(self) -> int:
        """Tied weights count once."""
        return sum(self._sizes.values())

    @cached_property
    def num_tensors(self) -> int:
        return len(self._sizes)

    @cached_property
    def num_linear(self) -> int:
        """Parameters of linear maps but the head: what autocast narrows and quantisation shrinks."""
        return self.num_parameters - self.num_outside

    @cached_property
    def num_outside(self) -> int:
        """Embedding, head and whatever has one dimension."""
        ends = {id(layer.weight): layer.weight.numel() for layer in self._ends()}
        flat = sum(p.numel() for p in self.model.parameters() if p.dim() < 2 and id(p) not in ends)
        return sum(ends.values()) + flat

    @cached_property
    def num_multiplied(self) -> float:
        """Parameters that a token is multiplied with: an untied embedding is not, idle experts are not."""
        looked_up = 0 if self.is_tied or self._head is None else self._embedding.weight.numel()
        experts = sum(size for name, size in self._sizes.items() if ".experts." in name)
        return self.num_parameters - looked_up - experts * (1 - self._active_share)

    @cached_property
    def is_tied(self) -> bool:
        return self._head is not None and self._head.weight is self._embedding.weight

    @property
    def head_elements(self) -> int:
        return self.vocab_size * self.hidden

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def num_heads(self) -> int:
        return int(getattr(self.config, "num_attention_heads", None) or 1)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden // self.num_heads)

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads) * self.head_dim

    @cached_property
    def normalises_queries(self) -> bool:
        """Norms of queries and keys; their weights, in float32, make the keys float32 under autocast."""
        return any("q_norm" in name or "q_layernorm" in name for name in self._sizes)

    @cached_property
    def is_gated(self) -> bool:
        return any("gate_proj" in name or "gate_up_proj" in name for name in self._sizes)

    @property
    def intermediate(self) -> int:
        """Width of what one token activates between the maps of an MLP."""
        experts = getattr(self.config, "num_experts_per_tok", None)
        width = getattr(self.config, "intermediate_size", None) or getattr(self.config, "n_inner", None)
        if experts and self._num_experts:
            width = experts * (getattr(self.config, "moe_intermediate_size", None) or width or 4 * self.hidden)
        return int(width or 4 * self.hidden)

    def cache_bytes(self, rows: int, prompt: int, completion: int, *, bf16: bool, weight_bytes: int) -> int:
        """Of the key-value cache when the last of `completion` tokens is drawn.

        Args: `bf16` whether arithmetic is bfloat16 over weights of `weight_bytes` bytes each.
        """
        width = cache_width(prompt, completion)
        value = min(2, weight_bytes) if bf16 else weight_bytes
        key = weight_bytes if self.normalises_queries else value
        return sum(rows * columns * self.kv_width * (key + value) for columns in self._columns(width))

    def token_cache_bytes(self, *, bf16: bool, weight_bytes: int) -> float:
        """Of one token in all layers."""
        value = min(2, weight_bytes) if bf16 else weight_bytes
        key = weight_bytes if self.normalises_queries else value
        return self.num_layers * self.kv_width * (key + value)

    def _columns(self, width: int) -> list[int]:
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * self.num_layers
        return [min(width, window) if kind == "sliding_attention" and window else width for kind in kinds]

    def layer_bytes(self, row_length: int, *, bf16: bool, weight_bytes: int, eager: bool) -> float:
        """What one layer keeps for its backward pass, per token of a sequence of `row_length` tokens."""
        wide = weight_bytes
        narrow = min(2, wide) if bf16 else wide
        queries = 2 * self.query_width + 2 * self.kv_width
        normed = 2 * (self.query_width + self.kv_width) if self.normalises_queries else 0
        between = (4 if self.is_gated else 3) * self.intermediate
        around = 6 * self.hidden * wide
        if narrow < wide:  # each linear map gets a narrow copy of its input
            around += 5 * self.hidden * narrow
        scores = self.num_heads * row_length * (4 + narrow) if eager else 0
        return around + normed * wide + (queries + between) * narrow + scores

    @cached_property
    def _head(self) -> Any:
        model: Any = self.model
        return model.get_output_embeddings()

    @cached_property
    def _embedding(self) -> Any:
        model: Any = self.model
        return model.get_input_embeddings()

    def _ends(self) -> list[Any]:
        return [layer for layer in (self._embedding, self._head) if layer is not None]

    @property
    def _num_experts(self) -> int:
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return int(next((value for name in names if (value := getattr(self.config, name, None))), 0))

    @property
    def _active_share(self) -> float:
        active = getattr(self.config, "num_experts_per_tok", None)
        return min(1.0, active / self._num_experts) if active and self._num_experts else 1.0


def cache_width(prompt: int, completion: int) -> int:
    """Columns of the cache when the last of `completion` tokens is drawn, which itself is not in it."""
    room, last = prompt + _CACHE_ROOM, prompt + max(completion, 1) - 1
    while room < last:
        room += 1 + _CACHE_ROOM
    return room


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """Sizes of the trained parameters of a student."""

    num_trained: int
    num_tensors: int


def trained(shape: ModelShape, lora: Any) -> Adapters:
    """What is trained: everything, or the adapters of `lora`. Raises: MissingDependencyError without peft."""
    if lora is None:
        return Adapters(num_trained=shape.num_parameters, num_tensors=shape.num_tensors)
    from stableopd.models import lora_config, with_adapters

    with torch.device("meta"):
        adapted = with_adapters(shape.model, lora_config(lora), seed=0)
    sizes = [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]
    return Adapters(num_trained=sum(sizes), num_tensors=len(sizes))
