"""What a run is to run on: how many devices, how much memory, how fast. Known by name, or measured here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from stableopd.errors import ConfigError
from stableopd.names import nearest

GIB = 2**30
_PROBE_S = 1.0
"""How long the speed of this machine is measured, altogether."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Devices of one kind. A run has one process per device."""

    name: str
    num_devices: int
    memory_bytes: int
    """Of each device."""
    flops_bf16: float | None = None
    """Dense matrix products in bfloat16, FLOP/s of each device; None where only the memory is known."""
    flops_float32: float | None = None
    bandwidth: float | None = None
    """Bytes/s between a device and its memory."""
    is_cpu: bool = False

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """The hardware that a text names: `h100x4`, `a100-80gb`, `cpu`, `auto`, or memory alone as `24GiB`.

        `cpu` and `auto` (the GPUs of this machine, or its CPU) are measured, for about a second.

        Raises: ConfigError for a name that is not known.
        """
        name = text.strip().lower().replace("_", "-").replace(" ", "")
        if name == "auto":
            return _gpus() or _cpu()
        if name == "cpu":
            return _cpu()
        kind, count = _kind_and_count(name)
        if memory := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)-?(gib|gb)", kind):
            size = float(memory[1]) * (GIB if memory[2] == "gib" else 10**9)
            if size >= 1:
                return cls(name=text.strip(), num_devices=count, memory_bytes=int(size))
        if kind not in DEVICES:
            known = [*DEVICES, "cpu", "auto"]
            raise ConfigError(
                f"hardware {text!r} is not known{nearest(kind, known)}. Known are {', '.join(known)}, each but the "
                "last two with a number of devices behind it (h100x4); or say the memory of a device, such as 24GiB"
            )
        gib, bf16, float32, bandwidth = DEVICES[kind]
        return cls(
            name=text.strip(),
            num_devices=count,
            memory_bytes=int(gib * GIB),
            flops_bf16=bf16 * 1e12,
            flops_float32=float32 * 1e12,
            bandwidth=bandwidth * 1e9,
        )


DEVICES: Mapping[str, tuple[float, float, float, float]] = {
    "a10": (24, 125, 31.2, 600),
    "a40": (48, 149.7, 37.4, 696),
    "a100-40gb": (40, 312, 19.5, 1_555),
    "a100-80gb": (80, 312, 19.5, 2_039),
    "b200": (180, 2_250, 75, 7_700),
    "h100": (80, 989, 67, 3_350),
    "h100-nvl": (94, 835, 60, 3_900),
    "h100-pcie": (80, 756, 51, 2_000),
    "h200": (141, 989, 67, 4_800),
    "l4": (24, 121, 30.3, 300),
    "l40": (48, 181, 90.5, 864),
    "l40s": (48, 362, 91.6, 864),
    "mi300x": (192, 1_307, 163.4, 5_300),
    "rtx3090": (24, 71, 35.6, 936),
    "rtx4090": (24, 165, 82.6, 1_008),
    "rtx5090": (32, 209, 104.8, 1_792),
    "rtx-a6000": (48, 155, 38.7, 768),
}
"""(memory in GB as sold, dense bfloat16 TFLOP/s, float32 TFLOP/s, GB/s), from the vendors' data sheets."""

_ALIASES = {"a100": "a100-80gb", "h100-sxm": "h100", "h100-80gb": "h100", "a6000": "rtx-a6000", "rtxa6000": "rtx-a6000"}


def _kind_and_count(name: str) -> tuple[str, int]:
    """`h100x4` is 4 of `h100`; the x of `rtx4090` is its own."""
    match = re.fullmatch(r"(.+?)-?x([1-9][0-9]{0,3})", name)
    if match and name not in DEVICES and (match[1] != "rt"):
        return _ALIASES.get(match[1], match[1]), int(match[2])
    return _ALIASES.get(name, name), 1


def _gpus() -> Hardware | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    bf16, float32, bandwidth = _measured("cuda")
    return Hardware(
        name=str(properties.name),
        num_devices=torch.cuda.device_count(),
        memory_bytes=int(properties.total_memory),
        flops_bf16=bf16,
        flops_float32=float32,
        bandwidth=bandwidth,
    )


def _cpu() -> Hardware:
    import psutil

    bf16, float32, bandwidth = _measured("cpu")
    memory = int(psutil.virtual_memory().total)
    return Hardware(
        name="cpu",
        num_devices=1,
        memory_bytes=memory,
        flops_bf16=bf16,
        flops_float32=float32,
        bandwidth=bandwidth,
        is_cpu=True,
    )


@cache
def _measured(device: str) -> tuple[float, float, float]:
    """FLOP/s in bfloat16 and in float32, and bytes/s of a copy (read and written both count)."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    side = 4_096 if device == "cuda" else 512
    flops = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(side, side, dtype=dtype, device=device)
        rate = _rate(lambda a=a: torch.mm(a, a), wait, _PROBE_S / 3)  # type: ignore[misc]
        flops.append(rate * 2 * side**3)
    source = torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _rate(lambda: target.copy_(source), wait, _PROBE_S / 3) * 2 * source.numel()
    return flops[0], flops[1], copied


def _rate(work: Callable[[], object], wait: Callable[[], object], seconds: float) -> float:
    """How often a second `work` can be done."""
    work()  # the first time is not like the others
    wait()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            work()
        wait()
        times += 4
    return times / (time.perf_counter() - start)
