"""Whether student and teacher read the same ids, cut text alike, and end answers alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from stableopd.doctor.findings import Finding
from stableopd.doctor.sides import Side, short, spread
from stableopd.errors import ModelError
from stableopd.vocabulary import VOCABULARY_REMEDY, compare_vocabularies, end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Numbers: 7, 42, 1234567, 3.14159, 2^10 = 1024, 1e-6",
    "  leading, double  and trailing spaces  \n\n\ttabs\t\tand\r\nline ends",
    "Üñïcödé straße café cafe\u0301 ﬁne ① ½ — “quotes” … 你好世界 こんにちは مرحبا 🙂👩‍💻",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]  # comment\n",
    r"\frac{-b \pm \sqrt{b^2-4ac}}{2a} \implies \boxed{x=\tfrac{3}{4}} $\sum_{i=1}^{n} i$",
    "don't WON'T I'm they'll O'Neill's CamelCaseWord snake_case_word ALLCAPS http://a.b/c?d=e&f#g",
    "aaaaaaaaaaaaaaaa ---------------- ================ 0000000000000000",
)
"""Texts that tokenizers cut differently: numbers, white space, Unicode forms, code, LaTeX, contractions."""

_NUM_DATA_TEXTS = 32
_LONGEST_TEXT = 2_000


def token_findings(student: Side, teacher: Side, texts: Sequence[str], used_ids: frozenset[int]) -> Iterator[Finding]:
    """What differs between the tokenizers of a pair.

    Args:
        texts: prompts and gold, beside the probe texts.
        used_ids: ids that occur in prompts, or end answers.
    """
    assert student.tokenizer is not None
    assert teacher.tokenizer is not None
    changed = _changed_parts(student.tokenizer, teacher.tokenizer)
    if changed == [] and _added(student.tokenizer) == _added(teacher.tokenizer):
        return  # byte for byte the same
    found = compare_vocabularies(student.tokenizer, teacher.tokenizer, teacher_name=teacher.name)
    if found.differences:
        yield Finding(
            check="vocabulary",
            danger="fatal",
            summary=f"the ids that the student samples mean another text to the {teacher.name}",
            evidence=f"{found.num_student} and {found.num_teacher} text tokens: {'; '.join(found.differences)}",
            remedy=VOCABULARY_REMEDY,
        )
    if found.renamed:
        yield _added_tokens(student, teacher, found.renamed, used_ids)
    if not found.differences:
        yield from _cutting(student, teacher, texts, changed)


def _added_tokens(student: Side, teacher: Side, renamed: Sequence[str], used_ids: frozenset[int]) -> Finding:
    assert student.tokenizer is not None
    ids = student.tokenizer.get_added_vocab()
    used = [token for token in renamed if ids.get(token) in used_ids]
    shown = ", ".join(map(repr, (used or list(renamed))[:5]))
    if not used:
        return Finding(
            check="added_tokens",
            danger="note",
            summary=f"{len(renamed)} added tokens are not the same in the student and the {teacher.name}",
            evidence=f"{shown}; none of them is in a prompt or ends an answer",
            remedy="nothing, as long as prompts and answers do without them",
        )
    return Finding(
        check="added_tokens",
        danger="problem",
        summary=f"the {teacher.name} reads {len(used)} added tokens of the prompts or answer ends as other tokens",
        evidence=f"{shown}; {len(renamed)} added tokens differ in all",
        remedy="give prompts as plain text, or give both models the turn markers that the teacher was trained with",
        figures={"added_tokens_used": len(used)},
    )


# ------------------------------------------------------------------------------------ how text is cut


def _cutting(student: Side, teacher: Side, texts: Sequence[str], changed: list[str] | None) -> Iterator[Finding]:
    assert student.tokenizer is not None
    assert teacher.tokenizer is not None
    if changed == []:
        return
    probes = [*PROBES, *(text[:_LONGEST_TEXT] for text in spread(texts, _NUM_DATA_TEXTS))]
    differing = [text for text in probes if _ids(student.tokenizer, text) != _ids(teacher.tokenizer, text)]
    changed = changed or []
    changed = [part for part in changed if part != "vocabulary"]  # ids were compared one by one
    by_model = "model" in changed or not changed
    if not differing and not changed:
        return
    seen = (
        f"{len(differing)} of {len(probes)} texts are cut differently, such as "
        f"{_first_difference(student, teacher, differing[0])}"
        if differing
        else f"none of {len(probes)} texts shows it"
    )
    where = f"; tokenizer.json differs in {', '.join(changed)}" if changed else ""
    if by_model:
        yield Finding(
            check="tokenization",
            danger="fatal" if differing else "problem",
            summary=f"the student's tokenizer cuts text otherwise than the {teacher.name}'s (other merges or scores)",
            evidence=seen + where,
            remedy="use one tokenizer for both: copy the teacher's tokenizer.json into the student's folder if the "
            "student may learn it, or take a teacher with the student's tokenizer",
            figures={"texts_cut_differently": len(differing) / len(probes)},
        )
        return
    yield Finding(
        check="normaliser",
        danger="problem" if differing else "note",
        summary=f"the student's tokenizer prepares text otherwise than the {teacher.name}'s ({', '.join(changed)})",
        evidence=seen + where,
        remedy="take the tokenizer.json of the model that was trained with more care for both, or clean the texts so "
        "that the difference does not show",
        figures={"texts_cut_differently": len(differing) / len(probes)},
    )


def _changed_parts(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str] | None:
    """Which parts of tokenizer.json that decide how text is cut differ; None where that cannot be looked at."""
    mine, theirs = getattr(student, "backend_tokenizer", None), getattr(teacher, "backend_tokenizer", None)
    if not isinstance(mine, Tokenizer) or not isinstance(theirs, Tokenizer):
        return None
    changed = [
        name for name in ("normalizer", "pre_tokenizer") if _state(getattr(mine, name)) != _state(getattr(theirs, name))
    ]
    # Comparing bytes is cheap; reading 150,000 merges is not, and most pairs share them to the letter.
    if _state(mine.model) != _state(theirs.model):
        changed += ["model"] if _cutting_rules(mine) != _cutting_rules(theirs) else ["vocabulary"]
    return changed


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}


def _state(part: Any) -> bytes | None:
    return None if part is None else part.__getstate__()


def _cutting_rules(backend: Tokenizer) -> dict[str, Any]:
    """The model of a tokenizer without its vocabulary: type, merges, options."""
    model = json.loads(backend.model.__getstate__())
    return {key: value for key, value in model.items() if key != "vocab"}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Ids of a text; None where the tokenizer refuses it, as one without an unknown token may."""
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception:  # tokenizers raises nothing more specific for a text it cannot encode
        return None


def _first_difference(student: Side, teacher: Side, text: str) -> str:
    assert student.tokenizer is not None
    assert teacher.tokenizer is not None
    mine, theirs = _ids(student.tokenizer, text), _ids(teacher.tokenizer, text)
    if mine is None or theirs is None:
        refuses = "student" if mine is None else teacher.name
        return f"{short(text, 60)}, which the {refuses}'s tokenizer refuses"
    both = zip(mine, theirs, strict=False)
    start = next((place for place, (left, right) in enumerate(both) if left != right), min(len(mine), len(theirs)))
    shown = [
        " ".join(map(repr, side.tokenizer.convert_ids_to_tokens(ids[start : start + 4])))
        for side, ids in ((student, mine), (teacher, theirs))
        if side.tokenizer is not None
    ]
    return f"{short(text, 60)} at token {start}: {shown[0] or 'nothing'} / {shown[1] or 'nothing'}"


# ------------------------------------------------------------------------------------ sizes


def size_findings(student: Side, teachers: Sequence[Side], num_ids: int) -> Iterator[Finding]:
    """Embeddings that are too few for the ids that will be drawn, or padded to another number."""
    for side in (student, *teachers):
        rows = side.num_embeddings
        if rows is None:
            continue
        if rows < num_ids:
            yield Finding(
                check="vocabulary_size",
                danger="fatal",
                summary=f"the {side.name} has {rows} embeddings, fewer than the {num_ids} ids of the student's "
                "tokenizer",
                evidence=f"the first id without an embedding is {student.named([rows])}",
                remedy="model.resize_token_embeddings(len(tokenizer)) and save it again, or take the tokenizer that "
                f"the {side.name} was trained with",
                figures={"embeddings": rows, "ids": num_ids},
            )
        elif side is not student and student.num_embeddings is not None and rows != student.num_embeddings:
            yield Finding(
                check="vocabulary_padding",
                danger="note",
                summary=f"student and {side.name} pad their embeddings to different sizes",
                evidence=f"{student.num_embeddings} and {rows} embeddings for {num_ids} ids",
                remedy="nothing: what lies beyond the ids is never drawn nor scored",
            )


# ------------------------------------------------------------------------------------ ends


def end_findings(student: Side, stop_ids: Sequence[int], num_ids: int) -> Iterator[Finding]:
    """Ends of the student's answers: none at all, ids that do not exist, and padding that is the end token."""
    assert student.tokenizer is not None
    try:
        ends = end_token_ids(student.tokenizer, student.generation_config)
    except ModelError as error:
        if not student.tokenizer.eos_token_id and not stop_ids:
            yield Finding(
                check="no_end_token",
                danger="fatal",
                summary="nothing ends an answer of the student: every rollout would run to the length limit",
                evidence=str(error).split(". ")[0],
                remedy="set tokenizer.eos_token and save the tokenizer again, or eos_token_id in the student's "
                "generation_config.json; rollout.stop_token_ids ends rollouts but not gold",
            )
        return
    beyond = sorted(end for end in (*ends, *stop_ids) if end >= num_ids)
    if beyond:
        yield Finding(
            check="end_token_unknown",
            danger="problem",
            summary="ids that are to end answers are beyond the student's vocabulary and are never drawn",
            evidence=f"ids {', '.join(map(str, beyond))}; the tokenizer has {num_ids} ids",
            remedy="correct eos_token_id in the student's generation_config.json, or rollout.stop_token_ids",
        )
    if student.tokenizer.pad_token_id is not None and student.tokenizer.pad_token_id in ends:
        yield Finding(
            check="padding_token",
            danger="note",
            summary="the student's padding token is one that ends answers",
            evidence=student.named([student.tokenizer.pad_token_id]),
            remedy="nothing here, where masks come from lengths; elsewhere it hides the end of answers from the loss",
        )


def pair_end_findings(student: Side, teacher: Side, stop_ids: Sequence[int], *, chat: bool) -> Iterator[Finding]:
    """Ends of the teacher's answers at which the student's rollouts would go on."""
    assert teacher.tokenizer is not None
    ends = student.end_ids | frozenset(stop_ids)
    theirs = teacher.end_ids
    if not ends or not theirs:
        return
    missing = sorted(theirs - ends)
    setting = f"rollout.stop_token_ids={json.dumps(sorted({*stop_ids, *missing})).replace(' ', '')}"
    remedy = (
        f"set {setting}, or add these ids to eos_token_id in the student's generation_config.json; end gold in the "
        f"{teacher.name}'s token too (tokenizer.eos_token of the student)"
    )
    evidence = f"rollouts end at {student.named(ends)}; the {teacher.name} ends at {teacher.named(theirs)}"
    main = teacher.main_end(chat=chat)
    habit = "" if main is None else f", by habit with {teacher.named([main])}"
    if not ends & theirs or (main in missing and len(ends) == 1):
        yield Finding(
            check="end_tokens",
            danger="fatal",
            summary=f"the {teacher.name} does not end its answers with a token that ends the student's rollouts: it "
            "teaches the student not to stop",
            evidence=evidence + habit,
            remedy=remedy,
        )
    elif main in missing:
        yield Finding(
            check="end_tokens",
            danger="problem",
            summary=f"rollouts go on after the token that the {teacher.name} ends its answers with",
            evidence=evidence + habit,
            remedy=remedy,
        )
    elif missing:
        yield Finding(
            check="end_tokens",
            danger="note",
            summary=f"the {teacher.name} has more end tokens than end the student's rollouts",
            evidence=evidence,
            remedy=f"nothing if the {teacher.name} seldom uses them; else set {setting}",
        )
