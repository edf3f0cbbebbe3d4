"""How runs in the words world are set: what all methods share."""

from __future__ import annotations

from typing import Any

from stableopd.words.settings import COMPRESSION_THRESHOLD, TAIL_CHARS, Preset

JUDGE = "stableopd.words.judging:judge"


def run_settings(preset: Preset) -> dict[str, Any]:
    """Settings of a run of this preset but for its models, its data and its method."""
    run = preset.run
    return {
        "student": {"attn_implementation": preset.attention},
        "teacher": {"attn_implementation": preset.attention},
        "rollout": {
            "num_prompts": run.num_prompts,
            "num_generations": run.num_generations,
            "max_completion_length": run.max_completion_length,
        },
        "optimizer": {
            "learning_rate": run.learning_rate,
            "beta2": 0.99,
            "num_minibatches": run.num_minibatches,
            "micro_batch_tokens": run.micro_batch_tokens,
            "bf16": preset.bf16,
        },
        "health": {"tail_chars": TAIL_CHARS, "compression_threshold": COMPRESSION_THRESHOLD},
        "objective": {"reward": {"function": JUDGE}},
        "evaluation": {"every_steps": run.eval_every, "num_prompts": run.eval_prompts, "judge": JUDGE},
        "checkpoint": {"every_steps": 25},
        "logging": {"every_steps": 5, "rollouts_every_steps": 10},
        "max_steps": run.max_steps,
    }
