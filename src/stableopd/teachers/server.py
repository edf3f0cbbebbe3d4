"""A teacher behind a server: vLLM's, or SGLang's."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch

from stableopd.errors import ConfigError, MissingDependencyError, ModelError, TeacherError
from stableopd.keys import key_from
from stableopd.model_config import TeacherConfig
from stableopd.teachers.background import Background, wait_for_all
from stableopd.teachers.dialects import WHOLE, Ask, BadAnswerError, RowScores, dialect, tempered
from stableopd.teachers.handshake import (
    Plan,
    applies_temperature,
    cannot_temper,
    listed_model,
    probe,
    probe_texts,
    too_many_topk,
)
from stableopd.teachers.retrying import Caller, Patience, RefusedError
from stableopd.types import FinishedRollout, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL_VOCABULARY = 4096
"""Up to so many tokens, the whole vocabulary is asked for where a server knows no temperature."""


class ServerTeacher:
    """Scores rollouts by asking a server for the log-probabilities of their tokens.

    Requests run in a thread of their own, `max_concurrent` at a time. One that fails is repeated; where the server
    stays away, or gives an answer that cannot be used, TeacherError is raised before anything is trained on the step.

    Args:
        config: a teacher with `server_url`.
        vocab_size: number of ids of the student's tokenizer.
        first_wait_s: bound of the wait before a request's first repeat; it doubles with each, up to 30 s.

    Raises: ConfigError for a URL that holds a secret, or a key that is not in the environment;
        MissingDependencyError without httpx.
    """

    def __init__(self, config: TeacherConfig, *, vocab_size: int, first_wait_s: float = 0.5) -> None:
        self._url = _root(config.server_url)
        self._config = config
        self._vocab_size = vocab_size
        self._dialect = dialect(config.api)
        patience = Patience(timeout_s=config.timeout_s, max_retries=config.max_retries, first_wait_s=first_wait_s)
        self._client = _http_client(config.max_concurrent)
        self._caller = Caller(
            self._client,
            self._url,
            None if config.api_key_env is None else key_from(config.api_key_env, "teacher"),
            patience,
        )
        self._background = Background()
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._model: str | None = None
        self._context_length: int | None = None
        self._plans: dict[tuple[float, int], Plan] = {}

    def __repr__(self) -> str:
        return f"ServerTeacher({self._url!r}, api={self._config.api!r})"

    @property
    def model_id(self) -> str:
        """Name of the model at the server. Raises: ConfigError or TeacherError when the server does not tell it."""
        self._connect()
        assert self._model is not None
        return self._model

    @property
    def context_length(self) -> int | None:
        """Most tokens of a prompt with its completion that the server scores; None where it does not say."""
        self._connect()
        return self._context_length

    def check(self, *, temperature: float, topk: int = 0) -> None:
        """Asks for a short scoring, to find out now whether this server can score a run; its answer is kept.

        Raises:
            ConfigError: the server gives log-probabilities at temperature 1 only, or fewer than `topk` of them.
            TeacherError: it stays away, refuses, or gives answers that cannot be used.
        """
        if (temperature, topk) not in self._plans:
            self._connect()
            self._plans[temperature, topk] = self._background.run(self._find_plan(temperature, topk))

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """True when the server's tokenizer gives the ids of this one for a few texts; False when it cannot be told.

        Raises: ModelError when they differ; TeacherError when the server stays away.
        """
        self._connect()
        for text in probe_texts(tokenizer):
            body = {"model": self._model, "prompt": text, "add_special_tokens": False}
            try:
                answer = self._background.run(self._caller.call("/tokenize", body))
            except RefusedError as refusal:
                if refusal.status in (401, 403):
                    raise
                return False
            theirs = answer.get("tokens") if isinstance(answer, dict) else None
            if not isinstance(theirs, list) or not all(type(token) is int for token in theirs):
                return False
            ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ours != theirs:
                raise ModelError(
                    f"the tokenizer of the teacher at {self._url} cuts {text!r} into {theirs[:12]} and the student's "
                    f"into {ours[:12]}: the teacher would read another text than the student wrote. Take a student and "
                    "a teacher of one family"
                )
        return True

    def begin(self, *, temperature: float, topk: int = 0) -> ServerStream:
        """As `stableopd.protocols.StreamingTeacher`; the first time, with `check`."""
        self.check(temperature=temperature, topk=topk)
        return ServerStream(self, self._plans[temperature, topk])

    def score(self, rollouts: RolloutBatch, *, temperature: float, topk: int = 0, states: bool = False) -> TokenScores:
        """As `stableopd.protocols.Teacher`. Raises: TeacherError when the scores cannot be had."""
        if states:
            raise ConfigError(
                "this loss needs the teacher's whole distribution, and a server gives the likeliest tokens at most. "
                "Set objective.distill.divergence=sampled_reverse_kl or objective.distill.support=teacher_topk, or "
                "load the teacher in this process (teacher.model_name_or_path without teacher.server_url)"
            )
        stream = self.begin(temperature=temperature, topk=topk)
        try:
            return stream.result(rollouts)
        finally:
            stream.close()

    def close(self) -> None:
        """Closes the connections and ends the thread; the teacher is not used afterwards."""
        self._background.run(self._client.aclose())
        self._background.stop()

    def start(self, rollout: FinishedRollout, plan: Plan) -> Future[RowScores]:
        """Begins to score one rollout."""
        return self._background.submit(self._row(rollout.prompt_ids, rollout.completion_ids, plan))

    def _connect(self) -> None:
        if self._model is None:
            model = self._background.run(self._listed())
            self._model, self._context_length = model

    async def _listed(self) -> tuple[str, int | None]:
        """The model's name and the most tokens that it scores."""
        try:
            answer = await self._caller.call("/v1/models")
        except RefusedError as refusal:
            named = self._config.server_model or (self._url if self._config.api == "sglang" else None)
            if refusal.status in (404, 405) and named:
                return named, None
            raise
        name, context = listed_model(answer, self._config, self._url)
        # Both servers want room for one more token than they are sent.
        return name, None if context is None else context - 1

    async def _find_plan(self, temperature: float, topk: int) -> Plan:
        whole = topk >= self._vocab_size
        asked = WHOLE if whole else topk
        try:
            if temperature == 1:
                await self._probe(1.0, asked)
                return Plan(temperature=1.0, topk=topk, ask_temperature=1.0, ask_topk=asked)
            likeliest = asked if whole else min(max(topk, 4), self._vocab_size)
            plain, warm = await self._probe(1.0, likeliest), await self._probe(temperature, likeliest)
        except RefusedError as refusal:
            raise too_many_topk(refusal, topk) if topk and refusal.status in (400, 422) else refusal from None
        if applies_temperature(plain, warm, temperature, self._url):
            return Plan(temperature=temperature, topk=topk, ask_temperature=temperature, ask_topk=asked)
        if not whole and self._vocab_size > _SMALL_VOCABULARY:
            raise cannot_temper(self._url, temperature, "")
        try:
            await self._probe(1.0, WHOLE)
        except RefusedError as refusal:
            raise cannot_temper(self._url, temperature, refusal.said) from None
        return Plan(temperature=temperature, topk=topk, ask_temperature=1.0, ask_topk=WHOLE)

    async def _probe(self, temperature: float, topk: int) -> RowScores:
        return await self._asked(probe(self._vocab_size, temperature, topk))

    async def _row(self, prompt: tuple[int, ...], completion: tuple[int, ...], plan: Plan) -> RowScores:
        if not prompt:
            raise TeacherError("a rollout has no prompt, and a server gives its first token no log-probability")
        length = len(prompt) + len(completion)
        if self._context_length is not None and length > self._context_length:
            raise TeacherError(
                f"a rollout has {length} tokens with its prompt, and the teacher's server {self._url} scores at most "
                f"{self._context_length}. Start it with a larger context (--max-model-len, --context-length), or lower "
                "rollout.max_completion_length or data.max_prompt_length"
            )
        ask = Ask(
            prompt_ids=prompt,
            completion_ids=completion,
            temperature=plan.ask_temperature,
            topk=plan.ask_topk,
            vocab_size=self._vocab_size,
        )
        async with self._slots:
            row = await self._asked(ask)
        if plan.ask_topk == WHOLE:
            topk = min(plan.topk, self._vocab_size)
            return tempered(row, completion, plan.temperature / plan.ask_temperature, topk)
        return row

    async def _asked(self, ask: Ask) -> RowScores:
        answer: Any = await self._caller.call(self._dialect.path, self._dialect.body(ask, self._model or ""))
        try:
            return self._dialect.read(answer, ask)
        except BadAnswerError as problem:
            raise TeacherError(
                f"the teacher's server {self._url} gave scores that cannot be used: {problem}. No weight was touched "
                f"by this step. See that teacher.api ({self._config.api}) is what the server speaks and that its model "
                "is sound, then resume the run"
            ) from None


class ServerStream:
    """As `stableopd.protocols.ScoringStream`: each rollout is sent as soon as it is added."""

    def __init__(self, teacher: ServerTeacher, plan: Plan) -> None:
        self._teacher = teacher
        self._plan = plan
        self._rows: dict[tuple[tuple[int, ...], tuple[int, ...]], Future[RowScores]] = {}

    def add(self, rollout: FinishedRollout) -> None:
        """Sends it, unless an equal one was sent, or one has failed so that the step cannot be scored any more."""
        key = (tuple(rollout.prompt_ids), tuple(rollout.completion_ids))
        if rollout.completion_ids and key not in self._rows and self._failed() is None:
            self._rows[key] = self._teacher.start(rollout, self._plan)

    def result(self, rollouts: RolloutBatch) -> TokenScores:
        """Scores of all rows, in their order. Raises: TeacherError when they cannot be had; nothing is half-done."""
        keys = _keys(rollouts)
        for prompt, completion in keys:
            self.add(FinishedRollout(prompt_ids=prompt, completion_ids=completion))
        failed = self._failed()
        wanted = [self._rows[key] for key in keys if key[1] and key in self._rows]
        found = wait_for_all([failed] if failed else wanted)
        rows = iter(found)
        return self._scores(rollouts, [next(rows) if completion else None for _, completion in keys])

    def close(self) -> None:
        for future in self._rows.values():
            future.cancel()

    def _failed(self) -> Future[RowScores] | None:
        return next((row for row in self._rows.values() if row.done() and _has_failed(row)), None)

    def _scores(self, rollouts: RolloutBatch, rows: list[RowScores | None]) -> TokenScores:
        """Tensors of the batch's shape on its device, 0 where masked."""
        shape, k = tuple(rollouts.completion_ids.shape), min(self._plan.topk, self._teacher._vocab_size)
        sampled, entropy = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        ids, top = np.zeros((*shape, k), np.int64), np.zeros((*shape, k), np.float32)
        for number, row in enumerate(rows):
            if row is None:
                continue
            length = len(row.sampled)
            sampled[number, :length] = row.sampled
            if row.topk_ids is not None:
                ids[number, :length], top[number, :length] = row.topk_ids, row.topk_logprobs
            if row.entropy is not None:
                entropy[number, :length] = row.entropy
        device = rollouts.completion_ids.device
        return TokenScores(
            sampled_logprobs=torch.from_numpy(sampled).to(device),
            temperature=self._plan.temperature,
            model_id=self._teacher.model_id,
            topk_ids=torch.from_numpy(ids).to(device) if k else None,
            topk_logprobs=torch.from_numpy(top).to(device) if k else None,
            entropy=torch.from_numpy(entropy).to(device) if k and self._plan.ask_topk == WHOLE else None,
        )


def _has_failed(future: Future[RowScores]) -> bool:
    return future.cancelled() or future.exception() is not None


def _keys(rollouts: RolloutBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, completion) of each row, without padding."""
    prompts, width = rollouts.prompt_ids.tolist(), rollouts.prompt_ids.shape[1]
    lengths = rollouts.prompt_mask.sum(dim=1).tolist()
    return [
        (tuple(prompt[width - length :]), tuple(completion))
        for prompt, length, completion in zip(prompts, lengths, rollouts.completions(), strict=True)
    ]


def _root(url: str | None) -> str:
    """The URL without a trailing /v1. Raises: ConfigError when there is none, or it holds a secret."""
    if url is None:
        raise ConfigError("teacher.server_url is not set; give the server's base URL, such as http://10.0.0.5:8000")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "teacher.server_url must hold neither a user and password nor a query; put the key into an environment "
            "variable and name that in teacher.api_key_env"
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _http_client(max_concurrent: int) -> Any:
    try:
        import httpx
    except ImportError:
        raise MissingDependencyError.of("httpx", "a teacher behind a server", "server") from None
    limits = httpx.Limits(max_connections=max_concurrent + 1, max_keepalive_connections=max_concurrent + 1)
    return httpx.AsyncClient(timeout=None, limits=limits, follow_redirects=False)
