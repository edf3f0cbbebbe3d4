"""Errors that a user can act on. Each says what is wrong, why, and what to do.

Every error is also one of the standard library's, so that code which does not know this package
can still catch it. Command-line programs print them without a traceback and exit with status 2.
"""

from __future__ import annotations

from collections.abc import Iterable


class StableOPDError(Exception):
    """Root of all errors raised on purpose by this package."""


class ConfigError(StableOPDError, ValueError):
    """A configuration that cannot be run: unknown key, wrong type, impossible value, broken YAML."""

    problems: tuple[tuple[str, str], ...] = ()
    """(dotted key, message) of each thing that is wrong, where single keys are to blame."""

    @classmethod
    def of(cls, problems: Iterable[tuple[str, str]]) -> ConfigError:
        found = tuple(problems)
        error = cls("\n".join(message for _, message in found))
        error.problems = found
        return error


class DataError(StableOPDError, ValueError):
    """A dataset that cannot be used: missing file, broken line, missing column, overlong prompt."""


class ModelError(StableOPDError, ValueError):
    """A model or tokenizer that cannot be used, or a student and teacher that do not fit together."""


class RunFolderError(StableOPDError, OSError):
    """A run folder that must not be written into, or from which nothing can be read or resumed."""


class TrainingError(StableOPDError, RuntimeError):
    """A run that began well and cannot go on: no update can be made, no reward can be had."""


class InterruptedWorkError(StableOPDError):
    """Work that the user ended; the message says how to go on. The command line ends with status 130."""


class TeacherError(StableOPDError, RuntimeError):
    """A teacher that does not answer, or whose answer cannot be used; no weight was touched by it."""


class EngineError(StableOPDError, RuntimeError):
    """A rollout engine that does not answer, or whose weights are not the trainer's."""


class MissingDependencyError(StableOPDError, ImportError):
    """An optional package is needed for what was asked."""

    @classmethod
    def of(cls, package: str, purpose: str, extra: str | None = None) -> MissingDependencyError:
        how = f"pip install 'stableopd[{extra}]'" if extra else f"pip install {package}"
        return cls(f"{purpose} needs the package {package!r}, which is not installed. Install it: {how}")
