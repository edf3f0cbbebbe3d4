"""The parts of a pair of the words world as folders: data, teachers, students.

    python -m stableopd.words.pieces teacher FOLDER --preset cpu --seed 3
    python -m stableopd.words.pieces pair FOLDER --preset cpu --seed 3

A pair holds teacher/, student/, data/ and models.json, what both can do before distillation. A part is written aside
and renamed: a folder that is there is whole, and is not made again. One that was made with other settings is refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.console import quiet_libraries
from stableopd.errors import StableOPDError
from stableopd.lines import write_atomically, write_lines
from stableopd.toy.demo import one_thread
from stableopd.toy.habits import HABITS
from stableopd.toy.learning import Progress, engine_of, held_out_figures
from stableopd.toy.making import is_made, making
from stableopd.words.build import build_tokenizer, messages, prompt_example, train_student, train_teacher
from stableopd.words.judging import judge
from stableopd.words.problems import Problem, draw_problems
from stableopd.words.settings import COMPRESSION_THRESHOLD, PRESETS, TAIL_CHARS, Preset
from stableopd.words.traces import gold

Role = Literal["teacher", "student"]

_DATA_STREAM = 5


def build_pair(folder: Path, preset: Preset, *, teacher_seed: int = 0, student_seed: int = 0) -> None:
    """Write `teacher/`, `student/`, `data/` and `models.json`, as far as they are not there.

    On a GPU where the preset wants one and there is one, else on one thread of the CPU.
    """
    write_data(folder / "data", preset)
    write_model(folder / "teacher", "teacher", preset, teacher_seed)
    write_model(folder / "student", "student", preset, student_seed)
    checks = {role: json.loads((folder / role / "checks.json").read_text()) for role in ("teacher", "student")}
    write_atomically(folder / "models.json", json.dumps(checks, indent=2) + "\n")


def write_data(folder: Path, preset: Preset) -> None:
    """train.jsonl and validation.jsonl: problems as chats, with golden solution and answer; always the same."""
    made = made_with("data", preset)
    if is_made(folder, made):
        return
    rng = np.random.default_rng(_DATA_STREAM)
    with making(folder, made) as aside:
        for name, count in (("train", preset.num_train), ("validation", preset.num_validation)):
            problems = draw_problems(preset.world.problems, rng, count, held_out=name == "validation")
            write_lines(aside / f"{name}.jsonl", (_row(preset, problem) for problem in problems))


def write_model(folder: Path, role: Role, preset: Preset, seed: int, progress: Progress | None = None) -> None:
    """A teacher or a student with its tokenizer, and `checks.json`: what it can do before distillation."""
    made = made_with(role, preset, seed)
    if is_made(folder, made):
        return
    device = torch.device("cuda" if preset.bf16 and torch.cuda.is_available() else "cpu")
    train = train_teacher if role == "teacher" else train_student
    with making(folder, made) as aside, one_thread():
        tokenizer = build_tokenizer(preset)
        model = train(preset, tokenizer, seed, device, progress or _print_progress)
        checks = check_model(model, tokenizer, preset)
        model.save_pretrained(aside)  # type: ignore[operator]
        tokenizer.save_pretrained(str(aside))
        write_atomically(aside / "checks.json", json.dumps(checks, indent=2) + "\n")


def made_with(piece: Literal["data", "teacher", "student"], preset: Preset, seed: int = 0) -> dict[str, Any]:
    """All of a preset that a piece depends on, and its seed: data are always the same."""
    whole = asdict(preset)
    if piece == "data":
        return {"piece": piece, **{name: whole[name] for name in ("world", "num_train", "num_validation")}}
    names = ("world", piece, "vocab_size", "tokenizer_texts", "token_budget", "attention", "bf16")
    return {"piece": piece, "seed": seed, **{name: whole[name] for name in names}}


def check_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, preset: Preset) -> dict[str, float]:
    """Accuracy and truncation on held-out problems, sampled at temperature 1 and greedily."""
    rng = np.random.default_rng(_DATA_STREAM)
    problems = draw_problems(preset.world.problems, rng, preset.checked_problems, held_out=True)
    return held_out_figures(
        engine_of(model, tokenizer, bf16=preset.bf16),
        tokenizer,
        [prompt_example(problem, tokenizer, index) for index, problem in enumerate(problems)],
        judge=judge,
        max_new_tokens=preset.run.max_completion_length,
        tail_chars=TAIL_CHARS,
        compression_threshold=COMPRESSION_THRESHOLD,
    )


def _row(preset: Preset, problem: Problem) -> dict[str, object]:
    return {"prompt": messages(problem), "gold": gold(preset.world, problem), "answer": str(problem.answer)}


def _print_progress(name: str, step: int, total: int, loss: float) -> None:
    if step % 25 == 0:
        print(f"{name}: step {step} of {total}, loss {loss:.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=("data", "teacher", "student", "pair"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="cpu", choices=tuple(PRESETS))
    parser.add_argument("--habit", default="standard", choices=HABITS, help="how the teacher likes to re-check")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    quiet_libraries()
    preset = PRESETS[given.preset]
    preset = replace(preset, world=preset.world.with_teacher(given.habit))
    try:
        if given.piece == "data":
            write_data(given.folder, preset)
        elif given.piece == "pair":
            build_pair(given.folder, preset, teacher_seed=given.seed, student_seed=given.seed)
        else:
            write_model(given.folder, given.piece, preset, given.seed)
    except StableOPDError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
