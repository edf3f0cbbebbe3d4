"""The losses once more, written for reading: lists of numbers, loops and `math`, one position at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

SHAPES = {"num_rows": st.integers(1, 3), "num_tokens": st.integers(1, 4), "vocab": st.integers(2, 7)}
SEEDS = st.integers(0, 10_000)
NEVER = -math.inf

Row = list[float]


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def tokens(seed: int, vocab: int, *shape: int) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def rows_of_lengths(seed: int, num_rows: int, width: int) -> Tensor:
    """[num_rows, width] bool: the first tokens of each row, of random length, also 0."""
    return torch.arange(width) < tokens(seed, width + 1, num_rows)[:, None]


def at_each_position(function: Callable[..., float], *arrays: Tensor) -> Tensor:
    """function(row, row, ...) of plain lists along the last axis: [..., V] -> [...] in float64."""
    lead = arrays[0].shape[:-1]
    flat = [array.reshape(-1, array.shape[-1]).tolist() for array in arrays]
    values = [function(*rows) for rows in zip(*flat, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(lead)


def log_softmax(row: Row, temperature: float = 1.0) -> Row:
    scaled = [value / temperature for value in row]
    top = max(scaled)
    total = math.log(math.fsum(math.exp(value - top) for value in scaled)) + top
    return [value - total for value in scaled]


def kl(log_p: Row, log_q: Row) -> float:
    total = 0.0
    for p, q in zip(log_p, log_q, strict=True):
        if p != NEVER:
            total += math.inf if q == NEVER else math.exp(p) * (p - q)
    return total


def jensen_shannon(log_s: Row, log_t: Row, beta: float) -> float:
    total = 0.0
    for s, t in zip(log_s, log_t, strict=True):
        s, t = math.exp(s), math.exp(t)
        m = beta * t + (1 - beta) * s
        total += beta * t * math.log(t / m) if beta and t else 0.0
        total += (1 - beta) * s * math.log(s / m) if beta < 1 and s else 0.0
    return total


def divergence(kind: str, log_s: Row, log_t: Row, beta: float, forward_weight: float) -> float:
    if kind == "reverse_kl":
        return kl(log_s, log_t)
    if kind == "forward_kl":
        return kl(log_t, log_s)
    if kind == "jsd":
        return jensen_shannon(log_s, log_t, beta)
    return forward_weight * kl(log_t, log_s) + (1 - forward_weight) * kl(log_s, log_t)


def on_a_support(kind: str, tail: str, log_s: Row, log_t: Row, beta: float, forward_weight: float) -> float:
    """`divergence` of log-probabilities gathered on a set, renormalised or with the rest as one outcome."""
    if not log_s:
        return 0.0
    s, t = [math.exp(value) for value in log_s], [math.exp(value) for value in log_t]
    if tail == "renormalise":
        s, t = [p / math.fsum(s) for p in s], [p / math.fsum(t) for p in t]
    else:
        s, t = [*s, 1 - math.fsum(s)], [*t, 1 - math.fsum(t)]
    log_s, log_t = ([math.log(p) if p > 0 else NEVER for p in row] for row in (s, t))
    return divergence(kind, log_s, log_t, beta, forward_weight)


def top_ids(row: Row, k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda index: -row[index])[:k])


def candidates(kind: str, student: Row, teacher: Row, k: int) -> set[int]:
    s, t = top_ids(student, k), top_ids(teacher, k)
    return {
        "teacher_topk": t,
        "student_topk": s,
        "intersection": s & t,
        "union": s | t,
        "symmetric_difference": s ^ t,
    }[kind]
