"""What the pipelined step does to accuracy and to the time of a step, in the toy world.

    python benchmarks/pipeline.py [--out DIR] [--pairs N]

StableOPD and plain OPD on fresh pairs: on policy; on policy with the importance correction that a pipeline needs; and
pipelined, every step but the first one step behind. Late accuracy is the mean of the last five evaluations. One
run at a time, one thread for arithmetic, so that a pipelined run has a second core for its rollouts. Prints a table
and, last, one JSON object. docs/engines.md holds its figures. Runs that are finished in DIR are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from controller import late_accuracy
from stableopd.console import quiet_libraries
from stableopd.health.verdict import collapse_step
from stableopd.runfolder import read_run
from toy_runs import Pair, Run, build_pairs, finish

PAIRS = [Pair(teacher=521, student=621), Pair(teacher=522, student=622), Pair(teacher=523, student=623, habit="clean")]
CORRECTED = {"objective.correction.kind": "truncate"}
SELDOM_SAVED = {"checkpoint.keep_best": False, "checkpoint.every_steps": 1000}
CASES: dict[str, dict[str, Any]] = {
    "on policy": {},
    "corrected": CORRECTED,
    "pipelined": {**CORRECTED, **SELDOM_SAVED, "rollout.pipeline": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="keep pairs and runs here, and use those there")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many of the pairs")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="pipeline-"))
    out.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    pairs = PAIRS[: arguments.pairs]
    build_pairs(out, pairs)
    cases = {
        (method, name): [
            Run(pair=pair, name=f"{method}_{name.replace(' ', '_')}", method=method, overrides=overrides)
            for pair in pairs
        ]
        for method in ("stableopd", "opd")
        for name, overrides in CASES.items()
    }
    finish(out, [run for runs in cases.values() for run in runs], parallel=1)
    print("| method | rollouts | late accuracy | by pair | collapsed | median step |\n|---|---|---|---|---|---|")
    summary = {}
    for (method, name), runs in cases.items():
        records = [read_run(run.folder(out)) for run in runs]
        late = [late_accuracy(record) for record in records]
        seconds = statistics.median(line["step_time"] for record in records for line in record.metrics[1:])
        found = {
            "late_accuracy": round(statistics.mean(late), 4),
            "by_pair": [round(value, 4) for value in late],
            "collapsed_on_the_way": sum(collapse_step(record.metrics, "validation") is not None for record in records),
            "step_s": round(seconds, 3),
        }
        summary[f"{method}, {name}"] = found
        shown = ", ".join(f"{value:.3f}" for value in late)
        print(
            f"| {method} | {name} | {found['late_accuracy']:.3f} | {shown} | {found['collapsed_on_the_way']} of "
            f"{len(runs)} | {seconds:.2f} s |"
        )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
