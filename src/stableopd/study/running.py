"""Runs a study: whatever is not made yet, so many at a time, and one line of results.jsonl for each run that is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stableopd.config import StableOPDConfig
from stableopd.config_files import dump_config
from stableopd.errors import ConfigError, StableOPDError
from stableopd.recorder import lock_folder
from stableopd.study.cells import Cell, cells_of, last_checkpoint
from stableopd.study.config import StudyConfig
from stableopd.study.final import answers_of, final_job
from stableopd.study.inputs import changed_inputs, check_contents, check_inputs, contents_of
from stableopd.study.jobs import Ended, Job, run_jobs
from stableopd.study.made_with import made_with, run_key, settings_digest, settings_file, standing
from stableopd.study.outcome import Outcome, append_outcome, by_arm, read_folder, read_outcomes, with_answers

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

    @property
    def arms(self) -> dict[str, list[Outcome]]:
        """Results by method (and point of its grid), in the order of the configuration."""
        found = by_arm(self.outcomes)
        return {arm: found[arm] for arm in dict.fromkeys([*(cell.arm for cell in self.cells), *found]) if arm in found}

    @property
    def missing(self) -> list[Cell]:
        """Runs that have no result."""
        known = {outcome.key for outcome in self.outcomes}
        return [cell for cell in self.cells if cell.key not in known]


Tell = Callable[[Ended], None]
TellActive = Callable[[Sequence[Job]], None]


def run_study(
    study: StudyConfig,
    tell: Tell = lambda ended: None,
    tell_active: TellActive = lambda active: None,
    tell_total: Callable[[int], None] = lambda total: None,
    *,
    ask_again: bool = False,
) -> StudyRun:
    """Make every run that is not in results.jsonl yet. A failure ends nothing but what needs it.

    Args: `ask_again` asks finished runs anew of which only `final` has changed since; else they are refused.

    Raises: ConfigError or DataError before anything is started when a run's settings are impossible, something that it
    reads is not there, or a finished one was made with others; RunFolderError when another process runs this study.
    """
    cells = cells_of(study)
    stored = read_outcomes(study.folder / RESULTS)
    check_contents(study, cells, stored)
    known = standing(study, cells, stored, ask_again=ask_again)
    check_inputs(study, cells)
    study.folder.mkdir(parents=True, exist_ok=True)
    with _locked(study.folder):
        results = study.folder / RESULTS
        planned = [(twins, _jobs(study, twins[0], ask_again)) for twins in _without_twins(study, cells, known)]
        last_jobs = {needed[-1].name: twins for twins, needed in planned}
        jobs = list({job.name: job for _, needed in planned for job in needed}.values())
        tell_total(sum(job.is_to_be_made for job in jobs))

        unread: list[Ended] = []

        def collect(ended: Ended) -> None:
            twins = last_jobs.get(ended.job.name, [])
            if twins and ended.status == "done":
                try:
                    outcome = _outcome(study, twins[0])
                except (StableOPDError, OSError, ValueError) as error:
                    ended.job.record.unlink(missing_ok=True)
                    why = f"its result cannot be read, and is made again the next time: {error}"
                    ended = replace(ended, status="failed", why=why)
                    unread.append(ended)
                else:
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
        outcomes=_finished(study, cells),
        failures=[*(end for end in ended.values() if end.status != "done"), *unread],
    )


def _without_twins(study: StudyConfig, cells: Sequence[Cell], known: Sequence[Outcome]) -> list[list[Cell]]:
    """The cells that have no result yet, those that are one and the same run together.

    A method without a teacher is the same run for all pairs that differ in their teacher alone. Where a twin has a
    result already, the others are given it here.
    """
    results = {outcome.key: outcome for outcome in known}
    wanted = {cell.key for cell in cells}
    groups: dict[str, list[Cell]] = {}
    for cell in _cells_of_the_whole(study, cells):
        groups.setdefault(run_key(cell), []).append(cell)
    missing = []
    for twins in groups.values():
        done = next((results[cell.key] for cell in twins if _is_done(study, cell, results)), None)
        without = [cell for cell in twins if cell.key in wanted and cell.key not in results]
        if done is not None:
            for cell in without:
                append_outcome(study.folder / RESULTS, _for_cell(study, cell, done))
        elif without:
            missing.append(without)
    return missing


def _is_done(study: StudyConfig, cell: Cell, results: Mapping[tuple[str, str, int], Outcome]) -> bool:
    """Whether a cell, of the part that is run or not, has a result that holds."""
    outcome = results.get(cell.key)
    if outcome is None or outcome.digest != settings_digest(study.whole, cell):
        return False
    return not changed_inputs(study.whole, cell, outcome)


def _cells_of_the_whole(study: StudyConfig, cells: Sequence[Cell]) -> Sequence[Cell]:
    """Also the runs of methods and pairs that were not asked for: one of them may be a twin that is done."""
    try:
        return cells_of(study.whole)
    except ConfigError:  # what was not asked for may be impossible
        return cells


def _for_cell(study: StudyConfig, cell: Cell, outcome: Outcome) -> Outcome:
    return replace(
        outcome,
        arm=cell.arm,
        pair=cell.pair,
        seed=cell.seed,
        digest=settings_digest(study, cell),
        made_with=made_with(study, cell),
    )


def existing(study: StudyConfig) -> StudyRun:
    """A study as far as it has been run, without running anything.

    Raises: ConfigError as `run_study`.
    """
    cells = cells_of(study)
    stored = read_outcomes(study.folder / RESULTS)
    check_contents(study, cells, stored)
    standing(study, cells, stored)
    return StudyRun(study=study, cells=cells, outcomes=_finished(study, cells))


def _finished(study: StudyConfig, cells: Sequence[Cell]) -> list[Outcome]:
    """The results that there are of the study's cells, in their order."""
    known = {(outcome.key, outcome.digest): outcome for outcome in read_outcomes(study.folder / RESULTS)}
    found = [known.get((cell.key, settings_digest(study, cell))) for cell in cells]
    return [outcome.with_late(study.late_fraction) for outcome in found if outcome is not None]


def _jobs(study: StudyConfig, cell: Cell, ask_again: bool) -> list[Job]:
    """All that a cell needs, its own run last.

    Each is made with all that went into it: a run of other models is another run, wherever they lie.
    """
    made = made_with(study, cell)
    world = {"world": made["world"]} if "world" in made else {}
    jobs = study.world.jobs(study.folder, cell.pair, cell.seed) if study.world else []
    if cell.cold_start is not None:
        under = {"run": made["cold_start"], **world}
        jobs.append(_training(study, "cold start", cell.cold_start, under, after=jobs))
    trained = {part: given for part, given in made.items() if part != "final"}
    jobs.append(_training(study, "run", cell.config, trained, after=jobs))
    if study.final is not None:
        jobs.append(final_job(study, study.final, cell, made, after=jobs[-1], again=ask_again))
    return jobs


def _training(
    study: StudyConfig, what: str, config: StableOPDConfig, made: Mapping[str, Any], after: Sequence[Job]
) -> Job:
    folder, path = config.run_dir, settings_file(config)
    launch = study.launch or (sys.executable, "-m", "stableopd")
    return Job(
        name=f"{what} {folder.relative_to(study.folder)}",
        command=(*launch, "train", str(path), "{resume}"),
        stem=folder,
        reads=(path, dump_config(config)),
        after=tuple(job.name for job in after),
        begun=folder,
        leaves=last_checkpoint(config),
        settings=json.dumps(made, sort_keys=True),
    )


def _outcome(study: StudyConfig, cell: Cell) -> Outcome:
    outcome = read_folder(
        cell.folder,
        arm=cell.arm,
        pair=cell.pair,
        seed=cell.seed,
        digest=settings_digest(study, cell),
        name=cell.config.evaluation.name,
    )
    outcome = replace(outcome, inputs=contents_of(study, cell), made_with=made_with(study, cell))
    return with_answers(outcome, answers_of(cell)) if study.final is not None else outcome


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = lock_folder(folder)
    try:
        yield
    finally:
        lock.close()
