"""What a study compares: methods, pairs, seeds and a grid of settings, in one YAML file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, model_validator

from stableopd.config import explain
from stableopd.config_files import laid_over, read_yaml
from stableopd.errors import ConfigError
from stableopd.names import nearest
from stableopd.sections import FolderName, NonNegativeInt, PositiveInt, Section, Temperature
from stableopd.study.layers import merged
from stableopd.study.worlds import World

OWN = ("methods", "grid", "grid_methods", "compare_with", "output_dir")
"""What a study does not inherit from the one that it extends."""
RESERVED = ("grid", "start")
"""Keys of a method that are the study's, not a run's."""
_OF_THE_STUDY = {"seed": "seeds", "output_dir": "output_dir"}
"""Settings of a run that the study itself makes, and its own key for each."""

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


def _at_least_one(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds:
        raise ValueError("a study has at least one seed")
    return seeds


class FinalConfig(Section):
    """What every finished run answers: the same prompts for all, so that differences can be paired."""

    benchmarks: tuple[str, ...] = ()
    """Registry names, or files of prompts with answers; without them, the run's `evaluation.path` and its columns."""
    num_prompts: PositiveInt | None = None
    num_samples: PositiveInt | None = None
    """Answers to each prompt; without it, what the benchmark is usually given."""
    temperature: Temperature = 0.6
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Without it, the run's `evaluation.top_p`."""
    greedy: bool = True
    """Also answer each prompt once greedily: loops show there first."""
    max_completion_length: PositiveInt | None = None
    judge: str | None = None
    """Without it, the run's `evaluation.judge`."""
    seed: NonNegativeInt = 0


class StudyConfig(Section):
    """Methods x pairs x seeds (x a grid of any keys), each an ordinary run."""

    base: dict[str, Any] = Field(default_factory=dict)
    """Settings that all runs share, as in the configuration of a run."""
    methods: dict[FolderName, dict[str, Any]] = Field(min_length=1)
    """Per method what is laid over `base`. `grid`: a grid of its own; `start: student`: not from the cold start."""
    pairs: dict[FolderName, dict[str, Any]] = Field(default_factory=dict)
    """Students and teachers (or anything else that all methods meet), laid over `base` before the method."""
    world: World | None = None
    """Models and data made on the spot, in place of `pairs`."""
    cold_start: dict[str, Any] | None = None
    """Settings of a run, laid over `base`, that is made once per pair and seed; its student is every method's."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted keys, each with its values; crosses `grid_methods`."""
    grid_methods: tuple[str, ...] = ()
    """Methods that the grid crosses; all of them without it."""
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_at_least_one)] = (0,)
    compare_with: str | None = None
    """Method that the others are compared with, prompt by prompt; the first one without it."""
    final: FinalConfig | None = FinalConfig()
    """null: judge by the evaluations during the runs alone."""
    late_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of a run, at its end, whose evaluations make its late accuracy."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    parallel: PositiveInt = 1
    """Runs at a time."""
    threads: PositiveInt | None = None
    """CPU threads of each run."""
    launch: tuple[str, ...] = ()
    """What starts a run in place of `python -m stableopd`: torchrun --nproc_per_node 4 -m stableopd."""
    output_dir: str
    _part: str = PrivateAttr("")
    _whole: Self | None = PrivateAttr(None)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = explain(error, list(type(self).model_fields))
            raise ConfigError.of([(_without_kind(key), _without_kind(told)) for key, told in problems]) from None

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for setting, names in (("grid_methods", self.grid_methods), ("compare_with", (self.compare_with,))):
            for name in names:
                if name is not None and name not in self.methods:
                    raise ValueError(
                        f"{setting} says {name!r}, which is none of the methods{nearest(name, self.methods)}"
                    )
        return self

    @model_validator(mode="after")
    def _methods_are_clear(self) -> Self:
        for name, method in self.methods.items():
            if method.get("start", "cold_start") not in ("cold_start", "student"):
                raise ValueError(f"methods.{name}.start is {method['start']!r}; it must be cold_start or student")
            grid = method.get("grid", {})
            if isinstance(grid, dict) and not all(isinstance(key, str) for key in grid):
                raise ValueError(f"methods.{name}.grid: keys are the dotted names of settings, not {list(grid)}")
            if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
                raise ValueError(f"methods.{name}.grid maps keys to lists of values")
        return self

    @model_validator(mode="after")
    def _nothing_is_given_twice(self) -> Self:
        """What the study or its world decides may not be given elsewhere, where it would be ignored."""
        if self.world and self.pairs:
            raise ValueError("world and pairs are both given; a world makes its own pairs")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds holds a seed twice: {', '.join(map(str, self.seeds))}")
        for where, given in self._layers():
            for key, own in _OF_THE_STUDY.items():
                if key in given:
                    raise ValueError(f"{where}.{key}: every run of a study is given its own; set {own} of the study")
        for section, key in self.world.places() if self.world else ():
            if isinstance(found := merged(self.base).get(section), Mapping) and key in found:
                raise ValueError(f"base.{section}.{key} is made by the world: leave it out, or leave out world")
        return self

    def _layers(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Everything that settings of a run can be given in, and what it is called."""
        yield "base", self.base
        yield "cold_start", self.cold_start or {}
        yield "grid", self.grid
        yield from ((f"pairs.{name}", given) for name, given in self.pairs.items())
        for name, given in self.methods.items():
            yield f"methods.{name}", given
            yield f"methods.{name}.grid", given.get("grid", {})

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def reference_method(self) -> str:
        return self.compare_with or next(iter(self.methods))

    def grid_of(self, method: str) -> Mapping[str, list[Any]]:
        """The grid that a method is run on; empty: once."""
        own = self.methods[method].get("grid", {})
        shared = self.grid if not self.grid_methods or method in self.grid_methods else {}
        return {**shared, **own}

    def pair_names(self) -> list[str]:
        return list(self.world.teachers if self.world else self.pairs) or ["pair"]

    def only(self, methods: Collection[str] = (), pairs: Collection[str] = ()) -> Self:
        """The study of these methods and pairs alone; none named: all of them. Its results are those of the whole.

        Raises: ConfigError for a name that the study does not have.
        """
        for what, names, known in (("method", methods, list(self.methods)), ("pair", pairs, self.pair_names())):
            for name in names:
                if name not in known:
                    raise ConfigError(f"there is no {what} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        changes: dict[str, Any] = {}
        if methods:
            crossed = tuple(name for name in self.grid_methods if name in methods)
            changes["methods"] = {name: given for name, given in self.methods.items() if name in methods}
            changes["compare_with"] = self.compare_with if self.compare_with in methods else None
            changes |= {"grid_methods": crossed, "grid": {} if self.grid_methods and not crossed else self.grid}
        if pairs and self.world:
            teachers = {name: teacher for name, teacher in self.world.teachers.items() if name in pairs}
            changes["world"] = self.world.model_copy(update={"teachers": teachers})
        elif pairs and self.pairs:
            changes["pairs"] = {name: given for name, given in self.pairs.items() if name in pairs}
        part = self.model_copy(update=changes)
        part._part = "; ".join(", ".join(names) for names in (methods, pairs) if names)
        part._whole = self.whole if part._part else self._whole
        return part

    @property
    def whole(self) -> Self:
        """The study that this is a part of; itself where it is whole."""
        return self._whole or self

    @property
    def part(self) -> str:
        """Which methods and pairs alone this is of a larger study; empty for a whole one."""
        return self._part


def _without_kind(text: str) -> str:
    """A complaint about a setting of the world, without the kind of world that pydantic puts into its key."""
    return re.sub(r"\bworld\.(toy|words)\.", "world.", text)


def load_study(path: str | Path, overrides: tuple[str, ...] = ()) -> StudyConfig:
    """The study in a YAML file, with `dotted.key=value` overrides laid over it.

    `extends: other.yaml` takes all sections of another study but methods, grid and output_dir; `base` is laid over its.

    Raises: ConfigError with the line for broken YAML, an unknown key, a wrong type or an impossible value.
    """
    raw, lines = _with_parents(Path(path), ())
    raw.setdefault("output_dir", str(Path("studies") / Path(path).stem))
    return laid_over(StudyConfig, raw, lines, overrides, path)


def _with_parents(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, int]]:
    """The settings of a file, over those of the study that it `extends`, if any."""
    raw, lines = read_yaml(path)
    name = raw.pop("extends", None)
    if name is None:
        return raw, lines
    if not isinstance(name, str):
        raise ConfigError(f"{path}, line {lines['extends']}: extends is the name of another study's file")
    parent = (path.parent / name).resolve()
    if parent in (*children, path.resolve()):
        raise ConfigError(f"{path}, line {lines['extends']}: {name} extends this study in turn")
    inherited, _ = _with_parents(parent, (*children, path.resolve()))
    for key in OWN:
        inherited.pop(key, None)
    base = [layer for layer in (inherited.get("base"), raw.get("base")) if isinstance(layer, dict)]
    return {**inherited, **raw, **({"base": merged(*base)} if base else {})}, lines
