"""English word problems: somebody has some things, and what happens to them, told in several ways with idle numbers.

    Tom has 5 plums. Ana is 7 years old. Ben gives Tom 3. Tom loses 2. How many plums does Tom have now?
    5 + 3 = 8, 8 - 2 = 6.

A problem is a program (a start and operations, each with its number) and its telling. Which problems are held out is a
matter of the program alone: a program of validation is never seen in training, in whatever words. This module needs
numpy and the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Literal

from numpy.random import Generator

Kind = Literal["add", "remove", "multiply", "share"]

KINDS: tuple[Kind, ...] = ("add", "remove", "multiply", "share")
SYMBOLS: Mapping[Kind, str] = {"add": "+", "remove": "-", "multiply": "*", "share": "/"}

_HELD_OUT_FRACTION = 0.2
_NAMES = ("Tom", "Ana", "Ben", "Mia", "Leo", "Eva", "Sam", "Zoe", "Max", "Ida")
_THINGS = ("plums", "books", "coins", "shells", "pens", "cards", "stones", "nuts")
_STARTS = ("{name} has {number} {things}.", "{name} starts with {number} {things}.", "{name} owns {number} {things}.")
_TOLD: Mapping[Kind, tuple[str, ...]] = {
    "add": ("{name} buys {number} more.", "{other} gives {name} {number}.", "{name} finds {number} more."),
    "remove": ("{name} loses {number}.", "{name} gives {number} to {other}.", "{name} sells {number}."),
    "multiply": ("Then {name} has {number} times as many.", "Magic makes {number} of each."),
    "share": (
        "{name} splits them into {number} equal parts and keeps one.",
        "{number} friends share them evenly, and {name} is one.",
    ),
}
_IDLE = (
    "{other} has {number} {other_things}.",
    "{other} is {number} years old.",
    "{name} is {number} years old.",
    "It takes {number} minutes.",
)
_QUESTIONS = ("How many {things} does {name} have now?", "Now how many {things} has {name}?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemSettings:
    """What problems are made of."""

    min_operations: int = 2
    max_operations: int = 4
    max_distractors: int = 2
    """Sentences with a number that does not matter: each problem has none up to so many, all as likely."""
    max_start: int = 9
    max_term: int = 6
    """Largest number that is added or removed; things are multiplied and shared by 2 or 3."""
    max_value: int = 18
    """No result is larger; none is below 1."""


@dataclass(frozen=True, slots=True)
class Operation:
    kind: Kind
    number: int

    def apply(self, value: int) -> int:
        """The value after the operation; sharing leaves the remainder out, removing stops at 0."""
        match self.kind:
            case "add":
                return value + self.number
            case "remove":
                return max(0, value - self.number)
            case "multiply":
                return value * self.number
            case "share":
                return value // self.number


@dataclass(frozen=True, slots=True)
class Step:
    """One line of working: `left symbol right = result`."""

    left: int
    operation: Operation
    result: int

    def __str__(self) -> str:
        return f"{self.left} {SYMBOLS[self.operation.kind]} {self.operation.number} = {self.result}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    text: str
    start: int
    operations: tuple[Operation, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The right working."""
        return tuple(working(self.start, self.operations))

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def program(self) -> str:
        """Start and operations, in a form that names them."""
        return " ".join([str(self.start), *(f"{SYMBOLS[op.kind]}{op.number}" for op in self.operations)])

    @property
    def is_held_out(self) -> bool:
        """Whether it belongs to validation: one program in five, by a hash of the program."""
        return stable_uniform(self.program, purpose="held-out") < _HELD_OUT_FRACTION


def draw_problem(settings: ProblemSettings, rng: Generator) -> Problem:
    """A problem with 2 to 4 operations (by `settings`); every result lies between 1 and `max_value`."""
    start = int(rng.integers(2, settings.max_start + 1))
    operations: list[Operation] = []
    value = start
    for _ in range(int(rng.integers(settings.min_operations, settings.max_operations + 1))):
        possible = {kind: numbers for kind in KINDS if (numbers := _numbers(settings, kind, value))}
        kind = list(possible)[int(rng.integers(len(possible)))]
        operation = Operation(kind, possible[kind][int(rng.integers(len(possible[kind])))])
        operations.append(operation)
        value = operation.apply(value)
    return Problem(text=_telling(settings, start, operations, rng), start=start, operations=tuple(operations))


def draw_problems(settings: ProblemSettings, rng: Generator, count: int, *, held_out: bool) -> list[Problem]:
    """So many problems of training, or of validation, no two with the same words."""
    return list(islice(_distinct(settings, rng, held_out), count))


def working(start: int, operations: Sequence[Operation]) -> Iterator[Step]:
    """The steps that lead from the start to the answer."""
    value = start
    for operation in operations:
        step = Step(value, operation, operation.apply(value))
        yield step
        value = step.result


def stable_uniform(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text and the purpose alone, on every machine."""
    digest = blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def _distinct(settings: ProblemSettings, rng: Generator, held_out: bool) -> Iterator[Problem]:
    seen = set()
    while True:
        problem = draw_problem(settings, rng)
        if problem.is_held_out == held_out and problem.text not in seen:
            seen.add(problem.text)
            yield problem


def _numbers(settings: ProblemSettings, kind: Kind, value: int) -> list[int]:
    """The numbers with which an operation keeps the value within bounds, sharing without remainder."""
    candidates = range(1, settings.max_term + 1) if kind in ("add", "remove") else (2, 3)
    return [
        number
        for number in candidates
        if 1 <= Operation(kind, number).apply(value) <= settings.max_value
        and not (kind == "share" and value % number)
        and not (kind == "remove" and number >= value)
    ]


def _telling(settings: ProblemSettings, start: int, operations: Sequence[Operation], rng: Generator) -> str:
    name, other = (_NAMES[index] for index in rng.permutation(len(_NAMES))[:2])
    things, other_things = (_THINGS[index] for index in rng.permutation(len(_THINGS))[:2])

    def tell(sentences: Sequence[str], number: int = 0) -> str:
        sentence = sentences[int(rng.integers(len(sentences)))]
        return sentence.format(name=name, other=other, things=things, other_things=other_things, number=number)

    told = [tell(_STARTS, start), *(tell(_TOLD[operation.kind], operation.number) for operation in operations)]
    for _ in range(int(rng.integers(settings.max_distractors + 1))):
        told.insert(int(rng.integers(len(told) + 1)), tell(_IDLE, int(rng.integers(2, settings.max_start + 1))))
    return " ".join([*told, tell(_QUESTIONS)])
