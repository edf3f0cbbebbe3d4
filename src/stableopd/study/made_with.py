"""What a result was made with: runs of other settings are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.config_files import flatten, load_config
from stableopd.errors import ConfigError
from stableopd.study.cells import Cell, without_places
from stableopd.study.config import StudyConfig
from stableopd.study.final import final_settings
from stableopd.study.outcome import Outcome

_MOST_NAMED = 6


def settings_digest(study: StudyConfig, cell: Cell) -> str:
    """Of the settings of a run, its cold start, its world and its final answers.

    Defaults and places are left out: a study may be moved, and a default written out.
    """
    configs = [cell.config, *([cell.cold_start] if cell.cold_start else [])]
    given = [training_settings(study, config) for config in configs]
    world = study.world.made_with(cell.pair, cell.seed) if study.world else ""
    return hashlib.blake2b("\n".join([*given, world, final_settings(study, cell)]).encode(), digest_size=8).hexdigest()


def training_settings(study: StudyConfig, config: StableOPDConfig) -> str:
    """Settings of a run that change what comes out, without defaults and places."""
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=_no_result(config))
    return json.dumps(without_places(given, study), sort_keys=True)


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


def check_unchanged(study: StudyConfig, cells: Sequence[Cell], known: Sequence[Outcome]) -> None:
    """Raises: ConfigError for finished runs of other settings, naming what differs in the first as far as is known."""
    made = {outcome.key: outcome.digest for outcome in known}
    changed = [cell for cell in cells if made.get(cell.key) not in (None, settings_digest(study, cell))]
    if changed:
        first = changed[0]
        named = _differences(first)
        what = f" ({'; '.join(named)})" if named else ""
        raise ConfigError(
            f"{len(changed)} of the runs whose results are in {study.folder} were made with other settings, "
            f"{first.arm} of {first.pair}, seed {first.seed} among them{what}. Put the old settings back, give the "
            "method another name, or choose another output_dir"
        )


def _differences(cell: Cell) -> list[str]:
    """`key: old -> new` of a run and its cold start. None where their files are gone, or of the world or `final`."""
    found = []
    for prefix, config in (("", cell.config), ("cold_start.", cell.cold_start)):
        if config is None or not settings_file(config).exists():
            continue
        try:
            stored = flatten(load_config(settings_file(config)).model_dump(mode="json"))
        except ConfigError:  # of another version
            continue
        now = flatten(config.model_dump(mode="json"))
        if stored["output_dir"] != now["output_dir"]:  # moved since, and so are all its paths
            continue
        found += [
            f"{prefix}{key}: {stored.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(stored.keys() | now.keys())
            if stored.get(key) != now.get(key) and key.partition(".")[0] not in _no_result(config)
        ]
    return [*found[:_MOST_NAMED], *([f"and {len(found) - _MOST_NAMED} more"] if len(found) > _MOST_NAMED else [])]
