"""Loading students, teachers and tokenizers; the frozen reference; what a model's context allows."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig

from stableopd.config import LoraSettings, ModelConfig, TeacherConfig
from stableopd.errors import ConfigError, MissingDependencyError, ModelError
from stableopd.heads import Head, HeadlessModel, evaluating
from stableopd.names import is_a_path
from stableopd.scoring import StatesModel

_LOADING = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, StrictDataclassError)
"""What transformers raises for files of a model that are damaged or contradict each other."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load_model(config: ModelConfig, role: str) -> nn.Module:
    """A causal language model from a local folder or the hub; safetensors only, no code from the repository.

    Raises: ModelError when there is no such model or it cannot be loaded; `role` says which one it was.
    """
    name = _require_name(config, role)
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "revision": config.revision, "use_safetensors": True}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if isinstance(config, TeacherConfig):
        options |= _placement(config, role)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
    except (*_LOADING, RuntimeError, AssertionError, SafetensorError) as error:
        if "offload_folder" in str(error) or "offload_dir" in str(error):
            raise _does_not_fit(role, name) from error
        if config.attn_implementation and _is_about_attention(error, config.attn_implementation):
            raise ModelError(
                f"{role}.attn_implementation is {config.attn_implementation!r}, with which {name!r} cannot be loaded: "
                f"{_first_line(error)}\nLeave it out to get the model's own, or take eager, sdpa or an installed kernel"
            ) from error
        raise _cannot_load("model", role, name, error) from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise _does_not_fit(role, name)
    return model


def _does_not_fit(role: str, name: str) -> ModelError:
    return ModelError(
        f"{role}.device_map leaves parts of {name!r} outside the devices, to be fetched layer by layer at every pass. "
        f"Set {role}.offload=true (the whole model moves in for each scoring) or {role}.quantization, or serve it "
        f"elsewhere ({role}.server_url)"
    )


def _placement(config: TeacherConfig, role: str) -> dict[str, Any]:
    """Where a frozen model's layers go, and how they are compressed, as transformers takes it."""
    options: dict[str, Any] = {}
    if config.device_map is not None:
        options["device_map"] = config.device_map
    if config.quantization is not None:
        try:
            options["quantization_config"] = AutoQuantizationConfig.from_dict(dict(config.quantization))
        except (ValueError, TypeError, ImportError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"{role}.quantization is not what transformers takes as quantization_config: {_first_line(error)}. "
                "An example: {quant_method: bitsandbytes, load_in_8bit: true}"
            ) from error
    return options


def load_model_config(config: ModelConfig, role: str) -> Any:
    """The configuration of a model, without its weights. Raises: ModelError as `load_model`."""
    name = _require_name(config, role)
    try:
        return AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=False)
    except _LOADING as error:
        raise _cannot_load("model", role, name, error) from error


def load_tokenizer(config: ModelConfig, role: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    name = _require_name(config, role)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=config.revision, trust_remote_code=False
        )
    except (*_LOADING, RuntimeError) as error:
        raise _cannot_load("tokenizer", role, name, error) from error
    return tokenizer


def lora_config(settings: LoraSettings) -> Any:
    """The peft configuration of these settings. Raises: MissingDependencyError without peft."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise MissingDependencyError.of("peft", "student.lora", extra="lora") from None
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules
        if isinstance(settings.target_modules, str)
        else list(settings.target_modules),
        task_type="CAUSAL_LM",
    )


def check_is_whole(student: nn.Module) -> None:
    """Raises: ConfigError for a student from a folder of adapters: checkpoints of what is trained would lose them."""
    if getattr(student, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "the student is a folder of adapters, which checkpoints of this run would not hold. Give a whole model: a "
            "run with student.lora.merge=true leaves one in its folder merged/"
        )


def with_adapters(model: nn.Module, peft_config: Any, *, seed: int) -> nn.Module:
    """The model with trainable adapters of a peft configuration, drawn from `seed`; its own weights are frozen.

    Raises: ConfigError when the adapters do not fit the model.
    """
    from peft import get_peft_model

    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted: nn.Module = get_peft_model(model, peft_config)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"student.lora does not fit this model: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # a base in bfloat16 is fine, what is trained must be exact
            parameter.data = parameter.data.float()
    return adapted


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "disable_adapter")


def computing_module(model: nn.Module) -> nn.Module:
    """The transformers model that does the arithmetic: the model itself, or the one inside peft's wrapper."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator, return-value]


class AdaptersOff:
    """The student as it was before its adapters: a reference that costs no memory."""

    def __init__(self, adapted: nn.Module, headless: HeadlessModel) -> None:
        self._adapted, self._headless = adapted, headless

    @property
    def head(self) -> Head:
        return self._headless.head

    @property
    def packs(self) -> bool:
        return self._headless.packs

    def __call__(self, input_ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        with evaluating(self._adapted), self._adapted.disable_adapter():  # type: ignore[operator]
            states: Tensor = self._headless(input_ids, lengths)
            return states


@torch.no_grad()
def digest_of_weights(model: nn.Module) -> str:
    """A short digest of the exact bits of all weights, the same on every machine."""
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reference_of(student: nn.Module, headless: HeadlessModel) -> StatesModel:
    """The student as it is now, for good: its adapters switched off where it has any, else a frozen copy.

    Args: `headless` is the student's own backbone and head.
    """
    if is_adapted(student):
        return AdaptersOff(student, headless)
    return HeadlessModel(frozen_copy(student), headless.vocab_size)


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, never to be trained: the reference of a run."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def context_length(config: Any) -> int | None:
    """Most tokens that a model's positions cover, when its configuration says so."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def _require_name(config: ModelConfig, role: str) -> str:
    name = config.model_name_or_path
    if not name:
        raise ModelError(f"no {role} is given; set {role}.model_name_or_path to a local folder or a hub id")
    if is_a_path(name) and not Path(name).is_dir():
        raise ModelError(f"{role}.model_name_or_path: there is no folder {name!r}")
    return name


def _is_about_attention(error: Exception, implementation: str) -> bool:
    text = str(error).lower()
    return "attn" in text or "attention" in text or implementation.lower() in text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cannot_load(what: str, role: str, name: str, error: Exception) -> ModelError:
    missing = "" if Path(name).exists() else f"there is no folder {name!r} in {Path.cwd()}, and on the hub: "
    setting = "a model" if role == "model" else f"{role}.model_name_or_path"
    return ModelError(
        f"the {role} {what} {name!r} cannot be loaded: {missing}{_first_line(error)}\n"
        f"{setting} must be a folder written by save_pretrained (config.json, model.safetensors, tokenizer files) or "
        "the id of such a repository on the hub"
    )
