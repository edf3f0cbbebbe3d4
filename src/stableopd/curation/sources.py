"""Rows of data sets too large for memory, read in order from any row on; which data it was, to the byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from stableopd.curation.cards import sha256_of
from stableopd.errors import DataError, MissingDependencyError
from stableopd.reading import Place, Row, files_of, looks_local, read_jsonl

T = TypeVar("T")
_BATCH_ROWS = 64
"""Rows of a Parquet file held at a time; with generations of tens of kilobytes, a few megabytes."""


class Source(Protocol):
    """Rows in a fixed order."""

    def rows(self, start: int) -> Iterator[tuple[Place, Row]]:
        """All rows but the first `start`, each with its place. Raises: DataError for what cannot be read."""
        ...

    def columns(self) -> list[str]:
        """Names of the columns, as far as the first row or the schema tells."""
        ...

    def num_rows(self) -> int | None:
        """How many rows there are, where that is known without reading them."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells this data from any other: digests of files, or the commit of a repository. JSON."""
        ...


def open_source(path: str, *, columns: Sequence[str], split: str = "train", setting: str = "--source") -> Source:
    """The rows of a .jsonl or .parquet file, of a folder of them, or of a split of a dataset on the hub.

    Args:
        path: what looks like a local path is never looked up on the hub. A hub id may have a colon before the name of
            its configuration ("open-r1/OpenR1-Math-220k:default").
        columns: the columns to read, of those that there are.

    Raises: DataError when there is nothing there; MissingDependencyError without pyarrow or datasets.
    """
    local = Path(path).expanduser()
    if not local.exists() and not looks_local(path):
        return HubSource.find(path, split, columns)
    if not local.exists():
        raise DataError(f"{setting}: {path} does not exist (relative paths start at {Path.cwd()})")
    files = [local] if local.is_file() else files_of(local, None, setting=setting)
    for file in files:
        if file.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"{file} cannot be read row by row; give .jsonl or .parquet files")
    root = local.parent if local.is_file() else local
    return FileSource(root=root, files=tuple(files), wanted=tuple(columns))


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Local files, one after the other."""

    root: Path
    """What their names are relative to: files of several folders below it may be called alike."""
    files: tuple[Path, ...]
    wanted: tuple[str, ...]

    def rows(self, start: int) -> Iterator[tuple[Place, Row]]:
        for file in self.files:
            if file.suffix == ".parquet":
                size = parquet_file(file).metadata.num_rows
                if start < size:
                    yield from _parquet_rows(file, self.wanted, start)
                start = max(0, start - size)
                continue
            for placed in _readable(file):
                if start:
                    start -= 1
                else:
                    yield placed

    def columns(self) -> list[str]:
        first = self.files[0]
        if first.suffix == ".parquet":
            return [str(name) for name in parquet_file(first).schema_arrow.names]
        return list(next((row for _, row in _readable(first)), {}))

    def num_rows(self) -> int | None:
        if any(file.suffix != ".parquet" for file in self.files):
            return None
        return sum(parquet_file(file).metadata.num_rows for file in self.files)

    def identity(self) -> dict[str, Any]:
        digests = {file.relative_to(self.root).as_posix(): sha256_of(file) for file in self.files}
        together = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode())
        return {"files": len(digests), "names": ", ".join(digests), "sha256": together.hexdigest()}


def _readable(path: Path) -> Iterator[tuple[Place, Row]]:
    try:
        yield from read_jsonl(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}). Check the file") from error


def parquet_file(path: Path) -> Any:
    """The file, opened. Raises: DataError when it is none; MissingDependencyError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError.of("pyarrow", "Reading Parquet files", extra="data") from error
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}). Fetch or write it again") from error


def _parquet_rows(path: Path, wanted: Sequence[str], start: int) -> Iterator[tuple[Place, Row]]:
    """Row groups that lie before `start` are not read."""
    import pyarrow as pa

    file = parquet_file(path)
    names = set(file.schema_arrow.names)
    groups, first = list(range(file.num_row_groups)), 0
    while groups and first + file.metadata.row_group(groups[0]).num_rows <= start:
        first += file.metadata.row_group(groups.pop(0)).num_rows
    columns = [column for column in wanted if column in names]
    try:
        batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(islice(rows, start - first, None), start=start + 1):
            yield Place(str(path), "row", number), row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read to its end ({error}). Fetch or write it again") from error


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A split of a dataset on the hub, streamed, at the commit that was the newest when it was opened."""

    repository: str
    configuration: str | None
    split: str
    revision: str | None
    wanted: tuple[str, ...]

    @classmethod
    def find(cls, path: str, split: str, columns: Sequence[str]) -> HubSource:
        from huggingface_hub import HfApi

        repository, _, name = path.partition(":")
        try:
            revision = HfApi().dataset_info(repository).sha
        except Exception as error:  # the client passes on the errors of its HTTP library, whichever that is
            raise DataError(
                f"{path!r} is no local file, and the hub does not give it as a dataset: {_first_line(error)}. Correct "
                "--source, or download the data and give the path of the file or folder"
            ) from error
        return cls(
            repository=repository, configuration=name or None, split=split, revision=revision, wanted=tuple(columns)
        )

    def rows(self, start: int) -> Iterator[tuple[Place, Row]]:
        stream = self._stream()
        names = stream.column_names
        if names is not None:
            stream = stream.select_columns([column for column in self.wanted if column in names])
        try:
            for number, row in enumerate(stream.skip(start) if start else stream, start=start + 1):
                yield Place(self.repository, "row", number), row
        except Exception as error:  # as above, from the middle of a stream
            raise DataError(
                f"{self.repository!r} cannot be read on from the hub: {_first_line(error)}. The same command goes on "
                "from there"
            ) from error

    def columns(self) -> list[str]:
        stream = self._stream()
        return list(stream.column_names or next(iter(stream), {}))

    def num_rows(self) -> int | None:
        info = self._stream().info
        known = info.splits.get(self.split) if info is not None and info.splits else None
        return known.num_examples or None if known is not None else None

    def identity(self) -> dict[str, Any]:
        return {
            "repository": self.repository,
            "configuration": self.configuration,
            "split": self.split,
            "revision": self.revision,
        }

    def _stream(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise MissingDependencyError.of("datasets", "Reading a dataset of the hub", extra="data") from error
        try:
            return datasets.load_dataset(
                self.repository, self.configuration, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # as above
            raise DataError(
                f"{self.repository!r} cannot be read from the hub (configuration {self.configuration!r}, split "
                f"{self.split!r}): {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """The items in their order, `size` at a time; the last batch may be smaller."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch
