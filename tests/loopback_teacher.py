"""A real HTTP server on loopback, with a real small model, that speaks as vLLM and as SGLang do, and can misbehave."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn


@dataclass
class Manners:
    """How the server behaves. Changed by a test while it runs."""

    fail_first: int = 0
    """So many scorings are answered with `status`."""
    status: int = 500
    message: str = "out of sorts"
    headers: dict[str, str] = field(default_factory=dict)
    close_first: int = 0
    """So many scorings are answered by closing the connection."""
    gate: threading.Event | None = None
    """Scorings wait for it."""
    key: str | None = None
    echo_key: bool = False
    """A refusal repeats the headers that came."""
    max_logprobs: int | None = 20
    applies_temperature: bool = False
    wrong: str = ""
    """ids, nan, floor, short, text, above or none: what is wrong with the answers."""
    wrong_after: int = 0
    """So many scorings are right before."""
    max_model_len: int | None = 64
    models: tuple[str, ...] = ("tiny",)
    lists: bool = True
    """Answers /v1/models."""
    tokenizer: Any = None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that gives up is part of the tests
            super().handle_error(request, client_address)


class ModelServer:
    """Serves `model` at `url` until `close`. `requests` has (path, body) of every scoring, in the order they came."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.manners = Manners()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.arrived = threading.Semaphore(0)
        """Released once for every scoring that came in."""
        self.lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @torch.no_grad()
    def logprobs(self, ids: list[int], temperature: float) -> torch.Tensor:
        """Log-probabilities [length, vocabulary] of what comes after each token, the embedding's padding included."""
        scale = temperature if self.manners.applies_temperature else 1.0
        with self.lock:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        return torch.log_softmax(logits / scale, dim=-1)


def vllm_answer(server: ModelServer, body: dict[str, Any]) -> dict[str, Any]:
    ids, k = body["prompt"], body["prompt_logprobs"]
    found = server.logprobs(ids, body["temperature"])
    positions: list[Any] = [None]
    for token, row in zip(ids[1:], found, strict=False):
        table = {
            str(token): {"logprob": row[token].item(), "rank": int((row >= row[token]).sum()), "decoded_token": "?"}
        }
        top = row.topk(len(row) if k == -1 else k)
        for rank, (value, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
            table[str(index)] = {"logprob": value, "rank": rank, "decoded_token": "?"}
        positions.append(table)
    choice: dict[str, Any] = {"index": 0, "text": "?", "finish_reason": "length", "prompt_logprobs": positions}
    if body.get("return_token_ids"):
        choice["prompt_token_ids"] = ids
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}


def sglang_answer(server: ModelServer, body: dict[str, Any]) -> dict[str, Any]:
    ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
    found = server.logprobs(ids, body.get("input_logprob_temperature", 1.0))
    sampled: list[Any] = [[None, ids[start], None]]
    tops: list[Any] = [None]
    for token, row in zip(ids[start + 1 :], found[start:], strict=False):
        sampled.append([row[token].item(), token, None])
        top = row.topk(min(k, len(row)))
        tops.append(
            [[value, index, None] for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        )
    info: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": 0, "input_token_logprobs": sampled}
    if k:
        info["input_top_logprobs"] = tops
    return {"text": "", "meta_info": info}


def spoilt(answer: dict[str, Any], wrong: str) -> Any:
    """The answer with the sampled tokens' entries made wrong, in either format."""
    if wrong == "text":
        return "not what was asked for"
    if wrong == "none":
        return {}
    if "choices" in answer:
        return _spoilt_vllm(answer, wrong)
    entries = answer["meta_info"]["input_token_logprobs"]
    if wrong == "short":
        del entries[-1]
        return answer
    for entry in entries[1:]:
        if wrong == "ids":
            entry[1] += 1
        else:
            entry[0] = {"nan": float("nan"), "floor": -9999.0, "above": 0.5}[wrong]
    return answer


def _spoilt_vllm(answer: dict[str, Any], wrong: str) -> Any:
    choice = answer["choices"][0]
    if wrong == "short":
        del choice["prompt_logprobs"][-1]
        return answer
    if wrong == "ids":
        choice["prompt_token_ids"] = [token + 1 for token in choice["prompt_token_ids"]]
        return answer
    if wrong == "keys":
        del choice["prompt_token_ids"]
        choice["prompt_logprobs"] = [p and {"0": next(iter(p.values()))} for p in choice["prompt_logprobs"]]
        return answer
    for position in choice["prompt_logprobs"][1:]:
        for entry in position.values():
            entry["logprob"] = {"nan": float("nan"), "floor": -9999.0, "above": 0.5}[wrong]
    return answer


def _handler(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(content).encode()
            try:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def refused(self) -> bool:
            manners = server.manners
            if manners.key is None or self.headers.get("Authorization") == f"Bearer {manners.key}":
                return False
            said = f"wrong key: {self.headers.get('Authorization')}" if manners.echo_key else "wrong key"
            self.answer(401, {"error": {"message": said}})
            return True

        def do_GET(self) -> None:
            if self.refused():
                return
            if self.path != "/v1/models" or not server.manners.lists:
                self.answer(404, {"detail": "Not Found"})
                return
            length = server.manners.max_model_len
            self.answer(200, {"data": [{"id": name, "max_model_len": length} for name in server.manners.models]})

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            data = self.rfile.read(size)
            if len(data) < size:  # the client has given up
                self.close_connection = True
                return
            body = json.loads(data)
            if self.refused():
                return
            if self.path == "/tokenize":
                self.tokenize(body)
                return
            server.requests.append((self.path, body))
            server.arrived.release()
            manners = server.manners
            if manners.gate is not None:
                manners.gate.wait(30)
            if manners.close_first > 0:
                manners.close_first -= 1
                self.close_connection = True
                return
            if manners.fail_first > 0:
                manners.fail_first -= 1
                self.answer(manners.status, {"error": {"message": manners.message}}, manners.headers)
                return
            self.scoring(body)

        def scoring(self, body: dict[str, Any]) -> None:
            manners = server.manners
            vllm = self.path == "/v1/completions"
            asked, most = body["prompt_logprobs" if vllm else "top_logprobs_num"], manners.max_logprobs
            size = server.model.get_output_embeddings().weight.shape[0]
            if vllm and most is not None and (size if asked == -1 else asked) > most:
                said = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {most}"
                self.answer(400, {"error": {"message": said, "type": "BadRequestError", "code": 400}})
                return
            answer = vllm_answer(server, body) if vllm else sglang_answer(server, body)
            if manners.wrong and manners.wrong_after <= 0:
                answer = spoilt(answer, manners.wrong)
            manners.wrong_after -= 1
            self.answer(200, answer)

        def tokenize(self, body: dict[str, Any]) -> None:
            if server.manners.tokenizer is None:
                self.answer(404, {"detail": "Not Found"})
                return
            ids = server.manners.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            self.answer(200, {"count": len(ids), "max_model_len": server.manners.max_model_len, "tokens": ids})

    return Handler
