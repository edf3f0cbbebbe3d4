"""Rows of data from files, folders and the hub, each of which remembers where it was read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from stableopd.errors import DataError, MissingDependencyError

Row = dict[str, Any]
_LARGEST = 10**4000
"""Python turns no longer numbers into text."""


class Place(NamedTuple):
    """Where a row was read: a line of a file, or a row of a dataset, counted from 1."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


class Rows(list[Row]):
    """Rows of a dataset that remember where each was read."""

    def __init__(self, placed: Iterable[tuple[Place, Row]]) -> None:
        pairs = list(placed)
        super().__init__(row for _, row in pairs)
        self.places = [place for place, _ in pairs]


def read_rows(
    path: str, split: str | None = None, *, setting: str = "data.path", split_setting: str = "data.split"
) -> Rows:
    """Rows of a local file, of a folder of files, or of a dataset on the hub.

    Args:
        path: a .jsonl, .json (one list) or .parquet file; a folder of them, or one that `datasets` saved;
            otherwise a hub id, with a colon before the name of its configuration where it needs one
            ("openai/gsm8k:main"). What looks like a local path is never looked up on the hub, and no
            code of a dataset is ever run.
        setting, split_setting: the keys that named path and split, for errors.
        split: the split on the hub, or the files of a folder to take ("train" takes train.jsonl and
            train-*.parquet). A single file is one split, whatever its name.

    Raises:
        DataError: nothing there, nothing in it, or something that cannot be read; names file and line.
        MissingDependencyError: Parquet without pyarrow, the hub without `datasets`. JSON needs neither.
    """
    local = Path(path).expanduser()
    is_local = local.exists() or looks_local(path)
    if is_local and not local.exists():
        raise DataError(f"{setting}: {path} does not exist (relative paths start at {Path.cwd()})")
    read = (
        _read_local(local, split, setting, split_setting)
        if is_local
        else _read_hub(path, split, setting, split_setting)
    )
    rows = Rows(read)
    if not rows:
        raise DataError(f"{path} holds no rows. Give a dataset with at least one prompt")
    return rows


def looks_local(path: str) -> bool:
    """A hub id is one or two plain names, and its last dot, if any, begins a version rather than a suffix."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or bool(re.search(r"\\|\.[A-Za-z]\w*$", path))


def _read_local(path: Path, split: str | None, setting: str, split_setting: str) -> Iterator[tuple[Place, Row]]:
    if path.is_file():
        yield from _read_file(path)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        yield from _placed(
            _one_split(_datasets().load_from_disk(str(path)), str(path), split, split_setting), str(path)
        )
    else:
        for file in files_of(path, split, setting=setting, split_setting=split_setting):
            yield from _read_file(file)


def files_of(
    folder: Path, split: str | None, *, setting: str = "data.path", split_setting: str = "data.split"
) -> list[Path]:
    """Files of rows in a folder and below, by name. Raises: DataError when there are none, or none of the split."""
    visible = (file for file in folder.rglob("*") if not re.search(r"(^|/)\.", file.relative_to(folder).as_posix()))
    files = sorted(file for file in visible if file.suffix in _READERS and file.is_file())
    if not files:
        raise DataError(f"the folder {folder} holds no {_suffixes()} file. Put the data there or correct {setting}")
    chosen = [file for file in files if split is None or re.match(rf"{re.escape(split)}(?!\w)", file.name)]
    if not chosen:
        names = ", ".join(file.name for file in files[:10])
        raise DataError(
            f"no file in {folder} belongs to the split {split!r}; it holds {names}. Correct {split_setting}"
        )
    return chosen


def _read_file(path: Path) -> Iterator[tuple[Place, Row]]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path} has the suffix {path.suffix!r}; only {_suffixes()} can be read. Convert the file")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}). Check the file and its permissions"
        ) from error


def read_jsonl(path: Path) -> Iterator[tuple[Place, Row]]:
    """The rows of a file of JSON Lines, one at a time. Raises: DataError with the line that is not one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decode(line, path, number)
            if text.strip():
                place = Place(str(path), "line", number)
                yield place, _row(_parse(text, path, number), place)


def _read_json(path: Path) -> Iterator[tuple[Place, Row]]:
    rows = _parse(_decode(path.read_bytes(), path, 1), path, 1)
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds {kind_of(rows)} where a list of rows is needed. Give a list of objects, or one object per "
            "line in a file that ends in .jsonl"
        )
    return _placed(rows, str(path))


def _read_parquet(path: Path) -> Iterator[tuple[Place, Row]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError.of("pyarrow", "Reading Parquet files", extra="data") from error
    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file ({error}). Write it again or correct its suffix") from error
    return _placed(rows, str(path))


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[Place, Row]]]] = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _read_hub(path: str, split: str | None, setting: str, split_setting: str) -> Iterator[tuple[Place, Row]]:
    datasets = _datasets()
    repository, _, name = path.partition(":")
    try:
        loaded = datasets.load_dataset(repository, *([name] if name else []), split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path!r} is no local file, and the hub does not give it as a dataset (split {split!r}): {error}. Correct "
            f"{setting} and {split_setting}, or download the data and give the path of the file"
        ) from error
    return _placed(_one_split(loaded, path, split, split_setting), path)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError.of("datasets", "Reading a dataset of the hub", extra="data") from error
    return datasets


def _one_split(loaded: Any, path: str, split: str | None, split_setting: str) -> Any:
    """The rows of `split`; of the only split where none is asked for."""
    if not isinstance(loaded, dict):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DataError(f"{path} has the splits {', '.join(loaded)}. Set {split_setting} to one of them")
    return loaded[split]


def _placed(rows: Iterable[Any], source: str) -> Iterator[tuple[Place, Row]]:
    for number, row in enumerate(rows, start=1):
        place = Place(source, "row", number)
        yield place, _row(row, place)


def _row(value: Any, place: Place) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{place} is {kind_of(value)}, not an object such as {{"prompt": ...}}. Correct or remove it')
    return value


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + error.object[: error.start].count(b"\n")
        raise DataError(
            f"{path}, line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}). Save the file as UTF-8"
        ) from error


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = ". If it holds one object per line, name it .jsonl" if path.suffix == ".json" else ". Correct the line"
        raise DataError(f"{path}, line {line}, column {error.colno} is not JSON: {error.msg}{hint}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise DataError(f"{path}, line {first_line} cannot be read as JSON: {error}. Correct the line") from error


def _suffixes() -> str:
    *first, last = _READERS
    return f"{', '.join(first)} or {last}"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words, for errors."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def answer_text(value: Any) -> str | None:
    """An answer to compare with, as text; None for what is none: null, blank, not finite, a list, an object, bytes.

    A whole number that was stored as a float loses its point: Parquet holds a column of numbers with gaps so.
    """
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, int):
        return str(value) if abs(value) < _LARGEST else None
    if isinstance(value, Real | Decimal) and math.isfinite(value):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return None
