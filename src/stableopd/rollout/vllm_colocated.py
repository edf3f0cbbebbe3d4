"""vLLM in the trainer's own process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stableopd.errors import EngineError, MissingDependencyError
from stableopd.rollout.requests import Answer, Request
from stableopd.rollout.vllm_params import sampling_arguments
from stableopd.rollout_config import VllmConfig


class ColocatedBackend:
    """A `Backend` over `vllm.LLM` in this process.

    Args:
        save: writes the student and its tokenizer into a folder, from which the engine is built.
        dtype: of the engine ("float32", "bfloat16", ...).
        stop_ids: every id that ends a completion.
        banned: ids that are never drawn.

    Raises: MissingDependencyError without vLLM; EngineError when it cannot be built.
    """

    def __init__(
        self,
        save: Callable[[Path], None],
        settings: VllmConfig,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        raw_logprobs: bool,
        stop_ids: Sequence[int],
        banned: Sequence[int] = (),
    ) -> None:
        # In this process the weights can be handed over without a copy on disk.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm
        except ImportError:
            raise MissingDependencyError.of("vllm", "rollout.engine=vllm") from None
        self._vllm: Any = vllm
        self._stop_ids, self._banned = tuple(stop_ids), tuple(banned)
        self._number = 0
        arguments = {
            "dtype": dtype,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "logprobs_mode": "raw_logprobs" if raw_logprobs else "processed_logprobs",
            "generation_config": "vllm",
            "trust_remote_code": False,
            **settings.engine_kwargs,
        }
        with tempfile.TemporaryDirectory(prefix="stableopd-vllm-") as folder:
            save(Path(folder))
            try:
                self._llm = vllm.LLM(model=folder, **arguments)
            except (ValueError, RuntimeError, TypeError, OSError) as error:
                raise EngineError(
                    f"vLLM cannot serve the student: {error}. Settings are under rollout.vllm; rollout.engine=hf needs "
                    "no other engine"
                ) from error

    def run(self, requests: Sequence[Request], on_answer: Callable[[Answer], None]) -> None:
        """As `Backend`."""
        engine = self._llm.llm_engine
        rows: dict[str, int] = {}
        try:
            for request in requests:
                self._number += 1
                name = f"rollout-{self._number}"
                rows[name] = request.row
                engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, self._params(request))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        on_answer(_answer(rows.pop(output.request_id), output.outputs[0]))
        finally:
            if rows:
                engine.abort_request(list(rows))

    def _params(self, request: Request) -> Any:
        return self._vllm.SamplingParams(
            **sampling_arguments(request, self._stop_ids, self._banned),
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def prompt_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """As `Backend`."""
        params = self._vllm.SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            [found[token].logprob for found, token in zip(output.prompt_logprobs[1:], sequence[1:], strict=True)]
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As `Backend`: in place, and what was computed with the old weights is forgotten."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights)})
        self._llm.reset_prefix_cache()

    def mend(self) -> bool:
        """Ties a tied head anew and has it prepacked again: on CPUs a reload leaves it stale."""
        mended = self._llm.apply_model(_tie_head_anew)
        self._llm.reset_prefix_cache()
        return any(mended)

    def close(self) -> None:
        """Give the engine's memory back."""
        self._llm.llm_engine.engine_core.shutdown()


def _tie_head_anew(model: Any) -> bool:
    head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
    if head is None or embedding is None or not getattr(model.config, "tie_word_embeddings", False):
        return False
    head.weight = embedding.weight
    for layer in (head, embedding):
        method = getattr(layer, "quant_method", None)
        if method is not None and hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(layer)
    return True


def _answer(row: int, completion: Any) -> Answer:
    ids = tuple(int(token) for token in completion.token_ids)
    logprobs = tuple(float(found[token].logprob) for found, token in zip(completion.logprobs or (), ids, strict=False))
    return Answer(row=row, token_ids=ids, logprobs=logprobs, finish_reason=str(completion.finish_reason))
