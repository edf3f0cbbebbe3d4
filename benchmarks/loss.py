"""The fused losses against full logits and against TRL's chunked functions: time and peak memory.

    python benchmarks/loss.py [--quick] [--repeats 3] [--tokens 2048,8192]

One forward and one backward pass of a loss of N tokens, from hidden states [N, H] to the gradients of states and head:

- "sampled": the log-probability of the sampled token, what policy gradients and golden solutions need;
- "kl": KL(student ‖ teacher) over the whole vocabulary, two heads.

Sides:

- "fused": `stableopd.fused`, with its defaults;
- "full": all logits by one linear map per head, then `stableopd.losses` and autograd: what there is without the pass;
- "log_softmax": full logits with `torch.log_softmax`, the shortest way to write the sampled loss (no KL);
- "trl": `ChunkedLogProbFunction` and `ChunkedDivergenceFunction` of TRL, with its own tile sizes.

V = 151,936 and H = 896 (Qwen2.5-0.5B), bfloat16 and float32, N = 2,048 and 8,192. Full logits at 8,192 tokens do not
fit and are left out. Every measurement is a process of its own: a pass over 64 tokens first, then one that counts. The
peak is how far resident memory (on a GPU what torch has allocated) rises above where it was: heads and states are
there already. Sides take turns; times and peaks are medians over repeats, ratios medians of the ratios of one turn.

Prints a table, and as its last line one JSON object, ours / theirs. The figures at the top are those of bfloat16 at
N = 2,048; "cases" has all; "peak_growth" is how much the fused peak grows from 2,048 to 8,192 tokens, in units of the
growth of the hidden states.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stableopd.fused import DivergenceTerm, Projected, SampledTerm, fused_loss
from stableopd.heads import LinearHead
from stableopd.losses import reverse_kl, token_logprobs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIDES = {"sampled": ("fused", "full", "log_softmax", "trl"), "kl": ("fused", "full", "trl")}
_TRL_CHUNK = 32_768
"""Vocabulary entries of a tile in TRL's log-probabilities; its divergence has the same."""


@dataclass(frozen=True)
class Case:
    kind: str
    dtype: str
    num_tokens: int
    vocab: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.dtype} {self.num_tokens:,}"

    def sides(self) -> tuple[str, ...]:
        fits = self.num_tokens * self.vocab < 2**29
        return tuple(side for side in SIDES[self.kind] if fits or side in ("fused", "trl"))

    @property
    def states_bytes(self) -> int:
        return self.num_tokens * self.width * (2 if self.dtype == "bf16" else 4)


@dataclass
class Inputs:
    """Leaves of one pass."""

    states: Tensor
    weight: Tensor
    teacher_states: Tensor
    teacher_weight: Tensor
    ids: Tensor

    @classmethod
    def of(cls, case: Case, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[case.dtype]

        def array(rows: int, scale: float) -> Tensor:
            drawn = torch.empty(rows, case.width).normal_(0.0, scale, generator=generator)
            return drawn.to(device=device, dtype=dtype)

        return cls(
            states=array(case.num_tokens, 1.0).requires_grad_(),
            weight=array(case.vocab, 0.05).requires_grad_(),
            teacher_states=array(case.num_tokens, 1.0),
            teacher_weight=array(case.vocab, 0.05),
            ids=torch.randint(case.vocab, (case.num_tokens,), generator=generator).to(device),
        )

    def first(self, count: int) -> Inputs:
        states = self.states.detach()[:count].clone().requires_grad_()
        return Inputs(states, self.weight, self.teacher_states[:count], self.teacher_weight, self.ids[:count])


def fused(kind: str, x: Inputs) -> Tensor:
    weight = torch.full((len(x.ids),), 1.0 / len(x.ids), device=x.ids.device)
    vocab = x.weight.shape[0]
    student = Projected(states=x.states, head=LinearHead(weight=x.weight, vocab_size=vocab))
    if kind == "sampled":
        return fused_loss(student, x.ids, [SampledTerm(name="nll", weight=weight, loss=lambda y, at, _: -y)]).loss
    teacher = Projected(states=x.teacher_states, head=LinearHead(weight=x.teacher_weight, vocab_size=vocab))
    term = DivergenceTerm(name="kl", weight=weight, other="teacher", divergence="reverse_kl")
    return fused_loss(student, x.ids, [term], others={"teacher": teacher}).loss


def full(kind: str, x: Inputs) -> Tensor:
    logits = torch.nn.functional.linear(x.states, x.weight)
    if kind == "sampled":
        return -token_logprobs(logits, x.ids).mean()
    with torch.no_grad():
        teacher = torch.nn.functional.linear(x.teacher_states, x.teacher_weight)
    return reverse_kl(logits, teacher).mean()


def log_softmax(kind: str, x: Inputs) -> Tensor:
    logits = torch.nn.functional.linear(x.states, x.weight)
    return -logits.float().log_softmax(-1).gather(-1, x.ids[:, None]).mean()


def trl(kind: str, x: Inputs) -> Tensor:
    if kind == "sampled":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        arguments = (x.states, x.weight, None, x.ids, 1.0, _TRL_CHUNK, None, 1.0, ())
        return -ChunkedLogProbFunction.apply(*arguments)[0].mean()
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    arguments = (x.states, x.weight, None, x.teacher_states, x.teacher_weight, None, 1.0)
    return ChunkedDivergenceFunction.apply(*arguments)[0].mean()


PASSES: dict[str, Callable[[str, Inputs], Tensor]] = {
    "fused": fused,
    "full": full,
    "log_softmax": log_softmax,
    "trl": trl,
}


class Peak:
    """How far memory rises above where it is now."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.base = self._status("VmRSS")

    def bytes(self) -> int:
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.base
        return self._status("VmHWM") - self.base

    @staticmethod
    def _status(key: str) -> int:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(key))
        return 1024 * int(line.split()[1])


def measure_here(side: str, case: Case, device: str) -> dict[str, float]:
    """One pass of one side in this process."""
    inputs = Inputs.of(case, device)
    PASSES[side](case.kind, inputs.first(64)).backward()
    inputs.weight.grad = None
    peak = Peak(device)
    start = time.perf_counter()
    loss = PASSES[side](case.kind, inputs)
    loss.backward()
    high = peak.bytes()
    seconds = time.perf_counter() - start
    assert inputs.states.grad is not None
    return {"seconds": seconds, "peak": high, "loss": loss.item(), "grad": inputs.states.grad.float().norm().item()}


def measure(side: str, case: Case, device: str) -> dict[str, float]:
    arguments = [side, case.kind, case.dtype, str(case.num_tokens), str(case.vocab), str(case.width), device]
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}, {case.name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_same_result(results: dict[str, dict[str, float]], case: Case) -> None:
    """All sides compute the same thing, or their times mean nothing."""
    tolerance = 2e-2 if case.dtype == "bf16" else 1e-4
    for side, result in results.items():
        for key in ("loss", "grad"):
            expected = results["fused"][key]
            if abs(result[key] - expected) > tolerance * abs(expected):
                raise RuntimeError(f"{case.name}: {key} of {side} is {result[key]}, of fused {expected}")


def run_case(case: Case, repeats: int, device: str, console: Console) -> dict[str, dict[str, list[float]]]:
    """Seconds and peaks of every side, over turns."""
    found: dict[str, dict[str, list[float]]] = {side: {"seconds": [], "peak": []} for side in case.sides()}
    for repeat in range(repeats):
        turn = {}
        for side in case.sides():
            console.print(f"[dim]{case.name}: turn {repeat + 1} of {repeats}, {side}[/dim]")
            turn[side] = measure(side, case, device)
            for key in ("seconds", "peak"):
                found[side][key].append(turn[side][key])
        check_same_result(turn, case)
    return found


def ratio(found: dict[str, dict[str, list[float]]], side: str, key: str) -> float | None:
    if side not in found:
        return None
    return round(
        statistics.median(ours / theirs for ours, theirs in zip(found["fused"][key], found[side][key], strict=True)), 2
    )


def cases(quick: bool, tokens: list[int]) -> list[Case]:
    vocab, width = (32_768, 256) if quick else (151_936, 896)
    sizes = tokens or ([512, 2_048] if quick else [2_048, 8_192])
    return [Case(kind, dtype, n, vocab, width) for dtype in DTYPES for n in sizes for kind in SIDES]


def peak_growth(all_found: dict[Case, dict[str, dict[str, list[float]]]]) -> dict[str, float]:
    """Per kind and dtype: growth of the fused peak from the smaller to the larger N, by that of the hidden states."""
    growth = {}
    for small in all_found:
        for large in all_found:
            if (small.kind, small.dtype) == (large.kind, large.dtype) and small.num_tokens < large.num_tokens:
                peaks = [statistics.median(all_found[case]["fused"]["peak"]) for case in (small, large)]
                growth[f"{small.kind} {small.dtype}"] = round(
                    (peaks[1] - peaks[0]) / (large.states_bytes - small.states_bytes), 2
                )
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small vocabulary, one turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", default="", help="numbers of tokens, in place of 2048,8192")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, kind, dtype, *sizes, device = options.one
        print(json.dumps(measure_here(side, Case(kind, dtype, *map(int, sizes)), device)))
        return
    console = Console(stderr=True)
    table = Table("loss", "side", "seconds", "peak (MiB)", "time, ours / theirs", "peak, ours / theirs")
    all_found: dict[Case, dict[str, dict[str, list[float]]]] = {}
    for case in cases(options.quick, [int(number) for number in options.tokens.split(",") if number]):
        found = run_case(case, 1 if options.quick else options.repeats, options.device, console)
        all_found[case] = found
        for side in found:
            seconds, peak = (statistics.median(found[side][key]) for key in ("seconds", "peak"))
            ratios = ["" if side == "fused" else f"{ratio(found, side, key):.2f}" for key in ("seconds", "peak")]
            table.add_row(case.name, side, f"{seconds:.2f}", f"{peak / 2**20:,.0f}", *ratios)
        table.add_section()
    Console(width=110).print(table)
    print(json.dumps(summary(all_found)))


def summary(all_found: dict[Case, dict[str, dict[str, list[float]]]]) -> dict[str, object]:
    smallest = min(case.num_tokens for case in all_found)
    headline = {
        case.kind: found for case, found in all_found.items() if (case.dtype, case.num_tokens) == ("bf16", smallest)
    }
    per_case = {
        case.name: {
            side: {"time": ratio(found, side, "seconds"), "peak": ratio(found, side, "peak")}
            for side in found
            if side != "fused"
        }
        for case, found in all_found.items()
    }
    return {
        "sampled_time": ratio(headline["sampled"], "full", "seconds"),
        "sampled_peak": ratio(headline["sampled"], "full", "peak"),
        "kl_time": ratio(headline["kl"], "full", "seconds"),
        "kl_peak": ratio(headline["kl"], "full", "peak"),
        "vs_trl_time": ratio(headline["kl"], "trl", "seconds"),
        "vs_trl_peak": ratio(headline["kl"], "trl", "peak"),
        "peak_growth": peak_growth(all_found),
        "cases": per_case,
    }


if __name__ == "__main__":
    main()
