"""What a tokenizer's ids mean to a run: which end an answer, which pad, and whether two models share them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from stableopd.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "stableopd-probe"
_NUM_SHOWN = 5


class VocabularyWarning(UserWarning):
    """Student and teacher name some added tokens differently."""


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> frozenset[int]:
    """Every id that ends an answer.

    The union of the tokenizer's EOS, of `generation_config.eos_token_id` (one id or several), and of
    the chat template's end-of-turn token. Base and instruct models of one family often differ in just
    these, so that a rollout must stop at any of them.

    Raises:
        ModelError: nothing ends an answer, or the chat template cannot be rendered.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list | tuple) else [configured]
    wrong = [end for end in several if end is not None and not isinstance(end, int)]
    if wrong:
        raise ModelError(f"eos_token_id in generation_config.json is {wrong[0]!r}, and must be an id or a list of ids")
    ends = frozenset(int(end) for end in (tokenizer.eos_token_id, turn_end_id(tokenizer), *several) if end is not None)
    if not ends:
        raise ModelError(
            f"the tokenizer {_name(tokenizer)} has no EOS token and its chat template ends no turn, so that no answer "
            "could ever end. Set tokenizer.eos_token to the token that ends an answer and save the tokenizer again, "
            "or set eos_token_id in the model's generation_config.json"
        )
    return ends


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that ends an assistant's turn in the chat template; None where there is none.

    Definition: the first special token after the assistant's content, with nothing but white space
    between, in a conversation of a user and an assistant; if that conversation just stops there, in
    one that the user continues (templates in which the next speaker's token ends the turn).

    Raises:
        ModelError: the chat template cannot be rendered.
    """
    if not tokenizer.chat_template:
        return None
    special = _special_ids(tokenizer)
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    for continuation in ([], [{"role": "user", "content": "question"}]):
        rendered = _render(tokenizer, conversation + continuation)
        _, found, tail = rendered.rpartition(_PROBE)
        end = _first_special(tokenizer, tail, special) if found else None
        if end is not None:
            return end
    return None


def answer_end_id(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> int:
    """Id that a golden answer ends in: the end of a turn after a chat prompt, EOS after a text prompt.

    A chat template without an end-of-turn token falls back on EOS.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    end = turn_end_id(tokenizer) if chat else None
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        kind = "chat" if chat else "text"
        raise ModelError(
            f"the tokenizer {_name(tokenizer)} has no EOS token, so that golden answers to {kind} prompts cannot be "
            "ended and would teach the student to go on for ever. Set tokenizer.eos_token to the token that ends an "
            "answer and save the tokenizer again"
        )
    return int(end)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to fill the padding with: the tokenizer's own, or else an end token; masks never depend on it.

    Raises:
        ModelError: the tokenizer has neither.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return min(end_token_ids(tokenizer))


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids that sampling may use: the largest id plus one, added tokens included.

    Rows of the embedding beyond it are padding that no text ever trained.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_same_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    student_name: str = "student",
    teacher_name: str = "teacher",
) -> None:
    """Returns if both tokenizers map the same tokens to the same ids; how far embeddings are padded is no matter.

    Families rename their added tokens (turn markers and the like) while the text tokens stay the same. Such a pair
    can be distilled; the difference is a `VocabularyWarning`.

    Raises:
        ModelError: text tokens differ; names the first differing tokens by id, and counts all of them.
    """
    found = compare_vocabularies(
        student_tokenizer, teacher_tokenizer, student_name=student_name, teacher_name=teacher_name
    )
    if found.differences:
        raise ModelError(
            f"the vocabularies of the {student_name} ({found.num_student} tokens) and the {teacher_name} "
            f"({found.num_teacher} tokens) differ: {'; '.join(found.differences)}. The {teacher_name} scores the ids "
            f"that the {student_name} samples, and they would mean another text to it. {VOCABULARY_REMEDY}"
        )
    if found.renamed:
        shown = ", ".join(map(repr, found.renamed[:_NUM_SHOWN]))
        warnings.warn(
            f"{len(found.renamed)} added tokens differ between the {student_name} and the {teacher_name} ({shown}, "
            f"...): the {teacher_name} reads the {student_name}'s turn markers as other tokens. Prompts of plain text "
            "avoid it",
            VocabularyWarning,
            stacklevel=2,
        )


VOCABULARY_REMEDY = (
    "Take a student and a teacher of one family, or give both the same tokenizer if they were trained with it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyDifference:
    """Where two vocabularies differ."""

    num_student: int
    """Tokens of the student; where the vocabularies differ, without the added ones."""
    num_teacher: int
    differences: tuple[str, ...]
    """What is wrong with text tokens, in words; empty where they are the same."""
    renamed: tuple[str, ...]
    """Added tokens that the other side lacks, or gives another id."""


def compare_vocabularies(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    student_name: str = "student",
    teacher_name: str = "teacher",
) -> VocabularyDifference:
    """Which tokens have other ids, or are missing, on either side; names stand in what it says of them."""
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student == teacher:
        return VocabularyDifference(num_student=len(student), num_teacher=len(teacher), differences=(), renamed=())
    added = set(student_tokenizer.get_added_vocab()) | set(teacher_tokenizer.get_added_vocab())
    renamed = sorted(token for token in added if student.get(token) != teacher.get(token))
    student = {token: index for token, index in student.items() if token not in added}
    teacher = {token: index for token, index in teacher.items() if token not in added}
    moved = [token for token in _by_id(student) if token in teacher and teacher[token] != student[token]]
    differences = (
        _difference("have another id", [f"{token!r} ({student[token]} / {teacher[token]})" for token in moved]),
        _difference(f"are unknown to the {teacher_name}", _missing(student, teacher)),
        _difference(f"are unknown to the {student_name}", _missing(teacher, student)),
    )
    return VocabularyDifference(
        num_student=len(student),
        num_teacher=len(teacher),
        differences=tuple(difference for difference in differences if difference),
        renamed=tuple(renamed),
    )


def _difference(what: str, tokens: list[str]) -> str:
    if not tokens:
        return ""
    more = f" and {len(tokens) - _NUM_SHOWN} more" if len(tokens) > _NUM_SHOWN else ""
    return f"{len(tokens)} {what}: {', '.join(tokens[:_NUM_SHOWN])}{more}"


def _missing(present: Mapping[str, int], absent: Mapping[str, int]) -> list[str]:
    return [f"{token!r} ({present[token]})" for token in _by_id(present) if token not in absent]


def _by_id(vocabulary: Mapping[str, int]) -> list[str]:
    return sorted(vocabulary, key=lambda token: vocabulary[token])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(
            f"the chat template of the tokenizer {_name(tokenizer)} cannot render a user's and an assistant's turn "
            f"({error}), so that the token that ends an answer is unknown. Correct tokenizer.chat_template, or set it "
            "to None if all prompts are plain text"
        ) from error


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(added) | frozenset(tokenizer.all_special_ids)


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str, special: frozenset[int]) -> int | None:
    """The first token of `text` if it is special; white space before it does not count."""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in special:
            return int(token)
        if str(tokenizer.decode([token])).strip():
            return None
    return None


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "(unnamed)"
