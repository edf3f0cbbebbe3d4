"""What every finished run of a study answers at its end: `stableopd eval` with one protocol for all."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError
from stableopd.study.cells import Cell
from stableopd.study.config import FinalConfig, StudyConfig
from stableopd.study.jobs import Job


def answers_of(cell: Cell) -> Path:
    """The file of a run's final answers."""
    return cell.folder.with_name(f"{cell.folder.name}.answers.json")


def protocol(final: FinalConfig, config: StableOPDConfig) -> dict[str, Any]:
    """Options of `stableopd eval` on which the answers depend, as the run's own evaluations are made where `final` says
    nothing.

    Raises: ConfigError when there is nothing to answer.
    """
    evaluation = config.evaluation
    own = not final.benchmarks
    asked = final.benchmarks or ((evaluation.path,) if evaluation.path else ())
    if not asked:
        raise ConfigError(
            "final has nothing to ask: set final.benchmarks or evaluation.path; or final: null, to judge the runs by "
            "their own evaluations"
        )
    options = {
        "--benchmark": list(asked),
        "--split": evaluation.split if own else None,
        "--prompt-column": config.data.prompt_column if own else None,
        "--answer-column": config.data.answer_column if own else None,
        "--num-prompts": final.num_prompts,
        "--samples": final.num_samples,
        "--temperature": final.temperature,
        "--top-p": final.top_p or evaluation.top_p,
        "--greedy": final.greedy or None,
        "--max-completion-length": final.max_completion_length or config.eval_max_completion_length,
        "--stop-strings": list(config.rollout.stop_strings) or None,
        "--stop-token-ids": list(config.rollout.stop_token_ids) or None,
        "--no-chat": own or not evaluation.chat or None,  # the run's own prompts are asked as they stand
        "--chat-template-kwargs": config.data.chat_template_kwargs or None,
        "--judge": final.judge or evaluation.judge,
        "--judge-timeout": evaluation.judge_timeout_s,
        "--seed": final.seed,
    }
    return {option: value for option, value in options.items() if value is not None}


def final_job(
    study: StudyConfig, final: FinalConfig, cell: Cell, made_with: Mapping[str, Any], after: Job, *, again: bool = False
) -> Job:
    """The answers of a finished run's last checkpoint to the benchmarks of the study.

    Args: `made_with` is all that they depend on, the run included.
    """
    command = [sys.executable, "-m", "stableopd", "eval", str(cell.folder)]
    for option, value in protocol(final, cell.config).items():
        command += _arguments(option, value)
    command += ["--out", str(study.folder / "evals"), "--output", str(answers_of(cell))]
    return Job(
        name=f"answers {cell.folder.relative_to(study.folder)}",
        command=tuple(command),
        stem=cell.folder.with_name(f"{cell.folder.name}.final"),
        after=(after.name,),
        makes=answers_of(cell),
        settings=json.dumps(made_with, sort_keys=True),
        again=again,
    )


def _arguments(option: str, value: Any) -> list[str]:
    if value is True:
        return [option]
    if isinstance(value, Mapping):
        return [option, json.dumps(value)]
    several = value if isinstance(value, list) else [value]
    return [part for one in several for part in (option, str(one))]
