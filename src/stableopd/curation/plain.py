"""Values of any format as a data set's files hold them: verdicts, answers, and whole rows as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

from stableopd.errors import DataError
from stableopd.reading import Place, Row, kind_of

_VERDICTS = {"true": True, "false": False}


def verdict_of(value: Any, where: str) -> bool | None:
    """What a data set says of a solution; None where it says nothing.

    A verdict is a boolean (of Python, NumPy or Arrow), 0 or 1, or the text "true" or "false" in any case.

    Raises: DataError for anything else: a "no" that counts as true would make wrong solutions golden.
    """
    plain = value.as_py() if hasattr(value, "as_py") else value
    if isinstance(plain, str):
        plain = _VERDICTS.get(plain.strip().lower(), plain)
    if plain is None:
        return None
    if isinstance(plain, str | list | dict) or plain not in (0, 1):
        raise DataError(
            f"{where} says {plain!r:.80}, which is no verdict. Write true or false (or 1 or 0), or null where nothing "
            "is known; or remove the row"
        )
    return bool(plain)


def plain_row(row: Row, place: Place) -> Row:
    """A row as JSON has it: dates and times in ISO form, decimals as text, null for figures that are not finite.

    Raises: DataError naming the column of a value that has no form in JSON, such as bytes.
    """
    return {column: _plain(value, f"{place}: the column {column!r}") for column, value in row.items()}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    held = "bytes" if isinstance(value, bytes) else kind_of(value)
    raise DataError(f"{where} holds {held}, which JSON Lines cannot. Leave the column out, or make it text")
