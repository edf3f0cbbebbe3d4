"""A world small enough for every test: real checkpoints and files, made once per session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    from stableopd.toy.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer) -> Path:
    """Folders `student` and `teacher`, untrained, as save_pretrained writes them."""
    from stableopd.toy.models import build_model

    folder = tmp_path_factory.mktemp("checkpoints")
    for name, layers, width, seed in (("student", 1, 16, 1), ("teacher", 2, 24, 2)):
        model = build_model(num_layers=layers, hidden_size=width, num_heads=2, tokenizer=tokenizer, seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(str(folder / name))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Folder with train.jsonl (gold and answers) and validation.jsonl of the toy world."""
    from stableopd.toy.task import World, answer, gold, is_held_out, prompt_text, prompts

    world, folder = World.t4(), tmp_path_factory.mktemp("data")
    chosen = prompts(world)[::50]
    for name, wanted in (("train", False), ("validation", True)):
        rows = [
            {"prompt": prompt_text(p), "gold": gold(world, p), "answer": answer(p)}
            for p in chosen
            if is_held_out(p) == wanted
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run_settings(checkpoints, dataset, tmp_path) -> Callable[..., dict[str, Any]]:
    """Settings of a run of a few seconds, as a plain mapping; keyword arguments replace top-level sections."""

    def settings(**changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "method": "stableopd",
            "student": {"model_name_or_path": str(checkpoints / "student")},
            "teacher": {"model_name_or_path": str(checkpoints / "teacher")},
            "data": {"path": str(dataset / "train.jsonl")},
            "rollout": {"num_prompts": 6, "num_generations": 2, "max_completion_length": 12},
            "optimizer": {"learning_rate": 1e-2, "num_minibatches": 2, "micro_batch_tokens": 100},
            "health": {"tail_chars": 8, "compression_threshold": 2.2},
            "evaluation": {
                "path": str(dataset / "validation.jsonl"),
                "every_steps": 2,
                "num_prompts": 8,
                "judge": "stableopd.toy.task:judge",
            },
            "checkpoint": {"every_steps": 2},
            "logging": {"rollouts_every_steps": 1, "num_rollouts": 4},
            "seed": 3,
            "max_steps": 4,
            "output_dir": str(tmp_path / "run"),
        }
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(base.get(key), dict)
            base[key] = {**base[key], **value} if both else value
        return base

    return settings
