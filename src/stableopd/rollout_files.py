"""Rollout files of any trainer, read as a stream: which files there are, which format they have, their records.

Needs no torch, but for slime's dumps, which are torch files. Nothing of a file is ever executed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, get_args

from stableopd.errors import ConfigError, DataError, MissingDependencyError
from stableopd.reading import Place
from stableopd.rollout_rows import TEXT_KEYS, BadRowError, RolloutRecord, record_of, slime_row, trl_row

Format = Literal["run", "trl", "verl", "slime", "jsonl", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)

MAX_LINE_BYTES = 32 * 2**20
"""A longer line is taken for a broken one: no rollout is that long, and memory has an end."""
BATCH_ROWS = 16
SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".pt", ".pth")
"""What is looked at in a folder; .txt where there is nothing else."""

Advance = Callable[[int], None]
"""Told of so many more bytes read."""


class Broken(NamedTuple):
    """A line, a row or a whole file that could not be used."""

    place: Place
    why: str

    def __str__(self) -> str:
        return f"{self.place}: {self.why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFile:
    """One file of rollouts."""

    path: Path
    format: Format
    size: int
    """Bytes."""

    def read(self, advance: Advance = lambda _: None) -> Iterator[RolloutRecord | Broken]:
        """Its records in their order, and what is broken, in its place.

        Raises: MissingDependencyError where the format needs a package that is not installed.
        """
        readers = {"trl": _read_parquet, "slime": _read_slime, "text": _read_text}
        yield from readers.get(self.format, _read_json_lines)(self.path, advance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The rollouts of one training run: a folder, or all files that were named."""

    name: str
    files: tuple[RolloutFile, ...]
    run_folder: Path | None = None
    """Where this is a run folder of our own, which holds figures of whole batches too."""
    left_out: tuple[str, ...] = ()
    """Files of the folder that hold no rollouts, and why."""


def find_sources(paths: Sequence[str | Path], format: Format | None = None) -> list[Source]:
    """The runs that the paths name: each folder is one, and all files together are another.

    Args: format: of all files; None tells it from their content.
    Raises: DataError for a path that is not there, a folder without rollouts, a file that is none.
    """
    named = [Path(path) for path in paths]
    for path in named:
        if not path.exists():
            raise DataError(f"{path} does not exist (relative paths start at {Path.cwd()})")
    files = [path for path in named if not path.is_dir()]
    sources = [_folder_source(path, format) for path in named if path.is_dir()]
    if files:
        read = tuple(_file(path, format) for path in dict.fromkeys(files))
        name = str(files[0]) if len(read) == 1 else f"{files[0]} and {len(read) - 1} more"
        sources.append(Source(name=name, files=read))
    return sources


def checked_format(name: str | None) -> Format | None:
    """The format of this name. Raises: an unknown name -> ConfigError."""
    known: dict[str, Format] = {format: format for format in FORMATS}
    if name is not None and name not in known:
        raise ConfigError(f"--format has no value {name!r}. Give one of {', '.join(FORMATS)}, or leave it away")
    return known[name] if name else None


def recognise(path: Path) -> Format:
    """The format of a file, from its first bytes and lines.

    Raises: DataError when it holds no rollouts that this package can read.
    """
    with _opened(path) as file:
        head = file.read(8)
    if head.startswith(b"PAR1"):
        return "trl"
    if head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        return "slime"
    if head.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is compressed with gzip. Unpack it first: gunzip -k {path}")
    lines = [_maybe_json(line) for _, line in islice(_lines(path), 50) if line and line.strip()]
    rows = [line for line in lines if isinstance(line, dict)]
    if path.suffix == ".json" and (not rows or lines[0] is not rows[0]):
        raise DataError(f"{path} is not JSON Lines. Write one object a line: jq -c '.[]' {path} > rollouts.jsonl")
    if not rows:
        return "jsonl" if path.suffix in (".jsonl", ".ndjson") else "text"
    first = rows[0]
    if {"input", "output", "score"} <= first.keys():
        return "verl"
    return "run" if {"step", "completion", "finish_reason", "num_tokens"} <= first.keys() else "jsonl"


# ------------------------------------------------------------------------------------ finding


def _file(path: Path, format: Format | None) -> RolloutFile:
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder. Give rollout files, or the folder they are in")
    return RolloutFile(path=path, format=format or recognise(path), size=path.stat().st_size)


def _folder_source(folder: Path, format: Format | None) -> Source:
    run = folder if (folder / "metrics.jsonl").is_file() and format in (None, "run") else None
    home = next((folder / name for name in ("rollouts", "completions") if (folder / name).is_dir()), folder)
    found, left_out = [], []
    for path in _candidates(home):
        if path.stem.startswith("eval_") or "_eval_" in path.stem:
            left_out.append(f"{path.name} holds evaluations")
            continue
        try:
            file = _file(path, format)
            _check_holds_rollouts(file)
            found.append(file)
        except DataError as error:
            left_out.append(str(error))
    if not found and run is None:
        why = f": {left_out[0]}" if left_out else f" ({', '.join(SUFFIXES)} or .txt)"
        raise DataError(f"the folder {folder} holds no rollout files{why}. Give the files, or the folder they are in")
    return Source(name=str(folder), files=tuple(found), run_folder=run, left_out=tuple(left_out))


def _candidates(folder: Path) -> list[Path]:
    """Visible files of the folder itself, or else of the folders in it, in the order of the numbers in their names."""
    for pattern in ("*", "**/*"):
        files = [path for path in folder.glob(pattern) if path.is_file() and not _hidden(path, folder)]
        for suffixes in (SUFFIXES, (".txt",)):
            chosen = [path for path in files if path.suffix in suffixes]
            if chosen:
                return sorted(chosen, key=_natural)
    return []


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _check_holds_rollouts(file: RolloutFile) -> None:
    """Of files that were not named one by one, those whose rows all lack a completion are no rollout files."""
    if file.format in ("run", "verl", "jsonl"):
        rows = [row for _, line in islice(_lines(file.path), 50) if line and isinstance(row := _maybe_json(line), dict)]
        if rows and not any(_is_rollout(row) for row in rows):
            raise DataError(f"{file.path} holds no rollouts: its rows have none of {', '.join(TEXT_KEYS)}")


def _is_rollout(row: dict[str, Any]) -> bool:
    try:
        record_of(row, Place("", "line", 0))
    except BadRowError:
        return False
    return True


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}). Check its permissions") from error


def _maybe_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


# ------------------------------------------------------------------------------------ lines


def _lines(path: Path, advance: Advance = lambda _: None) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of a file; None for a line longer than MAX_LINE_BYTES, of which no more is kept."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            advance(len(line))
            if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
                yield number, line
                continue
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                advance(len(rest))
            advance(len(rest))
            yield number, None


def _decoded(path: Path, advance: Advance) -> Iterator[tuple[Place, str | Broken]]:
    """The text of each line that is not blank, or why there is none."""
    for number, line in _lines(path, advance):
        place = Place(str(path), "line", number)
        if line is None:
            yield place, Broken(place, f"it is longer than {MAX_LINE_BYTES // 2**20} MiB")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
            yield place, Broken(place, f"it is not UTF-8 ({byte})")
            continue
        if text.strip():
            yield place, text


def _read_text(path: Path, advance: Advance) -> Iterator[RolloutRecord | Broken]:
    step = _step_of(path)
    for place, text in _decoded(path, advance):
        yield text if isinstance(text, Broken) else RolloutRecord(place=place, step=step, completion=text)


def _read_json_lines(path: Path, advance: Advance) -> Iterator[RolloutRecord | Broken]:
    step = _step_of(path)
    for place, text in _decoded(path, advance):
        if isinstance(text, Broken):
            yield text
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            yield Broken(place, f"it is not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield Broken(place, f"it is not JSON that can be read: {error}")
        else:
            yield _record(row, place, step)


def _record(row: Any, place: Place, step: int | None) -> RolloutRecord | Broken:
    try:
        return record_of(row, place, step)
    except BadRowError as error:
        return Broken(place, str(error))


def _step_of(path: Path) -> int | None:
    """The number that the name of a file ends in, if any: step-000010, completions_00010, 10."""
    match = re.search(r"(?:^|[-_])(\d{1,12})$", path.stem)
    return int(match[1]) if match else None


# ------------------------------------------------------------------------------------ Parquet


def _read_parquet(path: Path, advance: Advance) -> Iterator[RolloutRecord | Broken]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError.of("pyarrow", "Reading Parquet files", extra="data") from error
    number, size = 0, path.stat().st_size
    try:
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as table:
            rewards = [
                field.name
                for field in table.schema_arrow
                if (pa.types.is_floating(field.type) or pa.types.is_boolean(field.type)) and field.name != "advantage"
            ]
            total = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_record(batch.slice(index, 1), Place(str(path), "row", number), rewards, path)
                advance(size * number // total - size * (number - batch.num_rows) // total)
    except (pa.ArrowException, OSError) as error:
        yield Broken(Place(str(path), "row", number + 1), f"it is not Parquet that can be read: {_one_line(error)}")


def _parquet_record(row: Any, place: Place, rewards: Sequence[str], path: Path) -> RolloutRecord | Broken:
    try:
        values = row.to_pylist()[0]
    except UnicodeDecodeError:
        return Broken(place, "it holds text that is not UTF-8")
    # Tables of other writers have other names for the same columns.
    return _record(trl_row(values, rewards) if "completion" in values else values, place, _step_of(path))


# ------------------------------------------------------------------------------------ slime


def _read_slime(path: Path, advance: Advance) -> Iterator[RolloutRecord | Broken]:
    """Records of a dump: {"rollout_id": int, "samples": [dict, ...]}, one rollout step a file."""
    dump = _load_torch(path)
    advance(path.stat().st_size)
    samples = dump.get("samples") if isinstance(dump, dict) else None
    if isinstance(dump, Broken) or not isinstance(samples, list):
        place = Place(str(path), "sample", 1)
        yield dump if isinstance(dump, Broken) else Broken(place, "the file holds no list under 'samples'")
        return
    number = dump.get("rollout_id")
    step = number if isinstance(number, int) else _step_of(path)
    for index, sample in enumerate(samples, start=1):
        place = Place(str(path), "sample", index)
        try:
            row = slime_row(sample)
        except ValueError as error:
            yield Broken(place, str(error))
        else:
            yield _record(row, place, step)


def _load_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError.of("torch", "Reading slime's rollout dumps") from error
    place = Place(str(path), "sample", 1)
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols, which the reader need not know
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not found:
            return Broken(place, "it is not a torch file that can be read: its content is no data of torch")
        return Broken(
            place,
            f"reading the file would take the unpickling of objects of {found[1]}, which can run code and is not done. "
            "Where the file comes from a trusted place, load it there and save its samples as JSON Lines",
        )
    # What a damaged archive makes the reader raise is not documented.
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, OSError) as error:
        return Broken(place, f"it is not a torch file that can be read: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
