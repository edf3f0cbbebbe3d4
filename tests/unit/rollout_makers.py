"""Rollouts as other trainers write them: TRL's Parquet, verl's JSON Lines, slime's torch files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SENTENCE = "we add three and four which gives seven then carry the one so that it holds for every even number"
WORDS = SENTENCE.split()
LOOP = " Wait, let me check that again."


def prose(rng: random.Random, num_words: int = 60) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)) + f" {rng.random()}"


def looping(rng: random.Random, times: int = 60) -> str:
    return prose(rng) + LOOP * times


def texts_by_step(*, steps: int, per_step: int = 32, onset: float = float("inf"), seed: int = 0) -> list[list[str]]:
    """Prose; from `onset` on, three of four completions end in a loop."""
    rng = random.Random(seed)
    return [
        [looping(rng) if step >= onset and index % 4 else prose(rng) for index in range(per_step)]
        for step in range(1, steps + 1)
    ]


def write_json_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_trl(folder: Path, texts: Sequence[Sequence[str]], *, chat: bool = False, rewards: bool = True) -> Path:
    """What log_completions leaves: completions/completions_NNNNN.parquet, written by pandas."""
    import pandas as pd

    (folder / "completions").mkdir(parents=True)
    for step, completions in enumerate(texts, start=1):
        table: dict[str, Any] = {
            "step": [step] * len(completions),
            "prompt": ["What is 3 + 4?"] * len(completions),
            "completion": [[{"role": "assistant", "content": text}] if chat else text for text in completions],
        }
        if rewards:
            table |= {
                "accuracy_reward": [float(index % 2) for index in range(len(completions))],
                "format_reward": [0.5] * len(completions),
                "advantage": [0.0] * len(completions),
            }
        pd.DataFrame(table).to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
    return folder


def write_verl(folder: Path, texts: Sequence[Sequence[str]]) -> Path:
    """rollout_data_dir: N.jsonl, one object a rollout."""
    for step, completions in enumerate(texts, start=1):
        rows = [
            {"input": "user\nWhat is 3 + 4?\nassistant\n", "output": text, "gts": "7", "score": float(index % 2),
             "step": step, "acc": bool(index % 2)}
            for index, text in enumerate(completions)
        ]  # fmt: skip
        write_json_lines(folder / f"{step}.jsonl", rows)
    return folder


def slime_sample(text: str, index: int, status: str = "completed") -> dict[str, Any]:
    """`Sample.to_dict()`, whose tokens are those of the prompt and the response."""
    tokens = [1 + ord(character) % 500 for character in text]
    return {
        "group_index": index // 4, "index": index, "prompt": "What is 3 + 4?", "tokens": [9, 9, 9, *tokens],
        "multimodal_inputs": None, "response": text, "response_length": len(tokens), "label": "7",
        "reward": float(index % 2), "loss_mask": None, "weight_versions": [], "rollout_log_probs": [-0.1] * len(tokens),
        "remove_sample": False, "status": status, "metadata": {}, "spec_info": {"spec_accept_token_num": 0},
    }  # fmt: skip


def write_slime(folder: Path, texts: Sequence[Sequence[str]]) -> Path:
    """--save-debug-rollout-data: one torch file a rollout step."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for step, completions in enumerate(texts):
        samples = [
            slime_sample(text, index, "truncated" if "Wait" in text else "completed")
            for index, text in enumerate(completions)
        ]
        torch.save({"rollout_id": step, "samples": samples}, folder / f"rollout_{step}.pt")
    return folder
