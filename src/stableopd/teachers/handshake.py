"""What is found out about a teacher's server before a run: its model, and whether it knows temperatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stableopd.errors import ConfigError, TeacherError
from stableopd.model_config import TeacherConfig
from stableopd.teachers.dialects import Ask, RowScores
from stableopd.teachers.retrying import RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST_PROBED_ID = 10
_NUM_PROBED = 8
_NUM_TEXTS, _NUM_TEXT_TOKENS = 4, 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a run's scores are had from this server."""

    temperature: float
    """Of the scores."""
    topk: int
    ask_temperature: float
    """What the server is asked for; 1 where it knows no other."""
    ask_topk: int


def probe(vocab_size: int, temperature: float, topk: int) -> Ask:
    """A short scoring, of ids that every vocabulary of this size has."""
    ids = tuple((_FIRST_PROBED_ID + number) % vocab_size for number in range(_NUM_PROBED))
    return Ask(prompt_ids=ids[:2], completion_ids=ids[2:], temperature=temperature, topk=topk, vocab_size=vocab_size)


def probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A few texts that the tokenizer can encode, made of ordinary tokens from all over its vocabulary."""
    marked = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ordinary = sorted(index for index in tokenizer.get_vocab().values() if index not in marked)
    chosen = ordinary[:: max(1, len(ordinary) // _NUM_TEXT_TOKENS)][:_NUM_TEXT_TOKENS]
    pieces = [str(tokenizer.decode([index])) for index in chosen]
    readable = [piece for piece in pieces if piece and "\ufffd" not in piece]  # no halves of characters
    size = max(1, -(-len(readable) // _NUM_TEXTS))
    return ["".join(readable[start : start + size]) for start in range(0, len(readable), size)]


def listed_model(answer: Any, config: TeacherConfig, url: str) -> tuple[str, int | None]:
    """(name, `max_model_len` where given) of the model to use, from the server's list.

    Raises: ConfigError when it is not listed, or several are and none is named; TeacherError for a list that is none.
    """
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise TeacherError(f"the teacher's server {url} lists no models at /v1/models; is it an inference server?")
    by_name = {str(entry.get("id")): entry for entry in entries}
    shown = ", ".join(repr(name) for name in sorted(by_name)[:10])
    name = config.server_model or next(iter(by_name))
    if config.server_model is None and len(by_name) > 1:
        raise ConfigError(f"the teacher's server {url} has {len(by_name)} models; set server_model to one of {shown}")
    if name not in by_name:
        raise ConfigError(f"the teacher's server {url} has no model {name!r}; set server_model to one of {shown}")
    lengths = [entry.get("max_model_len") for entry in (by_name[name], *entries)]  # adapters are listed without
    return name, next((length for length in lengths if type(length) is int and length > 0), None)


def applies_temperature(plain: RowScores, warm: RowScores, temperature: float, url: str) -> bool:
    """Whether `warm`, asked for at `temperature`, is at that temperature; False when it is `plain`, at temperature 1.

    Definition: the slope of differences of log-probabilities of two tokens in `warm` against those in `plain`, which
    is 1 / temperature or 1, whatever the normaliser.
    Raises: ConfigError when it is neither.
    """
    before, after = _differences(plain, warm)
    if float(np.square(before).sum()) < 1e-12:  # a uniform distribution stays uniform; nothing can be told
        return False
    slope = float((before * after).sum() / np.square(before).sum())
    tolerance = 0.25 * abs(1 / temperature - 1)
    if abs(slope - 1) <= tolerance:
        return False
    if abs(slope - 1 / temperature) <= tolerance:
        return True
    raise ConfigError(
        f"asked for scores at temperature {temperature:g}, the teacher's server {url} gives some at neither that "
        f"temperature nor 1 (differences scale by {slope:.3f}). Set rollout.temperature=1, or load the teacher in this "
        "process"
    )


def _differences(plain: RowScores, warm: RowScores) -> tuple[np.ndarray, np.ndarray]:
    """Differences to the likeliest token, over the tokens that both scorings give, position by position."""
    assert plain.topk_ids is not None
    assert plain.topk_logprobs is not None
    assert warm.topk_ids is not None
    assert warm.topk_logprobs is not None
    before, after = [], []
    for ids, old, other, new in zip(
        plain.topk_ids, plain.topk_logprobs, warm.topk_ids, warm.topk_logprobs, strict=True
    ):
        again = dict(zip(other.tolist(), new.tolist(), strict=True))
        both = [
            (logprob, again[token]) for token, logprob in zip(ids.tolist(), old.tolist(), strict=True) if token in again
        ]
        before += [pair[0] - both[0][0] for pair in both[1:]]
        after += [pair[1] - both[0][1] for pair in both[1:]]
    return np.array(before), np.array(after)


def cannot_temper(url: str, temperature: float, said: str) -> ConfigError:
    """The error for a server that knows temperature 1 alone."""
    reason = f" The whole vocabulary, from which they could be computed, is not to be had: {said}." if said else ""
    return ConfigError(
        f"the teacher's server {url} gives log-probabilities at temperature 1 whatever is asked for, and rollouts are "
        f"drawn at {temperature:g}; the teacher would be compared with another distribution than the student's."
        f"{reason} Set rollout.temperature=1, or load the teacher in this process (teacher.model_name_or_path without "
        "teacher.server_url)"
    )


def too_many_topk(refusal: RefusedError, topk: int) -> ConfigError:
    """The error for a server that refuses to give so many likeliest tokens; its own words say why."""
    return ConfigError(
        f"{refusal}. The run needs the {topk} likeliest tokens at each position: start vLLM with "
        f"--max-logprobs {topk} (20 without it; -1 for the whole vocabulary), or set a smaller topk"
    )
