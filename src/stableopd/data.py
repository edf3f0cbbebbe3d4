"""Prompts, golden answers and answers: rows of data, checked and tokenised."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from stableopd.errors import DataError
from stableopd.names import nearest
from stableopd.reading import Place, Rows, answer_text, kind_of, read_rows
from stableopd.types import Example
from stableopd.vocabulary import answer_end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_examples", "read_rows"]

_TOKENIZE_BATCH = 1024
_TRL_GOLD_COLUMN = "completion"


def load_examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_column: str = "prompt",
    gold_column: str = "gold",
    answer_column: str = "answer",
    gold_weights_column: str | None = None,
    source: str,
    max_prompt_tokens: int | None = None,
    max_total_tokens: int | None = None,
    require_gold: bool = False,
    require_answer: bool = False,
    judged: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    teacher_column: str | None = None,
    teachers: Collection[str] = (),
) -> list[Example]:
    """One tokenised `Example` per row.

    A prompt is a string, tokenised as it stands behind the tokenizer's own leading tokens (BOS), never
    twice; or a list of chat messages, rendered by the chat template up to where the assistant speaks. Gold is a
    string or one assistant message. It is tokenised apart from its prompt, in just the state that a
    rollout starts from, and ends in `answer_end_id` exactly once.

    Args:
        gold_column: TRL's column "completion" is taken where this is left at "gold" and there is no such column.
        gold_weights_column: one loss weight per golden token, the end token included; null means 1 for all.
        source: names the data in errors where the rows do not know their places (see `Rows`).
        max_prompt_tokens: longest prompt allowed, in tokens.
        max_total_tokens: longest prompt and gold together, in tokens.
        require_gold: refuse rows without gold.
        require_answer: refuse rows without an answer, which a reward compares with.
        judged: refuse lists and objects for answers; where nothing is judged they are none.
        chat_template_kwargs: passed to the chat template, for example {"enable_thinking": False}.
        teacher_column: names the teacher of each row, one of `teachers`.

    Raises:
        DataError: a row that cannot be used; names its place and its column.
        ModelError: gold, but no token to end it with.
    """
    table = _Table.of(rows, source)
    prompts = _prompts(table, prompt_column, tokenizer, chat_template_kwargs or {})
    prompt_ids = _prompt_ids(table, prompts, tokenizer)
    _check_lengths(table, prompt_ids, max_prompt_tokens)
    golds = _golds(table, gold_column, require_gold)
    gold_ids = _gold_ids(table, golds, prompts, tokenizer)
    _check_totals(table, prompt_ids, gold_ids, max_total_tokens)
    gold_weights = _gold_weights(table, gold_weights_column, gold_ids)
    answers = _answers(table, answer_column, require_answer, judged)
    named = _teachers(table, teacher_column, teachers)
    columns = zip(prompts, prompt_ids, gold_ids, gold_weights, answers, named, strict=True)
    return [
        Example(
            index=index,
            prompt=prompt.text,
            prompt_ids=ids,
            gold_ids=gold,
            gold_weights=weights,
            answer=answer,
            teacher=teacher,
        )
        for index, (prompt, ids, gold, weights, answer, teacher) in enumerate(columns)
    ]


@dataclass(frozen=True)
class _Table:
    """Rows with their places and the columns that any of them has."""

    rows: Sequence[Mapping[str, Any]]
    places: Sequence[Place]
    columns: Sequence[str]
    source: str

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], source: str) -> _Table:
        table = list(rows)
        places = rows.places if isinstance(rows, Rows) else [Place(source, "row", n + 1) for n in range(len(table))]
        if not table:
            raise DataError(f"{source} holds no rows. Give a dataset with at least one prompt")
        return cls(table, places, list(dict.fromkeys(column for row in table for column in row)), source)

    def items(self) -> Iterator[tuple[Place, Mapping[str, Any]]]:
        return zip(self.places, self.rows, strict=True)

    def known(self, column: str) -> str:
        """The columns there are, and the one whose name is nearest to `column`."""
        close = difflib.get_close_matches(column, self.columns, n=1)
        nearest = f"; did you mean {close[0]!r}?" if close else "."
        return f"Its columns are {', '.join(map(repr, self.columns))}{nearest}"


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    chat: bool


def _prompts(
    table: _Table, column: str, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> list[_Prompt]:
    prompts = []
    for place, row in table.items():
        if column not in row:
            raise DataError(f"{place}: no column {column!r}. {table.known(column)} Set data.prompt_column")
        value = row[column]
        if isinstance(value, str):
            prompt = _Prompt(value, chat=False)
        elif isinstance(value, list):
            prompt = _Prompt(_chat_prompt(value, tokenizer, template_kwargs, f"{place}: {column!r}"), chat=True)
        else:
            raise DataError(f"{place}: {column!r} is {kind_of(value)}. A prompt is a string or a list of chat messages")
        if not prompt.text.strip():
            raise DataError(f"{place}: {column!r} is empty. Give a prompt or remove the row")
        prompts.append(prompt)
    return prompts


def _chat_prompt(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], where: str
) -> str:
    if not messages:
        raise DataError(f"{where} is empty. Give at least one chat message or remove the row")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f'{where} holds {message!r}, which is no chat message {{"role": ..., "content": ...}}')
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where} ends in an assistant's turn. Put that turn into the gold column, as the answer")
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a list of chat messages, but the tokenizer has no chat template. Give prompts as strings, or "
            "take a tokenizer with a chat template"
        )
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"{where} is refused by the chat template: {error}. Correct the messages") from error
    return str(text)


def _prompt_ids(table: _Table, prompts: Sequence[_Prompt], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    encoded = _encode(tokenizer, [prompt.text for prompt in prompts], table.places)
    first_text = next((prompt.text for prompt in prompts if not prompt.chat), None)
    leading = _leading_ids(tokenizer, first_text) if first_text is not None else ()
    prompt_ids = []
    for place, prompt, ids in zip(table.places, prompts, encoded, strict=True):
        if not ids:
            raise DataError(f"{place}: the tokenizer makes no token of the prompt {prompt.text!r}. Remove the row")
        begun = prompt.chat or ids[: len(leading)] == leading
        prompt_ids.append(ids if begun else leading + ids)
    return prompt_ids


def _leading_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids that the tokenizer puts before a text of its own accord (BOS); those it puts behind (EOS) have
    no place in a prompt that is to be continued."""
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    full = tokenizer(text, verbose=False)["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return tuple(full[: next((start for start in starts if full[start : start + len(bare)] == bare), 0)])


def _check_lengths(table: _Table, prompt_ids: Sequence[tuple[int, ...]], limit: int | None) -> None:
    overlong = [row for row, ids in enumerate(prompt_ids) if limit is not None and len(ids) > limit]
    if overlong:
        longest = max(len(prompt_ids[row]) for row in overlong)
        raise DataError(
            f"{table.places[overlong[0]]}: the prompt has {len(prompt_ids[overlong[0]])} tokens, more than the {limit} "
            f"allowed; {len(overlong)} of {len(prompt_ids)} prompts are too long, the longest has {longest}. Remove or "
            "shorten them, or raise data.max_prompt_length if the model's context has room"
        )


def _check_totals(
    table: _Table, prompt_ids: Sequence[tuple[int, ...]], gold_ids: Sequence[tuple[int, ...] | None], limit: int | None
) -> None:
    for row, (prompt, gold) in enumerate(zip(prompt_ids, gold_ids, strict=True)):
        if limit is not None and gold is not None and len(prompt) + len(gold) > limit:
            raise DataError(
                f"{table.places[row]}: prompt and gold have {len(prompt) + len(gold)} tokens, more than the context of "
                f"{limit}. Remove the row or give a shorter golden solution; a truncated one teaches never to stop"
            )


def _golds(table: _Table, column: str, required: bool) -> list[str | None]:
    if column == "gold" and column not in table.columns and _TRL_GOLD_COLUMN in table.columns:
        column = _TRL_GOLD_COLUMN
    golds = [_gold_text(row.get(column), f"{place}: {column!r}") for place, row in table.items()]
    missing = [row for row, gold in enumerate(golds) if gold is None]
    if not required or not missing:
        return golds
    off = "turn gold off (objective.gold.coef=0, or method=opd)"
    if column not in table.columns:
        also = f" nor TRL's {_TRL_GOLD_COLUMN!r}" if column == "gold" else ""
        raise DataError(
            f"{table.source}: no golden answers: no row has a column {column!r}{also}. {table.known(column)} "
            f"Set data.gold_column, or {off}"
        )
    raise DataError(
        f"{table.places[missing[0]]}: no golden answer in the column {column!r}; {len(missing)} of {len(golds)} rows "
        f"have none. Give or remove these rows, or {off}"
    )


def _gold_text(gold: Any, where: str) -> str | None:
    """The text of a golden answer; None if there is none or it is blank."""
    if isinstance(gold, list) and gold:
        gold = _assistant_content(gold, where)
    if gold is None or gold == []:
        return None
    if not isinstance(gold, str):
        raise DataError(f"{where} is {kind_of(gold)}. A golden answer is a string or a list of one assistant message")
    return gold if gold.strip() else None


def _assistant_content(messages: list[Any], where: str) -> Any:
    message = messages[0]
    if len(messages) != 1 or not isinstance(message, Mapping) or message.get("role") != "assistant":
        raise DataError(
            f"{where} must be a string or a list of one message of the assistant; it has {len(messages)}: "
            f"{messages!r:.200}"
        )
    dropped = [key for key, value in message.items() if value and key not in ("role", "content")]
    if dropped:
        raise DataError(
            f"{where} has {', '.join(map(repr, dropped))} beside its content, which would be lost. Write all that the "
            "student is to say into the content"
        )
    return message.get("content")


def _gold_ids(
    table: _Table, golds: Sequence[str | None], prompts: Sequence[_Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...] | None]:
    present = [row for row, gold in enumerate(golds) if gold is not None]
    ends = {chat: answer_end_id(tokenizer, chat=chat) for chat in {prompts[row].chat for row in present}}
    endings = tuple(str(tokenizer.convert_ids_to_tokens(end)) for end in ends.values())
    endings += (str(tokenizer.eos_token),) if tokenizer.eos_token else ()
    texts = [_without_ending(str(golds[row]), endings) for row in present]
    encoded = _encode(tokenizer, texts, [table.places[row] for row in present])
    gold_ids: list[tuple[int, ...] | None] = [None] * len(golds)
    for row, ids in zip(present, encoded, strict=True):
        gold_ids[row] = (*ids, ends[prompts[row].chat])
    return gold_ids


def _without_ending(gold: str, endings: tuple[str, ...]) -> str:
    """The gold without the end token that it may carry already, and without the line break behind it."""
    stripped = gold.rstrip()
    ending = next((ending for ending in endings if stripped.endswith(ending)), None)
    return gold if ending is None else stripped.removesuffix(ending)


def _gold_weights(
    table: _Table, column: str | None, gold_ids: Sequence[tuple[int, ...] | None]
) -> list[tuple[float, ...] | None]:
    if column is None:
        return [None] * len(gold_ids)
    if column not in table.columns:
        raise DataError(f"{table.source}: no column {column!r}. {table.known(column)} Set data.gold_weights_column")
    values = (row.get(column) for row in table.rows)
    return [
        None if value is None else _weights(value, gold, f"{place}: {column!r}")
        for place, value, gold in zip(table.places, values, gold_ids, strict=True)
    ]


def _weights(value: Any, gold: tuple[int, ...] | None, where: str) -> tuple[float, ...]:
    if gold is None:
        raise DataError(
            f"{where} has weights, but the row has no golden answer. Give the answer, or null for the weights"
        )
    if not isinstance(value, list) or not all(_is_weight(weight) for weight in value):
        raise DataError(
            f"{where} must be a list of finite numbers >= 0, one for each golden token; it is {value!r:.200}"
        )
    if len(value) != len(gold):
        raise DataError(
            f"{where} has {len(value)} weights for {len(gold)} golden tokens. Give one for each token, the end token "
            "included"
        )
    return tuple(float(weight) for weight in value)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _answers(table: _Table, column: str, required: bool, judged: bool) -> list[str | None]:
    if column not in table.columns and column != "answer":
        raise DataError(f"{table.source}: no column {column!r}. {table.known(column)} Set data.answer_column")
    values = [row.get(column) for row in table.rows]
    answers = [value if isinstance(value, str) else answer_text(value) for value in values]
    for place, value, answer in zip(table.places, values, answers, strict=True):
        if (required or judged) and answer is None and not (value is None or isinstance(value, float)):
            raise DataError(
                f"{place}: the answer in the column {column!r} is {kind_of(value)}, {value!r:.80}, which nothing can "
                "be compared with. Give a text or a number, or name another column with data.answer_column"
            )
    missing = [row for row, answer in enumerate(answers) if answer is None]
    if not required or not missing:
        return answers
    how = (
        "give each row an answer (an empty one, if objective.reward.function looks at none), or turn the reward off "
        "(objective.reward.coef=0)"
    )
    if column not in table.columns:
        raise DataError(
            f"{table.source}: no answers to reward: no row has a column {column!r}. {table.known(column)} Set "
            f"data.answer_column, {how}"
        )
    raise DataError(
        f"{table.places[missing[0]]}: no answer in the column {column!r}, which the reward needs; {len(missing)} of "
        f"{len(answers)} rows have none. Remove them, {how}"
    )


def _teachers(table: _Table, column: str | None, known: Collection[str]) -> list[str | None]:
    if column is None:
        return [None] * len(table.rows)
    if column not in table.columns:
        raise DataError(f"{table.source}: no column {column!r}. {table.known(column)} Set data.teacher_column")
    for place, row in table.items():
        name = row.get(column)
        if name not in known:
            close = nearest(name, known) if isinstance(name, str) else ""
            raise DataError(
                f"{place}: the column {column!r} says {name!r}, which is none of the teachers{close}; known: "
                f"{', '.join(sorted(known))}. Correct the row, or add the teacher to `teachers`"
            )
    return [str(row[column]) for row in table.rows]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], places: Sequence[Place]) -> list[tuple[int, ...]]:
    """Ids of each text, with no special tokens added; batched, for the tokenizer is fast on many texts at once."""
    encoded: list[tuple[int, ...]] = []
    for start in range(0, len(texts), _TOKENIZE_BATCH):
        chunk = slice(start, start + _TOKENIZE_BATCH)
        encoded += _encode_chunk(tokenizer, texts[chunk], places[chunk])
    return encoded


def _encode_chunk(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], places: Sequence[Place]
) -> list[tuple[int, ...]]:
    try:
        batch = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except Exception as error:  # tokenizers raises nothing more specific for a text it cannot encode
        if len(texts) > 1:
            pairs = zip(texts, places, strict=True)
            return [ids for text, place in pairs for ids in _encode_chunk(tokenizer, [text], [place])]
        raise DataError(f"{places[0]}: the tokenizer cannot encode {texts[0]!r:.200}: {error}") from error
    return [tuple(ids) for ids in batch["input_ids"]]
