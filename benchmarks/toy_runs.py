"""Fresh pairs of the demo's world and runs on them, for the studies beside this file. Finished work is not repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from stableopd.config_files import dump_config
from stableopd.toy.build import train_student, train_teacher
from stableopd.toy.demo import TOKENIZER, DemoSettings, demo_config, one_thread, write_world


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

    Raises: RuntimeError when one fails.
    """
    waiting = [run for run in runs if not _outcome(run.folder(root)).exists()]
    active: list[tuple[Run, subprocess.Popen[bytes]]] = []
    while waiting or active:
        while waiting and len(active) < parallel:
            run = waiting.pop(0)
            active.append((run, _start(root, run)))
        time.sleep(0.5)
        for run, process in active.copy():
            if process.poll() is None:
                continue
            active.remove((run, process))
            folder = run.folder(root)
            if process.returncode not in (0, 3):
                raise RuntimeError(f"{folder} ended with {process.returncode}; see {folder.with_suffix('.log')}")
            _outcome(folder).write_text(json.dumps({"returncode": process.returncode}) + "\n")
            print(f"ran {run.pair.name}/{run.name}", flush=True)


def _start(root: Path, run: Run) -> subprocess.Popen[bytes]:
    folder = run.folder(root)
    config = demo_config(run.pair.settings(root), run.method)
    path = folder.with_suffix(".yaml")
    path.write_text(dump_config(config))
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**run.overrides, "output_dir": str(folder)}.items()]
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "stableopd", "train", str(path), *overrides, *resume],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def _outcome(folder: Path) -> Path:
    return folder.with_suffix(".done")


def _silent(name: str, step: int, total: int, loss: float) -> None:
    pass
