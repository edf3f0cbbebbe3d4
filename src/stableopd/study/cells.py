"""The runs of a study: one for every method, point of its grid, pair and seed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableopd.config import PRESETS, StableOPDConfig
from stableopd.errors import ConfigError
from stableopd.names import nearest
from stableopd.study.config import RESERVED, StudyConfig, merged


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of a study."""

    arm: str
    """What its row of the table is called: the method, and its point of the grid where it has one."""
    method: str
    point: Mapping[str, Any]
    """Dotted keys and values of its point of the grid."""
    pair: str
    seed: int
    config: StableOPDConfig
    cold_start: StableOPDConfig | None = field(default=None)
    """The run whose student this one begins with."""

    @property
    def folder(self) -> Path:
        return self.config.run_dir


def cells_of(study: StudyConfig) -> list[Cell]:
    """Every run of a study, checked; seeds go last, so that a study that is cut short is whole for its first seeds.

    Raises: ConfigError naming the runs whose settings are impossible, before anything is started.
    """
    cells: list[Cell] = []
    problems: dict[str, str] = {}
    for seed, pair, (method, point) in itertools.product(study.seeds, study.pair_names(), _arms(study)):
        try:
            cells.append(_cell(study, method, point, pair, seed))
        except ConfigError as error:
            problems.setdefault(str(error), f"{arm_name(method, point)} of {pair}, seed {seed}")
    if problems:
        raise ConfigError("\n".join(f"{where}: {message}" for message, where in problems.items()))
    return cells


def _arms(study: StudyConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in study.methods:
        grid = study.grid_of(method)
        for values in itertools.product(*grid.values()):
            yield method, dict(zip(grid, values, strict=True))


def arm_name(method: str, point: Mapping[str, Any]) -> str:
    return " ".join([method, *(f"{key}={value}" for key, value in point.items())])


def _cell(study: StudyConfig, method: str, point: Mapping[str, Any], pair: str, seed: int) -> Cell:
    arm = arm_name(method, point)
    own = {key: value for key, value in study.methods[method].items() if key not in RESERVED}
    under = _shared(study, pair, seed)
    cold_start = None
    if study.cold_start is not None and study.methods[method].get("start") != "student":
        cold_start = _run(study, under, {"method": "sft", **study.cold_start}, f"cold_start/{pair}/seed-{seed}")
        under = merged(under, {"student.model_name_or_path": str(student_of(cold_start))})
    folder = f"runs/{pair}/{_as_folder(arm)}/seed-{seed}"
    config = _run(
        study, under, merged({"method": _method_of(method, {**study.base, **own, **point})}, own, point), folder
    )
    return Cell(arm=arm, method=method, point=point, pair=pair, seed=seed, config=config, cold_start=cold_start)


def _shared(study: StudyConfig, pair: str, seed: int) -> dict[str, Any]:
    of_pair = study.world.settings(study.folder, pair, seed) if study.world else study.pairs.get(pair, {})
    return merged(study.base, of_pair, {"seed": seed})


def _run(study: StudyConfig, under: Mapping[str, Any], over: Mapping[str, Any], folder: str) -> StableOPDConfig:
    raw = merged(under, over, {"output_dir": str(study.folder / folder)})
    names = study.world.placeholders(study.folder) if study.world else {}
    return StableOPDConfig(**_filled(raw, names))


def _filled(value: Any, names: Mapping[str, str]) -> Any:
    """Settings with `{world}` and the like replaced."""
    if isinstance(value, Mapping):
        return {key: _filled(item, names) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item, names) for item in value]
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(f"{{{name}}}", text)
    return value


def student_of(config: StableOPDConfig) -> Path:
    """Where a run that went to its end leaves its student: a whole model, on which adapters can be trained again.

    Raises: ConfigError for a run that leaves adapters alone.
    """
    if config.student.lora is not None:
        if not config.student.lora.merge:
            raise ConfigError("the cold start trains adapters: set student.lora.merge to true for it to leave a model")
        return config.run_dir / "merged"
    return config.run_dir / "checkpoints" / f"step-{config.max_steps:06d}"


def _method_of(name: str, given: Mapping[str, Any]) -> str:
    """A method of the study that is called like one of the trainer is that one, unless it says otherwise.

    Raises: ConfigError for another one that does not say: a default would train something else under its name.
    """
    if name not in PRESETS and "method" not in given:
        known = ", ".join(PRESETS)
        raise ConfigError(f"methods.{name} does not say what it is{nearest(name, PRESETS)}: give it method: {known}")
    return name if name in PRESETS else str(given["method"])


def _as_folder(arm: str) -> str:
    """The arm as a folder's name; long or odd ones get a digest in place of what does not fit."""
    plain = "".join(char if char.isalnum() or char in "._+=-" else "_" for char in arm)
    return plain if plain == arm.replace(" ", "_") and len(plain) <= 120 else f"{plain[:100]}-{_digest(arm)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
