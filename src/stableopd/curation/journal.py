"""Long work that goes on where a kill left it: files that only grow, and what has been done, committed together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from stableopd.errors import RunFolderError
from stableopd.lines import write_atomically
from stableopd.recorder import lock_folder

_STATE = "state.json"


class Journal:
    """A work folder of files that only grow. What was written after the last `commit` is cut off when it is opened.

    Args:
        folder: made if it is not there; locked until `close`.
        settings: what the result depends on (JSON). The same settings go on with the work that is there.

    Raises:
        RunFolderError: the folder is in use, is something else, or was begun with other settings.

    Holds: after a kill at any instant, files and `state` are as some commit left them.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._settings = json.loads(json.dumps(settings))
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"{folder} is a file; work under way is kept in a folder of that name. Move the file")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(folder)
        self.state: dict[str, Any] = {}
        """What the last commit was given; empty in new work."""
        self._files: dict[str, IO[bytes]] = {}
        try:
            self._go_on()
        except BaseException:
            self.close()
            raise

    def _go_on(self) -> None:
        path = self.folder / _STATE
        if not path.exists():
            for file in self.folder.glob("*.log"):
                file.unlink()
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        check_same_settings(self.folder, stored["settings"], self._settings)
        self.state = stored["state"]
        for file in self.folder.glob("*.log"):
            os.truncate(file, stored["sizes"].get(file.name, 0))

    def append(self, name: str, text: str) -> None:
        """Adds to a file whose name ends in .log; not kept before `commit`."""
        assert name.endswith(".log")
        if name not in self._files:
            self._files[name] = (self.folder / name).open("ab")
        self._files[name].write(text.encode("utf-8", errors="backslashreplace"))

    def lines(self, name: str) -> Iterator[str]:
        """Lines of a file as they were at the last commit; none where nothing was added."""
        if (self.folder / name).exists():
            with (self.folder / name).open(encoding="utf-8", newline="\n") as file:
                yield from file

    def commit(self, state: Mapping[str, Any]) -> None:
        """From here on a kill loses nothing of what was added, and `state` (JSON) is found again."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.log"))}
        self.state = dict(state)
        record = {"settings": self._settings, "sizes": sizes, "state": self.state}
        write_atomically(self.folder / _STATE, json.dumps(record))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._lock.close()

    def remove(self) -> None:
        """The work is done and its result is elsewhere."""
        self.close()
        shutil.rmtree(self.folder)


def check_same_settings(where: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises: RunFolderError naming the settings that differ."""
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise RunFolderError(
            f"{where} was begun with other settings and cannot go on with these: {'; '.join(changed)}. Put the old "
            "values back, remove it, or choose another --out"
        )
