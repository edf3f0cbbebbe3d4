"""Exact checkpoints: weights, optimizer and state, complete or not there at all.

A checkpoint is a folder that `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer beside the weights,
plus `optimizer.safetensors` and `trainer_state.json`. It is written under a temporary name and renamed when it is
complete; nothing in it is a pickle. Random draws of a run are keyed by (seed, step, prompt), so there is no random
state to keep.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from stableopd.errors import RunFolderError
from stableopd.models import is_adapted
from stableopd.types import TrainState

_NAME = re.compile(r"^step-(\d{6,})$")
_ASIDE = re.compile(r"^\.(new|old)-")


def save_checkpoint(
    folder: Path,
    *,
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
) -> Path:
    """Write `folder/step-NNNNNN` and return it. One that is already there is left as it is."""
    path = checkpoint_path(folder, state.step)
    if path.exists():
        return path
    aside = folder / f".new-{path.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_model(student, tokenizer, aside)
    tensors, scalars = _flatten(optimizer.state_dict())
    save_file(tensors, aside / "optimizer.safetensors")
    (aside / "optimizer.json").write_text(json.dumps(scalars))
    (aside / "trainer_state.json").write_text(json.dumps(state.to_json(), indent=2))
    _flush_to_disk(aside)
    aside.rename(path)
    _flush_folder(folder)
    return path


def save_model(
    student: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path, *, merge_adapters: bool = False
) -> None:
    """Weights (safetensors), configuration and tokenizer, as transformers writes them.

    A student with adapters is written as its adapters; with `merge_adapters` as a whole model, from a copy, since
    merging and parting again would round the weights.
    """
    if merge_adapters and is_adapted(student):
        student = copy.deepcopy(student).merge_and_unload()  # type: ignore[operator]
    student.save_pretrained(path)  # type: ignore[operator]
    tokenizer.save_pretrained(str(path))


def load_checkpoint(path: Path, *, student: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put weights and optimizer state into the given objects, bit for bit, and return the state.

    Raises: RunFolderError when the checkpoint does not belong to such a student or cannot be read.
    """
    state = read_state(path)
    try:
        _load_weights(path, student)
        tensors = load_file(path / "optimizer.safetensors")
        scalars = json.loads((path / "optimizer.json").read_text())
        optimizer.load_state_dict(_unflatten(tensors, scalars))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return state


def load_first_readable(
    paths: Sequence[Path], *, student: nn.Module, optimizer: torch.optim.Optimizer, tell: Callable[[str], None]
) -> TrainState:
    """`load_checkpoint` of the first of these that can be read; `tell` hears of each that cannot.

    Raises: RunFolderError when none can.
    """
    for path in paths:
        try:
            return load_checkpoint(path, student=student, optimizer=optimizer)
        except RunFolderError as error:
            tell(f"{error}; trying the one before it")
    steps = [_step_of(path) for path in paths]
    raise RunFolderError(f"none of the checkpoints {steps} can be read, so the run cannot be rolled back")


def newest_of_this_run(folder: Path, begun_with: Mapping[str, str]) -> Path | None:
    """The newest checkpoint in a run's folder of them, which is cleared of half-written ones; None: there is none.

    Args: `begun_with` holds digests by name (student, dataset), to be compared with those in the checkpoint.

    Raises: RunFolderError when the run was begun with something else.
    """
    clean_up(folder)
    found = checkpoints_in(folder)
    if not found:
        return None
    stored = read_state(found[-1]).begun_with
    changed = [name for name, digest in stored.items() if begun_with.get(name) != digest]
    if changed:
        raise RunFolderError(
            f"{folder.parent} was begun with another {' and another '.join(changed)}, though the configuration names "
            "the same: the reference and the order of prompts would change in the middle of the run. Put the old one "
            "back, or choose another output_dir"
        )
    return found[-1]


def read_state(path: Path) -> TrainState:
    """The state in a checkpoint, without its tensors. Raises: RunFolderError when it cannot be read."""
    try:
        return TrainState(**json.loads((path / "trainer_state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunFolderError:
    return RunFolderError(
        f"{path} is damaged or belongs to another student ({error}). Remove this folder to go on from the "
        "checkpoint before it"
    )


def _load_weights(path: Path, student: nn.Module) -> None:
    if is_adapted(student):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(student, load_file(path / "adapter_model.safetensors"))
        return
    saved = AutoModelForCausalLM.from_pretrained(
        path, dtype=next(student.parameters()).dtype, use_safetensors=True, local_files_only=True
    )
    student.load_state_dict(saved.state_dict())


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=_step_of)


def rotate(folder: Path, *, keep_last: int, keep_steps: Collection[int]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of `keep_steps`."""
    for path in checkpoints_in(folder)[:-keep_last]:
        if _step_of(path) not in keep_steps:
            _remove(path)


def clean_up(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _ASIDE.match(path.name):
                shutil.rmtree(path, ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return [_step_of(path) for path in checkpoints_in(folder)]


def _step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    assert match is not None
    return int(match.group(1))


def _remove(path: Path) -> None:
    aside = path.with_name(f".old-{path.name}")
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _flush_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for parameter, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value.detach().cpu().contiguous()
            else:
                rest.setdefault(str(parameter), {})[name] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def _unflatten(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(key): dict(value) for key, value in scalars["state"].items()}
    for key, tensor in tensors.items():
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = tensor
    return {"state": state, "param_groups": scalars["param_groups"]}
