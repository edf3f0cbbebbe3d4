"""Makes the data folder of `stableopd data openr1`: selects, splits, writes the parts and their card."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableopd.curation.cards import check_outputs, read_card, write_card
from stableopd.curation.journal import Journal, check_same_settings
from stableopd.curation.openr1 import KEPT, Recipe, Tally, card_of, select, tokenizer_digest
from stableopd.curation.sources import Source
from stableopd.curation.splitting import threshold_of_fraction, threshold_of_largest, threshold_of_number
from stableopd.errors import DataError, RunFolderError
from stableopd.protocols import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("cold_start", "opd", "heldout")
_LARGEST_HELDOUT = 0.1
CARD, README, WORK = "card.json", "README.md", ".work"


class Digested:
    """A file of text lines that is there whole or not at all, with the number of its lines and its digest."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(f".{path.name}.tmp")
        self._file = self._aside.open("wb")
        self._digest, self._rows = hashlib.sha256(), 0

    def write(self, line: str | bytes) -> None:
        data = line.encode("utf-8", errors="backslashreplace") if isinstance(line, str) else line
        self._file.write(data)
        self._digest.update(data)
        self._rows += 1

    def figures(self) -> dict[str, Any]:
        return {"rows": self._rows, "sha256": self._digest.hexdigest()}

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.replace(self._path)

    def abandon(self) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)


@contextmanager
def written(*paths: Path) -> Iterator[list[Digested]]:
    """Files that appear under their names when the block ends well."""
    files = [Digested(path) for path in paths]
    try:
        yield files
    except BaseException:
        for file in files:
            file.abandon()
        raise
    for file in files:
        file.finish()


def check_place(folder: Path, option: str) -> None:
    """Whether files can be made in a folder, found out by making one. Raises: RunFolderError saying what is in the way.

    Args: `option` is what names the place on the command line.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        if isinstance(error, NotADirectoryError):
            told = f"{folder} is a file, or lies in one, and not a folder. Choose"
        elif isinstance(error, FileNotFoundError) and not folder.exists():
            told = f"the folder {folder} does not exist. Make it, or choose"
        else:
            told = f"the folder {folder} cannot be written into ({error.strerror or error}). Allow it, or choose"
        raise RunFolderError(f"{told} another {option}") from error


def make_parts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    out: Path,
    *,
    judge: Judge | None,
    names: Mapping[str, str],
    on_rows: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Writes `cold_start.jsonl`, `opd.jsonl`, `heldout.jsonl`, `README.md` and `card.json`; returns the card.

    Args: `names` are what the user calls source and tokenizer, for the card.

    Raises: RunFolderError when `out` holds something else; DataError for rows that cannot be used, or if none has gold.

    Holds: stopped at any instant and called again, it goes on and writes the same bytes as if it had not been stopped.
        A folder that is complete is left as it is, or refused when its files are not those of the card any more.
    """
    identity = {**source.identity(), "tokenizer_sha256": tokenizer_digest(tokenizer)}
    finished = _finished(out, recipe, identity)
    if finished is not None:
        return finished
    _check_out(out)
    journal = Journal(out / WORK, {**recipe.to_json(), **identity})
    try:
        tally = select(source, tokenizer, recipe, journal, judge=judge, on_rows=on_rows)
        if not tally.rows["kept"]:
            journal.remove()  # it is done, and other settings could not go on with it
            raise DataError(_nothing_kept(tally))
        outputs, lengths = _split(journal, recipe, out)
        made = card_of(tally, recipe, {**names, **identity}, outputs, lengths)
        card = write_card(made, out / CARD, out / README)
    finally:
        journal.close()
    journal.remove()
    return card


def _finished(out: Path, recipe: Recipe, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The card of a folder that is complete. A kill may have left its work folder behind."""
    if not (out / CARD).exists():
        return None
    card = read_card(out / CARD)
    stored = {**card["settings"], **{key: card["source"].get(key) for key in identity}}
    check_same_settings(out, stored, json.loads(json.dumps({**recipe.to_json(), **identity})))
    check_outputs(card, out, remove=f"the folder {out}")
    if (out / WORK).exists():
        Journal(out / WORK, {**recipe.to_json(), **identity}).remove()
    return card


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; --out must be a folder. Choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir():
        raise RunFolderError(f"{out} already holds something else, which is not overwritten. Choose another --out")
    above = next((folder for folder in (out, *out.parents) if folder.exists()), out)
    check_place(above, "--out")


def _nothing_kept(tally: Tally) -> str:
    counts = ", ".join(f"{name} {number}" for name, number in sorted((tally.rows + tally.generations).items()))
    return (
        f"not one prompt has a golden solution, so nothing is written ({counts}). Loosen --max-gold-tokens or --judge"
    )


def _kept(journal: Journal) -> Iterator[tuple[int, int, str]]:
    """(draw, tokens of gold, line) of each row with gold."""
    for line in journal.lines(KEPT):
        draw, tokens, row = line.split(" ", 2)
        yield int(draw), int(tokens), row


def _thresholds(rows: Iterable[tuple[int, int, str]], recipe: Recipe) -> tuple[int, int]:
    """Draws below the first are the cold start's, those from the second on are held out, which goes before."""
    draws = {draw for draw, _, _ in rows}
    num_heldout = min(recipe.num_heldout, int(_LARGEST_HELDOUT * len(draws)))
    cold_start = (
        threshold_of_fraction(recipe.cold_start_fraction)
        if recipe.num_cold_start is None
        else threshold_of_number(draws, recipe.num_cold_start)
    )
    return cold_start, threshold_of_largest(draws, num_heldout)


def _split(journal: Journal, recipe: Recipe, out: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Counter[int]]]:
    """Writes the parts; returns rows and digest, and lengths of gold, of each."""
    cold_start, heldout = _thresholds(_kept(journal), recipe)
    parts = PARTS if recipe.num_heldout else PARTS[:2]
    lengths: dict[str, Counter[int]] = {f"gold of {part}": Counter() for part in parts}
    with written(*(out / f"{part}.jsonl" for part in parts)) as files:
        for draw, tokens, row in _kept(journal):
            part = 2 if draw >= heldout else 0 if draw < cold_start else 1
            files[part].write(row)
            lengths[f"gold of {PARTS[part]}"][tokens] += 1
        outputs = {f"{part}.jsonl": file.figures() for part, file in zip(parts, files, strict=True)}
    return outputs, lengths
