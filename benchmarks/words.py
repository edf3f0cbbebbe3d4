"""Does plain OPD collapse in a language-like world, and what does StableOPD do there?

    python benchmarks/words.py [--quick] [--preset cpu|gpu] [--out DIR] [--seeds N] [--methods opd,stableopd]

Builds pairs of the words world (docs/words.md), each with a teacher and a student of its own seed, and trains every
student with every method, from the same weights and seed. Prints one line a run and, last, one JSON object. What is
finished in DIR is not repeated, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from stableopd.config_files import dump_config
from stableopd.console import quiet_libraries
from stableopd.lines import write_atomically
from stableopd.runfolder import RunRecord, read_run
from stableopd.study.jobs import Ended, Job, run_jobs
from stableopd.study.outcome import outcome_of_run
from stableopd.words.runs import METHODS, Pair, words_config
from stableopd.words.settings import PRESETS

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
HEADER = (
    "| seed | method | start | best | end | greedy end | greedy cut off, end | worst | worst cut off in training "
    "| repeated tokens, worst | length, end | verdict |"
)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    quiet_libraries()
    jobs = [job for seed in arguments.seeds for job in jobs_of(arguments, seed)]
    cpu = not PRESETS[arguments.preset].bf16
    ended = run_jobs(jobs, parallel=arguments.parallel, environment=ONE_THREAD if cpu else {}, tell=_tell)
    print(HEADER + "\n|" + "---|" * (HEADER.count("|") - 1))
    records: dict[str, list[RunRecord]] = {method: [] for method in arguments.methods}
    for seed in arguments.seeds:
        for method in arguments.methods:
            if ended[f"{method}, seed {seed}"].status == "done":
                record = read_run(run_folder(arguments.out, method, seed))
                records[method].append(record)
                print(_line(seed, method, record))
    checks = {role: _checks(arguments.out, role, arguments.seeds) for role in ("teacher", "student")}
    print(json.dumps({**checks, **{method: _summary(found) for method, found in records.items() if found}}))
    return int(any(end.status != "done" for end in ended.values()))


def jobs_of(arguments: argparse.Namespace, seed: int) -> list[Job]:
    """What one pair needs: its data, its teacher and its student, then a run for each method."""
    out, preset = arguments.out, PRESETS[arguments.preset]
    pair = Pair(teacher=out / f"teacher-{seed}", student=out / f"student-{seed}", data=out / "data")
    pieces = [
        _piece("data", pair.data, arguments.preset, 0),
        _piece("teacher", pair.teacher, arguments.preset, seed),
        _piece("student", pair.student, arguments.preset, seed),
    ]
    runs = []
    for method in arguments.methods:
        folder = run_folder(out, method, seed)
        config = dump_config(words_config(pair, preset, method, output_dir=folder, seed=seed))
        path = folder.with_name(folder.name + ".yaml")
        write_atomically(path, config)
        runs.append(
            Job(
                name=f"{method}, seed {seed}",
                command=(sys.executable, "-m", "stableopd", "train", str(path), "{resume}"),
                stem=folder,
                after=tuple(piece.name for piece in pieces),
                begun=folder / "config.yaml",
                settings=config,
            )
        )
    return [*pieces, *runs]


def run_folder(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-{seed}"


def _piece(kind: str, folder: Path, preset: str, seed: int) -> Job:
    command = (
        sys.executable,
        "-m",
        "stableopd.words.pieces",
        kind,
        str(folder),
        "--preset",
        preset,
        "--seed",
        str(seed),
    )
    return Job(name=folder.name, command=command, stem=folder, settings=f"{kind} {PRESETS[preset]} {seed}")


def _tell(ended: Ended) -> None:
    if ended.fresh or ended.status != "done":
        print(f"{ended.status} in {ended.seconds:.0f} s: {ended.job.name} {ended.why}".rstrip(), flush=True)


def _line(seed: int, method: str, record: RunRecord) -> str:
    figures, curves = outcome_of_run(record, "validation")
    worst_greedy = max(value for _, value in curves["greedy_truncation"])
    names = ("start_accuracy", "best_accuracy", "end_accuracy", "greedy_accuracy", "greedy_truncation")
    cells = [
        *(f"{figures[name]:.3f}" for name in names),
        f"{worst_greedy:.3f}",
        f"{figures['worst_truncation']:.3f}" if "worst_truncation" in figures else "",
        f"{figures['worst_repeated']:.3f}" if "worst_repeated" in figures else "",
        f"{figures['end_length']:.1f}" if "end_length" in figures else "",
    ]
    step = "" if record.verdict.step is None else f", step {record.verdict.step}"
    return f"| {seed} | {method} | " + " | ".join(cells) + f" | {record.verdict.status}{step} |"


def _summary(records: Sequence[RunRecord]) -> Mapping[str, float]:
    """Means over the seeds, and how many collapsed."""
    figures = [outcome_of_run(record, "validation")[0] for record in records]
    shared = set.intersection(*(set(found) for found in figures)) - {"collapsed", "collapse_step"}
    means = {name: round(statistics.mean(found[name] for found in figures), 4) for name in sorted(shared)}
    return {"runs": len(records), "collapsed": sum(found["collapsed"] for found in figures), **means}


def _checks(out: Path, role: str, seeds: Sequence[int]) -> list[Mapping[str, float]]:
    files = [out / f"{role}-{seed}" / "checks.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a poor pair and short runs in about a minute, to try it out"
    )
    parser.add_argument("--preset", default="cpu", choices=[name for name in PRESETS if name != "quick"])
    parser.add_argument("--seeds", type=int, default=1, help="number of pairs (default 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first pair (default 0)")
    parser.add_argument("--methods", default="opd,stableopd", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--parallel", type=int, default=2, help="processes at a time, each on one thread (default 2)")
    parser.add_argument("--out", type=Path, default=None, help="keep everything here, and use what is there")
    arguments = parser.parse_args(given)
    arguments.methods = arguments.methods.split(",")
    unknown = [method for method in arguments.methods if method not in METHODS]
    if unknown:
        parser.error(f"--methods: there is no {unknown[0]!r}; known: {', '.join(METHODS)}")
    if arguments.seeds < 1 or arguments.parallel < 1:
        parser.error("--seeds and --parallel must be at least 1")
    if arguments.quick:
        arguments.preset = "quick"
    arguments.seeds = list(range(arguments.first_seed, arguments.first_seed + arguments.seeds))
    arguments.out = arguments.out or Path(tempfile.mkdtemp(prefix="words-"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
