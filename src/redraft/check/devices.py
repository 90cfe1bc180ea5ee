"""What devices can do: data sheets of GPUs, and a short trial of this machine.

Rates are of dense products in bf16 (fp16 where there is no bf16), without sparsity. Sources: the makers' data sheets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.errors import UserError, nearest
from ..training.memory import free_memory

HERE = "this machine"
SHARE_OF_TRIAL = 0.3
"""Of a trial's products: what training reaches. Measured: 0.26 to 0.33 in three runs with SmolLM2 on two CPU cores
(docs/log.md)."""
TRIAL_SECONDS = 0.5
SHARE_OF_PEAK, SHARE_OF_BANDWIDTH = 0.35, 0.5
"""Of a data sheet's rates: what training's products and reading weights while answering reach. Assumed, not measured."""


@dataclass(frozen=True)
class Device:
    """Memory in bytes; operations per second that products reach; bytes per second that are read. `measured` is whether the rates are of a trial."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    measured: bool = False


def _gpu(name: str, gigabytes: float, teraflops: float, gigabytes_per_second: float) -> Device:
    return Device(
        name,
        gigabytes * 1e9,
        teraflops * 1e12 * SHARE_OF_PEAK,
        gigabytes_per_second * 1e9 * SHARE_OF_BANDWIDTH,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 16, 65, 320),
        _gpu("RTX3090", 24, 71, 936),
        _gpu("RTX4090", 24, 165, 1008),
        _gpu("A10", 24, 125, 600),
        _gpu("L4", 24, 121, 300),
        _gpu("L40S", 48, 362, 864),
        _gpu("A100-40GB", 40, 312, 1555),
        _gpu("A100-80GB", 80, 312, 2039),
        _gpu("H100", 80, 989, 3350),
        _gpu("H200", 141, 989, 4800),
        _gpu("B200", 180, 2250, 8000),
        _gpu("MI300X", 192, 1307, 5300),
    )
}


def device_named(name: str) -> Device:
    """A GPU of the table. Raises UserError for another."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise UserError(f"--gpu {name}: not in the table; {nearest(name, GPUS)}")


def this_machine(hidden: int, dtype: torch.dtype) -> Device:
    """Rates here: a share of those of a product of a training batch's shape, and of one row by a matrix too large for a cache."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, wide = 1024, min(max(hidden, 512), 4096)
    a, b = (torch.randn(size, wide, device=place, dtype=dtype) for size in (rows, 4 * wide))
    large = torch.randn(16 * 1024, 4096, device=place, dtype=dtype)  # 128 MB in bf16
    row = torch.randn(1, 4096, device=place, dtype=dtype)
    flops = SHARE_OF_TRIAL * 2 * rows * wide * 4 * wide * _rate(lambda: a @ b.T, place)
    read = large.numel() * large.itemsize * _rate(lambda: row @ large.T, place)
    memory = free_memory(place) * 1e6
    return Device(HERE, memory, flops, read, measured=True)


def _rate(work: Callable[[], object], place: torch.device) -> float:
    """Calls per second."""
    work()
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < TRIAL_SECONDS or not count:
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        count += 1
    return count / max(passed, 1e-9)
