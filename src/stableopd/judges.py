"""Judges of answers, (completion, reference answer) -> right or wrong, and what an answer counts as in a vote."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from stableopd.errors import ConfigError, MissingDependencyError
from stableopd.protocols import Judge

DEFAULT_TIMEOUT_S = 5
"""Of Math-Verify itself, which takes whole seconds, for each of its steps."""


def get_judge(name: str, setting: str = "evaluation.judge", *, timeout_s: int | None = DEFAULT_TIMEOUT_S) -> Judge:
    """The judge of that name: `exact`, `math`, or `package.module:function`; `setting` is where it was named.

    Args: `timeout_s` bounds `math` by signals, which work in the main thread alone; None: someone else bounds it.

    Raises: ConfigError when there is no such judge; MissingDependencyError when `math` lacks Math-Verify.
    """
    if name == "exact":
        return exact_match
    if name == "math":
        return _math_judge(setting, timeout_s)
    judge: Judge = _function(name, setting)
    return judge


def voter_of(name: str, setting: str = "evaluation.judge") -> Callable[[str], str | None]:
    """What a completion's answer counts as where wrong answers are compared with each other; None: it has no answer.

    `exact`: the completion; `math`: its last mathematical expression; a function of one's own: what its attribute
    `extract`, a function of the completion, makes of it, else its last line that is not blank.
    """
    if name == "exact":
        return _stripped
    if name == "math":
        return _math_vote
    extract: Callable[[str], str | None] = getattr(_function(name, setting), "extract", _last_line)
    return extract


def exact_match(completion: str, answer: str) -> bool:
    """The whole completion is the answer, but for white space around it."""
    return completion.strip() == answer.strip()


def _stripped(completion: str) -> str | None:
    return completion.strip() or None


def _last_line(completion: str) -> str | None:
    return next((line.strip() for line in reversed(completion.splitlines()) if line.strip()), None)


def _function(name: str, setting: str) -> Any:
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ConfigError(f"{setting} is {name!r}; it must be 'exact', 'math' or 'package.module:function'")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"{setting}: {name!r} is not a function")
    return function


def _math_judge(setting: str, timeout_s: int | None) -> Judge:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise MissingDependencyError.of("math-verify", f"{setting}=math", extra="math") from None

    def math_match(completion: str, answer: str) -> bool:
        """The last mathematical expression of the completion equals the answer (Math-Verify)."""
        reference = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        gold = parse(reference, parsing_timeout=timeout_s)
        return bool(verify(gold, parse(completion, parsing_timeout=timeout_s), timeout_seconds=timeout_s))

    return math_match


def _math_vote(completion: str) -> str | None:
    from math_verify import parse

    parsed = parse(completion, parsing_timeout=None)
    return str(parsed[0]) if parsed else None
