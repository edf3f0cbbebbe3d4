"""A whole training step of `StableOPDTrainer` against one of TRL's `DistillationTrainer`: speed, phases, memory.

    python benchmarks/step_vs_trl.py [--quick] [--sizes 2M-8M,20M-80M] [--lengths uniform] [--repeats 5] [--device cpu]

Both train the same student (random weights, tied head) under the same teacher on the same 64 prompts of 16 tokens,
one rollout each, up to 256 new tokens at temperature 1, and minimise the reverse KL over the whole vocabulary.
Float32, AdamW, no gradient checkpointing, no evaluation, no checkpoint, next to no logging, one thread.

- Lengths: "heavy_tail" is lognormal, cut at the budget, so that 28% of the rectangle (rows x budget) is useful;
  "uniform" is all 256, so that nothing is padding. They are forced as in `rollout.py`: each token that is generated
  is one less than the one before it, and 0 ends. The hook that does it acts on a forward pass of the whole model
  without gradients, which is how both sides generate. Training passes are not touched: the hook does nothing where a
  gradient is recorded or no cache is used, and the teacher has none. The learning rate is 1e-9. What each side has
  read and written in each step is compared with what it should have, token by token.
- TRL runs at its fastest: its 64 rollouts are cut into micro-batches of 8, 16 and 64, each setting makes a step, after
  a warm-up, and the fastest is measured; they often tie. One choice serves both kinds of lengths, as TRL computes the
  same rectangle for both. Ours has micro-batches of as many tokens as TRL's of 8 rows, and its defaults otherwise.
- Sides take turns in one process, after a warm-up. Speed is completion tokens, end tokens included, by the wall time of
  a whole step; for TRL from its fetching of prompts to its `on_step_end`, so that the overhead of calling `train()` for
  each turn is left out; for ours all of `train_step` with a run folder open. The ratio is a median over pairs of steps.
- On a CPU the C library is told to keep freed memory. By default it hands large blocks back and has them zeroed anew,
  up to a third of a step of either side, more or less by what the process did before.
- Phases: "generate" is TRL's `_generate` and our engine's `generate`. "teacher" is the forward pass of the teacher's
  backbone, on both sides; its head belongs to the loss. "health" is our monitor. "update" is all the rest: loss,
  student forward and backward, optimizer.
- Peak memory is that of a step alone: each side in a process of its own, after one step (models, optimizer state and
  libraries are there), how far the second step's peak lies above where it began. TRL's micro-batches are then of 8
  rows, where it needs the least, whichever size is fastest: no advantage of ours hangs on that choice. On a CPU that is
  resident memory (VmHWM after a reset, and VmRSS after `malloc_trim`), on a GPU what torch has allocated.

Prints a table, and as its last line one JSON object: "heavy_tail" and "uniform" are their time by ours (more is
better), medians over sizes; "peak_memory" is ours by theirs (less is better), the largest over cases.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

import rollout
from rollout import END, PROMPT_LENGTH
from stableopd import StableOPDConfig, StableOPDTrainer
from stableopd.logbook import Logbook

NUM_ROLLOUTS = 64
LEARNING_RATE = 1e-9
DIVERGENCE = "reverse_kl"
LENGTHS = ("heavy_tail", "uniform")
SIDES = ("TRL", "stableopd")
PHASES = ("generate", "teacher", "update", "health")
TRL_BATCH_SIZES = (8, 16, 64)
NEVER = 10**6
MIB = 2**20
MALLOPT = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}
"""Numbers of malloc.h."""
TIE = 1.05


def qwen(vocab_size: int, hidden: int, inner: int, layers: int, heads: int, head_dim: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A student and a teacher."""

    name: str
    student: Qwen3Config
    teacher: Qwen3Config
    repeats: int


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="2M-8M",
            student=qwen(8192, hidden=128, inner=384, layers=5, heads=4, head_dim=32),
            teacher=qwen(8192, hidden=256, inner=768, layers=8, heads=8, head_dim=32),
            repeats=5,
        ),
        Pair(
            name="20M-80M",
            student=qwen(32768, hidden=256, inner=1024, layers=12, heads=8, head_dim=32),
            teacher=qwen(32768, hidden=640, inner=1920, layers=12, heads=10, head_dim=64),
            repeats=2,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Case:
    pair: Pair
    lengths_name: str
    budget: int
    repeats: int

    @property
    def name(self) -> str:
        return f"{self.pair.name} {self.lengths_name}"

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of each prompt; the last is the number of tokens to come."""
        tailed = rollout.Case(name="", num_rows=NUM_ROLLOUTS, max_new_tokens=self.budget, repeats=1, sizes={})
        if self.lengths_name == "heavy_tail":
            return tailed.prompts
        return [[*ids[:-1], self.budget] for ids in tailed.prompts]

    @property
    def rows(self) -> list[dict[str, str]]:
        return [{"prompt": " ".join(f"t{token}" for token in ids)} for ids in self.prompts]

    @property
    def rows_with_gold(self) -> list[dict[str, str]]:
        """With golden solutions as long as the rollouts are."""
        golds = [" ".join(f"t{token}" for token in range(ids[-1] - 1, END, -1)) for ids in self.prompts]
        return [{**row, "gold": gold or "t1"} for row, gold in zip(self.rows, golds, strict=True)]

    @property
    def micro_batch_tokens(self) -> int:
        """Ours: the tokens of TRL's smallest micro-batch."""
        return min(TRL_BATCH_SIZES) * (PROMPT_LENGTH + self.budget)

    @property
    def num_tokens(self) -> int:
        return sum(ids[-1] for ids in self.prompts)

    @property
    def expected(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion) of every rollout, sorted."""
        return sorted((ids, list(range(ids[-1] - 1, END - 1, -1))) for ids in self.prompts)


def cases(names: list[str], quick: bool) -> list[Case]:
    return [
        Case(
            pair=PAIRS[name],
            lengths_name=lengths,
            budget=96 if quick else 256,
            repeats=1 if quick else PAIRS[name].repeats,
        )
        for name in names
        for lengths in LENGTHS
    ]


# ---------------------------------------------------------------------- what both sides are given


def count_down(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: while generating, the token after n is n - 1, and after 0 again 0."""
    if torch.is_grad_enabled() or kwargs.get("use_cache") is False:
        return
    ids, kept = kwargs["input_ids"], kwargs.get("logits_to_keep", 0)
    ids = ids[:, kept] if isinstance(kept, Tensor) else ids[:, -output.logits.shape[1] :]
    output.logits.scatter_(-1, (ids - 1).clamp(min=END)[..., None], 50.0)


def build_models(pair: Pair) -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """New models with configurations of their own: transformers' trainer writes use_cache=False into its model's."""
    torch.manual_seed(0)
    student, teacher = (Qwen3ForCausalLM(copy.deepcopy(config)) for config in (pair.student, pair.teacher))
    student.register_forward_hook(count_down, with_kwargs=True)
    return student, teacher.eval().requires_grad_(False)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token for each of the words t0, t1, ...; t0 ends."""
    backend = Tokenizer(models.WordLevel({f"t{token}": token for token in range(vocab_size)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=f"t{END}", pad_token=f"t{END}", padding_side="left"
    )


# ---------------------------------------------------------------------- the two sides


def set_malloc(**options: int) -> None:
    """Options of glibc's malloc, where it is the one in use."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for name, value in options.items():
            libc.mallopt(MALLOPT[name], value)


def now() -> float:
    """The clock, when the device has done all it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Meter:
    """Seconds by phase since `reset`, and what the generating function returned."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.generated: Any = None

    def reset(self) -> None:
        self.seconds.clear()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = function(*args, **kwargs)
            self.seconds[phase] += now() - start
            if phase == "generate":
                self.generated = result
            return result

        return wrapper

    def watch(self, phase: str, owner: Any, method: str) -> None:
        setattr(owner, method, self.timed(phase, getattr(owner, method)))


@dataclass(frozen=True, kw_only=True)
class Step:
    seconds: float
    phases: dict[str, float]
    rollouts: list[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, seconds: float, phases: dict[str, float], rollouts: list[tuple[list[int], list[int]]]) -> Step:
        """Whatever of `seconds` no phase accounts for is the update's."""
        phases = {phase: phases.get(phase, 0.0) for phase in PHASES}
        return cls(seconds=seconds, phases={**phases, "update": seconds - sum(phases.values())}, rollouts=rollouts)

    def check(self, side: str, case: Case) -> Step:
        if sorted(self.rollouts) != case.expected:
            raise RuntimeError(f"{side} did not read and write the tokens that were planned for {case.name}")
        return self


class Side(Protocol):
    def step(self) -> Step: ...


class Trl:
    """TRL's trainer, called for one step at a time and timed from outside."""

    def __init__(self, case: Case, device: str, folder: Path, batch_size: int) -> None:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        self.batch_size = batch_size
        self._meter = meter = Meter()
        self._start = self._end = 0.0
        student, teacher = build_models(case.pair)
        meter.watch("teacher", teacher.base_model, "forward")
        arguments = DistillationConfig(
            output_dir=str(folder / f"trl-{batch_size}"),
            use_cpu=device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            beta=1.0,
            temperature=1.0,
            max_completion_length=case.budget,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=NUM_ROLLOUTS // batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=1,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
        )
        self._trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            train_dataset=Dataset.from_list(case.rows),
            processing_class=build_tokenizer(case.pair.student.vocab_size),
            callbacks=[self._end_noting_callback()],
        )
        self._trainer.remove_callback(PrinterCallback)
        meter.watch("generate", self._trainer, "_generate")
        self._fetch = self._trainer.get_batch_samples
        self._trainer.get_batch_samples = self._noting_start

    def step(self) -> Step:
        self._trainer.train()
        prompts, completions, *_ = self._meter.generated
        return Step.of(self._end - self._start, self._meter.seconds, list(zip(prompts, completions, strict=True)))

    def _noting_start(self, *args: Any, **kwargs: Any) -> Any:
        self._meter.reset()
        self._start = now()
        return self._fetch(*args, **kwargs)

    def _end_noting_callback(self) -> TrainerCallback:
        side = self

        class EndNotingCallback(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                side._end = now()

        return EndNotingCallback()


class Ours:
    """Our trainer, with its run folder open."""

    def __init__(self, case: Case, device: str, folder: Path, *, with_gold: bool = False) -> None:
        self._meter = meter = Meter()
        self._steps_done = 0
        student, teacher = build_models(case.pair)
        meter.watch("teacher", teacher.base_model, "forward")
        config = StableOPDConfig(
            method="opd",
            rollout={
                "num_prompts": NUM_ROLLOUTS,
                "num_generations": 1,
                "max_completion_length": case.budget,
                "temperature": 1.0,
            },
            objective={"distill": {"coef": 1.0, "divergence": DIVERGENCE}},
            optimizer={"learning_rate": LEARNING_RATE, "micro_batch_tokens": case.micro_batch_tokens},
            checkpoint={"every_steps": NEVER},
            logging={"num_rollouts": 0},
            health={"probe_prompts": 4},
            max_steps=NEVER,
            output_dir=str(folder / "ours"),
        )
        self._trainer = StableOPDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=case.rows_with_gold if with_gold else case.rows,
            processing_class=build_tokenizer(case.pair.student.vocab_size),
        )
        if self._trainer.accelerator.device.type != device:
            raise RuntimeError(f"asked for {device}, but accelerate chose {self._trainer.accelerator.device}")
        self._trainer.logbook = Logbook(config, self._trainer.accelerator, resume=False)
        self._trainer.logbook.start(None)
        meter.watch("generate", self._trainer.engine, "generate")

    def step(self) -> Step:
        self._steps_done += 1
        self._meter.reset()
        start = now()
        metrics = self._trainer.train_step(self._steps_done)
        seconds = now() - start
        batch = self._meter.generated
        prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
        return Step.of(
            seconds,
            {**self._meter.seconds, "health": metrics["time/health_s"]},
            list(zip(prompts, batch.completions(), strict=True)),
        )


def fastest_trl_batch_size(case: Case, device: str, console: Console) -> int:
    """The micro-batch size with which TRL is fastest, generation left out, as it is the same for all.

    Of those that tie it is the smallest, which needs the least memory.
    """
    seconds: dict[int, float] = {}
    for batch_size in (max(TRL_BATCH_SIZES), *TRL_BATCH_SIZES):  # the first warms up and is overwritten
        with tempfile.TemporaryDirectory() as name:
            step = Trl(case, device, Path(name), batch_size).step().check(SIDES[0], case)
        seconds[batch_size] = step.seconds - step.phases["generate"]
        gc.collect()
    fastest = min(size for size in seconds if seconds[size] <= TIE * min(seconds.values()))
    tried = ", ".join(f"{size}: {seconds[size]:.2f} s" for size in TRL_BATCH_SIZES)
    console.print(f"{case.pair.name}: TRL without generation, by micro-batch size: {tried}; taken: {fastest}")
    return fastest


# ---------------------------------------------------------------------- memory


class Peak:
    """How far memory rises above where it was when this was made, in bytes."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        gc.collect()
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self._base = _process_status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

    def rise(self) -> int:
        return (torch.cuda.max_memory_allocated() if self._on_gpu else _process_status("VmHWM")) - self._base


def _process_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def peak_of_a_step(side: Side, device: str) -> int:
    side.step()
    peak = Peak(device)
    side.step()
    return peak.rise()


def peak_in_own_process(side: str, case: Case, arguments: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--peak-of", side, "--sizes", case.pair.name, "--lengths", case.lengths_name]
    command += ["--device", arguments.device, "--trl-batch-size", str(min(TRL_BATCH_SIZES))]
    command += ["--quick"] if arguments.quick else []
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"no peak memory of {side}:\n{finished.stderr[-2000:]}")
    return int(finished.stdout.split()[-1])


def print_peak(arguments: argparse.Namespace) -> None:
    """What a process started by `peak_in_own_process` does."""
    (case,) = [case for case in cases(arguments.sizes, arguments.quick) if case.lengths_name == arguments.lengths]
    with tempfile.TemporaryDirectory() as name, rollout.quiet():
        side: Side
        if arguments.peak_of == SIDES[0]:
            side = Trl(case, arguments.device, Path(name), arguments.trl_batch_size)
        else:
            side = Ours(case, arguments.device, Path(name))
        print(peak_of_a_step(side, arguments.device))


# ---------------------------------------------------------------------- measuring and showing


@dataclass(frozen=True, kw_only=True)
class Result:
    case: Case
    trl_batch_size: int
    steps: dict[str, list[Step]]
    peaks: dict[str, int]

    @property
    def speed_ratio(self) -> float:
        """Their time by ours."""
        theirs, ours = (self.steps[side] for side in SIDES)
        return statistics.median(a.seconds / b.seconds for a, b in zip(theirs, ours, strict=True))

    @property
    def peak_ratio(self) -> float:
        """Our peak by theirs."""
        return self.peaks[SIDES[1]] / self.peaks[SIDES[0]]

    def median(self, side: str, phase: str | None = None) -> float:
        """Seconds of a step, or of a phase of it."""
        steps = self.steps[side]
        return statistics.median(step.phases[phase] if phase else step.seconds for step in steps)


def measure(case: Case, batch_size: int, arguments: argparse.Namespace, console: Console) -> Result:
    steps: dict[str, list[Step]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        trl, ours = Trl(case, arguments.device, Path(name), batch_size), Ours(case, arguments.device, Path(name))
        sides: dict[str, Side] = dict(zip(SIDES, (trl, ours), strict=True))
        for repeat in range(case.repeats + 1):
            for side in SIDES:
                console.print(f"[dim]{case.name}: {f'repeat {repeat}' if repeat else 'warm-up'}, {side}[/dim]")
                steps[side].append(sides[side].step().check(side, case))
    del trl, ours, sides
    gc.collect()
    console.print(f"[dim]{case.name}: peak memory[/dim]")
    peaks = {side: peak_in_own_process(side, case, arguments) for side in SIDES}
    measured = {side: taken[1:] for side, taken in steps.items()}
    return Result(case=case, trl_batch_size=batch_size, steps=measured, peaks=peaks)


def table_of(result: Result) -> Table:
    case = result.case
    useful = case.num_tokens / (NUM_ROLLOUTS * case.budget)
    table = Table(
        "side", "tokens/s", "step", *PHASES, "peak (MiB)",
        title=f"{case.name}: {NUM_ROLLOUTS} rollouts up to {case.budget}, {useful:.0%} useful, "
        f"TRL in micro-batches of {result.trl_batch_size}",
    )  # fmt: skip
    for side in SIDES:
        whole = result.median(side)
        phases = [result.median(side, phase) for phase in PHASES]
        shown = [f"{seconds:.2f} s ({seconds / whole:.0%})" for seconds in phases]
        speed, peak = case.num_tokens / whole, result.peaks[side] / MIB
        table.add_row(side, f"{speed:,.0f}", f"{whole:.2f} s", *shown, f"{peak:,.0f}")
    theirs, ours = SIDES
    ratios = [_ratio(result.median(theirs, phase), result.median(ours, phase)) for phase in PHASES[:-1]]
    table.add_section()
    table.add_row("TRL / ours", f"{result.speed_ratio:.2f}x faster", "", *ratios, "-", f"{1 / result.peak_ratio:.2f}x")
    return table


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}x" if ours > 0 else "-"


def summary(results: list[Result]) -> dict[str, Any]:
    by_pair: dict[str, dict[str, float]] = defaultdict(dict)
    for result in results:
        figures = by_pair[result.case.pair.name]
        figures[result.case.lengths_name] = round(result.speed_ratio, 2)
        figures["peak_memory"] = max(figures.get("peak_memory", 0.0), round(result.peak_ratio, 2))
    measured = [key for key in LENGTHS if all(key in pair for pair in by_pair.values())]
    overall = {key: round(statistics.median(pair[key] for pair in by_pair.values()), 2) for key in measured}
    peak = max(pair["peak_memory"] for pair in by_pair.values())
    return {**overall, "peak_memory": peak, "cases": by_pair}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller pair only, short completions, one repeat")
    parser.add_argument("--sizes", default=",".join(PAIRS), help="student-teacher pairs, of: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", choices=LENGTHS, help="one distribution of lengths only")
    parser.add_argument("--trl-batch-size", type=int, help="rows of TRL's micro-batches, in place of the search")
    parser.add_argument("--repeats", type=int, help="pairs of steps, in place of 5 (smaller pair) and 2 (larger pair)")
    arguments = parser.parse_args()
    arguments.sizes = [next(iter(PAIRS))] if arguments.quick else arguments.sizes.split(",")
    unknown = [name for name in arguments.sizes if name not in PAIRS]
    if unknown:
        parser.error(f"no such pair: {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    if arguments.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if arguments.peak_of:
        set_malloc(mmap_threshold=MIB)  # give back what is freed
        print_peak(arguments)
        return
    set_malloc(mmap_max=0, trim_threshold=-1)  # keep what is freed
    console = Console(stderr=True)
    for name in arguments.sizes:
        counts = (f"{sum(p.numel() for p in model.parameters()):,}" for model in build_models(PAIRS[name]))
        console.print(f"{name}: parameters of student and teacher: {' and '.join(counts)}; device: {arguments.device}")
    results = []
    with rollout.quiet():
        for name in arguments.sizes:
            of_pair = cases([name], arguments.quick)
            found = arguments.trl_batch_size or fastest_trl_batch_size(of_pair[0], arguments.device, console)
            for case in of_pair:
                if arguments.lengths not in (None, case.lengths_name):
                    continue
                case = replace(case, repeats=arguments.repeats or case.repeats)
                results.append(measure(case, found, arguments, console))
                Console(width=140).print(table_of(results[-1]))
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
