"""Checkpoints of a training run: one safetensors file that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core import ranks
from ..core.console import say
from ..core.files import set_aside, write_tensors
from ..core.folders import state_hash
from ..core.records import best_tau

FILE = "checkpoint.safetensors"


@dataclass
class TrainState:
    """Where a run stands. `best` are the adapter tensors with the highest held-out tau so far,
    `average` the running average of those that train, where one is kept. `share` and `way` are a guard's, once the
    last step is taken (see `guard.py`)."""

    step: int
    supervised_tokens: int
    heldout_tau: list[tuple[int, float]]
    best_step: int
    best: dict[str, Tensor]
    last_loss: float
    seconds: float
    precision: str = ""
    evaluation_seconds: float = 0.0
    average: dict[str, Tensor] = field(default_factory=dict)
    share: float = 1.0
    way: list[tuple[float, float, float]] = field(default_factory=list)

    def best_tau(self) -> float:
        return best_tau(self.heldout_tau, self.best_step)


def owners_of(trainable: Sequence[tuple[str, nn.Parameter]]) -> list[int]:
    """The rank that moves each tensor."""
    return ranks.owners([parameter.numel() for _, parameter in trainable])


def save_checkpoint(
    folder: Path,
    state: TrainState,
    trainable: list[tuple[str, nn.Parameter]],
    optimizers: Sequence[torch.optim.Optimizer],
    key: str,
) -> None:
    """Write the run's state, all ranks' of the optimizers; `key` names the inputs that the checkpoint belongs to."""
    tensors: dict[str, Tensor] = {f"best/{n}": t for n, t in state.best.items()}
    tensors |= {f"average/{n}": t for n, t in state.average.items()}
    tensors |= {f"now/{name}": parameter.detach() for name, parameter in trainable}
    own = {
        f"optimizer/{slot}/{name}": value.cpu()  # it travels
        for name, parameter in trainable
        for optimizer in optimizers
        for slot, value in optimizer.state.get(parameter, {}).items()
    }
    for slots in ranks.to_first(own):
        tensors |= slots
    about = {
        "key": key,
        "step": state.step,
        "supervised_tokens": state.supervised_tokens,
        "heldout_tau": state.heldout_tau,
        "best_step": state.best_step,
        "last_loss": state.last_loss,
        "seconds": state.seconds,
        "precision": state.precision,
        "evaluation_seconds": state.evaluation_seconds,
    }
    text = json.dumps(about)
    metadata = {"about": text, "sum": _sum(text, tensors)}
    write_tensors(folder / FILE, tensors, metadata)


def load_checkpoint(
    folder: Path,
    trainable: list[tuple[str, nn.Parameter]],
    optimizers: Sequence[torch.optim.Optimizer],
    key: str,
) -> TrainState | None:
    """Restore parameters and this rank's part of the optimizers in place; None when there is no checkpoint for `key`.

    A damaged checkpoint is set aside, which is reported, and counts as none.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        about, tensors = _read(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as problem:
        aside = set_aside(path)
        say(f"{path} is damaged ({problem}); set aside as {aside.name}, training starts over")
        return None
    if about.pop("key") != key:
        return None
    for (name, parameter), owner in zip(trainable, owners_of(trainable), strict=True):
        with torch.no_grad():
            parameter.copy_(tensors[f"now/{name}"])
        slots = {
            entry.split("/", 2)[1]: value
            for entry, value in tensors.items()
            if entry.startswith("optimizer/") and entry.split("/", 2)[2] == name
        }
        if slots and owner == ranks.rank():
            _of(optimizers, parameter).state[parameter] = {
                slot: value if slot == "step" else value.to(parameter.device)
                for slot, value in slots.items()
            }
    best = {n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}
    average = {
        n.removeprefix("average/"): t for n, t in tensors.items() if n.startswith("average/")
    }
    about.pop("general_tau", None)  # of runs that a guard looked at during the steps
    about["heldout_tau"] = [(int(step), float(tau)) for step, tau in about["heldout_tau"]]
    return TrainState(best=best, average=average, **about)


def _of(optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor) -> torch.optim.Optimizer:
    """The one that moves this parameter."""
    groups = ((optimizer, group) for optimizer in optimizers for group in optimizer.param_groups)
    return next(o for o, group in groups if any(p is parameter for p in group["params"]))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint holds. Raises one of several errors when it is damaged."""
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    if metadata["sum"] != _sum(metadata["about"], tensors):
        raise ValueError("its bytes are not those that were written")
    about: dict[str, Any] = json.loads(metadata["about"])
    return about, tensors


def _sum(about: str, tensors: dict[str, Tensor]) -> str:
    """A hash of everything in a checkpoint."""
    return hashlib.sha256(f"{about} {state_hash(tensors)}".encode()).hexdigest()[:16]
