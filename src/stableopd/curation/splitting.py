"""Which part a prompt belongs to: a function of the prompt alone, so that no order and no neighbour changes it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection


def prompt_key(prompt: str) -> str:
    """32 hexadecimal digits, the same for prompts that differ in white space or in the form of their characters."""
    plain = " ".join(unicodedata.normalize("NFKC", prompt).split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def draw(seed: int, *key: str | int) -> int:
    """A number in [0, 2⁶⁴) that looks drawn by chance and is the same on every machine."""
    text = "\0".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def threshold_of_fraction(fraction: float) -> int:
    """Prompts whose draw lies below it are the part that gets `fraction` of all, in [0, 1], but for chance."""
    return int(fraction * 2**64)


def threshold_of_largest(draws: Collection[int], number: int) -> int:
    """The threshold from which on exactly `number` of distinct draws lie; all of them where there are fewer."""
    ordered = sorted(draws)
    return ordered[-min(number, len(ordered))] if number and ordered else 2**64


def threshold_of_number(draws: Collection[int], number: int) -> int:
    """The threshold below which exactly `number` of distinct draws lie; all of them where there are fewer."""
    ordered = sorted(draws)
    return ordered[number] if number < len(ordered) else 2**64
