"""The model that is asked: found, loaded once for all benchmarks, and told apart from every other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.benchmarking.cache import key_of
from stableopd.benchmarking.results import EvalSettings
from stableopd.checkpoint import checkpoint_path, checkpoint_steps
from stableopd.config import ModelConfig
from stableopd.errors import ConfigError, ModelError
from stableopd.models import context_length, digest_of_weights, load_model, load_tokenizer
from stableopd.vocabulary import end_token_ids

_UNRELATED = frozenset({"_name_or_path", "transformers_version", "architectures", "use_cache"})
"""Keys of a configuration that no answer depends on."""
_UNRELATED_IN_ADAPTERS = frozenset(
    {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "lora_dropout"}
)
"""Keys of peft's configuration that no answer depends on: the base tells itself by its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model, ready to be asked."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    weights_digest: str
    ends: frozenset[int]
    """Ids that end an answer."""

    @property
    def context(self) -> int | None:
        return context_length(self.model.config)

    def key(self) -> str:
        """A short name for what its answers depend on beside the weights: configuration, ends, vocabulary."""
        config: dict[str, Any] = self.model.config.to_dict()  # type: ignore[union-attr, operator]
        parts: dict[str, Any] = {
            "config": {key: repr(value) for key, value in config.items() if key not in _UNRELATED},
            "ends": sorted(self.ends),
            "vocabulary": self.tokenizer.get_vocab(),
        }
        adapters = getattr(self.model, "peft_config", None)
        if adapters:
            parts["adapters"] = {name: _of_adapters(settings.to_dict()) for name, settings in adapters.items()}
        return key_of(parts)


def _of_adapters(config: dict[str, Any]) -> dict[str, str]:
    """Scale, rank and places of adapters, which their weights do not tell; sets in one order in all processes."""
    return {
        key: repr(sorted(value, key=str) if isinstance(value, set) else value)
        for key, value in config.items()
        if key not in _UNRELATED_IN_ADAPTERS
    }


def load_subject(settings: EvalSettings) -> Subject:
    """The model of these settings, on its device. Raises: ModelError or ConfigError when it cannot be had."""
    source = ModelConfig(
        model_name_or_path=resolve_model(settings.model), revision=settings.revision, dtype=settings.dtype
    )
    tokenizer = load_tokenizer(source, "model")
    model = load_model(source, "model").eval()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return Subject(
        model=model,
        tokenizer=tokenizer,
        weights_digest=digest_of_weights(model),
        ends=end_token_ids(tokenizer, getattr(model, "generation_config", None)) | {*settings.stop_token_ids},
    )


def resolve_model(name: str) -> str:
    """The folder or hub id to load: of a run folder its newest checkpoint, of anything else itself.

    Raises: ModelError for a run folder without checkpoints.
    """
    folder = Path(name)
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or (folder / "config.json").exists():
        return name
    steps = checkpoint_steps(checkpoints)
    if not steps:
        raise ModelError(f"{name} is a run folder without checkpoints; there is no model in it yet")
    return str(checkpoint_path(checkpoints, max(steps)))
