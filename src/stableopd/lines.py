"""Files of JSON Lines, and folders, that a kill at any instant leaves readable."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """The file holds either its old content or all of the new, whatever happens meanwhile."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` when all went well: a folder that is there is whole."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    aside.rename(folder)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A file of these records, written at once."""
    write_atomically(path, "".join(json_line(record) for record in records))


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON Lines; figures that are not finite become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record whole, so that a kill tears no line but this one."""
    data = json_line(record).encode("utf-8", errors="backslashreplace")
    with path.open("ab", buffering=0) as file:
        file.write(data)


def keep_until(path: Path, last_step: int) -> None:
    """Drop the records of later steps, which are about to be repeated. No file: nothing to do."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill; its step is repeated
        if step <= last_step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))
