"""What is built in the words world, and how large: sizes, recipes, and presets for a CPU and for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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

PRESETS: Mapping[str, Preset] = {"cpu": CPU}
