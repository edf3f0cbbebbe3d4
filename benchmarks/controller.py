"""Does the controller save a run that starts as plain OPD, and at what cost against StableOPD from the start?

    python benchmarks/controller.py [--out DIR] [--parallel 2]

Five fresh pairs of the toy world, each run as plain OPD, as the demo's StableOPD, and as plain OPD with
`health.actions: stabilise` and `rollback`; the last two again without the stop probe, so that the alarm comes late;
and all four with a learning rate three times too high, and with a restless teacher. Held-out accuracy swings
from one evaluation to the next, so that the mean of the last five (steps 80 to 100) is what is compared. Prints tables,
counts of collapses, and, last, one JSON object. docs/health.md holds its figures. Runs that are finished in DIR are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stableopd.console import quiet_libraries
from stableopd.health.verdict import collapse_step
from stableopd.runfolder import RunRecord, read_run
from toy_runs import Pair, Run, build_pairs, finish

PAIRS = [
    Pair(teacher=501, student=601),
    Pair(teacher=501, student=602),
    Pair(teacher=502, student=604),
    Pair(teacher=502, student=605),
    Pair(teacher=503, student=607, habit="clean"),
]
RESTLESS = [Pair(teacher=505, student=student, habit="restless") for student in (613, 614, 615, 616, 617)]
OFTEN = {"checkpoint.every_steps": 10}
THREE_TIMES = {"optimizer.learning_rate": 1.8e-3}
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "opd": ("opd", {}),
    "stableopd": ("stableopd", {}),
    "stabilise": ("opd", {"health.actions": "stabilise", **OFTEN}),
    "rollback": ("opd", {"health.actions": "rollback", **OFTEN}),
}
CASES: Mapping[str, tuple[list[Pair], str, Mapping[str, Any], tuple[str, ...]]] = {
    "as it is": (PAIRS, "", {}, ("opd", "stableopd", "stabilise", "rollback")),
    "without the probe": (PAIRS, "_blind", {"health.probe_prompts": 0}, ("stabilise", "rollback")),
    "learning rate x 3": (PAIRS, "_lr3", THREE_TIMES, ("opd", "stableopd", "stabilise", "rollback")),
    "restless teacher": (RESTLESS, "", {}, ("opd", "stableopd", "stabilise", "rollback")),
}


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    summary = {}
    for case, (pairs, suffix, overrides, ways) in CASES.items():
        build_pairs(arguments.out, pairs)
        runs = {
            way: [
                Run(pair=pair, name=way + suffix, method=WAYS[way][0], overrides={**WAYS[way][1], **overrides})
                for pair in pairs
            ]
            for way in ways
        }
        finish(arguments.out, [run for of_way in runs.values() for run in of_way], arguments.parallel)
        summary[case] = {way: _summary(of_way, arguments.out) for way, of_way in runs.items()}
        print(f"\n{case}\n\n| pair | " + " | ".join(ways) + " |\n|" + "---|" * (len(ways) + 1))
        for number, pair in enumerate(pairs):
            print(f"| {pair.name} | " + " | ".join(_cell(runs[way][number], arguments.out) for way in ways) + " |")
        print("| mean | " + " | ".join(f"{summary[case][way]['late_accuracy']:.3f}" for way in ways) + " |", flush=True)
    print(json.dumps(summary))


def _cell(run: Run, root: Path) -> str:
    """Late accuracy / greedy truncation at the end; C where it had collapsed on the way; what was done."""
    record = read_run(run.folder(root))
    accuracy = late_accuracy(record)
    cut_off = record.series("eval/validation_greedy/truncation_rate")[-1][1]
    actions = Counter(alert.action for alert in record.alerts if alert.rule == "controller")
    done = ", ".join(f"{count} {action}" for action, count in actions.items())
    collapsed = " C" if collapse_step(record.metrics, "validation") is not None else ""
    return f"{accuracy:.3f} / {cut_off:.2f}{collapsed}" + (f" ({done})" if done else "")


def late_accuracy(record: RunRecord) -> float:
    return statistics.mean(value for _, value in record.series("eval/validation/accuracy")[-5:])


def _summary(runs: list[Run], root: Path) -> dict[str, float]:
    records = [read_run(run.folder(root)) for run in runs]
    late = [late_accuracy(record) for record in records]
    ends = [record.series("eval/validation/accuracy")[-1][1] for record in records]
    greedy = [record.series("eval/validation_greedy/accuracy")[-1][1] for record in records]
    return {
        "late_accuracy": round(statistics.mean(late), 4),
        "worst_late_accuracy": round(min(late), 4),
        "end_accuracy": round(statistics.mean(ends), 4),
        "end_greedy_accuracy": round(statistics.mean(greedy), 4),
        "collapsed_on_the_way": sum(collapse_step(record.metrics, "validation") is not None for record in records),
        "collapsed_at_the_end": sum(record.verdict.status == "collapsed" for record in records),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=None, help="keep pairs and run folders here, and use those that are"
    )
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each on one thread")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(tempfile.mkdtemp(prefix="controller-"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    main()
