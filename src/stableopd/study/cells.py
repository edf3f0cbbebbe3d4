"""The runs of a study: one for every method, point of its grid, pair and seed."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableopd.config import PRESETS, StableOPDConfig
from stableopd.errors import ConfigError
from stableopd.names import nearest
from stableopd.study.config import RESERVED, StudyConfig
from stableopd.study.layers import merged


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
    def key(self) -> tuple[str, str, int]:
        """What its line of results.jsonl is known by."""
        return self.arm, self.pair, self.seed

    @property
    def folder(self) -> Path:
        return self.config.run_dir


def cells_of(study: StudyConfig) -> list[Cell]:
    """Every run of a study, checked; seeds go last, so that a study that is cut short is whole for its first seeds.

    Raises: ConfigError naming the runs whose settings are impossible, or the same, before anything is started.
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
    _check_different(cells)
    return cells


def _check_different(cells: Sequence[Cell]) -> None:
    """Raises: ConfigError for two points of a grid, or two pairs, that are one run, which would count twice."""
    for what, arms_differ in (("points of the grid", True), ("pairs", False)):
        seen: dict[str, Cell] = {}
        for cell in cells:
            same_otherwise = (cell.method, cell.pair if arms_differ else cell.arm, cell.seed)
            first = seen.setdefault(repr((same_otherwise, settings_of(cell))), cell)
            if first is not cell:
                names = [one.arm if arms_differ else one.pair for one in (first, cell)]
                raise ConfigError(f"the {what} {names[0]!r} and {names[1]!r} are the same run: drop one of them")


def settings_of(cell: Cell) -> list[Any]:
    """All settings of a run and of its cold start, but for where they are written."""
    configs = [cell.config, *([cell.cold_start] if cell.cold_start else [])]
    return [config.model_dump(mode="json", exclude={"output_dir"}) for config in configs]


def reference_arm(study: StudyConfig) -> str:
    """The arm that the others are compared with: the study's method, at the first point where it has a grid."""
    return next(arm_name(method, point) for method, point in _arms(study) if method == study.reference_method)


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
        cold_start = _cold_start(study, under, seed)
        under = merged(under, {"student.model_name_or_path": str(student_of(cold_start))})
    folder = f"runs/{pair}/{_as_folder(arm)}/seed-{seed}"
    config = _run(
        study, under, merged({"method": _method_of(method, {**study.base, **own, **point})}, own, point), folder
    )
    return Cell(arm=arm, method=method, point=point, pair=pair, seed=seed, config=config, cold_start=cold_start)


def _shared(study: StudyConfig, pair: str, seed: int) -> dict[str, Any]:
    if study.world:
        return merged(study.world.settings(study.folder, pair, seed), study.base, {"seed": seed})
    return merged(study.base, study.pairs.get(pair, {}), {"seed": seed})


def _cold_start(study: StudyConfig, under: Mapping[str, Any], seed: int) -> StableOPDConfig:
    """In a folder named by what it is made with, so that pairs that differ in their teacher alone share it."""
    over = {"method": "sft", **(study.cold_start or {})}
    config = _run(study, under, over, "")
    left_out = {"output_dir", "seed", *(() if config.objective.needs_teacher else ("teacher", "teachers"))}
    made_with = without_places(config.model_dump(mode="json", exclude_unset=True, exclude=left_out), study)
    student = Path(config.student.model_name_or_path or "student").name
    name = f"{student}-{_digest(json.dumps(made_with, sort_keys=True))}"
    return _run(study, under, over, f"cold_start/{_as_folder(name)}/seed-{seed}")


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


def without_places(value: Any, study: StudyConfig) -> Any:
    """Settings in which the folders of the study and its world are placeholders: they may be moved."""
    places = {**({} if study.world is None else study.world.placeholders(study.folder)), "study": str(study.folder)}
    if isinstance(value, Mapping):
        return {key: without_places(item, study) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, study) for item in value]
    for name, place in places.items():
        if isinstance(value, str) and (value == place or value.startswith(f"{place}/")):
            return f"{{{name}}}{value[len(place) :]}"
    return value


def student_of(config: StableOPDConfig) -> Path:
    """Where a run that went to its end leaves its student: a whole model, on which adapters can be trained again.

    Raises: ConfigError for a run that leaves adapters alone.
    """
    if config.student.lora is not None:
        if not config.student.lora.merge:
            raise ConfigError("the cold start trains adapters: set student.lora.merge to true for it to leave a model")
        return config.run_dir / "merged"
    return last_checkpoint(config)


def last_checkpoint(config: StableOPDConfig) -> Path:
    """The checkpoint that a run which went to its end leaves."""
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
    as_it_is = plain == re.sub(r" (?=[A-Za-z_.]+=)", "_", arm)  # a space in a value may not be taken for its _
    return plain if as_it_is and len(plain) <= 120 else f"{plain[:100]}-{_digest(arm)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
