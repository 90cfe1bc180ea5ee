"""Memory that the processes of a job have in common where they run on one machine.

It is an anonymous file of Linux (`memfd_create`), which is gone with the last process that has it, however that ends. Unlike a
file in /dev/shm it may be larger than the 64 MB that a container has there.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from . import ranks

BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")


def shared_tensor(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor | None, list[list[int]]]:
    """Zeros that the ranks of a machine have in common, and the ranks of each machine.

    All ranks call it at once. The tensor is None on all of them where one cannot have it: without Linux, or where one process may
    not open a file of another.
    """
    own = _own_file()
    said = ranks.everyone((_machine(), os.getpid(), own))
    machines: dict[str, list[int]] = {}
    for rank, (machine, _, _) in enumerate(said):
        machines.setdefault(machine, []).append(rank)
    _, process, file = said[machines[_machine()][0]]
    tensor = None
    if all(number >= 0 for _, _, number in said):
        tensor = _opened(Path(f"/proc/{process}/fd/{file}"), shape, dtype)
    everywhere = ranks.all_agree(tensor is not None)
    if own >= 0:
        os.close(own)
    return (tensor if everywhere else None), list(machines.values())


def _machine() -> str:
    """What tells the processes apart that do not see each other: those of another machine, or of another container."""
    if not BOOT.exists():
        return f"process {os.getpid()} of rank {ranks.rank()}"
    return f"{BOOT.read_text().strip()} {PROCESSES.stat().st_ino}"


def _own_file() -> int:
    """The number of a new file in memory; -1 where the system has none."""
    try:
        return os.memfd_create("redraft")
    except (AttributeError, OSError):
        return -1


def _opened(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    try:
        found = torch.from_file(str(path), shared=True, size=max(prod(shape), 1), dtype=dtype)
    except RuntimeError:
        return None
    return found[: prod(shape)].view(shape)
