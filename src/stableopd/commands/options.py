"""What the commands share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def options_named(renamed: Mapping[str, str]) -> Iterator[None]:
    """Errors of parts that other commands use, too, tell this command's options in place of theirs."""
    from stableopd.errors import StableOPDError

    try:
        yield
    except StableOPDError as error:
        message = str(error)
        for theirs, ours in renamed.items():
            message = message.replace(theirs, ours)
        raise type(error)(message) from error
