"""Whether prompts and gold are what a run should learn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stableopd.config import StableOPDConfig
from stableopd.doctor.findings import Finding
from stableopd.doctor.sides import short, spread
from stableopd.health.loops import loop_mask
from stableopd.health.signals import is_repetitive
from stableopd.types import Example

_PILE_SHARE, _PILE_LEAST, _PILE_LENGTH = 0.02, 5, 64
_LOOP_SHARE = 0.5


def gold_text(tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """Gold as text, without the token that ends it."""
    ids = [list(example.gold_ids or ())[:-1] for example in examples]
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


def prompt_findings(
    config: StableOPDConfig, examples: Sequence[Example], held_out: Sequence[Example]
) -> Iterator[Finding]:
    """Too few prompts, prompts that come twice, held-out prompts that are trained on."""
    if len(examples) < config.rollout.num_prompts:
        yield Finding(
            check="num_prompts",
            danger="fatal",
            summary=f"there are {len(examples)} prompts, fewer than the {config.rollout.num_prompts} of one step",
            remedy=f"give more data or set rollout.num_prompts to at most {len(examples)}",
        )
    counts = Counter(example.prompt_ids for example in examples)
    repeated = len(examples) - len(counts)
    if repeated:
        often = max(examples, key=lambda example: counts[example.prompt_ids])
        yield Finding(
            check="duplicate_prompts",
            danger="note",
            summary=f"{repeated} of {len(examples)} prompts have come before",
            evidence=f"{counts[often.prompt_ids]} times: {short(often.prompt, 80)}",
            remedy="remove them, unless these prompts are to count more often",
            figures={"duplicate_prompts": repeated / len(examples)},
        )
    seen = [example for example in held_out if example.prompt_ids in counts]
    if seen:
        share = len(seen) / len(held_out)
        yield Finding(
            check="contamination",
            danger="problem" if share >= 0.01 else "note",
            summary=f"{len(seen)} of {len(held_out)} held-out prompts are also trained on",
            evidence=short(seen[0].prompt, 80),
            remedy="remove them from the training data: held-out accuracy would flatter",
            figures={"contamination": share},
        )


def presence_findings(config: StableOPDConfig, examples: Sequence[Example], *, has_pool: bool) -> Iterator[Finding]:
    """Gold and answers that the objective needs and rows lack."""
    without_gold = [example for example in examples if not example.gold_ids]
    if without_gold and config.objective.needs_gold and not has_pool:
        yield Finding(
            check="gold_missing",
            danger="fatal",
            summary=f"{len(without_gold)} of {len(examples)} rows have no golden solution, which method="
            f"{config.method} needs",
            evidence=f"the first is row {without_gold[0].index + 1}, column {config.data.gold_column!r}",
            remedy="give or remove these rows, set data.gold_column or data.gold_path, or turn gold off (method=opd)",
            figures={"gold_missing": len(without_gold) / len(examples)},
        )
    elif 0 < len(without_gold) < len(examples):
        yield Finding(
            check="gold_missing",
            danger="note",
            summary=f"{len(without_gold)} of {len(examples)} rows have no golden solution",
            evidence=f"the first is row {without_gold[0].index + 1}",
            remedy="nothing for this objective",
        )
    without_answer = [example for example in examples if example.answer is None]
    if without_answer and config.objective.needs_rewards:
        yield Finding(
            check="answers_missing",
            danger="fatal",
            summary=f"{len(without_answer)} of {len(examples)} rows have no answer, which the reward needs",
            evidence=f"the first is row {without_answer[0].index + 1}, column {config.data.answer_column!r}",
            remedy="give or remove these rows, set data.answer_column, or set objective.reward.coef=0",
        )


def gold_findings(
    config: StableOPDConfig, tokenizer: Any, golds: Sequence[Example], num_texts: int = 256
) -> Iterator[Finding]:
    """Gold that was cut off or repeats itself.

    Args: `golds` have gold; `num_texts` of them are read as text.
    """
    if not golds:
        return
    chosen = spread(golds, num_texts)
    texts = gold_text(tokenizer, chosen)
    yield from _truncated(golds, chosen, texts)
    yield from _repetitive(config, chosen, texts)


def _truncated(golds: Sequence[Example], chosen: Sequence[Example], texts: Sequence[str]) -> Iterator[Finding]:
    remedy = (
        "make the gold anew with a larger length limit, or remove these rows: cut gold with an end token behind it "
        "teaches to stop anywhere, without one never to stop"
    )
    lengths = np.array([len(example.gold_ids or ()) for example in golds])
    piled = _pile_up(lengths)
    if piled:
        yield Finding(
            check="gold_truncated",
            danger="problem",
            summary=f"{piled} of {len(golds)} golden solutions have exactly the greatest length: cut at a limit",
            evidence=f"{piled} of {lengths.max()} tokens, end token included; "
            f"{int(((lengths < lengths.max()) & (lengths >= 0.9 * lengths.max())).sum())} within a tenth below it",
            remedy=remedy,
            figures={"gold_truncated": piled / len(golds)},
        )
    unfinished = [row for row, text in enumerate(texts) if _is_unfinished(text)]
    if unfinished:
        share = len(unfinished) / len(texts)
        yield Finding(
            check="gold_truncated",
            danger="problem" if share >= 0.02 else "note",
            summary=f"{len(unfinished)} of {len(texts)} golden solutions break off inside a formula or block of code",
            evidence=f"row {chosen[unfinished[0]].index + 1} ends in {texts[unfinished[0]][-60:]!r}",
            remedy=remedy,
            figures={"gold_truncated": share},
        )
    boxed = [r"\boxed" in text for text in texts]
    lacking = [row for row, has in enumerate(boxed) if not has]
    if len(texts) >= 10 and 0 < len(lacking) <= 0.5 * len(texts):
        share = len(lacking) / len(texts)
        yield Finding(
            check="gold_truncated",
            danger="problem" if share >= 0.02 else "note",
            summary=f"{len(lacking)} of {len(texts)} golden solutions have no \\boxed answer, as the others do",
            evidence=f"row {chosen[lacking[0]].index + 1} ends in {texts[lacking[0]][-60:]!r}",
            remedy=remedy,
            figures={"gold_without_box": share},
        )


def _pile_up(lengths: np.ndarray) -> int:
    """Number of solutions of the greatest length, if there are far more of them than the lengths below lead to expect.

    Lengths that thin out towards their greatest have one or two there; a limit collects all that would go beyond.
    """
    top = int(lengths.max())
    if top < _PILE_LENGTH:
        return 0
    number = int((lengths == top).sum())
    below = (lengths < top) & (lengths >= 0.9 * top)
    per_length = below.sum() / max(1, top - int(np.ceil(0.9 * top)))
    many = number >= max(_PILE_LEAST, _PILE_SHARE * len(lengths)) and number >= 5 * max(1.0, per_length)
    varied = len(np.unique(lengths)) >= _PILE_LEAST
    return number if many and varied and number < 0.9 * len(lengths) else 0


def _is_unfinished(text: str) -> bool:
    """Whether a text ends inside a code block or inside the braces of its last \\boxed."""
    fences = sum(line.lstrip().startswith("```") for line in text.splitlines())
    if fences % 2:
        return True
    _, box, rest = text.rpartition(r"\boxed{")
    return bool(box) and _closing(rest) is None


def _closing(text: str) -> int | None:
    """Where the brace closes that was opened before this text; None if nowhere. Escaped braces do not count."""
    depth, escaped = 1, False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place
    return None


def _repetitive(config: StableOPDConfig, chosen: Sequence[Example], texts: Sequence[str]) -> Iterator[Finding]:
    tail, threshold = config.health.tail_chars, config.health.compression_threshold
    found = [
        row
        for row, (example, text) in enumerate(zip(chosen, texts, strict=True))
        if is_repetitive(text, tail, threshold) or _loops(example)
    ]
    if not found:
        return
    share = len(found) / len(texts)
    yield Finding(
        check="gold_repetitive",
        danger="problem" if share >= 0.01 else "note",
        summary=f"{len(found)} of {len(texts)} golden solutions repeat themselves",
        evidence=f"row {chosen[found[0]].index + 1} ends in {texts[found[0]][-60:]!r}",
        remedy="remove these rows: gold is what is to keep the student from repeating itself",
        figures={"gold_repetitive": share},
    )


def _loops(example: Example) -> bool:
    """Whether half of the gold, or more, lies in exact loops."""
    mask = loop_mask(list(example.gold_ids or ())[:-1])
    return bool(mask.size) and float(mask.mean()) >= _LOOP_SHARE
