"""Which models a run works with: the student and how it is trained, the teacher and where it lives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stableopd.keys import plain_url
from stableopd.sections import NonNegativeInt, Positive, PositiveInt, Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """A Hugging Face causal language model: a local folder or a hub id."""

    model_name_or_path: str | None = None
    revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None


class LoraSettings(Section):
    """Low-rank adapters in place of full fine-tuning; the reference is then the model with its adapters off."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    merge: bool = False
    """When the run ends, also write the student with its adapters merged in, as `merged/` in the run folder."""


class StudentConfig(ModelConfig):
    lora: LoraSettings | None = None
    dtype: Dtype = "float32"
    """Weights are kept in this dtype; with `optimizer.bf16` the arithmetic is bfloat16 all the same."""


class TeacherConfig(ModelConfig):
    """A model in this process, or one behind a server that gives log-probabilities of prompt tokens."""

    device_map: str | dict[str, int | str] | None = None
    """Where a local teacher's layers go, as in transformers ("auto", "cpu", ...); without it, the process's device."""
    quantization: dict[str, Any] | None = None
    """What transformers calls `quantization_config`, such as {quant_method: bitsandbytes, load_in_4bit: true}."""
    offload: bool = False
    """Keep a local teacher in CPU memory between scorings."""
    server_url: str | None = None
    """Base URL of a server, such as http://10.0.0.5:8000; the model is then not loaded here, its tokenizer may be."""
    api: Literal["openai", "sglang"] = "openai"
    """`openai`: /v1/completions with `prompt_logprobs`, as vLLM serves it; `sglang`: SGLang's own /generate."""
    server_model: str | None = None
    """Name of the model at the server; without it, the only one that the server lists."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the server's key."""
    timeout_s: Positive = 120.0
    """Longest wait for one answer of the server."""
    max_retries: NonNegativeInt = 6
    """How often a request is repeated when the server is busy, broken or away; the waits grow up to half a minute."""
    max_concurrent: PositiveInt = 32
    """Most requests under way at a time, per process."""

    @property
    def is_set(self) -> bool:
        return self.model_name_or_path is not None or self.server_url is not None

    @property
    def is_remote(self) -> bool:
        return self.server_url is not None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        local = [name for name in ("device_map", "quantization", "offload") if getattr(self, name)]
        if self.is_remote and local:
            raise ValueError(
                f"{local[0]} is for a model in this process, and server_url names a server; give one of them"
            )
        if self.offload and (self.device_map or self.quantization):
            raise ValueError("offload moves a whole model; it goes with neither device_map nor quantization")
        return self

    @field_validator("server_url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        return plain_url(url)
