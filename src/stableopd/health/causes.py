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
NOT_FINITE = Cause(
    "not_finite",
    "Likely cause: NaN or infinity in the weights of student or teacher, or a coefficient, learning rate or advantage "
    "so large that the arithmetic overflows.",
    "What to do: check the weights of both models (a broken or half-written file, float16 that overflowed), and lower "
    "objective.*.coef and optimizer.learning_rate.",
)
NO_TOKENS = Cause(
    "no_tokens",
    "Likely cause: every token is left out of the loss: all rollouts are truncated and "
    "objective.distill.tokens.truncated_weight is 0, the other settings there mask all of them, or "
    "health.controller.drop_loops drops them.",
    "What to do: raise objective.distill.tokens.truncated_weight or rollout.max_completion_length, or add the gold "
    "term (objective.gold.coef), which counts whatever the rollouts are.",
)
REWARD_FUNCTION = Cause(
    "reward_function",
    "Likely cause: the reward function raises, or does not return a finite number; such a completion counts 0.",
    "What to do: call it by hand on a completion and an answer of the run folder's rollouts/, and mend it.",
)
UNMEASURED = " Loops were not measured: give the monitor texts or token_ids to tell this from length inflation."

STABILISABLE = frozenset(cause.name for cause in (INFLATION, UNLEARNS_STOPPING, DRIFT, EARLY_LOOPS))
"""Causes that are length inflation or lead to it: golden solutions and the tie to the initial student help."""


def why_without_updates(step: int, num_steps: int, *, empty: bool) -> str:
    """Why a run that has made no update for `num_steps` steps is ended at `step`; `empty`: no token counted."""
    cause, why = (
        (NO_TOKENS, "no token counted in any loss") if empty else (NOT_FINITE, "loss or gradient were not finite")
    )
    return (
        f"stopped at step {step}: no update could be made in the last {num_steps} steps, since {why}. {cause.advice} "
        f"The student is as it was after step {step - num_steps}, and its checkpoints are kept"
    )
