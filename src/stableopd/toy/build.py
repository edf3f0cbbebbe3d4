"""Trains the toy's teacher and student with the library's own update on golden sequences.

The teacher first learns to verify single attempts, then to write reflective traces. The student's cold
start teaches it to copy, then the style of gold, and stops while it is still weak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from accelerate import Accelerator
from numpy.random import Generator
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.config import DistillConfig, GoldConfig, ObjectiveConfig
from stableopd.heads import HeadlessModel
from stableopd.rollout.hf import HFEngine
from stableopd.rows import TrainingRows, gold_rows
from stableopd.step import Updater
from stableopd.toy.models import build_student, build_teacher
from stableopd.toy.task import (
    ALPHABET,
    Sample,
    World,
    chain,
    copying_example,
    is_held_out,
    prompt_text,
    prompts,
    recheck_example,
    teacher_trace,
    verification_example,
)
from stableopd.types import Example, Sampling

Sampler = Callable[[World, str, Generator], Sample]
Progress = Callable[[str, int, int, float], None]
"""(what is being trained, step, steps in all, loss)"""

_SFT = ObjectiveConfig(distill=DistillConfig(coef=0.0), gold=GoldConfig(coef=1.0))
MICRO_BATCH_TOKENS = 2_500
_TEACHER_STREAM, _STUDENT_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    verification_steps: int = 400
    trace_steps: int = 800
    verification_batch: int = 176
    trace_batch: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_from: float = 0.7
    """Share of the steps after which the learning rate falls linearly to 0."""


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    copying_steps: int = 140
    max_steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3
    halve_from: int = 220
    probe_from: int = 200
    probe_every: int = 5
    target_first_right: float = 0.35
    """Stop when this share of chain-style completions (temperature 1) begins with the right chain."""


def train_teacher(
    world: World, tokenizer: PreTrainedTokenizerBase, seed: int, recipe: TeacherRecipe, progress: Progress
) -> nn.Module:
    """A reflective teacher, in evaluation mode; it has never seen a held-out prompt."""
    model = build_teacher(tokenizer, seed=seed)
    updater = _updater(model, recipe.learning_rate)
    rng = np.random.default_rng([seed, _TEACHER_STREAM])
    total = recipe.verification_steps + recipe.trace_steps
    step = 0
    phases = (
        (verification_example, recipe.verification_steps, recipe.verification_batch),
        (teacher_trace, recipe.trace_steps, recipe.trace_batch),
    )
    for sampler, steps, batch_size in phases:
        for _ in range(steps):
            rate = recipe.learning_rate * _ramp(step, recipe.warmup_steps, recipe.decay_from * total, total)
            rows = _random_rows(world, tokenizer, sampler, rng, batch_size)
            figures = updater.update(rows, rate)
            step += 1
            progress("teacher", step, total, figures["loss"])
    return model.eval()


def train_student(
    world: World, tokenizer: PreTrainedTokenizerBase, seed: int, recipe: StudentRecipe, progress: Progress
) -> nn.Module:
    """A student after its cold start, in evaluation mode; it has never seen a held-out prompt."""
    model = build_student(tokenizer, seed=seed)
    updater = _updater(model, recipe.learning_rate)
    rng = np.random.default_rng([seed, _STUDENT_STREAM])
    train_prompts = training_prompts(world)
    for step in range(1, recipe.max_steps + 1):
        sampler = copying_example if step <= recipe.copying_steps else recheck_example
        rate = recipe.learning_rate * (1.0 if step < recipe.halve_from else 0.5)
        figures = updater.update(_random_rows(world, tokenizer, sampler, rng, recipe.batch_size), rate)
        progress("student", step, recipe.max_steps, figures["loss"])
        if step >= recipe.probe_from and step % recipe.probe_every == 0:
            target = recipe.target_first_right * (1 - world.terse_fraction)
            if first_right_share(model, tokenizer, train_prompts[:: len(train_prompts) // 512], seed) >= target:
                break
    return model.eval()


def first_right_share(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], seed: int) -> float:
    """Share of completions at temperature 1 that begin with the right chain."""
    examples = [prompt_example(prompt, tokenizer, index) for index, prompt in enumerate(prompts)]
    num_digits = len(prompts[0])
    rollouts = toy_engine(model, tokenizer).generate(examples, Sampling(max_new_tokens=num_digits, seed=seed), step=0)
    texts = tokenizer.batch_decode(rollouts.completions())
    return sum(text == chain(prompt) for text, prompt in zip(texts, prompts, strict=True)) / len(prompts)


@cache
def training_prompts(world: World) -> list[str]:
    return [prompt for prompt in prompts(world) if not is_held_out(prompt)]


def held_out_prompts(world: World) -> list[str]:
    return [prompt for prompt in prompts(world) if is_held_out(prompt)]


def toy_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_batch_size: int = 512) -> HFEngine:
    return HFEngine(
        model=model,
        end_token_ids=frozenset({tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        max_batch_size=max_batch_size,
    )


def _updater(model: nn.Module, learning_rate: float) -> Updater:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    return Updater(
        HeadlessModel(model, len(ALPHABET)),
        optimizer,
        _SFT,
        Accelerator(cpu=True),
        temperature=1.0,
        max_grad_norm=1.0,
        token_budget=MICRO_BATCH_TOKENS,
        autocast=nullcontext,
    )


def _random_rows(
    world: World, tokenizer: PreTrainedTokenizerBase, sampler: Sampler, rng: Generator, batch_size: int
) -> TrainingRows:
    """A batch of sequences of all lengths: sorted into batches, lengths would give the verdicts away."""
    train_prompts = training_prompts(world)
    chosen = rng.choice(len(train_prompts), batch_size)
    batch = [_example(world, train_prompts[i], tokenizer, sampler, rng) for i in chosen]
    return gold_rows(batch, range(batch_size), tokenizer.pad_token_id)


def _example(
    world: World, prompt: str, tokenizer: PreTrainedTokenizerBase, sampler: Sampler, rng: Generator
) -> Example:
    sample = sampler(world, prompt, rng)
    gold_ids = _ids(tokenizer, sample.text)
    return replace(prompt_example(prompt, tokenizer, 0), gold_ids=gold_ids, gold_weights=sample.weights)


def prompt_example(prompt: str, tokenizer: PreTrainedTokenizerBase, index: int) -> Example:
    text = prompt_text(prompt)
    return Example(index=index, prompt=text, prompt_ids=_ids(tokenizer, text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ramp(step: int, warmup: int, decay_from: float, total: int) -> float:
    """Factor of the learning rate: up over `warmup` steps, level, then linearly down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < decay_from else (total - step) / (total - decay_from)
