"""Checkpoints of a training run: one safetensors file that appears whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "checkpoint.safetensors"


@dataclass
class TrainState:
    """Where a run stands. `best` are the private tensors with the highest held-out tau so far."""

    step: int
    supervised_tokens: int
    heldout_tau: list[tuple[int, float]]
    best_step: int
    best: dict[str, Tensor]
    last_loss: float
    seconds: float
    precision: str = ""

    def best_tau(self) -> float:
        return max((tau for _, tau in self.heldout_tau), default=float("-inf"))


def save_checkpoint(
    folder: Path,
    state: TrainState,
    trainable: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    key: str,
) -> None:
    """Write the run's state; `key` names the inputs that the checkpoint belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"best/{n}": t for n, t in state.best.items()}
    for name, parameter in trainable:
        tensors[f"now/{name}"] = parameter.detach()
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{slot}/{name}"] = value
    about = {
        "key": key,
        "step": state.step,
        "supervised_tokens": state.supervised_tokens,
        "heldout_tau": state.heldout_tau,
        "best_step": state.best_step,
        "last_loss": state.last_loss,
        "seconds": state.seconds,
        "precision": state.precision,
    }
    scratch = folder / f".{FILE}.tmp"
    contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(contiguous, scratch, metadata={"about": json.dumps(about)})
    scratch.replace(folder / FILE)


def load_checkpoint(
    folder: Path,
    trainable: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    key: str,
) -> TrainState | None:
    """Restore parameters and optimizer in place; None when there is no checkpoint for `key`."""
    path = folder / FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as stream:
        about: dict[str, Any] = json.loads(stream.metadata()["about"])
        if about.pop("key") != key:
            return None
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    for name, parameter in trainable:
        with torch.no_grad():
            parameter.copy_(tensors[f"now/{name}"])
        slots = {
            entry.split("/", 2)[1]: value
            for entry, value in tensors.items()
            if entry.startswith("optimizer/") and entry.split("/", 2)[2] == name
        }
        if slots:
            optimizer.state[parameter] = {
                slot: value if slot == "step" else value.to(parameter.device)
                for slot, value in slots.items()
            }
    best = {n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}
    about["heldout_tau"] = [(int(step), float(tau)) for step, tau in about["heldout_tau"]]
    return TrainState(best=best, **about)
