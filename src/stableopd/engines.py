"""The rollout engine that a configuration names, built and checked."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.checkpoint import save_model
from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError
from stableopd.models import computing_module, context_length, frozen_copy
from stableopd.protocols import RolloutEngine
from stableopd.rollout.hf import HFEngine
from stableopd.rollout.requests import Backend, padding_ids
from stableopd.rollout.snapshot import SnapshotEngine
from stableopd.rollout.vllm import VllmEngine
from stableopd.rollout.vllm_colocated import ColocatedBackend
from stableopd.rollout.vllm_server import ServerBackend
from stableopd.rollout.weight_sync import plain_weights
from stableopd.scoring import Autocast
from stableopd.types import Example, Sampling
from stableopd.vocabulary import pad_token_id, vocab_size

_TRIAL_TOKENS = 16
_CHECKED_TOKENS = 64
"""Length to which sequences are cut that engine and trainer compare."""


def make_engine(
    student: nn.Module,
    config: StableOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int],
    examples: Sequence[Example],
    autocast: Autocast,
) -> RolloutEngine:
    """Raises: ConfigError, EngineError or MissingDependencyError when there can be no such engine."""
    if config.rollout.engine == "vllm":
        return _vllm_engine(student, config, tokenizer, end_ids, examples, autocast)
    model = computing_module(student)

    def hf_engine(model: nn.Module) -> HFEngine:
        return HFEngine(
            model=model,
            end_token_ids=end_ids,
            pad_token_id=pad_token_id(tokenizer),
            vocab_size=vocab_size(tokenizer),
            max_batch_size=config.rollout.max_batch_size,
            autocast=autocast,
            tokenizer=tokenizer,
        )

    # An engine that goes on during an update has weights of its own.
    return SnapshotEngine(hf_engine, frozen_copy(model)) if config.rollout.pipeline else hf_engine(model)


def _vllm_engine(
    student: nn.Module,
    config: StableOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int],
    examples: Sequence[Example],
    autocast: Autocast,
) -> VllmEngine:
    rollout = config.rollout
    _check_adapters(student)
    raw = rollout.is_cut  # the temperature is 1 then
    sequences = checked_sequences(examples, rollout.vllm.sync_check_rollouts)
    if not sequences and rollout.vllm.sync_check_rollouts:
        raise ConfigError(
            "no prompt has two tokens or more, so that vLLM's weights cannot be compared with the student's; use "
            "rollout.engine=hf"
        )
    model = computing_module(student)
    backend = _backend(student, config, tokenizer, end_ids, raw_logprobs=raw)
    if rollout.vllm.mode == "server":  # whatever it was started with, or another run left in it
        backend.load_weights(plain_weights(model))
    return VllmEngine(
        backend,
        model,
        pad_token_id=pad_token_id(tokenizer),
        vocab_size=vocab_size(tokenizer),
        sequences=sequences,
        tolerance=rollout.vllm.sync_tolerance,
        raw_logprobs=raw,
        trial=Sampling(
            max_new_tokens=min(_TRIAL_TOKENS, rollout.max_completion_length),
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        ),
        autocast=autocast,
    )


def _check_adapters(student: nn.Module) -> None:
    """Raises: ConfigError for adapters that are more than a low-rank sum, which a sync does not carry over."""
    settings = getattr(student, "peft_config", None)
    for adapter in settings.values() if isinstance(settings, dict) else ():
        if getattr(adapter, "use_dora", False) or getattr(adapter, "modules_to_save", None):
            raise ConfigError(
                "rollout.engine=vllm takes plain LoRA adapters, not use_dora or modules_to_save; leave them out, or "
                "use rollout.engine=hf"
            )


def _backend(
    student: nn.Module,
    config: StableOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int],
    *,
    raw_logprobs: bool,
) -> Backend:
    settings = config.rollout.vllm
    num_rows = int(computing_module(student).get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    banned = list(padding_ids(vocab_size(tokenizer), num_rows))

    def save(folder: Path) -> None:
        save_model(student, tokenizer, folder, merge_adapters=True)

    if settings.mode == "server":
        assert settings.server_url is not None
        return ServerBackend(
            settings.server_url,
            api_key_env=settings.api_key_env,
            timeout_s=settings.timeout_s,
            sync_dir=Path(settings.sync_dir or tempfile.mkdtemp(prefix="stableopd-vllm-")),
            save=save,
            stop_ids=sorted(end_ids),
            banned=banned,
        )
    return ColocatedBackend(
        save,
        settings,
        dtype=settings.dtype if settings.dtype != "auto" else ("bfloat16" if config.optimizer.bf16 else "float32"),
        max_model_len=settings.max_model_len or _longest(student, config),
        max_num_seqs=config.rollout.max_batch_size,
        raw_logprobs=raw_logprobs,
        stop_ids=sorted(end_ids),
        banned=banned,
    )


def _longest(student: nn.Module, config: StableOPDConfig) -> int:
    """Longest prompt and completion together that the run may ask for."""
    context = context_length(computing_module(student).config)
    longest = max(config.rollout.max_completion_length, config.eval_max_completion_length)
    if config.data.max_prompt_length is not None:
        asked = config.data.max_prompt_length + longest
        return asked if context is None else min(context, asked)
    if context is None:
        raise ConfigError(
            "the student's context is not known; set rollout.vllm.max_model_len or data.max_prompt_length"
        )
    return context


def checked_sequences(examples: Sequence[Example], number: int) -> list[tuple[int, ...]]:
    """Ends of a few prompts with the beginnings of their gold, on which engine and trainer are compared.

    Prompts from all over the data, as neighbours may share most of their text.
    """
    if not number:
        return []
    chosen = examples[:: max(1, len(examples) // number)][:number]
    half = _CHECKED_TOKENS // 2
    found = [(*example.prompt_ids[-half:], *(example.gold_ids or ())[:half]) for example in chosen]
    return [sequence for sequence in found if len(sequence) > 1]
