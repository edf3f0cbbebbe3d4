"""Pieces of a world as folders that say what they were made with, so that none is taken for another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stableopd.config_files import flatten
from stableopd.errors import RunFolderError
from stableopd.lines import made_whole, write_atomically

_MADE = "made.json"


def is_made(folder: Path, made: Mapping[str, Any]) -> bool:
    """Whether a piece is there. One that does not say what it was made with (an older one) is taken as it is.

    Args: `made` is all that the piece depends on (JSON).

    Raises: RunFolderError naming what differs when it was made with something else.
    """
    if not folder.exists():
        return False
    if not (folder / _MADE).exists():
        return True
    old, new = flatten(json.loads((folder / _MADE).read_text())), flatten(_as_json(made))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if differing:
        told = "; ".join(f"{key}: {old.get(key)!r}, not {new.get(key)!r}" for key in differing)
        raise RunFolderError(
            f"{folder} was made with other settings ({told}). Choose another folder, or remove it first"
        )
    return True


@contextmanager
def making(folder: Path, made: Mapping[str, Any]) -> Iterator[Path]:
    """As `made_whole`, with `made` in the folder. Raises: RunFolderError as `is_made`, where another was faster."""
    with made_whole(folder) as aside:
        yield aside
        write_atomically(aside / _MADE, json.dumps(_as_json(made), indent=2) + "\n")
    is_made(folder, made)


def _as_json(made: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(made))
    return plain
