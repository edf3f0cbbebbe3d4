"""Judges that processes of their own import: light, and each of one kind."""

from __future__ import annotations


def judge(completion: str, answer: str) -> bool:
    """Right when it has an odd number of characters."""
    return len(completion) % 2 == 1


def never(completion: str, answer: str) -> bool:
    return False


def fragile(completion: str, answer: str) -> bool:
    if len(completion) % 3 == 0:
        raise ValueError("strange output")
    return True
