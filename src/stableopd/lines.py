"""Files of JSON Lines, and folders, that a kill at any instant leaves readable."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
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
    """An empty folder to fill, which becomes `folder` when all went well: a folder that is there is whole.

    Each process fills one of its own. If another was faster, its folder is kept. What killed ones left is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    aside = folder.with_name(f".{folder.name}.{_machine()}-{os.getpid()}.tmp")
    aside.mkdir()
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError:  # a folder of that name that is not empty
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes of this machine that live no more had begun; others' may be under way."""
    begun = re.compile(rf"\.{re.escape(folder.name)}\.{_machine()}-(\d+)\.tmp")
    for path in list(folder.parent.iterdir()):
        found = begun.fullmatch(path.name)
        if found and not _lives(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether a process of this machine is running. This one has begun nothing yet."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # there is no harmless way to ask
        return True
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _machine() -> str:
    """Eight digits that tell machines with a common file system apart, whose process numbers mean nothing here."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


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
