"""The runs on a pair of the words world: one configuration a method, all else shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError
from stableopd.names import nearest
from stableopd.words.settings import COMPRESSION_THRESHOLD, TAIL_CHARS, Preset

METHODS: Mapping[str, Mapping[str, Any]] = {
    "opd": {"method": "opd"},
    "stableopd": {"method": "stableopd", "lambda_gold": 3.0, "beta_kl": 0.1},
    "stableopd-lambda1": {"method": "stableopd", "lambda_gold": 1.0, "beta_kl": 0.1},
    "mixture": {"method": "stableopd", "lambda_gold": 3.0, "beta_kl": 0.0},
    "kl": {"method": "opd", "beta_kl": 0.1},
    "sft": {"method": "sft"},
}
"""StableOPD with lambda_gold 3 and 1, each of its two parts alone, and gold alone."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Where the models and the data of a pair are."""

    teacher: Path
    student: Path
    data: Path

    @classmethod
    def in_folder(cls, folder: Path) -> Pair:
        """As `build_pair` lays them out."""
        return cls(teacher=folder / "teacher", student=folder / "student", data=folder / "data")


def words_config(pair: Pair, preset: Preset, method: str, *, output_dir: Path, seed: int = 0) -> StableOPDConfig:
    """The run of a method; nothing but the method's own coefficients differs from one to the next.

    Raises: ConfigError for a method that is not one of `METHODS`.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    run = preset.run
    return StableOPDConfig(
        **METHODS[method],
        student={"model_name_or_path": str(pair.student), "attn_implementation": preset.attention},
        teacher={"model_name_or_path": str(pair.teacher), "attn_implementation": preset.attention},
        data={"path": str(pair.data / "train.jsonl")},
        rollout={
            "num_prompts": run.num_prompts,
            "num_generations": run.num_generations,
            "max_completion_length": run.max_completion_length,
        },
        optimizer={
            "learning_rate": run.learning_rate,
            "beta2": 0.99,
            "num_minibatches": run.num_minibatches,
            "micro_batch_tokens": run.micro_batch_tokens,
            "bf16": preset.bf16,
        },
        health={"tail_chars": TAIL_CHARS, "compression_threshold": COMPRESSION_THRESHOLD},
        evaluation={
            "path": str(pair.data / "validation.jsonl"),
            "every_steps": run.eval_every,
            "num_prompts": run.eval_prompts,
            "judge": "stableopd.words.judging:judge",
        },
        checkpoint={"every_steps": 25},
        logging={"every_steps": 5, "rollouts_every_steps": 10},
        seed=seed,
        max_steps=run.max_steps,
        output_dir=str(output_dir),
    )
