"""What several processes share: the same weights at the start, the sum of their gradients at every update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 2**25
"""Gradients are summed in buckets of about 128 MiB: few messages, little extra memory."""


def share_weights(model: nn.Module) -> None:
    """Every process takes over the parameters and buffers of the first one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for array in (*model.parameters(), *model.buffers()):
            dist.broadcast(array.data, src=0)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Each parameter's gradient becomes the sum over all processes; a process without one brings zeros.

    All processes must pass the same parameters in the same order. A parameter that has no gradient anywhere
    keeps none, as in a single process, so that no optimizer decays it. Nothing happens in a single process.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    for parameter, holders in zip(parameters, _holders(parameters), strict=True):
        if holders and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
        flat = torch.cat([array.reshape(-1) for array in bucket])
        dist.all_reduce(flat)
        for array, piece in zip(bucket, flat.split([array.numel() for array in bucket]), strict=True):
            array.copy_(piece.view_as(array))


def _holders(parameters: Sequence[nn.Parameter]) -> list[int]:
    """How many processes have a gradient of each parameter."""
    device = parameters[0].device if parameters else "cpu"
    counts = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(counts)
    return counts.tolist()  # type: ignore[no-any-return]


def _buckets(arrays: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Arrays in their order, grouped by kind, up to a bucket's size together."""
    for _, alike in groupby(arrays, key=lambda array: (array.dtype, array.device)):
        bucket: list[Tensor] = []
        for array in alike:
            if bucket and sum(kept.numel() for kept in bucket) + array.numel() > _BUCKET_ELEMENTS:
                yield bucket
                bucket = []
            bucket.append(array)
        yield bucket


def leave() -> None:
    """Take down what connects the processes, once all is done: threads that are still alive at the end may abort it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
