"""Data cards: what was done to make a data set, with counts, lengths and digests, for people and for programs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stableopd.errors import RunFolderError
from stableopd.lines import write_atomically

_NEEDED = ("settings", "source", "counts", "outputs")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a data set is made of. All JSON; nothing in it depends on when, where or in how many goes it was made."""

    title: str
    command: str
    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    """Where the rows came from, and digests of it."""
    counts: Mapping[str, Mapping[str, int]]
    """Groups of figures, by name."""
    lengths: Mapping[str, Mapping[str, float]]
    """Quantiles in tokens, by what was measured."""
    outputs: Mapping[str, Mapping[str, Any]]
    """Rows and digest of each file, by name."""
    notes: Sequence[str] = ()


def write_card(card: Card, json_path: Path, markdown_path: Path) -> dict[str, Any]:
    """Writes the card for people, then the one for programs: where the second is, all is there. Returns the second."""
    write_atomically(markdown_path, markdown(card))
    text = json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"
    write_atomically(json_path, text)
    return read_card(json_path)


def read_card(json_path: Path) -> dict[str, Any]:
    """The card. Raises: RunFolderError when the file is none."""
    try:
        card = json.loads(json_path.read_text(encoding="utf-8"))
    except ValueError:
        card = None
    if not isinstance(card, dict) or not all(isinstance(card.get(name), dict) for name in _NEEDED):
        raise RunFolderError(
            f"{json_path} is not a data card, or is damaged, so nothing vouches for the files beside it. Remove it and "
            "them, or choose another --out"
        )
    return card


def check_outputs(card: Mapping[str, Any], folder: Path, *, remove: str) -> None:
    """Whether the files that a card vouches for still are what was written, by their digests.

    Args: `remove` says what is to be removed for the command to make them again.

    Raises: RunFolderError naming the first that is not.
    """
    for name, made in card["outputs"].items():
        path = folder / name
        if not path.is_file():
            told = "is gone"
        elif sha256_of(path) != made["sha256"]:
            told = (
                f"is not as it was written ({made['rows']:,} lines then, {_num_lines(path):,} now; the digest differs)"
            )
        else:
            continue
        raise RunFolderError(f"{path} {told}. To make it again remove {remove}, or choose another --out")


def _num_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def markdown(card: Card) -> str:
    lines = [f"# {card.title}", "", f"Made with `{card.command}`.", ""]
    lines += [*card.notes, ""] if card.notes else []
    for group, figures in card.counts.items():
        lines += _table(group, ("what", "number"), [(key, f"{value:,}") for key, value in figures.items()])
    if card.lengths:
        names = list(next(iter(card.lengths.values())))
        rows = [(what, *(f"{value:,.0f}" for value in found.values())) for what, found in card.lengths.items()]
        lines += _table("Lengths in tokens", ("what", *names), rows)
    files = [(name, *map(str, found.values())) for name, found in card.outputs.items()]
    lines += _table("Files", ("file", "rows", "SHA-256"), files)
    lines += _table("Source", ("what", "value"), [(key, _cell(value)) for key, value in card.source.items()])
    lines += _table("Settings", ("setting", "value"), [(key, _cell(value)) for key, value in card.settings.items()])
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [f"## {title}", "", *("| " + " | ".join(row) + " |" for row in cells), ""]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|") or "(empty)"


def quantiles(lengths: Mapping[int, int]) -> dict[str, float]:
    """Number, mean, extremes and quantiles of lengths that are given as length -> how many have it.

    Definition: the q-quantile is the smallest length that a share q of all, or more, do not exceed.
    """
    number = sum(lengths.values())
    if not number:
        return {"number": 0}
    ordered = sorted(lengths.items())
    figures = {"number": float(number), "mean": sum(length * count for length, count in ordered) / number}
    figures["min"] = float(ordered[0][0])
    for share in _QUANTILES:
        figures[f"p{share * 100:.0f}"] = float(_quantile(ordered, share * number))
    figures["max"] = float(ordered[-1][0])
    return figures


def _quantile(ordered: Sequence[tuple[int, int]], wanted: float) -> int:
    seen = 0
    for length, count in ordered:
        seen += count
        if seen >= wanted:
            return length
    return ordered[-1][0]


def histogram(stored: Mapping[str, int] | None = None) -> Counter[int]:
    """Lengths as JSON keeps them, whose keys are texts."""
    return Counter({int(length): count for length, count in (stored or {}).items()})


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
