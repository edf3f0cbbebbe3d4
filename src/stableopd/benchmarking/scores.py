"""What many answers to one question are worth: pass@k without bias, maj@k with ties. numpy alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that at least one of k answers is right, estimated without bias from n answers of which c are right.

    Definition: 1 − C(n − c, k) / C(n, k), as the product 1 − Π_{i = n−c+1}^{n} (1 − k / i).
    Source: Chen et al. 2021 (arXiv 2107.03374).
    Raises: ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= num_right <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {num_right} right answers out of {num_samples} does not exist")
    if num_samples - num_right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1)))


def majority_at_k(votes: Sequence[str | None], right: Sequence[bool]) -> float:
    """Probability that the most frequent answer is right, ties being broken by chance.

    Right answers vote together, however they are written; wrong ones by their `votes`; None (no answer) does not vote
    unless it is right. 0 where nobody votes.
    """
    ballots: Counter[tuple[bool, str]] = Counter()
    for vote, is_right in zip(votes, right, strict=True):
        if is_right:
            ballots[True, ""] += 1
        elif vote is not None:
            ballots[False, vote] += 1
    if not ballots:
        return 0.0
    most = max(ballots.values())
    winners = [ballot for ballot, count in ballots.items() if count == most]
    return sum(is_right for is_right, _ in winners) / len(winners)


def ks_up_to(num_samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself: the k that pass@k is told for."""
    ks = [1 << power for power in range(num_samples.bit_length()) if 1 << power <= num_samples]
    return ks if ks[-1] == num_samples else [*ks, num_samples]
