"""vLLM behind its own server: completions over HTTP, weights through a folder that both can reach."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from stableopd.errors import ConfigError, EngineError, MissingDependencyError
from stableopd.keys import key_from
from stableopd.rollout.requests import Answer, Request
from stableopd.rollout.vllm_params import sampling_arguments

_MOST_SHOWN = 300
_CONCURRENT = 256
"""Requests under way at a time; the server batches them itself."""


class ServerBackend:
    """A `Backend` over vLLM's OpenAI-compatible server.

    Args:
        url: base URL, with or without /v1.
        api_key_env: name of the environment variable that holds the key.
        sync_dir: a folder that server and trainer see under the same path; weights pass through it.
        save: writes the student's configuration and tokenizer, and any weights, into a folder.
        stop_ids: every id that ends a completion.
        banned: ids that are never drawn.

    Raises: ConfigError, EngineError or MissingDependencyError when the server cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None,
        timeout_s: float,
        sync_dir: Path,
        save: Callable[[Path], None],
        stop_ids: Sequence[int],
        banned: Sequence[int] = (),
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise MissingDependencyError.of("httpx", "rollout.vllm.mode=server", extra="server") from None
        self._httpx: Any = httpx
        self._stop_ids, self._banned = tuple(stop_ids), tuple(banned)
        self._sync_dir, self._save = sync_dir, save
        self._base = url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=_CONCURRENT, max_keepalive_connections=_CONCURRENT)
        self._client = httpx.Client(timeout=timeout_s, limits=limits, headers=_headers(api_key_env))
        self._pool = ThreadPoolExecutor(max_workers=_CONCURRENT, thread_name_prefix="vllm")
        self._model = self._only_model()

    def run(self, requests: Sequence[Request], on_answer: Callable[[Answer], None]) -> None:
        """As `Backend`. The first failure gives up the others: a batch is whole or not at all."""
        waiting = [self._pool.submit(self._complete, request) for request in requests]
        try:
            for future in as_completed(waiting):
                on_answer(future.result())
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)  # what is under way holds cache blocks of the weights that are about to go

    def prompt_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """As `Backend`."""
        waiting = [self._pool.submit(self._prompt_logprobs, sequence) for sequence in sequences]
        wait(waiting, return_when=FIRST_EXCEPTION)
        return [future.result() for future in waiting]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As `Backend`: written to the shared folder, read from there by the server."""
        folder = self._sync_dir / "weights"
        aside = self._sync_dir / ".weights"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        self._save(aside)
        for old in (*aside.glob("*.safetensors"), *aside.glob("*.safetensors.index.json")):
            old.unlink()
        # Tied arrays share memory, which safetensors refuses; each is written out.
        save_file({name: array.detach().cpu().clone() for name, array in weights}, aside / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}})
        if self._post("/reset_prefix_cache", None).get("success") is False:
            raise EngineError(
                f"{self._base} is busy and keeps prompts that it read with the old weights. Leave the server to this "
                "run alone, or start it with --no-enable-prefix-caching"
            )

    def mend(self) -> bool:
        """A server's model cannot be reached from here."""
        return False

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _complete(self, request: Request) -> Answer:
        body = {
            **sampling_arguments(request, self._stop_ids, self._banned),
            "model": self._model,
            "prompt": list(request.prompt_ids),
            "return_token_ids": True,
        }
        choice = _first_choice(self._post("/v1/completions", body))
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
            raise EngineError(
                f"{self._base} answers without token ids or log-probabilities; rollout.vllm.mode=server needs a vLLM "
                "server that knows return_token_ids"
            )
        return Answer(
            row=request.row,
            token_ids=tuple(ids),
            logprobs=tuple(float(value) for value in logprobs),
            finish_reason=str(choice.get("finish_reason")),
        )

    def _prompt_logprobs(self, sequence: tuple[int, ...]) -> list[float]:
        body = {
            "model": self._model,
            "prompt": list(sequence),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        found = _first_choice(self._post("/v1/completions", body)).get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(sequence):
            raise EngineError(f"{self._base} does not give prompt_logprobs, so its weights cannot be checked")
        return [float(entry[str(token)]["logprob"]) for entry, token in zip(found[1:], sequence[1:], strict=True)]

    def _only_model(self) -> str:
        listed = self._answer(self._send("GET", "/v1/models", None), "/v1/models").get("data") or []
        names = [str(entry.get("id")) for entry in listed]
        if len(names) != 1:
            raise ConfigError(f"{self._base} serves {len(names)} models; serve the student alone")
        return names[0]

    def _post(self, path: str, body: Any) -> dict[str, Any]:
        return self._answer(self._send("POST", path, body), path)

    def _send(self, method: str, path: str, body: Any) -> Any:
        try:
            return self._client.request(method, self._base + path, json=body)
        except self._httpx.HTTPError as error:
            raise EngineError(
                f"the rollout server {self._base} does not answer ({type(error).__name__}). Is it up, and is "
                "rollout.vllm.server_url right? The run goes on from its last checkpoint with --resume"
            ) from None  # the cause may hold headers

    def _answer(self, response: Any, path: str) -> dict[str, Any]:
        if response.status_code == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
            raise EngineError(
                f"{self._base} has no {path}, so its weights cannot be updated. Start the server with "
                "VLLM_SERVER_DEV_MODE=1 in its environment, in a network that only the trainer reaches"
            )
        if response.status_code >= 400:
            text = "".join(character if character.isprintable() else " " for character in response.text)
            raise EngineError(f"{self._base}{path} answered {response.status_code}: {text[:_MOST_SHOWN]}")
        if not response.content:
            return {}
        try:
            answer = response.json()
        except ValueError as error:
            raise EngineError(f"{self._base}{path} answered with something that is not JSON") from error
        return answer if isinstance(answer, dict) else {}


def _headers(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    return {"Authorization": f"Bearer {key_from(api_key_env, 'rollout.vllm')}"}


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise EngineError("the rollout server's answer holds no completion")
    return choices[0]
