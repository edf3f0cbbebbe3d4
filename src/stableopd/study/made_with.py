"""What a result was made with: runs of other settings are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.config_files import flatten
from stableopd.errors import ConfigError
from stableopd.study.cells import Cell, without_places
from stableopd.study.config import StudyConfig
from stableopd.study.final import protocol
from stableopd.study.outcome import Outcome

_MOST_NAMED = 6


def made_with(study: StudyConfig, cell: Cell) -> dict[str, Any]:
    """All that a result depends on: the settings of its run and its cold start, its world, and what it is asked at its
    end (`final`).

    Defaults and places are left out: a study may be moved, and a default written out.
    """
    found: dict[str, Any] = {"run": _given(study, cell.config)}
    if cell.cold_start:
        found["cold_start"] = _given(study, cell.cold_start)
    if study.world:
        found["world"] = study.world.made_with(cell.pair, cell.seed)
    if study.final:
        found["final"] = without_places(protocol(study.final, cell.config), study)
    return found


def settings_digest(study: StudyConfig, cell: Cell) -> str:
    """A short digest of all that a result depends on."""
    return hashlib.blake2b(json.dumps(made_with(study, cell), sort_keys=True).encode(), digest_size=8).hexdigest()


def _given(study: StudyConfig, config: StableOPDConfig) -> dict[str, Any]:
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=_no_result(config))
    found: dict[str, Any] = without_places(given, study)
    return found


def _no_result(config: StableOPDConfig) -> dict[str, Any]:
    """Settings that do not change what comes out.

    How often a checkpoint is written does, where a run may go back to one, and where it interrupts a pipeline.
    """
    left_out = {"output_dir": True, "logging": True, "num_processes": True}
    counts = config.health.actions == "rollback" or config.rollout.pipeline
    return left_out if counts else {**left_out, "checkpoint": True}


def run_key(cell: Cell) -> str:
    """Names the run itself: everything that it depends on, which without a teacher's term is not the teacher."""
    left_out = {
        **_no_result(cell.config),
        **({} if cell.config.objective.needs_teacher else {"teacher": True, "teachers": True}),
    }
    settings = cell.config.model_dump(mode="json", exclude=left_out)
    return json.dumps([cell.arm, settings], sort_keys=True)


def settings_file(config: StableOPDConfig) -> Path:
    """The file that a run of a study is started with, every default spelled out."""
    folder = config.run_dir
    return folder.with_name(f"{folder.name}.yaml")


def standing(
    study: StudyConfig, cells: Sequence[Cell], known: Sequence[Outcome], *, ask_again: bool = False
) -> list[Outcome]:
    """The results that still hold.

    Args: `ask_again` leaves out those of which only `final` has changed since, which are then made anew.

    Raises: ConfigError for finished runs of other settings, naming what differs in the first, where it is known.
    """
    results = {outcome.key: outcome for outcome in known}
    changed = {
        cell.key: cell
        for cell in cells
        if cell.key in results and results[cell.key].digest != settings_digest(study, cell)
    }
    asked_otherwise = {key for key, cell in changed.items() if _only_asked_otherwise(study, cell, results[key])}
    refused = [cell for key, cell in changed.items() if not (ask_again and key in asked_otherwise)]
    if refused:
        first = refused[0]
        named = _differences(results[first.key].made_with, made_with(study, first))
        what = f" ({named})" if named else ""
        again = (
            "Only what they are asked at the end differs: --ask-again asks them anew without training them again. "
            if asked_otherwise.issuperset(cell.key for cell in refused)
            else ""
        )
        raise ConfigError(
            f"{len(refused)} of the runs whose results are in {study.folder} were made with other settings, "
            f"{first.arm} of {first.pair}, seed {first.seed} among them{what}. {again}Put the old settings back, give "
            "the method another name, or choose another output_dir"
        )
    return [outcome for outcome in known if outcome.key not in changed]


def _only_asked_otherwise(study: StudyConfig, cell: Cell, outcome: Outcome) -> bool:
    then, now = dict(outcome.made_with), made_with(study, cell)
    return bool(then) and {**then, "final": None} == {**now, "final": None}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`key: old -> new` of all that differs, as a study's file has the keys; empty where what was is not known."""
    old, new = _by_key(then), _by_key(now)
    found = [
        f"{key}: {_told(old, key)} -> {_told(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_cold_start(old.get(key), new.get(key))
    ]
    more = [f"and {len(found) - _MOST_NAMED} more"] if len(found) > _MOST_NAMED else []
    return "; ".join([*found[:_MOST_NAMED], *more]) if then else ""


def _by_key(made: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key; those of the run without a prefix."""
    return flatten({**made.get("run", {}), **{part: given for part, given in made.items() if part != "run"}})


def _told(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"


def _is_cold_start(*values: Any) -> bool:
    """The folder of another cold start, which differs because its settings do."""
    return all(isinstance(value, str) and value.startswith("{study}/cold_start/") for value in values)
