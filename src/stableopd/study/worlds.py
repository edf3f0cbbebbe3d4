"""Worlds that a study makes on the spot: models and data of every pair, built once and shared by all methods."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stableopd.sections import FolderName, Fraction, NonNegativeInt, PositiveInt, Section
from stableopd.study.jobs import Job
from stableopd.study.layers import merged
from stableopd.toy import task
from stableopd.words.runs import run_settings
from stableopd.words.settings import PRESETS

Habit = Literal["standard", "moderate", "clean", "restless"]


class WorldTeacher(Section):
    habit: Habit = "standard"
    """How it likes to check once more."""
    seed: NonNegativeInt = 0


class _World(Section):
    """A pair is a teacher; the seed of a run is that of its student, too."""

    teachers: dict[FolderName, WorldTeacher] = Field(min_length=1)
    _version: ClassVar[int] = 1
    dir: str | None = None
    """Where models and data are kept, so that several studies can share them; without it, in the study's folder."""

    @model_validator(mode="after")
    def _teachers_differ(self) -> Self:
        for (first, one), (second, other) in combinations(self.teachers.items(), 2):
            if one == other:
                raise ValueError(f"teachers {first} and {second} are the same: {one.habit}, seed {one.seed}")
        return self

    def folder(self, study: Path) -> Path:
        return Path(self.dir) if self.dir else study / "world"

    def settings(self, study: Path, pair: str, seed: int) -> dict[str, Any]:
        """Settings of a pair's runs, laid under the study's `base`: models, data, and how the world is best run."""
        root = self.folder(study)
        made = {
            "student": {"model_name_or_path": str(root / "students" / f"seed-{seed}")},
            "teacher": {"model_name_or_path": str(root / "teachers" / pair)},
            "data": {"path": str(root / "data" / "train.jsonl")},
            "evaluation": {"path": str(root / "data" / "validation.jsonl")},
        }
        return merged(self._own_settings(), made)

    def places(self) -> Sequence[tuple[str, str]]:
        """Settings, as (section, key), that are files which the world makes."""
        models = ("student", "model_name_or_path"), ("teacher", "model_name_or_path")
        return *models, ("data", "path"), ("evaluation", "path")

    def placeholders(self, study: Path) -> dict[str, str]:
        """What `{world}` in a setting stands for."""
        return {"world": str(self.folder(study))}

    def made_with(self, pair: str, seed: int) -> dict[str, str]:
        """What models and data of a pair are made with, by the piece."""
        return {job.settings.partition(" ")[0]: job.settings for job in self.jobs(Path(), pair, seed)}

    def jobs(self, study: Path, pair: str, seed: int) -> list[Job]:
        """What makes the models and data of a pair; jobs of several pairs that are the same have the same name."""
        teacher = self.teachers[pair]
        root = self.folder(study)
        return [
            self._job(root, "data", root / "data", WorldTeacher()),
            self._job(root, "teacher", root / "teachers" / pair, teacher),
            self._job(root, "student", root / "students" / f"seed-{seed}", WorldTeacher(seed=seed)),
        ]

    def _job(self, root: Path, piece: str, folder: Path, given: WorldTeacher) -> Job:
        module, *options = self._maker(given)
        return Job(
            name=f"world {folder.relative_to(root)}",
            command=(sys.executable, "-m", module, piece, str(folder), *options),
            stem=folder,
            settings=" ".join([piece, *options, *([f"version {self._version}"] if piece == "data" else [])]),
        )

    def _own_settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def _maker(self, given: WorldTeacher) -> list[str]:
        """The module that makes a piece, and its options."""
        raise NotImplementedError


class ToyWorld(_World):
    """The demo's world (docs/demo.md)."""

    _version: ClassVar[int] = 2  # of its data: held-out prompts are in an order of chance, and were in that of numbers

    name: Literal["toy"]
    kind: Literal["t4", "a"] = "t4"
    terse_fraction: Fraction | None = None
    """Share of golden solutions that are answer-only; without it, the world's own."""
    gold_pool: PositiveInt = 128
    """Size of the scarce pool in gold_pool.jsonl."""
    quick: bool = False
    """Poor models in seconds, to try a study out."""

    def _own_settings(self) -> dict[str, Any]:
        return {
            "evaluation": {"judge": task.JUDGE},
            "objective": {"reward": {"function": task.JUDGE}},
            "health": {"tail_chars": task.TAIL_CHARS, "compression_threshold": task.COMPRESSION_THRESHOLD},
        }

    def _maker(self, given: WorldTeacher) -> list[str]:
        command = ["stableopd.toy.pieces", "--kind", self.kind, "--habit", given.habit, "--seed", str(given.seed)]
        command += ["--gold-pool", str(self.gold_pool)]
        command += ["--terse-fraction", str(self.terse_fraction)] if self.terse_fraction is not None else []
        return command + (["--quick"] if self.quick else [])


class LanguageWorld(_World):
    """The words world (docs/words.md): problems in English; models and settings of runs are those of the preset."""

    name: Literal["words"]
    preset: Literal["cpu", "cpu-1m", "gpu", "quick"] = "cpu-1m"

    def _own_settings(self) -> dict[str, Any]:
        return run_settings(PRESETS[self.preset])

    def _maker(self, given: WorldTeacher) -> list[str]:
        return ["stableopd.words.pieces", "--preset", self.preset, "--habit", given.habit, "--seed", str(given.seed)]


World = Annotated[ToyWorld | LanguageWorld, Field(discriminator="name")]
