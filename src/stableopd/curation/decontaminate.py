"""Removes prompts that a benchmark asks as well: `stableopd data decontaminate`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from stableopd.curation.cards import Card, sha256_of, write_card
from stableopd.curation.overlap import OverlapIndex, Reason
from stableopd.curation.parts import Digested, check_place, written
from stableopd.curation.sources import parquet_file
from stableopd.errors import DataError, RunFolderError
from stableopd.reading import kind_of

_REASONS = get_args(Reason)
_BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files that are made, all beside the first."""

    kept: Path

    @property
    def removed(self) -> Path:
        return self.kept.with_suffix(".removed.jsonl")

    @property
    def card(self) -> Path:
        return self.kept.with_suffix(".card.json")

    @property
    def markdown(self) -> Path:
        return self.kept.with_suffix(".card.md")

    def check_free(self) -> None:
        taken = [path for path in (self.kept, self.removed, self.card, self.markdown) if path.exists()]
        if taken:
            raise RunFolderError(f"{taken[0]} is there already and is not overwritten. Choose another -o")
        check_place(self.kept.parent, "-o")


def decontaminate(
    path: Path,
    out: Path,
    index: OverlapIndex,
    *,
    benchmarks: Mapping[str, int],
    column: str | None = None,
    on_rows: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Writes the rows of `path` that have nothing in common with a benchmark, each as it stands; returns the card.

    Beside `out` (say clean.jsonl) lie clean.removed.jsonl, with each removed row's number, match and reason, and the
    card, clean.card.json and clean.card.md.

    Args:
        path: .jsonl or .parquet; `out` has the same suffix.
        benchmarks: number of prompts by name, for the card.
        column: the column with the prompt, a text or chat messages; None: `problem` where a row has it, else `prompt`.
        on_rows: told how many rows have been read.

    Raises: DataError for rows that cannot be read; RunFolderError when a file would be overwritten.
    """
    _check_suffixes(path, out)
    outputs = Outputs(kept=out)
    outputs.check_free()
    screen = _Screen(index=index, column=column, counts=Counter(), by_benchmark=Counter(), on_rows=on_rows)
    figures = (_parquet if path.suffix == ".parquet" else _lines)(path, outputs, screen)
    card = Card(
        title=f"{path.name} without prompts of benchmarks",
        command="stableopd data decontaminate",
        settings={"ngram": index.ngram, "min_ngram": index.min_ngram, "prompt_column": column},
        source={"file": path.name, "sha256": sha256_of(path)},
        counts={
            "Rows": {name: screen.counts[name] for name in ("read", "kept", "removed", *_REASONS)},
            "Removed, by benchmark": {name: screen.by_benchmark[name] for name in benchmarks},
            "Prompts of the benchmarks": benchmarks,
        },
        lengths={},
        outputs=figures,
    )
    return write_card(card, outputs.card, outputs.markdown)


def _check_suffixes(path: Path, out: Path) -> None:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix not in (".jsonl", ".parquet") or out.suffix != path.suffix:
        raise DataError(
            f"{path} and {out}: rows are kept as they stand, so both must be .jsonl or both .parquet. Rename -o"
        )


@dataclass(frozen=True, kw_only=True)
class _Screen:
    """Looks at one row after the other, and counts."""

    index: OverlapIndex
    column: str | None
    counts: Counter[str]
    by_benchmark: Counter[str]
    on_rows: Callable[[int], None]

    def removes(self, row: Any, number: int, where: str, removed: Digested) -> bool:
        """Whether the row goes; tells `removed` why."""
        prompt = _prompt(row, self.column, where)
        match = self.index.match(prompt)
        self.counts["read"] += 1
        self.on_rows(self.counts["read"])
        if match is None:
            self.counts["kept"] += 1
            return False
        self.counts["removed"] += 1
        self.counts[match.reason] += 1
        self.by_benchmark[match.benchmark] += 1
        found = asdict(match)
        record = {"row": number, "reason": found.pop("reason"), "benchmark": found.pop("benchmark")}
        record |= {"words": match.words, "prompt": prompt, "benchmark_prompt": match.prompt, "removed": row}
        removed.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        return True


def _prompt(row: Any, column: str | None, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where} is {kind_of(row)}, not an object. Correct or remove it")
    column = column or ("problem" if "problem" in row else "prompt")
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value
    ):
        return "\n".join(turn["content"] for turn in value if turn.get("role") == "user")
    known = ", ".join(map(repr, row))
    raise DataError(
        f"{where}: the column {column!r} is {kind_of(value)}, and must be a prompt: a text, or chat messages. The "
        f"columns are {known}; name the right one with --prompt-column"
    )


def _lines(path: Path, outputs: Outputs, screen: _Screen) -> dict[str, dict[str, Any]]:
    """JSON Lines: kept lines are copied byte by byte."""
    with path.open("rb") as lines, written(outputs.kept, outputs.removed) as (kept, removed):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            if not screen.removes(_parsed(line, where), number, where, removed):
                kept.write(line if line.endswith(b"\n") else line + b"\n")
        return {outputs.kept.name: kept.figures(), outputs.removed.name: removed.figures()}


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{where} is not JSON in UTF-8: {error}. Correct the line") from error


def _parquet(path: Path, outputs: Outputs, screen: _Screen) -> dict[str, dict[str, Any]]:
    """Parquet: the columns and types of the file, and of its rows those that are kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, aside = parquet_file(path), outputs.kept.with_name(f".{outputs.kept.name}.tmp")
    try:
        with written(outputs.removed) as (removed,):
            with pq.ParquetWriter(aside, file.schema_arrow) as kept:
                number = 0
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    stays = []
                    for row in batch.to_pylist():
                        number += 1
                        stays.append(not screen.removes(row, number, f"{path}, row {number}", removed))
                    kept.write_batch(batch.filter(pa.array(stays)))
            figures = {"rows": screen.counts["kept"], "sha256": sha256_of(aside)}
            aside.replace(outputs.kept)
            return {outputs.kept.name: figures, outputs.removed.name: removed.figures()}
    finally:
        aside.unlink(missing_ok=True)
