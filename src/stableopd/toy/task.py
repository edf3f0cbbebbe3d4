"""The toy world: running sums that a reflective teacher likes to check once more than is good.

A prompt is L digits and `:`. An attempt is the L running sums modulo 10; then `;` and a verdict:
`y=ANSWER$` stops, `w` ("wait") starts another attempt. A character is a token, `$` ends a sequence.

    1234:1360;y=0$            the gold chain of 1234
    1234:;y=0$                its terse gold: right, but without working
    1234:1471;w1360;y=0$      a slip at the second sum, which propagates; noticed and mended
    1234:1360;w1360;w1360     a right attempt that is checked again and again: how lengths inflate

All samplers draw from the generator they are given and return a `Sample`, the text of a completion
and a loss weight per character. This module needs numpy and the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, product
from typing import NamedTuple

from numpy.random import Generator

from stableopd.toy.habits import Habits, reflect

ALPHABET = "0123456789:;yw=$_"
EOS = "$"
PAD = "_"
JUDGE = "stableopd.toy.task:judge"
TAIL_CHARS, COMPRESSION_THRESHOLD = 64, 2.2
"""The paper's measure of repetition, scaled down to answers of ten characters."""

_HELD_OUT_FRACTION = 0.2
_FINAL_ANSWER = re.compile(rf"y=(\d){re.escape(EOS)}?{PAD}*\Z")


class Sample(NamedTuple):
    """A completion to learn from: its text, and the loss weight of each character (`$` included)."""

    text: str
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class World(Habits):
    """Settings of a world: its prompts, the style of its gold, the habits of its teacher and student."""

    num_digits: int = 4

    @classmethod
    def a(cls) -> World:
        """World A: all gold is a chain."""
        return cls()

    @classmethod
    def t4(cls) -> World:
        """World T4: 40% of the gold is terse, and the teacher answers a direct guess with `w` and a chain."""
        return cls(terse_fraction=0.4, direct_start_fraction=0.015)


def prompts(world: World) -> list[str]:
    """All 10^L digit strings, in numerical order. A prompt is named by its digits, without the `:`."""
    return ["".join(digits) for digits in product("0123456789", repeat=world.num_digits)]


def prompt_text(prompt: str) -> str:
    """What the model reads: the digits and `:`."""
    return f"{prompt}:"


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to validation: one in five, by a hash of its digits, in every world."""
    return _stable_uniform(prompt, purpose="held-out") < _HELD_OUT_FRACTION


def lot(prompt: str) -> float:
    """A number by chance, always the same one: prompts in the order of theirs are in no order of difficulty."""
    return _stable_uniform(prompt, purpose="order")


def is_terse(world: World, prompt: str) -> bool:
    """Whether the golden solution of a prompt is answer-only, by a hash of its digits."""
    return _stable_uniform(prompt, purpose="terse") < world.terse_fraction


def chain(prompt: str) -> str:
    """The right attempt: running sums of the digits, modulo 10."""
    return _running_sums(int(digit) for digit in prompt)


def answer(prompt: str) -> str:
    """The last running sum."""
    return chain(prompt)[-1]


def solution(prompt: str, *, terse: bool) -> str:
    """A right completion: `SSSS;y=A$`, or `;y=A$` when terse."""
    working = "" if terse else chain(prompt)
    return f"{working};y={answer(prompt)}{EOS}"


def gold(world: World, prompt: str) -> str:
    """The golden solution of a prompt: always the same one."""
    return solution(prompt, terse=is_terse(world, prompt))


def judge(completion: str, answer: str) -> bool:
    """Whether a completion ends in `y=ANSWER`, with or without its special tokens.

    Only the end counts: neither the working nor an answer in the middle does. A completion cut off
    at its length limit is therefore wrong, unless the limit fell exactly on the answer.
    """
    final = _FINAL_ANSWER.search(completion)
    return final is not None and final[1] == answer


def teacher_trace(world: World, prompt: str, rng: Generator) -> Sample:
    """One trace of the reflective teacher, with its loss weights.

    A wrong attempt is always followed by `w`, then by a copy of itself or by a new attempt; a right
    one by `w` and a copy, or by the answer. A copy is taught even where it copies a slip. A trace
    that reaches `max_trace_tokens` is cut there and has no `$`.
    """
    script = _Script(world, prompt)
    reflect(world, script, script.right, lambda: wrong_attempt(world, prompt, rng), rng)
    return script.sample(world.max_trace_tokens)


def verification_example(world: World, prompt: str, rng: Generator) -> Sample:
    """One attempt and its verdict, half of them wrong: `SSSS;y=A$` or `SSSS;w`, which ends there.

    Weighted as in a trace: the digits of a wrong attempt have weight 0, the verdict `y` or `w` has 3.
    """
    script = _Script(world, prompt)
    if rng.random() < 0.5:
        script.attempt(wrong_attempt(world, prompt, rng))
        script.wait()
    else:
        script.attempt(script.right)
        script.stop()
    return script.sample()


def copying_example(world: World, prompt: str, rng: Generator) -> Sample:
    """First phase of the student's cold start: gold, and in 40% a drill in copying; weight 1 throughout.

    The drill is one attempt, 70% wrong, then 1-5 copies of it, each after `;w`, then `;w` and the gold
    chain. Outside the drill gold is terse with probability `terse_fraction`, drawn anew each time.
    """
    if rng.random() >= world.drill_fraction:
        return _evenly_weighted(_fresh_gold(world, prompt, rng))
    wrong = rng.random() < world.drill_wrong_fraction
    attempt = wrong_attempt(world, prompt, rng) if wrong else chain(prompt)
    num_copies = int(rng.integers(1, world.drill_max_copies + 1))
    return _evenly_weighted(f"{attempt};w" * (1 + num_copies) + solution(prompt, terse=False))


def recheck_example(world: World, prompt: str, rng: Generator) -> Sample:
    """Second phase of the student's cold start: gold, and in 1% a single re-check; weight 1 throughout.

    A re-check is `SSSS;w` and the gold chain, or, with probability `terse_fraction`, `;w` and the gold
    chain. The gold of the other 99% is terse with the same probability.
    """
    if rng.random() >= world.single_recheck_fraction:
        return _evenly_weighted(_fresh_gold(world, prompt, rng))
    first = "" if rng.random() < world.terse_fraction else chain(prompt)
    return _evenly_weighted(f"{first};w{solution(prompt, terse=False)}")


def wrong_attempt(world: World, prompt: str, rng: Generator) -> str:
    """An attempt with k slips at different places, each of which propagates to all later sums.

    k is 1 with probability `single_slip_fraction`, else uniform over 1..L. The sum at the first slip
    is always off; later slips may cancel it, so that even the last sum can be right by chance.
    """
    num_digits = world.num_digits
    single = rng.random() < world.single_slip_fraction
    num_slips = 1 if single else int(rng.integers(1, num_digits + 1))
    steps = [int(digit) for digit in prompt]
    for place in rng.permutation(num_digits)[:num_slips]:
        steps[place] += int(rng.integers(1, 10))
    return _running_sums(steps)


@dataclass(slots=True)
class _Script:
    """A weighted completion in the making."""

    world: World
    prompt: str
    right: str = field(init=False)
    text: str = field(init=False, default="")
    weights: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.right = chain(self.prompt)

    @property
    def is_full(self) -> bool:
        return len(self.text) >= self.world.max_trace_tokens

    def guess(self) -> None:
        self.wait()

    def attempt(self, attempt: str, *, copied: bool = False) -> None:
        slipped = attempt != self.right and not copied
        self._write(attempt, self.world.slip_weight if slipped else 1.0)

    def wait(self) -> None:
        self._write(";", 1.0)
        self._write("w", self.world.verdict_weight)

    def stop(self) -> None:
        self._write(";", 1.0)
        self._write("y", self.world.verdict_weight)
        self._write(f"={self.right[-1]}{EOS}", 1.0)

    def sample(self, max_tokens: int | None = None) -> Sample:
        return Sample(self.text[:max_tokens], tuple(self.weights[:max_tokens]))

    def _write(self, text: str, weight: float) -> None:
        self.text += text
        self.weights += [weight] * len(text)


def _fresh_gold(world: World, prompt: str, rng: Generator) -> str:
    return solution(prompt, terse=bool(rng.random() < world.terse_fraction))


def _evenly_weighted(text: str) -> Sample:
    return Sample(text, (1.0,) * len(text))


def _running_sums(steps: Iterable[int]) -> str:
    return "".join(str(total % 10) for total in accumulate(steps))


def _stable_uniform(prompt: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the digits and the purpose alone, on every machine."""
    digest = blake2b(prompt.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
