"""What looking after health costs: the signals of a large batch, and their share of a training step.

    python benchmarks/health.py [--quick]

- Signals: `measure_rollouts` on 256 rollouts of 8,192 tokens with texts, token ids and advantages, so that every figure
  is computed, on one core. Five kinds of rollouts: ids drawn evenly from 30,000; from a distribution with a long tail;
  from six ids only; loops of up to 500 tokens that fill the second half; loops in which every 50th token changes.
- Step: the trainer's own `time/health_s` in whole steps of the 2M student and 8M teacher of `step_vs_trl.py`, 64
  rollouts of up to 256 tokens, heavy-tailed, after a warm-up. Golden solutions are as long, and 4 of them are probed,
  as many per rollout as the default 16 of the default 256. Larger models make the share smaller.

Prints a table, and as its last line one JSON object: "seconds_256x8192" is the slowest kind's median, "share_of_step"
the median over steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

import rollout
import step_vs_trl
from stableopd.health import measure_rollouts

NUM_ROLLOUTS, NUM_TOKENS = 256, 8192
KINDS = ("even", "long tail", "six ids", "loops", "near loops")


def draw(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "six ids":
        return rng.integers(0, 6, NUM_TOKENS)
    if kind == "long tail":
        return np.minimum(rng.zipf(1.2, NUM_TOKENS), 30_000)
    ids = rng.integers(0, 30_000, NUM_TOKENS)
    if kind in ("loops", "near loops"):
        start, period = NUM_TOKENS // 2, int(rng.integers(1, 500))
        ids[start:] = np.resize(ids[start : start + period], NUM_TOKENS - start)
    if kind == "near loops":
        ids[::50] = rng.integers(0, 30_000, len(ids[::50]))
    return ids


def seconds_of_signals(kind: str, repeats: int) -> float:
    rng = np.random.default_rng(0)
    token_ids = [draw(kind, rng) for _ in range(NUM_ROLLOUTS)]
    columns = {
        "lengths": [NUM_TOKENS] * NUM_ROLLOUTS,
        "finish_reasons": ["length"] * NUM_ROLLOUTS,
        "texts": [" ".join(map(str, ids.tolist())) for ids in token_ids],
        "token_ids": token_ids,
        "advantages": [rng.normal(size=NUM_TOKENS) for _ in range(NUM_ROLLOUTS)],
    }
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        measure_rollouts(**columns)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def shares_of_step(repeats: int, quick: bool) -> list[float]:
    (case,) = [case for case in step_vs_trl.cases(["2M-8M"], quick) if case.lengths_name == "heavy_tail"]
    shares = []
    with tempfile.TemporaryDirectory() as name, rollout.quiet():
        ours = step_vs_trl.Ours(case, "cpu", Path(name), with_gold=True)
        for _ in range(repeats + 1):
            step = ours.step().check("stableopd", case)
            shares.append(step.phases["health"] / step.seconds)
    return shares[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat, short completions in the step")
    arguments = parser.parse_args()
    console = Console()
    repeats = 1 if arguments.quick else 3
    table = Table("rollouts", "seconds", title=f"{NUM_ROLLOUTS} rollouts of {NUM_TOKENS:,} tokens, one core")
    seconds = {kind: seconds_of_signals(kind, repeats) for kind in KINDS}
    for kind, taken in seconds.items():
        table.add_row(kind, f"{taken:.2f}")
    console.print(table)
    share = statistics.median(shares_of_step(repeats, arguments.quick))
    console.print(f"Health is {share:.2%} of a step of the 2M student and the 8M teacher.")
    print(json.dumps({"seconds_256x8192": round(max(seconds.values()), 2), "share_of_step": round(share, 4)}))


if __name__ == "__main__":
    main()
