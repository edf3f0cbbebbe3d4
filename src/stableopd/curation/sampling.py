"""Golden solutions by rejection sampling: which completions to draw next, and what is known of those drawn.

Everything drawn is kept in a journal, one line a completion. What is drawn next follows from the journal alone, so that
work that was stopped draws the same completions as work that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from stableopd.curation.journal import Journal
from stableopd.curation.screening import Choose, chosen, judged_wrong
from stableopd.curation.sources import batched
from stableopd.curation.splitting import draw, prompt_key
from stableopd.errors import DataError
from stableopd.evaluate import Completion, decode
from stableopd.health.signals import COMPRESSION_THRESHOLD, TAIL_CHARS, is_repetitive
from stableopd.lines import json_line
from stableopd.protocols import Judge, RolloutEngine
from stableopd.reading import answer_text
from stableopd.types import Example, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES = "samples.log"


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """How completions are drawn and which are kept."""

    num_samples: int = 4
    """Most completions for a prompt."""
    choose: Choose = "first"
    """`first` stops at the first fit completion of a prompt; the others draw all of them and then choose."""
    tail_chars: int = TAIL_CHARS
    compression_threshold: float = COMPRESSION_THRESHOLD
    batch_prompts: int = 256
    """Prompts answered together; changes memory and speed."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of the teacher."""

    prompt: int
    """Position of its prompt."""
    number: int
    """From 0: which of the prompt's completions."""
    text: str
    num_tokens: int
    """The end token included."""
    reason: str | None
    """Why it cannot be gold; None: it can."""


def sample_gold(
    engine: RolloutEngine,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    rejection: Rejection,
    judge: Judge,
    journal: Journal,
    *,
    end_ids: frozenset[int],
    on_prompts: Callable[[int], None] = lambda number: None,
) -> None:
    """Draws completions in rounds until each prompt has what it needs, and keeps them in the journal.

    Prompts are taken a batch at a time; a round draws one completion for each of them that still needs one.

    Args: `on_prompts` is told how many prompts are done.

    Holds: a completion depends on (sampling.seed, prompt, its number) and the teacher, up to rounding of the forward
        pass, which may differ with `batch_prompts`. Equal prompts get equal completions.
    """
    drawn: dict[int, list[Sample]] = {}
    for sample in samples_of(journal):
        drawn.setdefault(sample.prompt, []).append(replace(sample, text=""))
    named = [replace(example, index=_name(example, sampling.seed)) for example in examples]
    done = 0
    on_prompts(done)
    for batch in batched(range(len(examples)), rejection.batch_prompts):
        for number in range(rejection.num_samples):
            if any(len(drawn.get(prompt, ())) > number for prompt in batch):
                continue  # this round is in the journal already
            open_prompts = [prompt for prompt in batch if not _is_done(drawn.get(prompt, ()), rejection)]
            if not open_prompts:
                break
            once = replace(sampling, num_generations=1)
            rollouts = engine.generate([named[prompt] for prompt in open_prompts], once, step=number)
            completions = decode(rollouts, [examples[prompt] for prompt in open_prompts], tokenizer, end_ids)
            for prompt, completion in zip(open_prompts, completions, strict=True):
                sample = _judged(prompt, number, completion, rejection, judge)
                drawn.setdefault(prompt, []).append(replace(sample, text=""))
                journal.append(_SAMPLES, json_line(asdict(sample)))
            journal.commit({"drawn": True})
            on_prompts(done + sum(_is_done(drawn.get(prompt, ()), rejection) for prompt in batch))
        done += len(batch)
        on_prompts(done)
        for prompt in batch:
            drawn.pop(prompt, None)


def _name(example: Example, seed: int) -> int:
    """What names a prompt's random numbers: its text, so that they do not depend on the other rows."""
    return draw(seed, "gold", prompt_key(example.prompt))


def _is_done(samples: Sequence[Sample], rejection: Rejection) -> bool:
    found = rejection.choose == "first" and any(sample.reason is None for sample in samples)
    return found or len(samples) >= rejection.num_samples


def _judged(prompt: int, number: int, completion: Completion, rejection: Rejection, judge: Judge) -> Sample:
    return Sample(
        prompt=prompt,
        number=number,
        text=completion.text,
        num_tokens=completion.num_tokens,
        reason=_reason(completion, rejection, judge),
    )


def _reason(completion: Completion, rejection: Rejection, judge: Judge) -> str | None:
    if completion.finish_reason != "stop":
        return "truncated"
    if not completion.text.strip():
        return "not_text"
    if is_repetitive(completion.text, rejection.tail_chars, rejection.compression_threshold):
        return "repetitive"
    return judged_wrong(completion.text, str(completion.example.answer), judge)


def samples_of(journal: Journal) -> Iterator[Sample]:
    """All completions drawn so far, those of a batch of prompts together, round by round."""
    for line in journal.lines(_SAMPLES):
        yield Sample(**json.loads(line))


def golden(samples: Iterable[Sample], examples: Sequence[Example], choose: Choose, seed: int) -> dict[int, Sample]:
    """The sample that becomes the gold of each prompt that has a fit one."""
    fit: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.reason is None:
            fit.setdefault(sample.prompt, []).append(sample)
    found = {}
    for prompt, several in fit.items():
        candidates = [(sample.number, sample.num_tokens) for sample in several]
        number = chosen(candidates, choose, seed=seed, key=prompt_key(examples[prompt].prompt))
        found[prompt] = next(sample for sample in several if sample.number == number)
    return found


def check_answers(rows: Sequence[dict[str, Any]], places: Sequence[object], column: str) -> None:
    """Raises: DataError for the first row without an answer to compare with."""
    for row, place in zip(rows, places, strict=True):
        if answer_text(row.get(column)) is None:
            held = f" (it holds {row[column]!r:.80})" if row.get(column) is not None else ""
            raise DataError(
                f"{place}: no answer in the column {column!r}{held}, which the judge compares completions with. Give a "
                "text or a number, or remove the row, or name another column with data.answer_column=..."
            )
