"""What ending rollouts in a loop saves, and what it does to accuracy.

    python benchmarks/stop_loops.py [--out DIR]

Three fresh pairs of the toy world, plain OPD and StableOPD, without `rollout.stop_loops_after` and with 4 and 8
repeats. Late accuracy is the mean of the last five evaluations. Prints a table and, last, one JSON object.
docs/health.md holds its figures. Runs that are finished in DIR are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from controller import late_accuracy
from stableopd.console import quiet_libraries
from stableopd.health.verdict import collapse_step
from stableopd.runfolder import read_run
from toy_runs import Pair, Run, build_pairs, finish

PAIRS = [Pair(teacher=501, student=601), Pair(teacher=502, student=604), Pair(teacher=503, student=607, habit="clean")]
REPEATS = (None, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="keep pairs and runs here, and use those there")
    out = parser.parse_args().out or Path(tempfile.mkdtemp(prefix="stop-loops-"))
    out.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    build_pairs(out, PAIRS)
    cases = {
        (method, repeats): [
            Run(
                pair=pair,
                name=method if repeats is None else f"{method}_loops{repeats}",
                method=method,
                overrides={} if repeats is None else {"rollout.stop_loops_after": repeats},
            )
            for pair in PAIRS
        ]
        for method in ("opd", "stableopd")
        for repeats in REPEATS
    }
    finish(out, [run for runs in cases.values() for run in runs])
    print("| method | ends after | tokens | saved | late accuracy | collapsed on the way |\n|---|---|---|---|---|---|")
    summary = {}
    for (method, repeats), runs in cases.items():
        records = [read_run(run.folder(out)) for run in runs]
        tokens = statistics.mean(record.metrics[-1]["num_tokens"] for record in records)
        free = statistics.mean(read_run(run.folder(out)).metrics[-1]["num_tokens"] for run in cases[method, None])
        found = {
            "tokens": round(tokens),
            "saved": round(1 - tokens / free, 3),
            "late_accuracy": round(statistics.mean(late_accuracy(record) for record in records), 4),
            "collapsed_on_the_way": sum(collapse_step(record.metrics, "validation") is not None for record in records),
        }
        summary[f"{method}, {repeats}"] = found
        print(
            f"| {method} | {'never' if repeats is None else f'{repeats} repeats'} | {found['tokens']:,} | "
            f"{found['saved']:.0%} | {found['late_accuracy']:.3f} | {found['collapsed_on_the_way']} of {len(runs)} |"
        )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
