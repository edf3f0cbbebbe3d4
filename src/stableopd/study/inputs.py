"""Whether what the runs of a study read is there, before the first of them has cost an hour."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from stableopd.benchmarking.registry import canonical, spec_of
from stableopd.benchmarking.timed import TimedJudge
from stableopd.config import StableOPDConfig
from stableopd.errors import ConfigError, MissingDependencyError
from stableopd.names import is_a_path
from stableopd.reading import looks_local
from stableopd.study.cells import Cell
from stableopd.study.config import StudyConfig
from stableopd.study.outcome import Outcome


def check_inputs(study: StudyConfig, cells: Sequence[Cell]) -> None:
    """Files, folders and functions of all runs; what lies on the hub or is made by the study itself is not looked at.

    Raises: ConfigError naming everything that is not there, and where it was named.
    """
    problems: dict[str, None] = {}
    for cell in cells:
        for config in (cell.config, *([cell.cold_start] if cell.cold_start else [])):
            for setting, name in _files(config):
                if not _is_made(study, name) and not Path(name).expanduser().exists():
                    problems[f"{setting}: {name} does not exist (relative paths start at {Path.cwd()})"] = None
    for setting, name in _functions(study, cells):
        try:  # in a process of its own, for a module may do anything when it is imported
            with TimedJudge(name, setting=setting) as judge:
                judge.start()
        except (ConfigError, MissingDependencyError) as error:
            problems[str(error)] = None
    if study.launch and shutil.which(study.launch[0]) is None:
        problems[f"launch: there is no command {study.launch[0]!r} on this machine"] = None
    asked = {("final.benchmarks", study.final.benchmarks if study.final else ())}
    asked |= {("evaluation.benchmarks", cell.config.evaluation.benchmarks) for cell in cells}
    for setting, names in sorted(asked):
        problems |= dict.fromkeys(_wrong_benchmarks(setting, names))
    if problems:
        raise ConfigError("\n".join(problems))


def contents_of(study: StudyConfig, cell: Cell) -> dict[str, str]:
    """A digest of each file or folder of prompts that a run reads or is asked, by its setting, where it is there."""
    found = {}
    for prefix, config in (("", cell.config), ("cold_start.", cell.cold_start)):
        for setting, path in (*_prompt_files(config), *_benchmark_files(config)) if config else ():
            found[prefix + setting] = path
    for name in study.final.benchmarks if study.final else ():
        found[f"final.benchmarks: {name}"] = _file_of_benchmark(name)
    places = {setting: Path(path).expanduser() for setting, path in found.items()}
    return {setting: _digest_at(place) for setting, place in places.items() if place.exists()}


def check_contents(study: StudyConfig, cells: Sequence[Cell], known: Sequence[Outcome]) -> None:
    """Raises: ConfigError for a file that holds something else than when a finished run read it."""
    results = {outcome.key: outcome for outcome in known}
    for cell in cells:
        changed = changed_inputs(study, cell, results[cell.key]) if cell.key in results else []
        if changed:
            raise ConfigError(
                f"what {changed[0]} names has changed since {cell.arm} of {cell.pair}, seed {cell.seed} was run, and "
                "runs on other prompts are not mixed: put it back as it was, or choose another output_dir"
            )


def changed_inputs(study: StudyConfig, cell: Cell, outcome: Outcome) -> list[str]:
    """Settings whose files of prompts hold something else than when a finished run read them."""
    now = contents_of(study, cell) if outcome.inputs else {}
    return [name for name, digest in now.items() if outcome.inputs.get(name, digest) != digest]


def _digest_at(place: Path) -> str:
    if place.is_file():
        return _digest_of_file(place)
    files = {str(file.relative_to(place)): file for file in sorted(place.rglob("*")) if file.is_file()}
    digests = [(name, _digest_of_file(file)) for name, file in files.items()]
    return hashlib.blake2b(repr(digests).encode(), digest_size=8).hexdigest()


def _digest_of_file(path: Path) -> str:
    stat = path.stat()
    return _digest_of(path, stat.st_mtime_ns, stat.st_size)


@cache
def _digest_of(path: Path, changed: int, size: int) -> str:
    """All runs of a study read the same files: each is read once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _wrong_benchmarks(setting: str, names: Sequence[str]) -> Iterator[str]:
    """Benchmarks that are not there, and two whose answers would be one another's."""
    seen: dict[str, str] = {}
    for name in names:
        plain, equals, _ = name.partition("=")
        known = spec_of(plain) is not None
        on_the_hub = not equals and "/" in name and not looks_local(name)
        if not (known and not equals) and not on_the_hub and not Path(_file_of_benchmark(name)).expanduser().exists():
            what = f"{_file_of_benchmark(name)} does not exist" if known else "it is none of the registry and no file"
            yield f"{setting}: {name!r}: {what}"
        called = canonical(plain) if known else Path(name).stem
        if called in seen:
            yield f"{setting}: {seen[called]} and {name} are both called {called!r}: rename one of them"
        seen[called] = name


def _file_of_benchmark(name: str) -> str:
    """The file of a local copy (`math500=copy.parquet`), or the name itself, which may be one."""
    plain, equals, copy = name.partition("=")
    return copy if equals and spec_of(plain) is not None else name


def _benchmark_files(config: StableOPDConfig) -> Iterator[tuple[str, str]]:
    for name in config.evaluation.benchmarks:
        yield f"evaluation.benchmarks: {name}", _file_of_benchmark(name)


def _files(config: StableOPDConfig) -> Iterator[tuple[str, str]]:
    """Names that can only be files or folders of this machine."""
    yield from _prompt_files(config)
    section = "teachers." if config.teachers else ""
    teachers = {f"{section}{name}": teacher for name, teacher in config.named_teachers.items()}
    for name, model in {"student": config.student, **teachers}.items():
        if model.model_name_or_path is not None and is_a_path(model.model_name_or_path):
            yield f"{name}.model_name_or_path", model.model_name_or_path


def _prompt_files(config: StableOPDConfig) -> Iterator[tuple[str, str]]:
    for setting, path in (
        ("data.path", config.data.path),
        ("data.gold_path", config.data.gold_path),
        ("evaluation.path", config.evaluation.path),
    ):
        if path is not None and looks_local(path):
            yield setting, path


def _is_made(study: StudyConfig, name: str) -> bool:
    folders = [study.folder, *([study.world.folder(study.folder)] if study.world else [])]
    return any(Path(name).is_relative_to(folder) for folder in folders)


def _functions(study: StudyConfig, cells: Sequence[Cell]) -> Iterator[tuple[str, str]]:
    """Judges and rewards by name, each once."""
    found = {("evaluation.judge", cell.config.evaluation.judge): None for cell in cells}
    for cell in cells:
        if cell.config.objective.needs_rewards:
            found["objective.reward.function", cell.config.objective.reward.function] = None
    if study.final and study.final.judge:
        found["final.judge", study.final.judge] = None
    yield from found
