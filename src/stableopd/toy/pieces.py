"""The parts of a toy pair as folders of their own, so that many runs can share them: data, teachers, students.

    python -m stableopd.toy.pieces teacher FOLDER --kind t4 --habit clean --seed 3

A part is written aside and renamed: a folder that is there is whole, and is not made again. One that was made with
other settings is refused.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from stableopd.console import quiet_libraries
from stableopd.errors import StableOPDError
from stableopd.lines import write_lines
from stableopd.toy.build import held_out_prompts, train_student, train_teacher, training_prompts
from stableopd.toy.demo import TOKENIZER, DemoSettings, check_model, one_thread
from stableopd.toy.habits import HABITS
from stableopd.toy.making import is_made, making
from stableopd.toy.task import World, answer, gold, prompt_text, solution

_POOL_STREAM = 3


def write_model(folder: Path, role: str, settings: DemoSettings) -> None:
    """A teacher or a student of `settings.seed` with its tokenizer, and `checks.json`: what it can do untaught."""
    world = settings.build_world()
    recipe = settings.teacher_recipe if role == "teacher" else settings.student_recipe
    made = {"piece": role, "seed": settings.seed, "world": asdict(world), "recipe": asdict(recipe)}
    if is_made(folder, made):
        return
    with making(folder, made) as aside, one_thread():
        if role == "teacher":
            model = train_teacher(world, TOKENIZER, settings.seed, settings.teacher_recipe, _silent)
        else:
            model = train_student(world, TOKENIZER, settings.seed, settings.student_recipe, _silent)
        checks = check_model(model, TOKENIZER, world)
        model.save_pretrained(aside)  # type: ignore[operator]
        TOKENIZER.save_pretrained(str(aside))
        (aside / "checks.json").write_text(json.dumps(checks, indent=2) + "\n")


def write_data(folder: Path, world: World, pool_size: int, seed: int = 0) -> None:
    """train.jsonl and validation.jsonl, and a scarce pool of gold, in two styles.

    The column `gold` is the world's own (terse in part), `gold_chain` shows its working for every prompt.
    """
    made = {"piece": "data", "order": "by lot", "seed": seed, "world": asdict(world), "gold_pool": pool_size}
    if is_made(folder, made):
        return
    train = training_prompts(world)
    chosen = np.random.default_rng([seed, _POOL_STREAM]).choice(len(train), min(pool_size, len(train)), replace=False)
    files = {
        "train.jsonl": train,
        "validation.jsonl": held_out_prompts(world),
        "gold_pool.jsonl": [train[index] for index in chosen],
    }
    with making(folder, made) as aside:
        for name, prompts in files.items():
            write_lines(aside / name, (_row(world, prompt) for prompt in prompts))


def _row(world: World, prompt: str) -> dict[str, str]:
    return {
        "prompt": prompt_text(prompt),
        "gold": gold(world, prompt),
        "gold_chain": solution(prompt, terse=False),
        "answer": answer(prompt),
    }


def _silent(name: str, step: int, total: int, loss: float) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=("data", "teacher", "student"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="t4", choices=("t4", "a"))
    parser.add_argument("--habit", default="standard", choices=HABITS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--terse-fraction", type=float, default=None)
    parser.add_argument("--gold-pool", type=int, default=128)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    quiet_libraries()
    settings = DemoSettings(
        out=given.folder, seed=given.seed, quick=given.quick, world=given.kind, teacher=given.habit,
        terse_fraction=given.terse_fraction,
    )  # fmt: skip
    try:
        if given.piece == "data":
            write_data(given.folder, settings.build_world(), given.gold_pool)
        else:
            write_model(given.folder, given.piece, settings)
    except StableOPDError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
