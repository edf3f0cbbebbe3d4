"""Whether prompts, gold and completions fit into the contexts and the length budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from stableopd.config import StableOPDConfig
from stableopd.doctor.findings import Finding
from stableopd.doctor.sides import Side
from stableopd.models import context_length
from stableopd.types import Example

GOLD_QUANTILE = 0.9
"""A budget below this quantile of the gold's lengths teaches answers that cannot be finished."""


def context_findings(config: StableOPDConfig, sides: Sequence[Side]) -> Iterator[Finding]:
    """Contexts that the completions alone fill."""
    if not config.objective.needs_rollouts:
        return
    budget = config.rollout.max_completion_length
    for side in sides:
        context = None if side.model_config is None else context_length(side.model_config)
        if context is not None and context <= budget:
            yield Finding(
                check="context",
                danger="fatal",
                summary=f"the context of the {side.name} has no room for a completion and its prompt",
                evidence=f"{context} tokens of context, rollout.max_completion_length={budget}",
                remedy=f"set rollout.max_completion_length below {context}, or take a {side.name} of a longer context",
                figures={"context": context, "max_completion_length": budget},
            )
    room = config.rollout.vllm.max_model_len
    if room is not None and room <= budget:
        yield Finding(
            check="context",
            danger="fatal",
            summary="rollout.vllm.max_model_len has no room for a completion and its prompt",
            evidence=f"max_model_len={room}, rollout.max_completion_length={budget}",
            remedy=f"set rollout.vllm.max_model_len to {budget} and the longest prompt, or leave it out",
        )


def prompt_length_findings(
    config: StableOPDConfig, sides: Sequence[Side], examples: Sequence[Example], what: str = "prompts"
) -> Iterator[Finding]:
    """Prompts that leave no room for a completion of full length, which a run refuses."""
    contexts = [context_length(side.model_config) for side in sides if side.model_config is not None]
    budget = max(config.rollout.max_completion_length, config.eval_max_completion_length)
    room = min((context - budget for context in contexts if context is not None), default=None)
    limits = [limit for limit in (config.data.max_prompt_length, room) if limit is not None and limit > 0]
    if not limits or not examples:  # where a completion alone fills the context, that is what is told
        return
    limit = min(limits)
    lengths = [len(example.prompt_ids) for example in examples]
    overlong = sum(length > limit for length in lengths)
    if overlong:
        asked = config.data.max_prompt_length == limit
        yield Finding(
            check="prompt_length",
            danger="fatal",
            summary=f"{overlong} of {len(examples)} {what} are too long, and a run refuses them",
            evidence=f"the longest has {max(lengths)} tokens, {limit} are allowed by "
            + ("data.max_prompt_length" if asked else f"the context less the {budget} tokens of a completion"),
            remedy="remove or shorten them, or "
            + ("raise data.max_prompt_length" if asked else "lower rollout.max_completion_length"),
            figures={"prompts_too_long": overlong / len(examples), "longest_prompt": max(lengths)},
        )


def gold_length_findings(config: StableOPDConfig, student: Side, golds: Sequence[Example]) -> Iterator[Finding]:
    """Gold that is longer than completions may be, or than the student can read.

    Args: `golds` have gold.
    """
    if not golds:
        return
    lengths = np.array([len(example.gold_ids or ()) for example in golds])
    budget = config.rollout.max_completion_length
    context = None if student.model_config is None else context_length(student.model_config)
    if context is not None and config.may_need_gold:
        beyond = sum(len(example.prompt_ids) + len(example.gold_ids or ()) > context for example in golds)
        if beyond:
            yield Finding(
                check="gold_context",
                danger="fatal",
                summary=f"{beyond} of {len(golds)} prompts do not fit into the student's context with their gold",
                evidence=f"{context} tokens of context; the longest gold has {lengths.max()}",
                remedy="remove these rows or give shorter gold; cut gold teaches never to stop",
                figures={"gold_beyond_context": beyond / len(golds)},
            )
    if not config.objective.needs_rollouts:
        return
    share = float((lengths > budget).mean())
    if share == 0:
        return
    quantile = int(np.quantile(lengths, GOLD_QUANTILE, method="higher"))
    yield Finding(
        check="gold_length",
        danger="problem" if quantile > budget else "note",
        summary=f"{share:.1%} of the gold is longer than rollouts may be: they are truncated where gold is right",
        evidence=f"rollout.max_completion_length={budget}; 9 of 10 golden solutions have at most {quantile} tokens, "
        f"the longest {lengths.max()}",
        remedy=f"set rollout.max_completion_length to {quantile} or more, or leave long solutions out of the gold",
        figures={"gold_longer_than_budget": share, "gold_length_p90": quantile, "max_completion_length": budget},
    )
