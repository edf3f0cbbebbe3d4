"""What is built in the words world, and how large: sizes, recipes, and presets for a CPU and for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from stableopd.words.problems import ProblemSettings
from stableopd.words.traces import WordsWorld

TAIL_CHARS, COMPRESSION_THRESHOLD = 256, 3.3
"""The paper's measure of repetition, scaled down: the last 256 characters of pure copies compress 3.3 to 4.3 times (the
median is 3.8), those of one new attempt after another 2.6 times, and those of gold not at all."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    num_layers: int
    hidden_size: int
    num_heads: int


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    size: ModelSize
    verification_steps: int
    trace_steps: int
    verification_batch: int = 96
    trace_batch: int = 48
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_from: float = 0.7
    """Share of the steps after which the learning rate falls linearly to 0."""


@dataclass(frozen=True, kw_only=True)
class StudentRecipe:
    size: ModelSize
    copying_steps: int
    max_steps: int
    probe_from: int
    target_first_right: float
    """Stop when this share of completions (temperature 1, training problems) begins with the right working."""
    batch_size: int = 64
    learning_rate: float = 3e-3
    probe_every: int = 10
    probe_problems: int = 256


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Rollouts, optimizer and length of a run."""

    num_prompts: int = 32
    num_generations: int = 4
    max_completion_length: int = 128
    learning_rate: float = 6e-4
    num_minibatches: int = 2
    max_steps: int = 100
    eval_every: int = 10
    eval_prompts: int = 200
    micro_batch_tokens: int = 8_192


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A pair and the runs on it."""

    world: WordsWorld
    teacher: TeacherRecipe
    student: StudentRecipe
    run: RunSettings = field(default_factory=RunSettings)
    vocab_size: int = 512
    tokenizer_texts: int = 3_000
    num_train: int = 20_000
    num_validation: int = 1_000
    checked_problems: int = 300
    """Held-out problems on which both models are looked at before distillation."""
    token_budget: int = 4_096
    """Most tokens, padding included, in one forward pass while teacher and student are built."""
    attention: str = "eager"
    bf16: bool = False


_SHORT = ProblemSettings(max_operations=3, max_distractors=1)
CPU = Preset(
    world=WordsWorld(problems=_SHORT, max_trace_tokens=128),
    teacher=TeacherRecipe(
        size=ModelSize(num_layers=4, hidden_size=96, num_heads=4), verification_steps=400, trace_steps=450
    ),
    student=StudentRecipe(
        size=ModelSize(num_layers=3, hidden_size=64, num_heads=4),
        copying_steps=140,
        max_steps=400,
        probe_from=200,
        target_first_right=0.35,
    ),
)
"""Problems of two or three operations, at most one idle number; teacher 0.47M, student 0.19M parameters."""

CPU_1M = replace(
    CPU,
    teacher=replace(
        CPU.teacher,
        size=ModelSize(num_layers=4, hidden_size=192, num_heads=6),
        verification_steps=250,
        trace_steps=400,
        learning_rate=1.2e-3,
    ),
    student=replace(CPU.student, size=ModelSize(num_layers=4, hidden_size=160, num_heads=5), learning_rate=1.5e-3),
    run=RunSettings(learning_rate=4e-4),
)
"""The same problems; teacher 1.7M, student 1.2M parameters."""

QUICK = replace(
    CPU,
    teacher=TeacherRecipe(
        size=ModelSize(num_layers=2, hidden_size=32, num_heads=2),
        verification_steps=10,
        trace_steps=10,
        verification_batch=16,
        trace_batch=16,
        warmup_steps=5,
    ),
    student=StudentRecipe(
        size=ModelSize(num_layers=1, hidden_size=32, num_heads=2),
        copying_steps=10,
        max_steps=20,
        probe_from=20,
        probe_problems=16,
        target_first_right=0.35,
        batch_size=16,
    ),
    run=RunSettings(num_prompts=4, max_completion_length=48, max_steps=4, eval_every=2, eval_prompts=8),
    tokenizer_texts=300,
    num_train=200,
    num_validation=40,
    checked_problems=20,
)
"""Everything in seconds, to try the machinery out: models that have learnt nothing."""

GPU = Preset(
    world=WordsWorld(max_trace_tokens=192),
    teacher=TeacherRecipe(
        size=ModelSize(num_layers=6, hidden_size=512, num_heads=8),
        verification_steps=1_500,
        trace_steps=2_500,
        verification_batch=256,
        trace_batch=128,
        learning_rate=6e-4,
        warmup_steps=100,
    ),
    student=StudentRecipe(
        size=ModelSize(num_layers=4, hidden_size=256, num_heads=8),
        copying_steps=200,
        max_steps=1_000,
        probe_from=250,
        target_first_right=0.35,
        batch_size=128,
        learning_rate=1e-3,
        probe_problems=512,
    ),
    run=RunSettings(
        num_prompts=64,
        max_completion_length=192,
        learning_rate=2e-4,
        max_steps=200,
        eval_prompts=1_000,
        micro_batch_tokens=65_536,
    ),
    vocab_size=1_024,
    num_train=100_000,
    num_validation=2_000,
    token_budget=65_536,
    attention="sdpa",
    bf16=True,
)
"""Problems of two to four operations, up to two idle numbers; teacher 16.3M, student 2.9M parameters."""

PRESETS: Mapping[str, Preset] = {"cpu": CPU, "cpu-1m": CPU_1M, "gpu": GPU, "quick": QUICK}
