"""Worlds that a study makes on the spot: models and data of every pair, built once and shared by all methods."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stableopd.sections import FolderName, Fraction, NonNegativeInt, PositiveInt, Section
from stableopd.study.jobs import Job
from stableopd.toy.task import COMPRESSION_THRESHOLD, JUDGE, TAIL_CHARS

Habit = Literal["standard", "moderate", "clean", "restless"]


class ToyTeacher(Section):
    habit: Habit = "standard"
    seed: NonNegativeInt = 0


class ToyWorld(Section):
    """The demo's world (docs/demo.md). A pair is a teacher; the seed of a run is that of its student, too."""

    name: Literal["toy"]
    kind: Literal["t4", "a"] = "t4"
    terse_fraction: Fraction | None = None
    """Share of golden solutions that are answer-only; without it, the world's own."""
    teachers: dict[FolderName, ToyTeacher] = Field(min_length=1)
    gold_pool: PositiveInt = 128
    """Size of the scarce pool in gold_pool.jsonl."""
    quick: bool = False
    """Poor models in seconds, to try a study out."""
    dir: str | None = None
    """Where models and data are kept, so that several studies can share them; without it, in the study's folder."""

    def folder(self, study: Path) -> Path:
        return Path(self.dir) if self.dir else study / "world"

    @model_validator(mode="after")
    def _teachers_differ(self) -> Self:
        for (first, one), (second, other) in combinations(self.teachers.items(), 2):
            if one == other:
                raise ValueError(f"teachers {first} and {second} are the same: {one.habit}, seed {one.seed}")
        return self

    def settings(self, study: Path, pair: str, seed: int) -> dict[str, Any]:
        """Models and data of a pair and how its answers are judged, laid under the study's `base`."""
        root = self.folder(study)
        return {
            "student": {"model_name_or_path": str(root / "students" / f"seed-{seed}")},
            "teacher": {"model_name_or_path": str(root / "teachers" / pair)},
            "data": {"path": str(root / "data" / "train.jsonl")},
            "evaluation": {"path": str(root / "data" / "validation.jsonl"), "judge": JUDGE},
            "objective": {"reward": {"function": JUDGE}},
            "health": {"tail_chars": TAIL_CHARS, "compression_threshold": COMPRESSION_THRESHOLD},
        }

    def places(self) -> Sequence[tuple[str, str]]:
        """Settings, as (section, key), that are files which the world makes."""
        sections = ("student", "model_name_or_path"), ("teacher", "model_name_or_path")
        return *sections, ("data", "path"), ("evaluation", "path")

    def placeholders(self, study: Path) -> dict[str, str]:
        """What `{world}` in a setting stands for."""
        return {"world": str(self.folder(study))}

    def made_with(self, pair: str, seed: int) -> str:
        """What models and data of a pair are made with."""
        return "\n".join(job.settings for job in self.jobs(Path(), pair, seed))

    def jobs(self, study: Path, pair: str, seed: int) -> list[Job]:
        """What makes the models and data of a pair; jobs of several pairs that are the same have the same name."""
        teacher = self.teachers[pair]
        root = self.folder(study)
        return [
            self._job(root, "data", root / "data"),
            self._job(root, "teacher", root / "teachers" / pair, habit=teacher.habit, seed=teacher.seed),
            self._job(root, "student", root / "students" / f"seed-{seed}", seed=seed),
        ]

    def _job(self, root: Path, piece: str, folder: Path, *, habit: str = "standard", seed: int = 0) -> Job:
        command = [sys.executable, "-m", "stableopd.toy.pieces", piece, str(folder), "--kind", self.kind]
        command += ["--habit", habit, "--seed", str(seed), "--gold-pool", str(self.gold_pool)]
        command += ["--terse-fraction", str(self.terse_fraction)] if self.terse_fraction is not None else []
        command += ["--quick"] if self.quick else []
        return Job(
            name=f"world {folder.relative_to(root)}",
            command=tuple(command),
            stem=folder,
            settings=" ".join([piece, *command[5:]]),
        )
