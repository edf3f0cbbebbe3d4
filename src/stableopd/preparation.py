"""Everything a run needs before its first step: data and models loaded, and refused when they do not fit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.benchmarking.loading import load_benchmark
from stableopd.config import StableOPDConfig
from stableopd.data import load_examples, read_rows
from stableopd.drawing import GoldPool, PromptStream
from stableopd.errors import ConfigError, ModelError
from stableopd.models import context_length
from stableopd.types import Example
from stableopd.vocabulary import vocab_size

Dataset = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a run reads: prompts step by step, gold from a pool where there is one, held-out prompts."""

    stream: PromptStream
    gold_pool: GoldPool | None
    held_out: list[Example]
    benchmarks: Mapping[str, list[Example]] = field(default_factory=dict)
    """More held-out prompts, by the name of their benchmark."""

    @property
    def is_evaluated(self) -> bool:
        return bool(self.held_out or self.benchmarks)

    def digest(self) -> str:
        """A short digest of all that training reads, in its order: prompts, gold, answers, the gold pool."""
        digest = hashlib.blake2b(digest_size=12)
        pool = self.gold_pool.examples if self.gold_pool else ()
        for example in (*self.stream.examples, None, *pool):
            parts = example and (example.prompt_ids, example.gold_ids, example.gold_weights, example.answer)
            digest.update(repr(parts).encode())
        return digest.hexdigest()

    @property
    def has_gold(self) -> bool:
        """Whether there is a golden solution for every prompt that may be drawn."""
        return self.gold_pool is not None or all(example.gold_ids for example in self.stream.examples)

    def gold(self, step: int, examples: list[Example]) -> list[Example]:
        """One golden solution for each prompt of the step: its own, or one from the pool."""
        return examples if self.gold_pool is None else self.gold_pool.batch(step, len(examples))


def prepare_data(
    config: StableOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    shared_context: int | None,
    context: int | None,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None,
) -> RunData:
    """The data of a run, tokenised and checked.

    Args:
        shared_context: most tokens that student and teacher both read; bounds what rollouts start from.
        context: most tokens that the student reads; bounds gold and held-out prompts.

    Raises: DataError or ConfigError for data that this run cannot use.
    """
    needs_gold = config.objective.needs_gold
    longest_prompt = _longest_prompt(config, shared_context)
    rows = _rows(train_dataset, config.data.path, config.data.split, "data.path")
    source = config.data.path or "train_dataset"
    examples = _load(
        config,
        tokenizer,
        rows,
        source,
        longest_prompt,
        context,
        require_gold=needs_gold and not config.data.gold_path,
        may_need_gold=config.may_need_gold and not config.data.gold_path,
        require_answer=config.objective.needs_rewards,
        routed=config.objective.needs_teacher,
    )
    pool = None
    if config.may_need_gold and config.data.gold_path:
        pool_rows = read_rows(config.data.gold_path, config.data.split, setting="data.gold_path")
        pool_examples = _load(
            config,
            tokenizer,
            pool_rows,
            config.data.gold_path,
            longest_prompt,
            context,
            require_gold=True,
            may_need_gold=True,
        )
        pool = GoldPool(pool_examples, seed=config.seed)
    held_out = []
    if eval_dataset is not None or config.evaluation.path:
        eval_rows = _rows(eval_dataset, config.evaluation.path, config.evaluation.split, "evaluation.path")
        source = config.evaluation.path or "eval_dataset"
        longest = _longest_prompt(config, context)
        held_out = _load(config, tokenizer, eval_rows, source, longest, context, require_gold=False, judged=True)
    stream = PromptStream(
        examples, num_prompts=config.rollout.num_prompts, seed=config.seed, shuffle=config.data.shuffle
    )
    return RunData(
        stream=stream,
        gold_pool=pool,
        held_out=held_out[: config.evaluation.num_prompts],
        benchmarks=_benchmarks(config, tokenizer, context, own=bool(held_out)),
    )


def _benchmarks(
    config: StableOPDConfig, tokenizer: PreTrainedTokenizerBase, context: int | None, *, own: bool
) -> dict[str, list[Example]]:
    """Args: `own` says that there are held-out prompts beside them.

    Raises: ConfigError when two sets of held-out prompts would share a name.
    """
    found: dict[str, list[Example]] = {}
    taken = _with_greedy(config.evaluation.name) if own else set()
    for given in config.evaluation.benchmarks:
        benchmark = load_benchmark(given, num_problems=config.evaluation.num_prompts)
        if not taken.isdisjoint(_with_greedy(benchmark.name)):
            raise ConfigError(
                f"evaluation.benchmarks: {given!r} is called {benchmark.name!r} like another set; rename the file, or "
                "set evaluation.name"
            )
        taken |= _with_greedy(benchmark.name)
        found[benchmark.name] = load_examples(
            benchmark.rows(chat=config.evaluation.chat and bool(tokenizer.chat_template)),
            tokenizer,
            source=benchmark.name,
            max_prompt_tokens=_longest_prompt(config, context),
            chat_template_kwargs=config.data.chat_template_kwargs,
        )
    return found


def _with_greedy(name: str) -> set[str]:
    return {name, f"{name}_greedy"}


def check_model(role: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: StableOPDConfig) -> None:
    """Raises: ModelError or ConfigError when the model has fewer embeddings than the tokenizer has ids, or too short
    a context for the completions.
    """
    num_ids = vocab_size(tokenizer)
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if rows < num_ids:
        raise ModelError(
            f"the {role} has {rows} embeddings and the student's tokenizer {num_ids} ids; they are not a pair. "
            f"Resize the {role}'s embeddings or take the tokenizer that it was trained with"
        )
    context, budget = context_length(model.config), config.rollout.max_completion_length
    if config.objective.needs_rollouts and context is not None and context <= budget:
        raise ConfigError(
            f"rollout.max_completion_length is {budget}, but the {role}'s context is {context} tokens, prompt "
            "included; lower it"
        )


def check_trackers(names: Iterable[str]) -> None:
    """Raises: ConfigError when accelerate does not know a tracker, or its package is not installed."""
    known = sorted(str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL)
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(f"logging.report_to: there is no tracker {name!r}; known: {', '.join(known)}")
        if name not in installed:
            raise ConfigError(f"logging.report_to: {name!r} is not installed; pip install {name}")


def check_processes(accelerator: Accelerator, config: StableOPDConfig) -> None:
    """Refuses a launch in which the processes would not train together.

    Raises: ConfigError when the world size is not the one asked for, or the launch uses a backend that is not
    supported.
    """
    found = accelerator.num_processes
    asked = config.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    if found != asked:
        raise ConfigError(
            f"{asked} processes were asked for and {found} train together. On CPUs launch with "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m stableopd train ..."
        )
    if config.rollout.engine == "vllm" and found > 1:
        raise ConfigError(
            f"rollout.engine=vllm with {found} processes: each would sync weights of its own into the engine. Use one "
            "process with vllm, or rollout.engine=hf with several"
        )
    if config.rollout.num_prompts < found:
        raise ConfigError(f"rollout.num_prompts is {config.rollout.num_prompts}; {found} processes need one each")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{accelerator.distributed_type.value} is not supported; launch with torchrun (data parallel)"
        )


def _rows(dataset: Dataset | None, path: str | None, split: str | None, key: str) -> Dataset:
    if dataset is not None:
        return dataset
    if not path:
        raise ConfigError(f"no data is given; set {key} to a .jsonl or .parquet file or a hub dataset id")
    return read_rows(path, split, setting=key)


def _load(
    config: StableOPDConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    source: str,
    longest_prompt: int | None,
    context: int | None,
    *,
    require_gold: bool,
    may_need_gold: bool = False,
    require_answer: bool = False,
    judged: bool = False,
    routed: bool = False,
) -> list[Example]:
    data = config.data
    return load_examples(
        rows,
        tokenizer,
        prompt_column=data.prompt_column,
        gold_column=data.gold_column,
        answer_column=data.answer_column,
        gold_weights_column=data.gold_weights_column if may_need_gold else None,
        source=source,
        max_prompt_tokens=longest_prompt,
        max_total_tokens=context if may_need_gold else None,
        require_gold=require_gold,
        require_answer=require_answer,
        judged=judged,
        chat_template_kwargs=data.chat_template_kwargs,
        teacher_column=data.teacher_column if routed else None,
        teachers=config.named_teachers,
    )


def _longest_prompt(config: StableOPDConfig, context: int | None) -> int | None:
    budget = max(config.rollout.max_completion_length, config.eval_max_completion_length)
    room = None if context is None else context - budget
    limits = [limit for limit in (config.data.max_prompt_length, room) if limit is not None]
    return max(1, min(limits)) if limits else None
