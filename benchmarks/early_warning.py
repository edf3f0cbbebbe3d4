"""Is a collapse announced before held-out accuracy falls, and are healthy runs left in peace?

    python benchmarks/early_warning.py [--out DIR] [--picture docs/images/early_warning.png]

Trains fresh pairs of the toy world with plain OPD and with StableOPD and hands every run's metrics to a monitor with
the settings of the demo, its thresholds being the package's defaults: once with and once without the stop probe. A
collapse is announced by the first alert of whatever severity about training (not about held-out accuracy itself), and
in time when that is at least 5 steps before held-out accuracy has fallen 0.1 below its best. Prints a table and, last,
one JSON object. docs/health.md holds its figures. Runs that are finished in DIR are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.console import quiet_libraries
from stableopd.health import HealthMonitor, MonitorSettings
from stableopd.health.verdict import collapse_step
from stableopd.runfolder import read_run
from stableopd.toy.demo import COMPRESSION_THRESHOLD, TAIL_CHARS
from stableopd.types import Alert
from toy_runs import Pair, Run, build_pairs, finish

FALL, LEAD = 0.1, 5
PAIRS = [
    Pair(teacher=teacher, student=student, habit=habit, world=world)
    for teacher, habit, world, students in (
        (501, "standard", "t4", (601, 602, 603)),
        (502, "standard", "t4", (604, 605, 606)),
        (503, "clean", "t4", (607, 608, 609)),
        (504, "standard", "a", (610, 611, 612)),
    )
    for student in students
]
HEADER = "| run | accuracy fell at | first alert | lead | first critical | collapsed |"
PROBES = ("health/stop_probe", "health/ending_probe")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the monitor said of a run, and what became of it."""

    run: str
    method: str
    steps: int
    fell_at: int | None
    """First evaluation with accuracy FALL below its best so far."""
    collapsed: bool
    alerts: list[Alert]

    def first(self, *, critical: bool = False) -> Alert | None:
        wanted = (
            a for a in self.alerts if not a.rule.startswith("eval_") and (a.severity == "critical" or not critical)
        )
        return next(wanted, None)

    @property
    def lead(self) -> int | None:
        """Steps from the first alert to the fall; None where either is missing."""
        first = self.first()
        return None if first is None or self.fell_at is None else self.fell_at - first.step


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    build_pairs(arguments.out, PAIRS)
    runs = [Run(pair=pair, name=method, method=method) for pair in PAIRS for method in ("opd", "stableopd")]
    finish(arguments.out, runs)
    summary = {}
    for name, without in (("with the probe", ()), ("without the probe", PROBES)):
        outcomes = [_outcome(run, arguments.out, without) for run in runs]
        print(f"\n{name}\n\n{HEADER}\n|" + "---|" * (HEADER.count("|") - 1))
        for outcome in outcomes:
            print(_line(outcome))
        summary[name] = _summary(outcomes)
    if arguments.picture:
        _draw(runs, arguments.out, arguments.picture)
    print(json.dumps(summary))


def _outcome(run: Run, root: Path, without: Iterable[str]) -> Outcome:
    record = read_run(run.folder(root))
    monitor = HealthMonitor(MonitorSettings(tail_chars=TAIL_CHARS, compression_threshold=COMPRESSION_THRESHOLD))
    alerts: list[Alert] = []
    best, fell_at = 0.0, None
    for row in record.metrics:
        step = int(row["step"])
        training = {key: value for key, value in row.items() if not key.startswith("eval/") and key not in without}
        alerts += monitor.judge(step, training)
        alerts += monitor.observe_eval(step, row)
        accuracy = row.get("eval/validation/accuracy")
        if accuracy is not None:
            best = max(best, accuracy)
            if fell_at is None and accuracy < best - FALL:
                fell_at = step
    return Outcome(
        run=f"{run.pair.name}/{run.name}", method=run.method, steps=len(record.metrics) - 1, fell_at=fell_at,
        collapsed=collapse_step(record.metrics, "validation") is not None, alerts=alerts,
    )  # fmt: skip


def _summary(outcomes: list[Outcome]) -> dict[str, Any]:
    collapses = [o for o in outcomes if o.collapsed]
    healthy = [o for o in outcomes if not o.collapsed and o.method != "opd"]
    leads = [o.lead for o in collapses if o.lead is not None]
    steps = sum(o.steps for o in healthy)
    alerts = [alert for o in healthy for alert in o.alerts if not alert.rule.startswith("eval_")]
    return {
        "collapses": len(collapses),
        "announced_in_time": sum(lead >= LEAD for lead in leads),
        "median_lead": statistics.median(leads) if leads else None,
        "leads": sorted(leads),
        "healthy_runs": len(healthy),
        "healthy_steps": steps,
        "warnings_per_1000_healthy_steps": round(1000 * sum(a.severity == "warning" for a in alerts) / steps, 2),
        "critical_per_1000_healthy_steps": round(1000 * sum(a.severity == "critical" for a in alerts) / steps, 2),
        "healthy_runs_with_a_warning": sum(o.first() is not None for o in healthy),
        "healthy_runs_with_a_critical": sum(o.first(critical=True) is not None for o in healthy),
        "accuracy_warnings_in_healthy_runs": sum(a.rule == "eval_accuracy" for o in healthy for a in o.alerts),
    }


def _line(outcome: Outcome) -> str:
    def told(alert: Alert | None) -> str:
        return "none" if alert is None else f"{alert.rule}, step {alert.step}"

    cells = (
        outcome.run, outcome.fell_at or "never", told(outcome.first()),
        "" if outcome.lead is None else outcome.lead, told(outcome.first(critical=True)),
        "yes" if outcome.collapsed else "no",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _draw(runs: list[Run], root: Path, path: Path) -> None:
    """The probe against the mean length and the accuracy, one thin line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = (
        ("health/ending_probe", "p(golden ending)"),
        ("completions/mean_length", "mean length, tokens"),
        ("eval/validation/accuracy", "held-out accuracy"),
    )
    for axes, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for run in runs:
            points = read_run(run.folder(root)).series(key)
            color = "#c0392b" if run.method == "opd" else "#1f77b4"
            axes.plot([step for step, _ in points], [value for _, value in points], color=color, alpha=0.5, linewidth=1)
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
    figure.suptitle("plain OPD in red, StableOPD in blue; each line one run of a fresh pair", fontsize=10)
    figure.savefig(path, dpi=120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=None, help="keep pairs and run folders here, and use those that are"
    )
    parser.add_argument("--picture", type=Path, default=None, help="also draw the curves")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(tempfile.mkdtemp(prefix="early-warning-"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    main()
