"""The paper's data: one golden solution per prompt of OpenR1-Math-220k, split for cold start, OPD and evaluation.

Source: Luo et al. 2026, arXiv 2604.08527, set-up of the experiments. Repetition is checked as well: the paper
asks it of golden solutions without saying where.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stableopd.benchmarking.registry import INSTRUCTION, with_instruction
from stableopd.curation.cards import Card, histogram, quantiles
from stableopd.curation.journal import Journal
from stableopd.curation.plain import plain_row
from stableopd.curation.screening import (
    DROP_REASONS,
    Choose,
    Generation,
    Screening,
    chosen,
    drop_reason,
    generations_of,
    is_unfinished,
)
from stableopd.curation.sources import Source, batched
from stableopd.curation.splitting import draw, prompt_key
from stableopd.errors import DataError
from stableopd.lines import json_line
from stableopd.protocols import Judge
from stableopd.reading import Place, Row, answer_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = "open-r1/OpenR1-Math-220k:default"
PAPER_COLD_START_FRACTION = 33_000 / 46_000
COLUMNS = (
    "problem",
    "answer",
    "uuid",
    "source",
    "problem_type",
    "is_reasoning_complete",
    "generations",
    "correctness_math_verify",
    "finish_reasons",
)
KEPT = "kept.log"
_SEEN = "seen.log"
_ROWS_AT_A_TIME = 64
_BATCHES_PER_COMMIT = 4
ROW_OUTCOMES = ("no_problem", "long_prompt", "no_generations", "no_answer", "no_gold", "duplicate", "kept")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows of the data set become prompts with gold."""

    screening: Screening = field(default_factory=Screening)
    judge: Literal["stored", "math"] = "stored"
    choose: Choose = "shortest"
    seed: int = 0
    cold_start_fraction: float = PAPER_COLD_START_FRACTION
    num_cold_start: int | None = None
    """Exactly so many prompts for the cold start, in place of a share."""
    num_heldout: int = 500
    """Prompts kept aside to evaluate on, a tenth of all at most."""
    prompt_format: Literal["chat", "text"] = "chat"
    instruction: str = INSTRUCTION
    """Put behind each problem, on a line of its own; empty: nothing."""
    max_prompt_tokens: int | None = None
    """As the student reads it, its chat template and the like included."""
    duplicates: Literal["first", "keep"] = "first"
    """Of rows with the same prompt, take the first that has gold, or all of them; in one part in either case."""
    limit: int | None = None
    """Only the first so many rows."""

    def to_json(self) -> dict[str, Any]:
        settings = asdict(self)
        return {**settings.pop("screening"), **settings}


@dataclass(kw_only=True)
class Tally:
    """What has been seen so far."""

    rows: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    """Rows that are kept, with and without one."""
    generations: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Tally:
        counts = {name: Counter(state.get(name, {})) for name in ("rows", "answers", "generations")}
        lengths = {name: histogram(counts) for name, counts in state.get("lengths", {}).items()}
        return cls(**counts, lengths=lengths)

    def to_json(self) -> dict[str, Any]:
        lengths = {name: dict(counts) for name, counts in self.lengths.items()}
        counts = {"rows": self.rows, "answers": self.answers, "generations": self.generations}
        return {**{name: dict(counter) for name, counter in counts.items()}, "lengths": lengths}

    def measure(self, name: str, length: int) -> None:
        self.lengths.setdefault(name, Counter())[length] += 1


def select(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    journal: Journal,
    *,
    judge: Judge | None,
    on_rows: Callable[[int], None] = lambda number: None,
) -> Tally:
    """Reads all rows that the journal has not seen and adds those with gold to its file `KEPT`.

    A line of it is `DRAW TOKENS ROW`: the draw that decides the part, the length of gold, the row as it is written.

    Args: `judge` is asked where `recipe.judge` is not `stored`; `on_rows` is told how many rows have been read in all.

    Raises: DataError for a row that cannot be understood, or columns that are missing.
    """
    check_columns(source.columns(), recipe)
    tally = Tally.of(journal.state)
    seen = {line.strip() for line in journal.lines(_SEEN)}
    on_rows(tally.rows["read"])
    if not journal.state.get("selected"):
        rows = _limited(source.rows(tally.rows["read"]), recipe.limit, tally.rows["read"])
        for number, batch in enumerate(batched(rows, _ROWS_AT_A_TIME), start=1):
            _take(batch, tokenizer, recipe, judge, tally, seen, journal)
            if number % _BATCHES_PER_COMMIT == 0:
                journal.commit(tally.to_json())
            on_rows(tally.rows["read"])
        journal.commit({**tally.to_json(), "selected": True})
    return tally


def check_columns(columns: Sequence[str], recipe: Recipe) -> None:
    needed = ["problem", "generations", "correctness_math_verify" if recipe.judge == "stored" else "answer"]
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise DataError(
            f"the source lacks the columns {', '.join(map(repr, lacking))} of OpenR1-Math-220k; it has "
            f"{', '.join(map(repr, columns)) or 'none'}. Correct --source"
            + (", or judge anew with --judge math" if lacking == ["correctness_math_verify"] else "")
        )


def _limited(rows: Iterator[tuple[Place, Row]], limit: int | None, done: int) -> Iterator[tuple[Place, Row]]:
    for number, placed in enumerate(rows, start=done + 1):
        if limit is not None and number > limit:
            return
        yield placed


def _take(
    batch: Sequence[tuple[Place, Row]],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    judge: Judge | None,
    tally: Tally,
    seen: set[str],
    journal: Journal,
) -> None:
    generations = [generations_of(row, place) for place, row in batch]
    lengths = _token_counts([one for several in generations for one in several], tokenizer)
    for (place, row), several in zip(batch, generations, strict=True):
        counted = [next(lengths) for _ in several]
        tally.rows["read"] += 1
        problem = row.get("problem")
        if not isinstance(problem, str) or not problem.strip():
            tally.rows["no_problem"] += 1
            continue
        if (
            recipe.max_prompt_tokens is not None
            and _prompt_tokens(problem, recipe, tokenizer) > recipe.max_prompt_tokens
        ):
            tally.rows["long_prompt"] += 1
            continue
        key = prompt_key(problem)
        gold = _gold(row, key, several, counted, recipe, judge, tally)
        if isinstance(gold, str):
            tally.rows[gold] += 1
        elif key in seen and recipe.duplicates == "first":
            tally.rows["duplicate"] += 1
        else:
            if key not in seen:
                seen.add(key)
                journal.append(_SEEN, f"{key}\n")
            tally.rows["kept"] += 1
            tally.answers["with" if answer_text(row.get("answer")) else "without"] += 1
            tally.measure("gold", counted[gold] or 0)
            record = _record(row, place, several[gold].text, gold, counted[gold] or 0, recipe)
            part = draw(recipe.seed, "split", key)
            journal.append(KEPT, f"{part} {counted[gold]} {json_line(record)}")


def _token_counts(generations: Sequence[Generation], tokenizer: PreTrainedTokenizerBase) -> Iterator[int | None]:
    """Tokens of each generation, no special tokens added; None where that does not matter or the tokenizer fails."""
    finished = [is_unfinished(one) is None for one in generations]
    counts = iter(
        _counted([one.text for one, is_done in zip(generations, finished, strict=True) if is_done], tokenizer)
    )
    return iter([next(counts) if is_done else None for is_done in finished])


def _counted(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    if not texts:
        return []
    try:
        batch = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except Exception:  # tokenizers raises nothing more specific for a text it cannot encode
        return [None] if len(texts) == 1 else [count for text in texts for count in _counted([text], tokenizer)]
    return [len(ids) for ids in batch["input_ids"]]


def _gold(
    row: Row,
    key: str,
    generations: Sequence[Generation],
    lengths: Sequence[int | None],
    recipe: Recipe,
    judge: Judge | None,
    tally: Tally,
) -> int | str:
    """The index of the golden generation, or why there is none."""
    if not generations:
        return "no_generations"
    answer = answer_text(row.get("answer"))
    if judge is not None and answer is None:
        return "no_answer"
    candidates = []
    for index, (generation, length) in enumerate(zip(generations, lengths, strict=True)):
        reason = drop_reason(generation, length, recipe.screening, judge, answer)
        tally.generations[reason or "fit"] += 1
        if length is not None:
            tally.measure("complete generations", length)
            if reason is None:
                candidates.append((index, length))
    return chosen(candidates, recipe.choose, seed=recipe.seed, key=key) if candidates else "no_gold"


def _asked(problem: str, recipe: Recipe) -> str:
    """The problem with the instruction behind it."""
    return with_instruction(problem, recipe.instruction)


def _prompt_tokens(problem: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int:
    """Length of the prompt as a run encodes it; 0 for a text that the tokenizer does not take."""
    text = _asked(problem, recipe)
    in_template = recipe.prompt_format == "chat" and bool(tokenizer.chat_template)
    if in_template:
        turns = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    try:
        return len(tokenizer(text, add_special_tokens=not in_template, verbose=False)["input_ids"])
    except Exception:  # tokenizers raises nothing more specific for a text it cannot encode
        return 0


def _record(row: Row, place: Place, gold: str, index: int, num_tokens: int, recipe: Recipe) -> dict[str, Any]:
    """A row as it is written: what training reads, and where it comes from."""
    problem = row["problem"].strip()
    text = _asked(problem, recipe)
    record = {
        "prompt": [{"role": "user", "content": text}] if recipe.prompt_format == "chat" else text,
        "gold": gold,
        "answer": answer_text(row.get("answer")),
        "problem": problem,
        "source_id": row.get("uuid") or f"row-{place.number}",
        "source": row.get("source"),
        "problem_type": row.get("problem_type"),
        "generation": index,
        "gold_tokens": num_tokens,
    }
    return plain_row(record, place)


def card_of(
    tally: Tally,
    recipe: Recipe,
    source: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
    lengths: Mapping[str, Counter[int]],
) -> Card:
    """The data card. `lengths` are those of gold, by part."""
    rows = {name: tally.rows[name] for name in ("read", *ROW_OUTCOMES)}
    generations = {"all": tally.generations.total()} | {
        name: tally.generations[name] for name in ("fit", *DROP_REASONS)
    }
    answers = {name: tally.answers[name] for name in ("with", "without")}
    return Card(
        title="Prompts with golden solutions from OpenR1-Math-220k",
        command="stableopd data openr1",
        settings=recipe.to_json(),
        source=source,
        counts={"Rows": rows, "Generations": generations, "Answers of kept rows": answers},
        lengths={name: quantiles(counts) for name, counts in {**tally.lengths, **lengths}.items() if counts},
        outputs=outputs,
        notes=(
            "A row is counted once: kept, or under the first reason that held. A generation is counted under the first "
            "reason in the order of the table; those of no_problem, long_prompt and no_answer are not looked at.",
        ),
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the vocabulary, which tells tokenizers of one name apart."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()
