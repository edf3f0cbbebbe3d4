"""The time of a whole step with the hf engine and with vLLM in the same process.

    python benchmarks/vllm_step.py [--quick]      # in an environment with vLLM, such as that of make test-vllm

The same student, teacher and prompts, geometric lengths (48 of 4,096 ids end a completion), reverse KL of the sampled
token, one thread for the trainer's arithmetic; vLLM decides on its own threads, so they are held to one as
well. The engines take turns. Prints seconds by phase (medians over steps, the first of each turn left out), and last
one JSON object: hf / vllm for the step and for rollouts, with the seconds of a checked weight sync.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from stableopd.config import StableOPDConfig
from stableopd.console import quiet_libraries
from stableopd.trainer import StableOPDTrainer

PHASES = ("step_time", "time/rollout_s", "time/sync_s", "time/teacher_s", "time/update_s", "time/health_s")
VOCAB = 4096
NUM_STOPS = 48
"""So many of the ids end a completion: an untrained student stops with a chance of about 1 in 85 at each token."""


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{number}": number for number in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="t0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def save(folder: Path, layers: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=1024, eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(str(folder))


def settings(root: Path, engine: str, steps: int, rows: int, budget: int) -> dict[str, Any]:
    rollout: dict[str, Any] = {"engine": engine, "num_prompts": rows // 4, "max_completion_length": budget}
    rollout["stop_token_ids"] = list(range(4000, 4000 + NUM_STOPS))
    if engine == "vllm":
        rollout["vllm"] = {"gpu_memory_utilization": 0.2, "enforce_eager": True, "max_model_len": budget + 64}
    return {
        "method": "opd",
        "student": {"model_name_or_path": str(root / "student")},
        "teacher": {"model_name_or_path": str(root / "teacher"), "dtype": "float32"},
        "data": {"path": str(root / "train.jsonl")},
        "rollout": rollout,
        "optimizer": {"learning_rate": 1e-6, "micro_batch_tokens": 4096},
        "checkpoint": {"every_steps": 10_000, "keep_best": False},
        "logging": {"num_rollouts": 0},
        "health": {"actions": "off"},
        "max_steps": steps,
        "output_dir": str(root / f"run-{engine}-{os.getpid()}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 2M student, short completions, few steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    quiet_libraries()
    layers, width, rows, budget, steps = (2, 128, 32, 64, 4) if quick else (6, 384, 64, 256, 5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save(root / "student", layers, width, seed=1)
        save(root / "teacher", 2 * layers, 2 * width, seed=2)
        prompts = [" ".join(f"t{(7 * row + column) % 4000}" for column in range(16)) for row in range(256)]
        (root / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        found: dict[str, dict[str, float]] = {}
        for engine in ("hf", "vllm"):
            trainer = StableOPDTrainer(args=StableOPDConfig(**settings(root, engine, steps, rows, budget)))
            lines = []
            for step in range(1, steps + 1):
                lines.append(trainer.train_step(step))
            found[engine] = {key: statistics.median(line.get(key, 0.0) for line in lines[1:]) for key in PHASES}
            found[engine]["mean_length"] = lines[-1]["completions/mean_length"]
            found[engine]["gap"] = max(line["sampling/logprob_gap"] for line in lines)
    print(f"| engine | {' | '.join(PHASES)} | mean length | log-probability gap |")
    print("|---" * (len(PHASES) + 3) + "|")
    for engine, record in found.items():
        shown = " | ".join(f"{record[key]:.2f} s" for key in PHASES)
        print(f"| {engine} | {shown} | {record['mean_length']:.0f} | {record['gap']:.1g} |")
    hf, vllm = found["hf"], found["vllm"]
    ratios = {
        "step": round(hf["step_time"] / vllm["step_time"], 2),
        "rollout": round(hf["time/rollout_s"] / vllm["time/rollout_s"], 2),
        "sync_s": round(vllm["time/sync_s"], 3),
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
