"""The file of golden solutions and its card: what is in it, whether it is done already, and writing it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stableopd.curation.cards import Card, check_outputs, quantiles, read_card, write_card
from stableopd.curation.journal import Journal, check_same_settings
from stableopd.curation.parts import check_place, written
from stableopd.curation.sampling import Sample, golden, samples_of
from stableopd.errors import DataError, RunFolderError
from stableopd.lines import json_line
from stableopd.reading import Row
from stableopd.types import Example

_REASONS = ("fit", "not_text", "truncated", "repetitive", "judge_failed", "wrong")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Rows as they are written again, and the same tokenised for the teacher."""

    rows: Sequence[Row]
    examples: list[Example]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class GoldFile:
    """A file to be made. It is complete when its card is there."""

    path: Path
    prompts: Prompts
    settings: Mapping[str, Any]
    names: Mapping[str, Any]
    """What the user calls teacher and data."""
    identity: Mapping[str, Any]
    """Digests of teacher and data."""

    @property
    def card_path(self) -> Path:
        return _card_of(self.path)

    @property
    def _work(self) -> Path:
        return _work_of(self.path)

    @cached_property
    def _must_match(self) -> dict[str, Any]:
        matching: dict[str, Any] = json.loads(json.dumps({**self.settings, **self.identity}))
        return matching

    @staticmethod
    def check_free(path: Path) -> None:
        """Whether the file can be made, or is made already. Raises: RunFolderError when something is in the way."""
        if not path.name or path.is_dir():
            raise RunFolderError(f"{path} is a folder; --out names the file to write. Choose another --out")
        if _card_of(path).exists():
            return
        if path.exists() and not _work_of(path).is_dir():
            raise RunFolderError(f"{path} is there already and is not overwritten. Choose another --out")
        check_place(path.parent, "--out")

    def journal(self) -> Journal:
        return Journal(self._work, self._must_match)

    def finished(self) -> dict[str, Any] | None:
        """The card of a file that is complete; None when there is something to do.

        Raises: RunFolderError when another file has this name, it was made with other settings, or is damaged.
        """
        self.check_free(self.path)
        if not self.card_path.exists():
            return None
        card = read_card(self.card_path)
        stored = {**card["settings"], **{key: card["source"].get(key) for key in self.identity}}
        check_same_settings(self.path, stored, self._must_match)
        check_outputs(card, self.path.parent, remove=f"{self.card_path} and what is left of {self.path}")
        if self._work.is_dir():  # killed between the card and the end
            self.journal().remove()
        return card

    def write(self, journal: Journal) -> dict[str, Any]:
        """Writes rows that have gold, then the card, which it returns. Raises: DataError when no row has."""
        choose, seed = self.settings["choose"], self.settings["seed"]
        gold = golden(samples_of(journal), self.prompts.examples, choose, seed)
        if not gold:
            told = _no_gold(journal)
            journal.remove()  # it is done, and other settings could not go on with it
            raise DataError(told)
        with written(self.path) as (file,):
            for position, row in enumerate(self.prompts.rows):
                if position in gold:
                    file.write(self._line(row, gold[position]))
            outputs = {self.path.name: file.figures()}
        return write_card(self._card(journal, gold, outputs), self.card_path, self.path.with_suffix(".card.md"))

    def _line(self, row: Row, sample: Sample) -> str:
        gold = self.settings["gold_prefix"] + sample.text
        return json_line(
            {**row, self.settings["gold_column"]: gold, "generation": sample.number, "gold_tokens": sample.num_tokens}
        )

    def _card(self, journal: Journal, gold: Mapping[int, Sample], outputs: Mapping[str, Mapping[str, Any]]) -> Card:
        reasons, lengths = _tally(journal)
        total = len(self.prompts.examples)
        return Card(
            title="Golden solutions from the teacher",
            command="stableopd data gold",
            settings=self.settings,
            source={**self.names, **self.identity},
            counts={
                "Prompts": {"all": total, "with gold": len(gold), "without gold": total - len(gold)},
                "Completions": {"all": reasons.total(), **{name: reasons[name] for name in _REASONS}},
            },
            lengths={
                "all completions": quantiles(lengths),
                "gold": quantiles(Counter(sample.num_tokens for sample in gold.values())),
            },
            outputs=outputs,
            notes=("Lengths count the end token. Prompts without gold are left out of the file.",),
        )


def _card_of(path: Path) -> Path:
    return path.with_suffix(".card.json")


def _work_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.work")


def _tally(journal: Journal) -> tuple[Counter[str], Counter[int]]:
    """How many completions there are by reason and by length."""
    reasons: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for sample in samples_of(journal):
        reasons[sample.reason or "fit"] += 1
        lengths[sample.num_tokens] += 1
    return reasons, lengths


def _no_gold(journal: Journal) -> str:
    told = ", ".join(f"{name} {number}" for name, number in sorted(_tally(journal)[0].items()))
    return (
        f"not one completion of the teacher can be gold ({told}); nothing is written. Raise --max-completion-length or "
        "--samples, or look at --judge"
    )
