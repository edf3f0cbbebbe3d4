"""A frozen model that is on its device only while it works."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offloaded:
    """Keeps a frozen model's arrays in CPU memory and lends copies to the device.

    As they never change, nothing has to be copied back: leaving the device only drops the copies.

    Args:
        kept: arrays that stay on the device, such as a head that losses use between scorings.
    """

    def __init__(self, model: nn.Module, device: torch.device, kept: Collection[Tensor] = ()) -> None:
        self._device = device
        stays = {id(array) for array in kept}
        for array in kept:
            array.data = array.data.to(device)
        moving = [array for array in (*model.parameters(), *model.buffers()) if id(array) not in stays]
        self._homes = [(array, _at_home(array.data, device)) for array in moving]
        self._send_home()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The whole model on its device for a while."""
        for array, home in self._homes:
            array.data = home.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._send_home()

    def _send_home(self) -> None:
        for array, home in self._homes:
            array.data = home


def _at_home(array: Tensor, device: torch.device) -> Tensor:
    home = array.to("cpu")
    return home.pin_memory() if device.type == "cuda" else home
