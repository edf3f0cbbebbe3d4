"""Trains tokenizer, teacher and student of the words world, with the library's own update on drawn sequences.

The teacher first learns to verify single attempts, then to write reflective traces. The student's cold start teaches
it to copy, then the style of gold, and stops while it is still weak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.random import Generator
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stableopd.toy.learning import Learner, Progress, engine_of, ramp, share_begun_right
from stableopd.toy.models import build_model
from stableopd.types import Example
from stableopd.words.problems import Problem, draw_problem, draw_problems
from stableopd.words.settings import ModelSize, Preset
from stableopd.words.tokenizer import train_tokenizer
from stableopd.words.traces import (
    Segment,
    WordsWorld,
    attempt_line,
    copying_example,
    recheck_example,
    teacher_trace,
    verification_example,
    weighted_ids,
)

Sampler = Callable[[WordsWorld, Problem, Generator], list[Segment]]

_TEACHER_STREAM, _STUDENT_STREAM, _TOKENIZER_STREAM, _PROBE_STREAM = 1, 2, 3, 4


def build_tokenizer(preset: Preset) -> PreTrainedTokenizerFast:
    """The tokenizer of a preset: always the same one, trained on problems and traces of training.

    Traces are those of the usual teacher, whatever the habits of the world: students of all teachers share it.
    """
    rng = np.random.default_rng(_TOKENIZER_STREAM)
    world = WordsWorld(problems=preset.world.problems, max_trace_tokens=preset.world.max_trace_tokens)
    problems = draw_problems(world.problems, rng, preset.tokenizer_texts, held_out=False)
    traces = ("".join(piece.text for piece in teacher_trace(world, problem, rng)) for problem in problems)
    return train_tokenizer(
        (f"{problem.text}\n{trace}" for problem, trace in zip(problems, traces, strict=True)), preset.vocab_size
    )


def train_teacher(
    preset: Preset, tokenizer: PreTrainedTokenizerBase, seed: int, device: torch.device, progress: Progress
) -> nn.Module:
    """A reflective teacher, in evaluation mode; it has never seen a held-out program."""
    recipe = preset.teacher
    model = new_model(preset, recipe.size, tokenizer, seed).to(device)
    learner = Learner(model, tokenizer, token_budget=preset.token_budget, bf16=preset.bf16)
    rng = np.random.default_rng([seed, _TEACHER_STREAM])
    total = recipe.verification_steps + recipe.trace_steps
    for step in range(total):
        verifying = step < recipe.verification_steps
        sampler = verification_example if verifying else teacher_trace
        batch_size = recipe.verification_batch if verifying else recipe.trace_batch
        rate = recipe.learning_rate * ramp(step, recipe.warmup_steps, recipe.decay_from * total, total)
        loss = learner.learn(draw_batch(preset.world, tokenizer, sampler, rng, batch_size), rate)
        progress("teacher", step + 1, total, loss)
    return model.eval()


def train_student(
    preset: Preset, tokenizer: PreTrainedTokenizerBase, seed: int, device: torch.device, progress: Progress
) -> nn.Module:
    """A student after its cold start, in evaluation mode; it has never seen a held-out program."""
    recipe = preset.student
    model = new_model(preset, recipe.size, tokenizer, seed).to(device)
    learner = Learner(model, tokenizer, token_budget=preset.token_budget, bf16=preset.bf16)
    rng = np.random.default_rng([seed, _STUDENT_STREAM])
    probes = draw_problems(
        preset.world.problems, np.random.default_rng(_PROBE_STREAM), recipe.probe_problems, held_out=False
    )
    target = recipe.target_first_right * (1 - preset.world.terse_fraction)
    for step in range(1, recipe.max_steps + 1):
        sampler = copying_example if step <= recipe.copying_steps else recheck_example
        rate = recipe.learning_rate * ramp(step - 1, 20, recipe.max_steps, recipe.max_steps)
        loss = learner.learn(draw_batch(preset.world, tokenizer, sampler, rng, recipe.batch_size), rate)
        progress("student", step, recipe.max_steps, loss)
        probed = step >= recipe.probe_from and step % recipe.probe_every == 0
        if probed and first_right_share(model, tokenizer, probes, seed, bf16=preset.bf16) >= target:
            break
    return model.eval()


def first_right_share(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], seed: int, *, bf16: bool = False
) -> float:
    """Share of completions at temperature 1 that begin with the right working."""
    lines = [attempt_line(problem.steps) for problem in problems]
    return share_begun_right(
        engine_of(model, tokenizer, bf16=bf16),
        tokenizer,
        [prompt_example(problem, tokenizer, index) for index, problem in enumerate(problems)],
        lines,
        max_new_tokens=max(len(ids) for ids in tokenizer(lines)["input_ids"]),
        seed=seed,
    )


def draw_batch(
    world: WordsWorld, tokenizer: PreTrainedTokenizerBase, sampler: Sampler, rng: Generator, batch_size: int
) -> list[Example]:
    """Problems of training, each with a sequence of the sampler as its gold."""
    batch: list[Example] = []
    while len(batch) < batch_size:
        problem = draw_problem(world.problems, rng)
        if problem.is_held_out:
            continue
        ids, weights = weighted_ids(tokenizer, sampler(world, problem, rng), world.max_trace_tokens)
        batch.append(replace(prompt_example(problem, tokenizer, 0), gold_ids=ids, gold_weights=weights))
    return batch


def messages(problem: Problem) -> list[dict[str, str]]:
    """The problem as a chat."""
    return [{"role": "user", "content": problem.text}]


def prompt_example(problem: Problem, tokenizer: PreTrainedTokenizerBase, index: int) -> Example:
    """The problem as the trainer sees it, with its answer."""
    text = str(tokenizer.apply_chat_template(messages(problem), add_generation_prompt=True, tokenize=False))
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Example(index=index, prompt=text, prompt_ids=ids, answer=str(problem.answer))


def new_model(preset: Preset, size: ModelSize, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """An untrained Qwen3 model of this size, on the CPU."""
    return build_model(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_heads=size.num_heads,
        tokenizer=tokenizer,
        seed=seed,
        max_positions=512,
        attention=preset.attention,
    )
