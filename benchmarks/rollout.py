"""Rollout speed of `HFEngine` against `model.generate` and transformers' continuous batching.

    python benchmarks/rollout.py [--quick] [--case NAME] [--device cpu|cuda]

All three decode the same prompts with the same weights and settings, to the same length in every row. The lengths
are lognormal and cut at a budget, so that about 28% of the rectangle (rows x budget) holds useful tokens, as in
training. They are forced through the tokens themselves: the last prompt token is the number of tokens to
come, the likeliest next token is always one less, and 0 ends. So whoever decodes a row, its length is known.

One case has more rows than slots: there the engine refills slots as rows finish, continuous batching does the same,
and `generate` takes one batch of so many rows after the other.

Sides take turns in one process, on a CPU on one thread. The figure is useful tokens per second: those up to and
including the end token. Prints a table, and as its last line one JSON object whose ratios are ours / theirs: medians
over repeats for each size, and over sizes at the top. On a CUDA device it also says which fraction of the
memory-bandwidth floor the engine reaches: the time that it takes to read all weights once and the cache of the rows
under way once for every token position, at the rate at which the device copies memory, over the time that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from stableopd.rollout.hf import HFEngine
from stableopd.types import Example, Sampling

PROMPT_LENGTH = 16
END = 0
SIDES = ("stableopd", "generate", "continuous batching")


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    num_rows: int
    max_new_tokens: int
    repeats: int
    sizes: dict[str, int]
    max_slots: int | None = None
    """Most rows at a time; None: all of them."""

    @property
    def slots(self) -> int:
        return min(self.max_slots or self.num_rows, self.num_rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row: evenly spaced quantiles of a lognormal distribution with σ = 1, cut, in mixed order."""
        normal = statistics.NormalDist(mu=0.0, sigma=1.0)
        quantiles = [normal.inv_cdf((row + 0.5) / self.num_rows) for row in range(self.num_rows)]
        median = 0.192 * self.max_new_tokens
        lengths = [min(self.max_new_tokens, 1 + round(median * 2.718281828**z)) for z in quantiles]
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(0)).tolist()
        return [lengths[row] for row in order]

    @property
    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        filler = torch.randint(1, 500, (self.num_rows, PROMPT_LENGTH - 1), generator=generator).tolist()
        return [[*row, length] for row, length in zip(filler, self.lengths, strict=True)]


SMALL = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
LARGE = {
    "vocab_size": 32768,
    "hidden_size": 640,
    "intermediate_size": 1920,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
}


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(name="3.3M x 64", num_rows=64, max_new_tokens=96, repeats=3, sizes=SMALL)]
    return [
        Case(name="3.3M x 64", num_rows=64, max_new_tokens=256, repeats=5, sizes=SMALL),
        Case(name="3.3M x 256", num_rows=256, max_new_tokens=256, repeats=3, sizes=SMALL),
        Case(name="3.3M x 256 in 64", num_rows=256, max_new_tokens=256, repeats=3, sizes=SMALL, max_slots=64),
        Case(name="80M x 64", num_rows=64, max_new_tokens=256, repeats=2, sizes=LARGE),
    ]


def counting_down(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The model, but after token n it says n - 1, and after 0 again 0."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids, kept = kwargs["input_ids"], kwargs.get("logits_to_keep", 0)
        ids = ids[:, kept] if isinstance(kept, Tensor) else ids[:, -output.logits.shape[1] :]
        output.logits.scatter_(-1, (ids - 1).clamp(min=END)[..., None], 50.0)

    model.register_forward_hook(hook, with_kwargs=True)
    return model


def build(case: Case, device: torch.device) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(**case.sizes, tie_word_embeddings=True)
    return counting_down(Qwen3ForCausalLM(config).eval().to(device))


def run_engine(model: Qwen3ForCausalLM, case: Case) -> list[int]:
    engine = HFEngine(model=model, end_token_ids={END}, pad_token_id=END, max_batch_size=case.slots)
    examples = [Example(index=row, prompt="", prompt_ids=tuple(ids)) for row, ids in enumerate(case.prompts)]
    return engine.generate(examples, Sampling(max_new_tokens=case.max_new_tokens), step=0).lengths()


def sampling_config(case: Case) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=END,
        pad_token_id=END,
    )


def run_generate(model: Qwen3ForCausalLM, case: Case) -> list[int]:
    rows: list[list[int]] = []
    for ids in torch.tensor(case.prompts, device=model.device).split(case.slots):
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=sampling_config(case))
        rows += output[:, PROMPT_LENGTH:].tolist()
    return [row.index(END) + 1 if END in row else len(row) for row in rows]


def run_continuous_batching(model: Qwen3ForCausalLM, case: Case) -> list[int]:
    from transformers import ContinuousBatchingConfig

    page_size = 32
    pages_per_row = -(-(PROMPT_LENGTH + case.max_new_tokens) // page_size)
    settings = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=case.slots * pages_per_row + 8,
        max_batch_tokens=max(256, case.slots * PROMPT_LENGTH),
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
    )
    outputs = model.generate_batch(
        case.prompts, generation_config=sampling_config(case), continuous_batching_config=settings
    )
    return [len(output.generated_tokens) for output in outputs.values()]


RUNNERS: dict[str, Callable[[Qwen3ForCausalLM, Case], list[int]]] = dict(
    zip(SIDES, (run_engine, run_generate, run_continuous_batching), strict=True)
)


def speed(side: str, model: Qwen3ForCausalLM, case: Case) -> float:
    """Useful tokens per second of one run."""
    start = time.perf_counter()
    lengths = RUNNERS[side](model, case)  # ends with lengths on the processor, so the device has finished
    seconds = time.perf_counter() - start
    if sorted(lengths) != sorted(case.lengths):
        raise RuntimeError(f"{side} decoded {sum(lengths)} tokens in {len(lengths)} rows, not {sum(case.lengths)}")
    return sum(lengths) / seconds


@contextmanager
def quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def measure(case: Case, device: torch.device, console: Console) -> dict[str, list[float]]:
    """Useful tokens per second of each side in each repeat; a side that does not work here is left out."""
    models = {side: build(case, device) for side in SIDES}  # continuous batching changes the attention of its model
    warm_up = Case(name=case.name, num_rows=4, max_new_tokens=8, repeats=1, sizes=case.sizes)
    speeds: dict[str, list[float]] = {}
    with quiet():
        for side in SIDES:
            try:
                speed(side, models[side], warm_up)
                speeds[side] = []
            except (ImportError, AttributeError, TypeError, RuntimeError) as error:
                if side != SIDES[-1]:
                    raise
                console.print(f"[yellow]{side} does not work here: {error}[/yellow]")
        for repeat in range(case.repeats):
            for side in speeds:
                console.print(f"[dim]{case.name}: repeat {repeat + 1} of {case.repeats}, {side}[/dim]")
                speeds[side].append(speed(side, models[side], case))
    return speeds


def ratio(speeds: dict[str, list[float]], side: str) -> float | None:
    """Median over repeats of our speed by that of `side`."""
    if side not in speeds:
        return None
    return statistics.median(ours / theirs for ours, theirs in zip(speeds["stableopd"], speeds[side], strict=True))


def median_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if known else None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the device copying 1 GiB of its memory: median of 10."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds[1:])


def floor_seconds(model: Qwen3ForCausalLM, case: Case, bandwidth: float) -> float:
    """Least time to read the weights once per token position, and of each row its own cache, without padding.

    Only where all rows have a slot from the start: position t is then decoded for all rows longer than t.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    config, element = model.config, model.dtype.itemsize
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element
    cached = sum(PROMPT_LENGTH + t for length in case.lengths for t in range(length))
    return (max(case.lengths) * weights + cached * per_token) / bandwidth


def floor_fraction(case: Case, device: torch.device, tokens_per_s: float) -> float | None:
    """The engine's speed over that of the memory-bandwidth floor; None where it is not known."""
    if device.type != "cuda" or case.slots < case.num_rows:
        return None
    return floor_seconds(build(case, device), case, copy_bandwidth(device)) * tokens_per_s / sum(case.lengths)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest size only, with short completions")
    parser.add_argument("--case", choices=[case.name for case in cases(quick=False)], help="this one alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    console, device = Console(stderr=True), torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here, so its figures are not available. Leave out --device cuda.")
    table = Table("size x rows", "useful", "ours (tokens/s)", "generate", "continuous", "vs generate", "vs continuous")
    ratios: dict[str, dict[str, float | None]] = {}
    for case in cases(given.quick):
        if given.case not in (None, case.name):
            continue
        speeds = measure(case, device, console)
        against = {"vs_generate": ratio(speeds, SIDES[1]), "vs_continuous_batching": ratio(speeds, SIDES[2])}
        useful = sum(case.lengths) / (case.num_rows * case.max_new_tokens)
        medians = [f"{statistics.median(speeds[side]):,.0f}" if side in speeds else "-" for side in SIDES]
        shown = [f"{value:.2f}x" if value else "-" for value in against.values()]
        table.add_row(case.name, f"{useful:.0%}", *medians, *shown)
        ratios[case.name] = {key: value and round(value, 2) for key, value in against.items()}
        fraction = floor_fraction(case, device, statistics.median(speeds[SIDES[0]]))
        if fraction is not None:
            ratios[case.name]["bandwidth_floor_fraction"] = round(fraction, 3)
    Console(width=110).print(table)
    if device.type == "cpu":
        print("Fraction of a GPU's memory-bandwidth floor: not available, as this ran on a CPU (--device cuda).")
    overall = {
        key: median_or_none([case[key] for case in ratios.values()])
        for key in ("vs_generate", "vs_continuous_batching")
    }
    print(json.dumps({**overall, "cases": ratios}))


if __name__ == "__main__":
    main()
