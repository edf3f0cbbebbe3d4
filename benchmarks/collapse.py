"""Does plain OPD collapse, and does StableOPD hold, on teachers and students that nobody has seen before?

    python benchmarks/collapse.py [--quick] [--teachers 301,302] [--students 401,402,403] [--out DIR]

Trains fresh teachers and students of the demo's world and, for each pair, OPD and StableOPD from the same
student with the same seed. Prints one line a pair and, last, one JSON object. docs/demo.md holds its table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from stableopd.console import quiet_libraries
from stableopd.health.verdict import collapse_step
from stableopd.runfolder import RunRecord, read_run
from stableopd.toy.build import train_student, train_teacher
from stableopd.toy.demo import METHODS, TOKENIZER, DemoSettings, one_thread, run_side_by_side, write_world

HEADER = (
    "| teacher | student | teacher greedy acc. / trunc. | OPD best | OPD end | OPD greedy acc. / trunc. "
    "| OPD | StableOPD end | StableOPD greedy acc. / trunc. | StableOPD |"
)


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    base = DemoSettings(out=arguments.out, quick=arguments.quick, world=arguments.world, teacher=arguments.habit)
    print(HEADER + "\n|" + "---|" * (HEADER.count("|") - 1), flush=True)
    pairs = []
    for runs, line in _pairs(base, arguments.teachers, arguments.students):
        print(line, flush=True)
        pairs.append(runs)
    print(json.dumps(_summary(pairs)))


def _pairs(
    base: DemoSettings, teacher_seeds: list[int], student_seeds: list[int]
) -> Iterator[tuple[dict[str, RunRecord], str]]:
    world = base.build_world()
    for teacher_seed in teacher_seeds:
        with one_thread():
            teacher = train_teacher(world, TOKENIZER, teacher_seed, base.teacher_recipe, _silent)
        for student_seed in student_seeds:
            with one_thread():
                student = train_student(world, TOKENIZER, student_seed, base.student_recipe, _silent)
            settings = replace(base, out=base.out / f"t{teacher_seed}-s{student_seed}", seed=student_seed)
            checks = write_world(settings, world, teacher, student)
            with Path("/dev/null").open("w") as nowhere:
                run_side_by_side(settings, Console(file=nowhere))
            runs = {method: read_run(settings.out / method) for method in METHODS}
            yield runs, _line(teacher_seed, student_seed, checks["teacher"], runs)


def _line(teacher: int, student: int, check: dict[str, float], runs: dict[str, RunRecord]) -> str:
    opd, stable = runs["opd"], runs["stableopd"]
    cells = (
        teacher, student, f"{check['greedy/accuracy']:.2f} / {check['greedy/truncation_rate']:.2f}",
        f"{max(_accuracy(opd)):.3f}", f"{_accuracy(opd)[-1]:.3f}", _greedy(opd), _verdict(opd),
        f"{_accuracy(stable)[-1]:.3f}", _greedy(stable), _verdict(stable),
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _accuracy(run: RunRecord) -> list[float]:
    return [value for _, value in run.series("eval/validation/accuracy")]


def _greedy(run: RunRecord) -> str:
    rates = (run.series(f"eval/validation_greedy/{name}")[-1][1] for name in ("accuracy", "truncation_rate"))
    return " / ".join(f"{rate:.2f}" for rate in rates)


def _verdict(run: RunRecord) -> str:
    status, step = run.verdict.status, run.verdict.step
    return status if step is None else f"{status}, step {step}"


def _summary(pairs: list[dict[str, RunRecord]]) -> dict[str, float]:
    summary: dict[str, float] = {"pairs": len(pairs)}
    for method in METHODS:
        runs = [pair[method] for pair in pairs]
        summary[f"{method}_collapsed"] = sum(run.verdict.status == "collapsed" for run in runs)
        begun = [collapse_step(run.metrics, "validation") for run in runs]
        summary[f"{method}_collapsed_on_the_way"] = sum(step is not None for step in begun)
        summary[f"{method}_best_accuracy"] = round(statistics.mean(max(_accuracy(run)) for run in runs), 4)
        summary[f"{method}_end_accuracy"] = round(statistics.mean(_accuracy(run)[-1] for run in runs), 4)
    return summary


def _silent(name: str, step: int, total: int, loss: float) -> None:
    pass


def _arguments() -> argparse.Namespace:
    def seeds(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo's quick recipe; promises no collapse")
    parser.add_argument("--teachers", type=seeds, default=[301, 302])
    parser.add_argument("--students", type=seeds, default=[401, 402, 403])
    parser.add_argument("--world", default="t4", choices=("t4", "a"))
    parser.add_argument("--habit", default="standard", choices=("standard", "moderate", "clean"))
    parser.add_argument("--out", type=Path, default=None, help="keep the run folders here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.teachers, arguments.students = arguments.teachers[:1], arguments.students[:1]
    arguments.out = arguments.out or Path(tempfile.mkdtemp(prefix="collapse-"))
    return arguments


if __name__ == "__main__":
    main()
