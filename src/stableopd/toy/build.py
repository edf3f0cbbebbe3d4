"""Trains the toy's teacher and student with the library's own update on golden sequences.

The teacher first learns to verify single attempts, then to write reflective traces. The student's cold
start teaches it to copy, then the style of gold, and stops while it is still weak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.random import Generator
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.toy.learning import Learner, Progress, engine_of, ramp, share_begun_right
from stableopd.toy.models import build_student, build_teacher
from stableopd.toy.task import (
    Sample,
    World,
    chain,
    copying_example,
    is_held_out,
    lot,
    prompt_text,
    prompts,
    recheck_example,
    teacher_trace,
    verification_example,
)
from stableopd.types import Example

Sampler = Callable[[World, str, Generator], Sample]

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
    learner = Learner(model, tokenizer, token_budget=MICRO_BATCH_TOKENS)
    rng = np.random.default_rng([seed, _TEACHER_STREAM])
    total = recipe.verification_steps + recipe.trace_steps
    step = 0
    phases = (
        (verification_example, recipe.verification_steps, recipe.verification_batch),
        (teacher_trace, recipe.trace_steps, recipe.trace_batch),
    )
    for sampler, steps, batch_size in phases:
        for _ in range(steps):
            rate = recipe.learning_rate * ramp(step, recipe.warmup_steps, recipe.decay_from * total, total)
            loss = learner.learn(_random_batch(world, tokenizer, sampler, rng, batch_size), rate)
            step += 1
            progress("teacher", step, total, loss)
    return model.eval()


def train_student(
    world: World, tokenizer: PreTrainedTokenizerBase, seed: int, recipe: StudentRecipe, progress: Progress
) -> nn.Module:
    """A student after its cold start, in evaluation mode; it has never seen a held-out prompt."""
    model = build_student(tokenizer, seed=seed)
    learner = Learner(model, tokenizer, token_budget=MICRO_BATCH_TOKENS)
    rng = np.random.default_rng([seed, _STUDENT_STREAM])
    train_prompts = training_prompts(world)
    for step in range(1, recipe.max_steps + 1):
        sampler = copying_example if step <= recipe.copying_steps else recheck_example
        rate = recipe.learning_rate * (1.0 if step < recipe.halve_from else 0.5)
        loss = learner.learn(_random_batch(world, tokenizer, sampler, rng, recipe.batch_size), rate)
        progress("student", step, recipe.max_steps, loss)
        if step >= recipe.probe_from and step % recipe.probe_every == 0:
            target = recipe.target_first_right * (1 - world.terse_fraction)
            if first_right_share(model, tokenizer, train_prompts[:: len(train_prompts) // 512], seed) >= target:
                break
    return model.eval()


def first_right_share(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], seed: int) -> float:
    """Share of completions at temperature 1 that begin with the right chain."""
    examples = [prompt_example(prompt, tokenizer, index) for index, prompt in enumerate(prompts)]
    chains = [chain(prompt) for prompt in prompts]
    return share_begun_right(
        engine_of(model, tokenizer), tokenizer, examples, chains, max_new_tokens=len(prompts[0]), seed=seed
    )


@cache
def training_prompts(world: World) -> list[str]:
    return [prompt for prompt in prompts(world) if not is_held_out(prompt)]


def held_out_prompts(world: World) -> list[str]:
    """In an order of chance, always the same one: the first hundred of them are a sample of all."""
    return sorted((prompt for prompt in prompts(world) if is_held_out(prompt)), key=lot)


def _random_batch(
    world: World, tokenizer: PreTrainedTokenizerBase, sampler: Sampler, rng: Generator, batch_size: int
) -> list[Example]:
    train_prompts = training_prompts(world)
    chosen = rng.choice(len(train_prompts), batch_size)
    return [_example(world, train_prompts[i], tokenizer, sampler, rng) for i in chosen]


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
