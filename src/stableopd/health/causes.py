"""What an alert probably means and what to do about it, from the signals side by side."""

from __future__ import annotations

from typing import NamedTuple


class Cause(NamedTuple):
    """A likely cause. `name` is for programs, such as the controller; the sentences are for people."""

    name: str
    likely: str
    remedy: str

    @property
    def advice(self) -> str:
        return f"{self.likely} {self.remedy}"


_STABILISE = (
    "What to do: turn on StableOPD, or raise its coefficients (objective.gold.coef, objective.reference.coef), "
    "and go back to a checkpoint from before the rise."
)
INFLATION = Cause(
    "inflation",
    "Likely cause: length inflation; the student falls into repetition, which the teacher finds easy to predict, "
    "so that every update makes it more frequent.",
    _STABILISE,
)
UNLEARNS_STOPPING = Cause(
    "unlearns_stopping",
    "Likely cause: the student is unlearning to stop, which comes before truncation and loops.",
    _STABILISE,
)
DRIFT = Cause(
    "drift",
    "Likely cause: no truncation or repetition was seen beside it, so this may be longer reasoning or the first sign "
    "of length inflation; held-out accuracy tells which.",
    _STABILISE,
)
EARLY_LOOPS = Cause(
    "early_loops",
    "Likely cause: held-out answers are decoded more greedily than training rollouts and loop before those do.",
    _STABILISE,
)
END_TOKEN = Cause(
    "end_token",
    "Likely cause: hardly anything has ever stopped by itself, so the end token or the chat template of student and "
    "teacher differ, or the end token is not among those that generation stops at.",
    "What to do: compare the EOS ids of both models and of the generation config before training on.",
)
BUDGET = Cause(
    "budget",
    "Likely cause: a budget too small for these answers, or an end token that is not recognised.",
    "What to do: raise rollout.max_completion_length, and compare the EOS ids of student and teacher.",
)
FORGETTING = Cause(
    "forgetting",
    "Likely cause: chance, if the evaluation is small, or a learning rate that is too high; most answers still end, so "
    "this need not be length inflation.",
    "What to do: evaluate on more prompts, lower optimizer.learning_rate, or raise objective.reference.coef.",
)
UNMEASURED = " Loops were not measured: give the monitor texts or token_ids to tell this from length inflation."

STABILISABLE = frozenset(cause.name for cause in (INFLATION, UNLEARNS_STOPPING, DRIFT, EARLY_LOOPS, FORGETTING))
"""Causes against which golden solutions and the tie to the initial student help."""
