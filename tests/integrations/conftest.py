"""Students and teachers of a few thousand parameters whose habit of ending is set by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stableopd.health import MonitorSettings

PROMPTS = ("1234:", "4321:", "1111:", "2468:") * 16
BUDGET = 32


@pytest.fixture
def settings() -> MonitorSettings:
    """For completions of up to 32 characters."""
    return MonitorSettings(tail_chars=20, compression_threshold=1.8, loop_min_tokens=8)


@pytest.fixture
def make_model(tokenizer) -> Callable[..., Any]:
    from stableopd.toy.models import build_model

    def make(end: float, *, digit: float = 0.0, seed: int = 1) -> Any:
        """The larger `end`, the sooner it ends; the larger `digit`, the more often it says "1"."""
        model = build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=seed)
        with torch.no_grad():
            # One coordinate of the residual stream is about constant, so that its column of the head is a bias.
            model.model.embed_tokens.weight[:, 0] = 3.0
            model.lm_head.weight *= 0.3
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[tokenizer.eos_token_id, 0] = end
            model.lm_head.weight[1, 0] = digit
        return model

    return make


@pytest.fixture
def train_dataset():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])


@pytest.fixture
def arguments(tmp_path) -> dict[str, Any]:
    """Of a run of TRL's trainers on a CPU, 32 rollouts a step."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_completion_length": BUDGET,
        "temperature": 1.0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 40,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
