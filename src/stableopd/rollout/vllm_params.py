"""How a request is said to vLLM, in process or over HTTP: the names are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stableopd.rollout.requests import Request

NEVER = -100.0
"""Bias on the logit of ids that must not be drawn; e^-100 of a chance."""


def sampling_arguments(request: Request, stop_ids: Sequence[int], banned: Sequence[int]) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for one completion.

    Everything that a model's own generation_config.json could change is said outright.
    """
    sampling = request.sampling
    arguments: dict[str, Any] = {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seed,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,  # the ids that end a completion are those of stop_token_ids and no others
        "logprobs": 0,
        "skip_special_tokens": False,
    }
    if sampling.stop_strings:
        arguments |= {"stop": list(sampling.stop_strings), "include_stop_str_in_output": True}
    if banned:
        arguments["logit_bias"] = dict.fromkeys(banned, NEVER)
    return arguments
