"""Following a file that grows: only what was appended is read, and only complete lines are handed out."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 8 << 20
"""Most bytes of one read, so that a long file does not hold up who follows it."""
MAX_LINE_BYTES = 64 << 20
"""A longer line is skipped instead of kept in memory."""
MARK_BYTES = 64
"""So many bytes before the place reached tell whether the file is still the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Appended:
    """What one read of a `FileTail` gave."""

    lines: tuple[bytes, ...] = ()
    """Complete lines, without their line ends."""
    restarted: bool = False
    """The file was cut, rewritten, replaced or removed: all lines handed out before are void, these are the first."""
    more: bool = False
    """There is more to read at once."""


class FileTail:
    """Hands out the lines of a file as they are completed, and notices when the file begins anew.

    A file counts as another one when its inode changes, when it is shorter than what was read, or when the bytes
    before the place reached are not those that were read there (cut and grown again between two looks, or an inode
    used again). A last line without its line end waits until it is whole. A file that is not there has no lines.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.max_line_bytes = max_line_bytes
        self.modified_at: float | None = None
        """Of the file when it was last read, seconds since the epoch; None where there is no file."""
        self.skipped_lines = 0
        """Lines left out for their length, since the file began."""
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._mark = b""
        self._partial = b""
        self._skipping = False

    def read(self) -> Appended:
        """The lines completed since the last call.

        Raises: OSError when the file is there but cannot be read; the next call goes on where this one would have.
        """
        try:
            opened = _open_regular(self.path)
        except (FileNotFoundError, NotADirectoryError):
            had_lines, self._identity, self.modified_at = self._offset > 0, None, None
            self._forget()
            return Appended(restarted=had_lines)
        with opened as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            same = identity == self._identity and status.st_size >= self._offset and self._is_where_it_was(file)
            offset = self._offset if same else 0
            file.seek(offset)
            data = file.read(min(self.max_bytes, status.st_size - offset))
        # Nothing is changed before all of the reading has succeeded.
        restarted = not same and self._offset > 0
        if not same:
            self._forget()
        self._identity, self.modified_at = identity, status.st_mtime
        self._offset += len(data)
        self._mark = (self._mark + data)[-MARK_BYTES:]
        return Appended(lines=self._complete(data), restarted=restarted, more=self._offset < status.st_size)

    def _forget(self) -> None:
        self._offset = 0
        self._mark, self._partial = b"", b""
        self._skipping, self.skipped_lines = False, 0

    def _is_where_it_was(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _complete(self, data: bytes) -> tuple[bytes, ...]:
        *lines, self._partial = (self._partial + data).split(b"\n")
        if lines and self._skipping:
            lines, self._skipping = lines[1:], False
        if self._skipping:
            self._partial = b""
        elif len(self._partial) > self.max_line_bytes:
            self._partial, self._skipping = b"", True
            self.skipped_lines += 1
        return tuple(line.removesuffix(b"\r") for line in lines)


def _open_regular(path: Path) -> BinaryIO:
    """Opens without waiting: a pipe in place of the file would otherwise hold up the caller for ever."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb", buffering=0)


class Records:
    """The JSON objects of a growing file; lines that are none are counted."""

    def __init__(self, path: Path) -> None:
        self.tail = FileTail(path)
        self.restarts = 0
        self.more = False
        self.num_broken = 0
        self._line = 0
        self._broken_line = 0

    def read(self, begin_anew: Callable[[], None], take: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Hand over what was appended; whether there was anything."""
        appended = self.tail.read()
        self.more = appended.more
        if appended.restarted:
            self.restarts += 1
            self.num_broken = self._line = 0
            begin_anew()
        for line in appended.lines:
            self._line += 1
            if line.strip() and not any(take(record) for record in _objects(line)):
                self.num_broken += 1
                self._broken_line = self._line
        return appended.restarted or bool(appended.lines)

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.num_broken:
            lines = "line" if self.num_broken == 1 else "lines"
            notes.append(
                f"{self.num_broken} {lines} of {self.tail.path.name} cannot be used (last: line {self._broken_line})"
            )
        if self.tail.skipped_lines:
            notes.append(f"{self.tail.skipped_lines} overlong lines of {self.tail.path.name} left out")
        return tuple(notes)


def _objects(line: bytes) -> Iterator[Mapping[str, Any]]:
    """The object that the line holds, or nothing."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict):
        yield record
