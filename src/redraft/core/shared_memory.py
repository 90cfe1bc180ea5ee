"""Memory that the processes of a job have in common, where all of them run on one machine.

It is an anonymous file of Linux (`memfd_create`), which is gone with the last process that has it, however that ends. Unlike a
file in /dev/shm it may be larger than the 64 MB that a container has there.
"""

from __future__ import annotations

import os
import secrets
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from . import ranks


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Zeros that all ranks have in common; they call it at once.

    None on all of them where one cannot have it: on another machine or in another container, and without Linux.
    """
    name = f"redraft-{secrets.token_hex(8)}"
    file = _new_file(name) if ranks.is_first() else None
    process, number, name = ranks.everyone((os.getpid(), file, name))[0]
    tensor = None
    if number is not None:
        tensor = _opened(Path(f"/proc/{process}/fd/{number}"), name, shape, dtype)
    everywhere = ranks.all_agree(tensor is not None)
    if file is not None:
        os.close(file)
    return tensor if everywhere else None


def _new_file(name: str) -> int | None:
    """The number of a new file in memory; None where the system has none."""
    try:
        return os.memfd_create(name)
    except (AttributeError, OSError):
        return None


def _opened(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The file of that name as a tensor; None where the path is of another file, as on another machine, or cannot be opened."""
    try:
        if name not in str(path.readlink()):
            return None
        found = torch.from_file(str(path), shared=True, size=max(prod(shape), 1), dtype=dtype)
    except (OSError, RuntimeError):
        return None
    return found[: prod(shape)].view(shape)
