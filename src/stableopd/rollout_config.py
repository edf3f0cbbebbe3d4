"""How rollouts are made: by which engine, how many, how long, and where they stop."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stableopd.keys import plain_url
from stableopd.sections import NonNegativeInt, Positive, PositiveInt, Section, Temperature


class VllmConfig(Section):
    """The vLLM engine: in this process, or a server of its own."""

    mode: Literal["colocate", "server"] = "colocate"
    server_url: str | None = None
    """`server`: its base URL, such as http://10.0.0.5:8000."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    sync_dir: str | None = None
    """`server`: a folder that server and trainer see under the same path, through which weights pass; without it, a
    temporary one, for a server on the same machine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the engine's weights and arithmetic; `auto`: that of the trainer's arithmetic."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together; without it, what the run needs."""
    enforce_eager: bool = False
    timeout_s: Positive = 600.0
    sync_check_rollouts: NonNegativeInt = 4
    """Prompts with gold whose log-probabilities are compared with the trainer's after every weight sync; 0: none."""
    sync_tolerance: Positive = 0.1
    """Largest mean |difference| of those log-probabilities, in nats, at which a sync counts as done."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of vllm.LLM, by name."""

    @field_validator("server_url")
    @classmethod
    def _plain_url(cls, url: str | None) -> str | None:
        return plain_url(url)


class RolloutConfig(Section):
    engine: Literal["hf", "vllm"] = "hf"
    vllm: VllmConfig = VllmConfig()
    num_prompts: PositiveInt = 64
    """Prompts per step, all processes together."""
    num_generations: PositiveInt = 4
    max_completion_length: Annotated[int, Field(ge=1, le=100_000_000)] = 1024
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegativeInt = 0
    stop_loops_after: Annotated[int, Field(ge=2)] | None = None
    """End a rollout that has repeated one stretch of tokens so many times in a row; it counts as truncated."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A completion also ends when its text holds one of these; the tokens that make it up stay."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """More ids that end a completion, beside those of tokenizer, chat template and generation_config.json."""
    pipeline: bool = False
    """One step off policy: the next batch is generated, with the weights as they are, while this one is scored and
    trained on. Needs `objective.correction` where a policy gradient is trained."""
    max_batch_size: PositiveInt = 256
    """Most sequences generated at a time in one process."""

    @field_validator("stop_strings", mode="before")
    @classmethod
    def _one_stop_string_is_a_list(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _engine_is_clear(self) -> Self:
        if self.engine != "vllm" and self.vllm.changed():
            raise ValueError(f"vllm.{self.vllm.changed()[0]} is set, but engine is {self.engine!r}; set engine=vllm")
        if self.vllm.mode == "server" and self.vllm.server_url is None:
            raise ValueError("vllm.mode is 'server', and vllm.server_url does not say where it is")
        if self.engine == "vllm":
            self._vllm_gives_its_log_probabilities()
        if self.vllm.server_url is not None and self.vllm.mode != "server":
            raise ValueError("vllm.server_url is given, but vllm.mode is 'colocate'; set vllm.mode=server")
        return self

    def _vllm_gives_its_log_probabilities(self) -> None:
        if self.stop_loops_after is not None:
            raise ValueError("stop_loops_after is not possible with engine=vllm; leave it out, or use engine=hf")
        if self.is_cut and self.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.temperature:g} with top_p or top_k: vLLM gives log-probabilities either at "
                "temperature 1 or of the cut distribution, and the teacher's are of neither. Set temperature=1, or "
                "top_p=1 and top_k=0, or engine=hf"
            )

    @property
    def is_cut(self) -> bool:
        """Whether tokens are drawn from a part of the distribution only."""
        return self.top_p < 1 or self.top_k > 0
