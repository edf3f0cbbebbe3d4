"""Runs a study: whatever is not made yet, so many at a time, and one line of results.jsonl for each run that is."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.config_files import dump_config
from stableopd.errors import ConfigError
from stableopd.lines import write_atomically
from stableopd.recorder import lock_folder
from stableopd.study.cells import Cell, cells_of
from stableopd.study.config import FinalConfig, StudyConfig
from stableopd.study.jobs import Ended, Job, run_jobs
from stableopd.study.outcome import Outcome, append_outcome, read_folder, read_outcomes, with_answers

RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """A study that has been run as far as it went."""

    study: StudyConfig
    cells: Sequence[Cell]
    outcomes: Sequence[Outcome]
    """Of the study's own cells, in their order."""
    failures: Sequence[Ended] = field(default=())
    """What failed, or was skipped because of it."""


Tell = Callable[[Ended], None]
TellActive = Callable[[Sequence[Job]], None]


def run_study(
    study: StudyConfig,
    tell: Tell = lambda ended: None,
    tell_active: TellActive = lambda active: None,
    tell_total: Callable[[int], None] = lambda total: None,
) -> StudyRun:
    """Make every run that is not in results.jsonl yet. A failure ends nothing but what needs it.

    Raises: ConfigError before anything is started when a run's settings are impossible, or a finished one was made with
    others; RunFolderError when another process runs this study.
    """
    cells = cells_of(study)
    known = read_outcomes(study.folder / RESULTS)
    _check_unchanged(study, cells, known)
    study.folder.mkdir(parents=True, exist_ok=True)
    with _locked(study.folder):
        results = study.folder / RESULTS
        missing = _without_twins(study, cells, known)
        last_jobs = {_jobs(study, twins[0])[-1].name: twins for twins in missing}
        jobs = list({job.name: job for twins in missing for job in _jobs(study, twins[0])}.values())
        tell_total(len(jobs))

        def collect(ended: Ended) -> None:
            twins = last_jobs.get(ended.job.name, [])
            if twins and ended.status == "done":
                outcome = _outcome(study, twins[0])
                for cell in twins:
                    append_outcome(results, _for_cell(study, cell, outcome))
            tell(ended)

        environment = {}
        if study.threads:
            environment = {name: str(study.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        ended = run_jobs(jobs, parallel=study.parallel, environment=environment, tell=collect, tell_active=tell_active)
    return StudyRun(
        study=study,
        cells=cells,
        outcomes=finished_outcomes(study, cells),
        failures=[end for end in ended.values() if end.status != "done"],
    )


def _without_twins(study: StudyConfig, cells: Sequence[Cell], known: Sequence[Outcome]) -> list[list[Cell]]:
    """The cells that have no result yet, those that are one and the same run together.

    A method without a teacher is the same run for all pairs that differ in their teacher alone. Where a twin has a
    result already, the others are given it here.
    """
    results = {outcome.key: outcome for outcome in known}
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_run_key(cell), []).append(cell)
    missing = []
    for twins in groups.values():
        without = [cell for cell in twins if _key(cell) not in results]
        done = next((results[_key(cell)] for cell in twins if _key(cell) in results), None)
        if done is None:
            missing.append(without)
            continue
        for cell in without:
            append_outcome(study.folder / RESULTS, _for_cell(study, cell, done))
    return missing


def _run_key(cell: Cell) -> str:
    """Names the run itself: everything that it depends on, which without a teacher's term is not the teacher."""
    left_out = {
        **_no_result(cell.config),
        **({} if cell.config.objective.needs_teacher else {"teacher": True, "teachers": True}),
    }
    settings = cell.config.model_dump(mode="json", exclude=left_out)
    return json.dumps([cell.arm, settings], sort_keys=True)


def _for_cell(study: StudyConfig, cell: Cell, outcome: Outcome) -> Outcome:
    return replace(outcome, arm=cell.arm, pair=cell.pair, seed=cell.seed, digest=settings_digest(study, cell))


def existing(study: StudyConfig) -> StudyRun:
    """A study as far as it has been run, without running anything.

    Raises: ConfigError as `run_study`.
    """
    cells = cells_of(study)
    _check_unchanged(study, cells, read_outcomes(study.folder / RESULTS))
    return StudyRun(study=study, cells=cells, outcomes=finished_outcomes(study, cells))


def finished_outcomes(study: StudyConfig, cells: Sequence[Cell]) -> list[Outcome]:
    """The results that there are of the study's cells, in their order."""
    known = {outcome.key: outcome for outcome in read_outcomes(study.folder / RESULTS)}
    return [known[_key(cell)] for cell in cells if _key(cell) in known]


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell.arm, cell.pair, cell.seed


def _check_unchanged(study: StudyConfig, cells: Sequence[Cell], known: Sequence[Outcome]) -> None:
    made = {outcome.key: outcome.digest for outcome in known}
    changed = [cell for cell in cells if made.get(_key(cell)) not in (None, settings_digest(study, cell))]
    if changed:
        first = changed[0]
        raise ConfigError(
            f"{study.folder / RESULTS}: {len(changed)} of the runs that are there were made with other settings, "
            f"{first.arm} of {first.pair}, seed {first.seed} among them. Put the old settings back, give the method "
            "another name, or choose another output_dir"
        )


def settings_digest(study: StudyConfig, cell: Cell) -> str:
    """Of the settings that were given for a run, its cold start and its world: neither defaults nor places, so that a
    study may be moved and the package updated."""
    configs = [cell.config, *([cell.cold_start] if cell.cold_start else [])]
    given = [_settings(study, config) for config in configs]
    world = study.world.made_with(cell.pair, cell.seed) if study.world else ""
    return hashlib.blake2b("\n".join([*given, world]).encode(), digest_size=8).hexdigest()


def _settings(study: StudyConfig, config: StableOPDConfig) -> str:
    places = {**_no_result(config), **(_PLACES_IN_A_WORLD if study.world else {})}
    text = json.dumps(config.model_dump(mode="json", exclude_unset=True, exclude=places), sort_keys=True)
    for name, place in (study.world.placeholders(study.folder) if study.world else {}).items():
        text = text.replace(json.dumps(place)[1:-1], f"{{{name}}}")
    return text


def _no_result(config: StableOPDConfig) -> dict[str, Any]:
    """Settings that do not change what comes out. How often a checkpoint is written does, where a run may go back."""
    left_out = {"output_dir": True, "logging": True, "num_processes": True}
    return left_out if config.health.actions == "rollback" else {**left_out, "checkpoint": True}


_PLACES_IN_A_WORLD: dict[str, Any] = {
    "data": {"path"},
    "evaluation": {"path"},
    "student": {"model_name_or_path"},
    "teacher": {"model_name_or_path"},
}


def _jobs(study: StudyConfig, cell: Cell) -> list[Job]:
    """All that a cell needs, its own run last."""
    jobs = study.world.jobs(study.folder, cell.pair, cell.seed) if study.world else []
    if cell.cold_start is not None:
        jobs.append(_training(study, "cold start", cell.cold_start, after=jobs))
    jobs.append(_training(study, "run", cell.config, after=jobs))
    if study.final is not None:
        jobs.append(_final(study, study.final, cell, after=jobs[-1]))
    return jobs


def _final(study: StudyConfig, final: FinalConfig, cell: Cell, after: Job) -> Job:
    """The answers of a finished run's last checkpoint to the benchmarks of the study."""
    evaluation = cell.config.evaluation
    length = final.max_completion_length or cell.config.eval_max_completion_length
    benchmarks = final.benchmarks or ((evaluation.path,) if evaluation.path else ())
    command = [sys.executable, "-m", "stableopd", "eval", str(cell.folder)]
    command += [part for name in benchmarks for part in ("--benchmark", name)]
    command += ["--temperature", str(final.temperature), "--max-completion-length", str(length)]
    command += ["--judge", final.judge or evaluation.judge, "--seed", str(final.seed)]
    command += ["--samples", str(final.num_samples)] if final.num_samples else []
    command += ["--num-prompts", str(final.num_prompts)] if final.num_prompts else []
    command += ["--greedy"] if final.greedy else []
    command += ["--out", str(study.folder / "evals"), "--output", str(_answers_of(cell))]
    stem = cell.folder.with_name(f"{cell.folder.name}.final")
    return Job(
        name=f"answers {cell.folder.relative_to(study.folder)}",
        commands=(tuple(command),),
        stem=stem,
        after=(after.name,),
        settings=final.model_dump_json(),
    )


def _answers_of(cell: Cell) -> Path:
    return cell.folder.with_name(f"{cell.folder.name}.answers.json")


def _training(study: StudyConfig, what: str, config: StableOPDConfig, after: Sequence[Job]) -> Job:
    folder = config.run_dir
    path = folder.with_name(f"{folder.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_config(config))
    launch = study.launch or (sys.executable, "-m", "stableopd")
    return Job(
        name=f"{what} {folder.relative_to(study.folder)}",
        commands=((*launch, "train", str(path), "{resume}"),),
        stem=folder,
        after=tuple(job.name for job in after),
        begun=folder / "config.yaml",
        settings=_settings(study, config),
    )


def _outcome(study: StudyConfig, cell: Cell) -> Outcome:
    outcome = read_folder(
        cell.folder,
        arm=cell.arm,
        pair=cell.pair,
        seed=cell.seed,
        digest=settings_digest(study, cell),
        name=cell.config.evaluation.name,
        late_fraction=study.late_fraction,
    )
    return with_answers(outcome, _answers_of(cell)) if study.final is not None else outcome


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = lock_folder(folder)
    try:
        yield
    finally:
        lock.close()
