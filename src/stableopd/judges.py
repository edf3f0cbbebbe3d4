"""Judges of answers, (completion, reference answer) -> right or wrong, and what an answer counts as in a vote."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

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

    `exact`: the completion; `math`: the value of its last mathematical expression; a function of one's own: what its
    attribute `extract`, a function of the completion, makes of it, else its last line that is not blank.
    """
    if name == "exact":
        return _stripped
    if name == "math":
        return _math_vote
    extract: Callable[[str], str | None] = getattr(_function(name, setting), "extract", _last_line)
    return extract


def as_verdict(said: object) -> bool:
    """What a judge has said: True, False, 1 or 0, also as NumPy's.

    Raises: TypeError for anything else: a judge that says -1 for wrong would find every answer right.
    """
    plain = said.item() if isinstance(said, np.generic) else said
    if not isinstance(plain, bool | int) or plain not in (0, 1):
        raise TypeError(f"a judge says True or False, not {said!r:.80}")
    return bool(plain)


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
        return bool(verify(gold, _parsed(completion, timeout_s), timeout_seconds=timeout_s))

    return math_match


@lru_cache(maxsize=1)  # judged, then voted on
def _parsed(completion: str, timeout_s: int | None) -> Any:
    from math_verify import parse

    return parse(completion, parsing_timeout=timeout_s)


def _math_vote(completion: str) -> str | None:
    parsed = _parsed(completion, None)
    return _value_of(parsed[0]) if parsed else None


def _value_of(expression: Any) -> str:
    """The same text for 1/2 and 0.5, for √8 and 2√2, for x = 3 and 3; what is no number is told as it was written."""
    from sympy import Equality

    if isinstance(expression, Equality) and expression.lhs.is_Symbol:
        expression = expression.rhs
    if not getattr(expression, "is_number", False) or expression.is_Integer:
        return str(expression)
    number = expression.evalf(15)  # as Math-Verify compares
    if not (number.is_Float or number.is_Integer):
        return str(expression)
    value = float(number)
    if not math.isfinite(value):
        return str(expression)
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
