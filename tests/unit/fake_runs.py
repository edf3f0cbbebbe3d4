"""Run folders as a trainer would leave them, with made-up but plausible curves: no model, no training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

LOOPS_SEEN = (
    "21.0% of all tokens lie in exact loops (mean of the last 5 steps; 0.3% in the first 5 steps): above the warning "
    "level of 0.05 since step {since}. Likely cause: length inflation; the student falls into repetition. "
    "What to do: turn on StableOPD."
)
BOUNDS = (0, 16, 32, 64)
LOOP = "so 3 + 4 = 7. Wait, let me check that again: "


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_collapsing_run(folder: Path, *, steps: int = 100, seed: int = 0) -> Path:
    """Plain OPD: rises, then within a few steps around the middle runs into the length limit and stays there."""
    return _write_run(folder, method="opd", steps=steps, seed=seed, onset=0.55 * steps)


def write_healthy_run(folder: Path, *, steps: int = 100, seed: int = 0) -> Path:
    """StableOPD: rises and stays."""
    return _write_run(folder, method="stableopd", steps=steps, seed=seed, onset=math.inf)


def write_steered_run(folder: Path, *, steps: int = 100, seed: int = 0) -> Path:
    """Plain OPD that begins to loop, until the controller raises its coefficients for a while."""
    write_healthy_run(folder, steps=steps, seed=seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(_config("opd", steps, seed), sort_keys=False))
    begun, acted = int(0.4 * steps), int(0.4 * steps) + 4
    rows = []
    for step in range(steps + 1):
        trouble = 0.6 * math.exp(-(((step - begun - 3) / 4) ** 2))
        raised = step >= acted
        held = {
            "gold_coef": 0.5 * raised * 0.98 ** (step - acted),
            "reference_coef": 0.05 * raised,
            "level": int(raised),
        }
        controller = {f"controller/{name}": value for name, value in held.items()} if step else {}
        rows.append(_row(step, "opd", trouble, steps) | controller)
    write_lines(folder / "metrics.jsonl", rows)
    action = "Gold 0 to 0.5 and reference 0 to 0.05, because of the alert 'loops'; both decay by 2% a step."
    write_lines(
        folder / "alerts.jsonl",
        [
            _alert(begun + 2, "warning", "health/loop_token_fraction", 0.21, 0.05, LOOPS_SEEN.format(since=begun)),
            {"rule": "controller", "severity": "warning", "signal": "health/loop_token_fraction", "value": 0.21}
            | {"threshold": 0.05, "step": acted, "since": acted, "message": action, "action": "raise"},
        ],
    )
    return folder


def _write_run(folder: Path, *, method: str, steps: int, seed: int, onset: float) -> Path:
    random.seed(seed)
    rows = [_row(step, method, _sigmoid((step - onset) / 3), steps) for step in range(steps + 1)]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "alerts.jsonl", _alerts(int(onset)) if onset < math.inf else [])
    for step in range(10, steps + 1, 10):
        write_lines(folder / f"rollouts/step-{step:06d}.jsonl", _rollouts(step, looping=step > onset))
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(method, steps, seed), sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"python": "3.12.1", "torch": "2.11.0", "device": "cpu"}))
    (folder / "checkpoints").mkdir()
    return folder


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -50 else 0.0


def _noisy(value: float, spread: float = 0.03) -> float:
    return max(0.0, value * (1 + random.gauss(0, spread)))


def _row(step: int, method: str, collapse: float, steps: int) -> dict[str, Any]:
    """One line of metrics, `collapse` of the way from healthy to collapsed."""
    learned = 1 - math.exp(-4 * step / steps)
    row: dict[str, Any] = {"step": step}
    if step % 5 == 0:
        row |= _evaluation("eval/held_out", _noisy(0.22 + 0.6 * learned - 0.42 * collapse), 0.35 * collapse)
        row |= _evaluation("eval/held_out_greedy", _noisy(0.25 + 0.66 * learned - 0.88 * collapse), 0.98 * collapse)
    return row if step == 0 else row | _training(method, collapse, learned)


def _evaluation(prefix: str, accuracy: float, truncated: float) -> dict[str, float]:
    return {
        f"{prefix}/accuracy": min(1.0, max(0.0, accuracy)),
        f"{prefix}/mean_length": 14 + 62 * truncated,
        f"{prefix}/truncation_rate": truncated,
        f"{prefix}/repetition_rate": 0.9 * truncated,
    }


def _training(method: str, collapse: float, learned: float) -> dict[str, float]:
    stable = method == "stableopd"
    return {
        "loss": _noisy(0.9 - 0.5 * learned, 0.1),
        "loss/distill": _noisy(0.6 - 0.4 * learned, 0.1),
        **(
            {"loss/gold": _noisy(0.5 - 0.3 * learned), "loss/reference": _noisy(0.02 + 0.05 * learned)}
            if stable
            else {}
        ),
        "completions/mean_length": _noisy(13 + 5 * learned * (not stable) + 40 * collapse),
        "completions/length_p50": _noisy(12 + 40 * collapse),
        "completions/length_p90": min(80.0, _noisy(19 + 8 * learned * (not stable) + 60 * collapse)),
        "completions/length_p99": min(80.0, _noisy(34 + 50 * collapse)),
        "completions/max_length": 80.0 if collapse > 0.1 else 52.0,
        "completions/clipped_ratio": _noisy(0.004 + 0.4 * collapse, 0.1),
        "health/repetition_rate": _noisy(0.002 + 0.33 * collapse, 0.1),
        "health/loop_token_fraction": _noisy(0.003 + 0.45 * collapse, 0.05),
        "health/repeated_token_fraction": _noisy(0.01 + 0.55 * collapse, 0.05),
        "health/advantage_loop": -0.04 - _noisy(0.02, 0.4),
        "health/advantage_other": -0.5 + 0.2 * learned - _noisy(0.05, 0.4),
        "health/advantage_repeated": -0.08 - _noisy(0.03, 0.4),
        "health/advantage_fresh": -0.52 + 0.2 * learned - _noisy(0.05, 0.4),
        "health/loop_update_share": _noisy(0.002 + 0.2 * collapse, 0.1),
        "health/repeated_update_share": _noisy(0.006 + 0.24 * collapse, 0.1),
        "health/near_loop_token_fraction": 0.01 + 0.08 * collapse,
        **_by_position(collapse, learned),
        "teacher/reverse_kl": _noisy(0.5 - 0.3 * learned - 0.15 * collapse),
        "reference/kl": _noisy(0.02 + 0.1 * learned + (0 if stable else 0.4) * learned),
        "entropy": _noisy(0.6 - 0.2 * learned - 0.2 * collapse),
        "grad_norm": _noisy(1.2 - 0.5 * learned + collapse, 0.15),
        "learning_rate": 6e-4,
        "step_time": _noisy(0.42 + 0.4 * collapse),
        "time/rollout_s": _noisy(0.2 + 0.3 * collapse),
        "time/teacher_s": _noisy(0.05 + 0.04 * collapse),
        "time/update_s": _noisy(0.15 + 0.06 * collapse),
    }


def _by_position(collapse: float, learned: float) -> dict[str, float]:
    """Of a collapse the late positions know first; where no rollout gets, nothing is logged."""
    shares = [1.0, 0.4, 0.02 + 0.7 * collapse, 0.9 * collapse]
    figures = {}
    for bound, share in zip(BOUNDS, shares, strict=True):
        if share > 0.01:
            late = collapse * (bound >= 32)
            figures[f"health/token_fraction_from_{bound}"] = share / sum(shares)
            figures[f"health/advantage_from_{bound}"] = (-0.6 + 0.2 * learned) * (1 - 0.9 * late)
            figures[f"health/update_share_from_{bound}"] = share / sum(shares)
    return figures


def _alert(step: int, severity: str, signal: str, value: float, threshold: float, message: str) -> dict[str, Any]:
    name = signal.split("/")[-1]
    record = {"rule": name, "severity": severity, "signal": signal, "value": value, "threshold": threshold}
    return record | {"step": step, "since": step - 3, "message": message, "action": "none"}


def _alerts(onset: int) -> list[dict[str, Any]]:
    return [
        _alert(
            onset - 8,
            "warning",
            "completions/length_p90",
            31.0,
            28.5,
            "90% length quantile 31 is 1.6 times its start. Lengths grow before answers are cut off. "
            "Add the gold and reference terms or lower the learning rate.",
        ),
        _alert(
            onset + 2,
            "critical",
            "completions/clipped_ratio",
            0.26,
            0.1,
            "26% of rollouts ran into the length limit (threshold 10%) and repeated tokens are 33% of all tokens. "
            "The student is being pulled into loops. Stop and go back to the last healthy checkpoint.",
        ),
    ]


def _rollouts(step: int, *, looping: bool) -> list[dict[str, Any]]:
    return [_rollout(step, index, looping=looping and index % 3 != 2) for index in range(6)]


def _rollout(step: int, index: int, *, looping: bool) -> dict[str, Any]:
    completion = "3 + 4 = 7, then 7 + 5 = 12.\n" + (LOOP * 12 + LOOP[:20] if looping else "The answer is 12.")
    return {
        "step": step,
        "prompt": f"What is 3 + 4 + 5? (question {index // 2})",
        "completion": completion,
        "finish_reason": "length" if looping else "stop",
        "num_tokens": len(completion) // 4,
        "index": index // 2,
        "mean_advantage": -0.05 if looping else -0.41,
        "answer": "12",
        "repetitive": looping,
    }


def _config(method: str, steps: int, seed: int) -> dict[str, Any]:
    stable = method == "stableopd"
    return {
        "method": method,
        "student": {"model_name_or_path": "toy/student", "dtype": "float32"},
        "teacher": {"model_name_or_path": "toy/teacher"},
        "rollout": {"engine": "hf", "num_prompts": 64, "num_generations": 4, "max_completion_length": 80},
        "objective": {
            "distill": {"coef": 1.0, "divergence": "sampled_reverse_kl"},
            "gold": {"coef": 1.0 if stable else 0.0},
            "reference": {"coef": 0.1 if stable else 0.0},
        },
        "optimizer": {"learning_rate": 6e-4, "max_grad_norm": 1.0},
        "seed": seed,
        "max_steps": steps,
    }
