"""How a scoring is asked of a server and read from its answer: vLLM's way and SGLang's. Nothing here sends anything.

Both servers give log-probabilities of the tokens of a prompt. The rollout, prompt and completion, is sent as a prompt,
and only the positions of its completion are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

WHOLE = -1
"""As the number of likeliest tokens: all of the vocabulary."""
_FLOOR = -9999.0
"""What vLLM writes for minus infinity and for NaN, neither of which JSON has."""


class BadAnswerError(ValueError):
    """An answer that does not hold the scores of the tokens that were sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One scoring, as the server is asked for it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    temperature: float
    topk: int
    """Number of likeliest tokens at each position; 0 for none, `WHOLE` for the whole vocabulary."""
    vocab_size: int

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.completion_ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScores:
    """Scores of one completion of n tokens."""

    sampled: np.ndarray
    """[n] float64, nats."""
    topk_ids: np.ndarray | None = None
    """[n, K] int64, the likeliest first."""
    topk_logprobs: np.ndarray | None = None
    """[n, K] float64, nats."""
    entropy: np.ndarray | None = None
    """[n] float64, nats; only where the whole vocabulary is known."""


class Dialect(Protocol):
    """A wire format."""

    path: str
    """Where scorings are asked for, below the server's root."""

    def body(self, ask: Ask, model: str) -> dict[str, Any]: ...

    def read(self, answer: Any, ask: Ask) -> RowScores:
        """Raises: BadAnswerError when the answer is not about these tokens, or not made of numbers."""
        ...


class OpenAI:
    """vLLM's /v1/completions with `prompt_logprobs`. It has no way to ask for some positions only."""

    path = "/v1/completions"

    def body(self, ask: Ask, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": ask.ids,
            "max_tokens": 1,  # vLLM refuses 0
            "temperature": ask.temperature,
            "prompt_logprobs": ask.topk,
            "return_token_ids": True,
            "stream": False,
        }

    def read(self, answer: Any, ask: Ask) -> RowScores:
        choice = _only(_get(answer, "choices"))
        echoed = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        if echoed is not None and echoed != ask.ids:
            raise BadAnswerError("its prompt_token_ids are not the token ids that were sent")
        positions = choice.get("prompt_logprobs", answer.get("prompt_logprobs"))
        if not isinstance(positions, list):
            raise BadAnswerError("it has no prompt_logprobs; is it a vLLM server?")
        if len(positions) != len(ask.ids):
            raise BadAnswerError(f"it has {len(positions)} prompt_logprobs for {len(ask.ids)} tokens")
        tables = [_table(position) for position in positions[len(ask.prompt_ids) :]]
        sampled = [_sampled(table, token) for table, token in zip(tables, ask.completion_ids, strict=True)]
        return _row(ask, sampled, [list(table.items()) for table in tables] if ask.topk else None)


class SGLang:
    """SGLang's /generate with `return_logprob`, from the last token of the prompt on."""

    path = "/generate"

    def body(self, ask: Ask, model: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "input_ids": ask.ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": ask.temperature},
            "return_logprob": True,
            "logprob_start_len": len(ask.prompt_ids) - 1,
            "top_logprobs_num": ask.vocab_size if ask.topk == WHOLE else ask.topk,
            "stream": False,
        }
        if ask.temperature != 1:  # servers that know it apply it to the scores; the others ignore it
            body["input_logprob_temperature"] = ask.temperature
        return body

    def read(self, answer: Any, ask: Ask) -> RowScores:
        found = _get(answer, "meta_info")
        entries = self._completion(_get(found, "input_token_logprobs"), ask, "input_token_logprobs")
        pairs = [_pair(entry) for entry in entries]
        if tuple(token for token, _ in pairs) != ask.completion_ids:
            raise BadAnswerError("its input_token_logprobs are about other token ids than those that were sent")
        tops = None
        if ask.topk:
            likeliest = self._completion(_get(found, "input_top_logprobs"), ask, "input_top_logprobs")
            tops = [[_pair(entry) for entry in _list(position)] for position in likeliest]
        return _row(ask, [logprob for _, logprob in pairs], tops)

    @staticmethod
    def _completion(entries: Any, ask: Ask, name: str) -> list[Any]:
        """The completion's positions: the last ones, wherever the server began."""
        wanted = len(ask.completion_ids)
        if len(_list(entries)) < wanted:
            raise BadAnswerError(f"it has {len(entries)} {name} for a completion of {wanted} tokens")
        if len(entries) > len(ask.ids):
            raise BadAnswerError(f"it has {len(entries)} {name} for {len(ask.ids)} tokens")
        return list(entries[-wanted:])


def dialect(api: Literal["openai", "sglang"]) -> Dialect:
    """The wire format of that name."""
    return OpenAI() if api == "openai" else SGLang()


def tempered(row: RowScores, completion_ids: Sequence[int], temperature: float, topk: int) -> RowScores:
    """The scores under softmax(logits / temperature), exactly, from the whole vocabulary at temperature 1.

    Definition: log q_v = l_v / temperature − log Σ_u exp(l_u / temperature), with l the log-probabilities at
    temperature 1, which are the logits up to a constant that cancels.
    Numerics: float64.
    """
    assert row.topk_ids is not None
    assert row.topk_logprobs is not None
    scaled = row.topk_logprobs / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    logprobs = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    column = (row.topk_ids == np.asarray(completion_ids)[:, None]).argmax(axis=1)
    return RowScores(
        sampled=logprobs[np.arange(len(column)), column],
        topk_ids=row.topk_ids[:, :topk] if topk else None,
        topk_logprobs=logprobs[:, :topk] if topk else None,
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1) if topk else None,
    )


def _row(ask: Ask, sampled: list[float], tops: list[list[tuple[int, float]]] | None) -> RowScores:
    if min(sampled) <= _FLOOR:
        raise BadAnswerError(
            f"a token has the log-probability {min(sampled):g}, which stands for NaN or minus infinity"
        )
    if tops is None:
        return RowScores(sampled=np.array(sampled))
    kept = [_likeliest(pairs, ask) for pairs in tops]
    return RowScores(
        sampled=np.array(sampled),
        topk_ids=np.array([[token for token, _ in pairs] for pairs in kept], dtype=np.int64),
        topk_logprobs=np.array([[logprob for _, logprob in pairs] for pairs in kept]),
    )


def _likeliest(pairs: list[tuple[int, float]], ask: Ask) -> list[tuple[int, float]]:
    """The k likeliest, in order: vLLM adds the sampled token where it is none of them."""
    if ask.topk == WHOLE:
        # Rows of the embedding beyond the tokenizer's ids are padding, that a local teacher leaves out as well.
        pairs = [(token, logprob) for token, logprob in pairs if token < ask.vocab_size]
    wanted = ask.vocab_size if ask.topk == WHOLE else ask.topk
    kept = sorted(pairs, key=lambda pair: -pair[1])[:wanted]
    if len({token for token, _ in kept}) < wanted:
        raise BadAnswerError(f"a position has {len(kept)} likeliest tokens instead of {wanted}")
    beyond = [token for token, _ in kept if not 0 <= token < ask.vocab_size]
    if beyond:
        raise BadAnswerError(
            f"token id {beyond[0]} is among the likeliest, but the student's tokenizer ends at {ask.vocab_size - 1}"
        )
    return kept


def _table(position: Any) -> dict[int, float]:
    """Log-probability by token id of one position of `prompt_logprobs`."""
    if not isinstance(position, dict):
        raise BadAnswerError("a token of the completion has no log-probabilities")
    try:
        return {int(token): _number(_get(entry, "logprob")) for token, entry in position.items()}
    except ValueError as error:
        raise BadAnswerError(
            str(error) if isinstance(error, BadAnswerError) else "a token id is not a number"
        ) from None


def _sampled(table: dict[int, float], token: int) -> float:
    if token not in table:
        raise BadAnswerError(f"token id {token} was sent, and the answer is about others at its place")
    return table[token]


def _pair(entry: Any) -> tuple[int, float]:
    """(token id, log-probability) of SGLang's [log-probability, token id, text]."""
    if not isinstance(entry, list) or len(entry) < 2 or type(entry[1]) is not int:
        raise BadAnswerError("an entry is not a log-probability with its token id")
    return entry[1], _number(entry[0])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadAnswerError("a log-probability is missing or not a finite number")
    if value > 1e-3:
        raise BadAnswerError(f"a log-probability is {value:g}, above 0")
    return float(value)


def _get(answer: Any, key: str) -> Any:
    if not isinstance(answer, dict) or key not in answer:
        raise BadAnswerError(f"it has no {key}")
    return answer[key]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadAnswerError("a list is missing")
    return value


def _only(choices: Any) -> dict[str, Any]:
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswerError("it has not exactly one choice")
    return choices[0]
