"""Rollout speed of `HFEngine` against `model.generate` and transformers' continuous batching.

    python benchmarks/rollout.py [--quick]

All three decode the same prompts with the same weights and settings, to the same length in every row. The lengths
are lognormal and cut at a budget, so that about 28% of the rectangle (rows x budget) holds useful tokens, as in
training. They are forced through the tokens themselves: the last prompt token is the number of tokens to
come, the likeliest next token is always one less, and 0 ends. So whoever decodes a row, its length is known.

Sides take turns in one process on one thread. The figure is useful tokens per second: those up to and including the
end token. Prints a table, and as its last line one JSON object whose ratios are ours / theirs: medians over repeats
for each size, and over sizes at the top.
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


def build(case: Case) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return counting_down(Qwen3ForCausalLM(Qwen3Config(**case.sizes, tie_word_embeddings=True)).eval())


def run_engine(model: Qwen3ForCausalLM, case: Case) -> list[int]:
    engine = HFEngine(model=model, end_token_ids={END}, pad_token_id=END, max_batch_size=case.num_rows)
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
    ids = torch.tensor(case.prompts)
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=sampling_config(case))
    rows = output[:, PROMPT_LENGTH:].tolist()
    return [row.index(END) + 1 if END in row else len(row) for row in rows]


def run_continuous_batching(model: Qwen3ForCausalLM, case: Case) -> list[int]:
    from transformers import ContinuousBatchingConfig

    page_size = 32
    pages_per_row = -(-(PROMPT_LENGTH + case.max_new_tokens) // page_size)
    settings = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=case.num_rows * pages_per_row + 8,
        max_batch_tokens=max(256, case.num_rows * PROMPT_LENGTH),
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
    lengths = RUNNERS[side](model, case)
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


def measure(case: Case, console: Console) -> dict[str, list[float]]:
    """Useful tokens per second of each side in each repeat; a side that does not work here is left out."""
    models = {side: build(case) for side in SIDES}  # continuous batching changes the attention of its model
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest size only, with short completions")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    console = Console(stderr=True)
    table = Table("size x rows", "useful", "ours (tokens/s)", "generate", "continuous", "vs generate", "vs continuous")
    ratios: dict[str, dict[str, float | None]] = {}
    for case in cases(quick):
        speeds = measure(case, console)
        against = {"vs_generate": ratio(speeds, SIDES[1]), "vs_continuous_batching": ratio(speeds, SIDES[2])}
        useful = sum(case.lengths) / (case.num_rows * case.max_new_tokens)
        medians = [f"{statistics.median(speeds[side]):,.0f}" if side in speeds else "-" for side in SIDES]
        shown = [f"{value:.2f}x" if value else "-" for value in against.values()]
        table.add_row(case.name, f"{useful:.0%}", *medians, *shown)
        ratios[case.name] = {key: value and round(value, 2) for key, value in against.items()}
    Console(width=110).print(table)
    overall = {
        key: median_or_none([case[key] for case in ratios.values()])
        for key in ("vs_generate", "vs_continuous_batching")
    }
    print(json.dumps({**overall, "cases": ratios}))


if __name__ == "__main__":
    main()
