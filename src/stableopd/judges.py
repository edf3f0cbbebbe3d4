"""Judges of answers, (completion, reference answer) -> right or wrong, and rewards made of them."""

from __future__ import annotations

import importlib

from stableopd.errors import ConfigError, MissingDependencyError
from stableopd.protocols import Judge


def get_judge(name: str, setting: str = "evaluation.judge") -> Judge:
    """The judge of that name: `exact`, `math`, or `package.module:function`; `setting` is where it was named.

    Raises: ConfigError when there is no such judge; MissingDependencyError when `math` lacks Math-Verify.
    """
    if name == "exact":
        return exact_match
    if name == "math":
        return _math_judge(setting)
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ConfigError(f"{setting} is {name!r}; it must be 'exact', 'math' or 'package.module:function'")
    try:
        judge = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: {name!r} cannot be imported: {error}") from error
    if not callable(judge):
        raise ConfigError(f"{setting}: {name!r} is not a function")
    found: Judge = judge
    return found


def exact_match(completion: str, answer: str) -> bool:
    """The whole completion is the answer, but for white space around it."""
    return completion.strip() == answer.strip()


def _math_judge(setting: str) -> Judge:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise MissingDependencyError.of("math-verify", f"{setting}=math", extra="math") from None

    def math_match(completion: str, answer: str) -> bool:
        """The last mathematical expression of the completion equals the answer (Math-Verify)."""
        reference = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        return bool(verify(parse(reference), parse(completion)))

    return math_match
