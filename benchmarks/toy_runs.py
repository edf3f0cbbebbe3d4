"""Fresh pairs of the demo's world and runs on them, for the studies beside this file. Finished work is not repeated."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from stableopd.config_files import dump_config
from stableopd.lines import write_atomically
from stableopd.study.jobs import Ended, Job, run_jobs
from stableopd.toy.build import train_student, train_teacher
from stableopd.toy.demo import TOKENIZER, DemoSettings, demo_config, one_thread, write_world

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A teacher and a student of the toy world, by their seeds."""

    teacher: int
    student: int
    habit: str = "standard"
    world: str = "t4"

    @property
    def name(self) -> str:
        return f"{self.world}-{self.habit}-t{self.teacher}-s{self.student}"

    def settings(self, root: Path) -> DemoSettings:
        return DemoSettings(out=root / self.name, seed=self.student, world=self.world, teacher=self.habit)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a pair: the demo's configuration of `method`, and what is laid over it."""

    pair: Pair
    name: str
    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, root: Path) -> Path:
        return root / self.pair.name / self.name


def build_pairs(root: Path, pairs: Sequence[Pair]) -> None:
    """Train teachers and students, and write data and models of each pair under `root`."""
    for pair in pairs:
        settings = pair.settings(root)
        if (settings.out / "models.json").exists():
            continue
        world = settings.build_world()
        kept = root / "teachers" / f"{pair.world}-{pair.habit}-{pair.teacher}"
        with one_thread():
            if kept.exists():
                teacher = AutoModelForCausalLM.from_pretrained(kept, attn_implementation="eager")
            else:
                teacher = train_teacher(world, TOKENIZER, pair.teacher, settings.teacher_recipe, _silent)
                teacher.save_pretrained(kept)  # type: ignore[operator]
            student = train_student(world, TOKENIZER, pair.student, settings.student_recipe, _silent)
        write_world(settings, world, teacher, student)
        print(f"built {pair.name}", flush=True)


def finish(root: Path, runs: Sequence[Run], parallel: int = 2) -> None:
    """Make every run that has not ended yet, so many at a time, each on one thread.

    Raises: RuntimeError when some failed, after all the others.
    """
    ended = run_jobs([_job(root, run) for run in runs], parallel=parallel, environment=ONE_THREAD, tell=_tell)
    failed = [f"{end.job.name}: {end.why}" for end in ended.values() if end.status != "done"]
    if failed:
        raise RuntimeError("\n".join(failed))


def _job(root: Path, run: Run) -> Job:
    folder = run.folder(root)
    config = dump_config(demo_config(run.pair.settings(root), run.method))
    write_atomically(folder.with_suffix(".yaml"), config)
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**run.overrides, "output_dir": str(folder)}.items()]
    command = (sys.executable, "-m", "stableopd", "train", str(folder.with_suffix(".yaml")), *overrides, "{resume}")
    return Job(
        name=f"{run.pair.name}/{run.name}",
        command=command,
        stem=folder,
        begun=folder / "config.yaml",
        settings="\n".join([config, *overrides]),
    )


def _tell(ended: Ended) -> None:
    if ended.fresh and ended.status == "done":
        print(f"ran {ended.job.name}", flush=True)


def _silent(name: str, step: int, total: int, loss: float) -> None:
    pass
