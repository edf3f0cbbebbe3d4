"""What `test_two_processes_judge_the_completions_of_both_and_stop_together` runs under torchrun."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from stableopd.health import MonitorSettings
from stableopd.integrations.trl import HealthCallback
from stableopd.toy.models import build_model
from stableopd.toy.tokenizer import build_tokenizer

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
seen: dict[int, list[list[int]]] = {}


def looping(completion_ids, trainer_state, **_):
    seen.setdefault(trainer_state.global_step + 1, []).extend(completion_ids)
    return [float(sum(a == b for a, b in pairwise(ids))) for ids in completion_ids]


torch.set_num_threads(1)
tokenizer = build_tokenizer()
model = build_model(num_layers=1, hidden_size=16, num_heads=2, tokenizer=tokenizer, seed=1)
with torch.no_grad():
    model.model.embed_tokens.weight[:, 0] = 3.0
    model.lm_head.weight *= 0.3
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[tokenizer.eos_token_id, 0] = 0.6
    model.lm_head.weight[1, 0] = 0.5
health = HealthCallback(
    MonitorSettings(tail_chars=20, compression_threshold=1.8, loop_min_tokens=8), stop_on="critical"
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=[looping, health.reward],
    args=GRPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=32,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        max_steps=30,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        beta=0.0,
    ),
    train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in ("1234:", "4321:", "1111:", "2468:") * 16]),
    processing_class=tokenizer,
    callbacks=[health],
)
trainer.train()
outcome = {
    "world_size": trainer.args.world_size,
    "alerts": [alert.to_json() for alert in health.alerts],
    "state": health.monitor.state_dict(),
    "stopped_at": trainer.state.global_step,
    "seen": seen,
    "ends": [tokenizer.eos_token_id, tokenizer.pad_token_id],
}
(folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
