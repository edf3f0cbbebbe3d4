"""Benchmarks as lists of questions with answers: from the hub, from a copy of it, or from a file of one's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.benchmarking.registry import REGISTRY, BenchmarkSpec, canonical, plain_answer, spec_of, with_instruction
from stableopd.errors import ConfigError, DataError
from stableopd.names import nearest
from stableopd.reading import Place, Rows, read_rows

QUESTION_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "final_answer")
"""Columns looked for in a file of one's own, in this order."""

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question of a benchmark. `prompt` is text, or chat messages."""

    id: str
    prompt: Prompt
    answer: str
    place: Place
    """Where it was read, for errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A benchmark, ready to be asked."""

    name: str
    problems: Sequence[Problem]
    num_samples: int = 1
    """Answers that each problem is usually given."""
    is_registered: bool = False
    """Of the registry: its questions are asked with an instruction (`with_instruction`)."""

    def rows(self, *, chat: bool) -> Rows:
        """Rows of data: the prompt as text or, with `chat`, as a conversation of one turn; and the answer."""
        rows = []
        for problem in self.problems:
            prompt = problem.prompt
            if isinstance(prompt, str):
                text = with_instruction(prompt) if self.is_registered else prompt
                prompt = [{"role": "user", "content": text}] if chat else text
            rows.append((problem.place, {"prompt": prompt, "answer": problem.answer}))
        return Rows(rows)

    def digest(self) -> str:
        """A short digest of questions and answers, in their order."""
        rows = [(problem.id, problem.prompt, problem.answer) for problem in self.problems]
        return hashlib.blake2b(json.dumps(rows, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_benchmarks(given: Sequence[str], **options: Any) -> list[Benchmark]:
    """Several benchmarks (`load_benchmark`), each under a name of its own.

    Raises: ConfigError, too, when two have one name: their results would not be told apart.
    """
    found: dict[str, tuple[str, Benchmark]] = {}
    for one in given:
        benchmark = load_benchmark(one, **options)
        if benchmark.name in found:
            other, _ = found[benchmark.name]
            if one == other:
                raise ConfigError(f"the benchmark {one!r} is given twice; leave one out")
            raise ConfigError(
                f"the benchmarks {other!r} and {one!r} are both called {benchmark.name!r}, and their results would not "
                "be told apart. Rename one, or ask them in two calls"
            )
        found[benchmark.name] = one, benchmark
    return [benchmark for _, benchmark in found.values()]


def load_benchmark(
    given: str,
    *,
    split: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    num_problems: int | None = None,
) -> Benchmark:
    """A benchmark of the registry, a local copy of one (`math500=copy.parquet`), or data of one's own: a JSONL, JSON or
    Parquet file, a folder of them, or a dataset on the hub.

    Args:
        split: of a folder or a dataset on the hub; the registry's benchmarks have theirs.
        question_column, answer_column: in place of the registry's, or of the first of the usual names that is there.
        num_problems: the first so many.

    Raises: ConfigError for a name that is no benchmark and no file; DataError for rows that cannot be used.
    """
    name, equals, copy = given.partition("=")
    spec = spec_of(name)
    if not re.search(r"\w", Path(given).name):
        raise ConfigError(f"the benchmark {given!r} has no name, which its results need; give a file or folder by name")
    if equals and spec is None and not Path(given).exists():
        raise ConfigError(f"{given!r}: {name!r} is no benchmark of the registry{_known(name)}")
    if spec is not None and (equals or not Path(given).exists()):
        if equals and not copy:
            raise ConfigError(
                f"{given!r} names no copy of {name}; give {name}=FILE.parquet, or {name} for that of the hub"
            )
        rows = _read(copy, split, f"benchmark {name}") if copy else _from_hub(spec, name)
        return Benchmark(
            name=canonical(name),
            problems=_registered(spec, rows, question_column, answer_column)[:num_problems],
            num_samples=spec.num_samples,
            is_registered=True,
        )
    if not Path(given).expanduser().exists() and "/" not in given and not Path(given).suffix:
        raise ConfigError(f"there is no benchmark {given!r}{_known(given)}")
    rows = _read(given, split, "the benchmark")
    return Benchmark(name=Path(given).stem, problems=_own(rows, question_column, answer_column)[:num_problems])


def _read(path: str, split: str | None, setting: str) -> Rows:
    return read_rows(path, split, setting=setting, split_setting="--split")


def _from_hub(spec: BenchmarkSpec, name: str) -> Rows:
    try:
        return read_rows(spec.hub_id, spec.split)
    except DataError as error:
        raise DataError(
            f"benchmark {name} cannot be read from the hub ({spec.hub_id}, split {spec.split}): "
            f"{error.__cause__ or error}. A copy of it does as well: {name}=FILE.parquet"
        ) from error


def benchmark_prompts(given: str) -> list[str]:
    """The texts of all questions of a benchmark, as they stand in it."""
    return [_text(problem.prompt) for problem in load_benchmark(given).problems]


def _known(name: str) -> str:
    return f"{nearest(name, list(REGISTRY))}; known: {', '.join(REGISTRY)}; or give a .jsonl, .json or .parquet file"


def _registered(
    spec: BenchmarkSpec, rows: Rows, question_column: str | None, answer_column: str | None
) -> list[Problem]:
    problems = []
    for number, (place, row) in enumerate(zip(rows.places, rows, strict=True)):
        column = question_column or spec.question_column
        question = _value(row, column, place, "question")
        if not isinstance(question, str):
            raise DataError(f"{place}: {column!r} is {question!r:.80}; a question is a text. Correct or remove the row")
        answer = _answer(row, answer_column or spec.answer_column, place, spec.answer_of)
        identity = row.get(spec.id_column) if spec.id_column else None
        name = str(number if identity is None else identity)
        problems.append(Problem(id=name, prompt=question, answer=answer, place=place))
    return problems


def _own(rows: Rows, question_column: str | None, answer_column: str | None) -> list[Problem]:
    columns = {column for row in rows for column in row}
    question = question_column or next((name for name in QUESTION_COLUMNS if name in columns), QUESTION_COLUMNS[0])
    answer = answer_column or next((name for name in ANSWER_COLUMNS if name in columns), ANSWER_COLUMNS[0])
    problems = []
    for number, (place, row) in enumerate(zip(rows.places, rows, strict=True)):
        prompt = _value(row, question, place, "question")
        if not isinstance(prompt, str | list):
            raise DataError(f"{place}: {question!r} is {prompt!r:.80}; a question is a text or a list of chat messages")
        problems.append(
            Problem(
                id=str(row.get("id", number)),
                prompt=prompt,
                answer=_answer(row, answer, place, plain_answer),
                place=place,
            )
        )
    return problems


def _answer(row: Mapping[str, Any], column: str, place: Place, answer_of: Callable[[Any], str]) -> str:
    raw = _value(row, column, place, "answer")
    try:
        return answer_of(raw)
    except DataError as error:
        raise DataError(f"{place}: {error}. Rename the column that holds it, or correct or remove the row") from None


def _value(row: Mapping[str, Any], column: str, place: Place, what: str) -> Any:
    value = row.get(column)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        known = ", ".join(map(repr, row))
        raise DataError(
            f"{place}: no {what} in the column {column!r}; the row has {known}. Rename the column, or remove the row"
        )
    return value


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content", "")) for message in prompt if message.get("role") == "user")
