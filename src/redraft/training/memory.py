"""Peak memory of training: predicted from shapes before the first step, read from the system after.

Shapes: B rows, T tokens, F features.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..core import ranks
from ..core.errors import UserError
from ..drafts.base import Draft
from ..losses.functions import LOSSES
from ..losses.table import LABELS, OWN, WHOLE
from ..models.target import Target
from .teacher_batch import HELD, VALUES

MB = 1e6
DRAFT_COPIES, TEACHER_COPIES = 5, {LABELS: 0, OWN: 1, WHOLE: 4}
"""Float32 copies of a chunk's logits that live together: of the draft's, and of the target's by what
a loss reads of it. Measured."""
PROBE = 24
"""Tokens of the row on which a draft's saved tensors are counted."""
LEAST_FREE_MB = 512
"""Memory left free by a run that is let begin."""


def predict_peak(
    target: Target, runs: Sequence[Training], batch_tokens: int, longest: int, first: int = 0
) -> float:
    """Predicted peak in MB: what is resident now and what a run adds (see `predict_growth`)."""
    grown = predict_growth(target, runs, batch_tokens, longest, first)
    return current_memory(target.device) + grown


class Training(Protocol):
    """What is looked at of a run: the draft with its adapter, its settings and what trains."""

    @property
    def draft(self) -> Draft: ...
    @property
    def config(self) -> TrainConfig: ...
    @property
    def parameters(self) -> list[nn.Parameter]: ...


def predict_growth(
    target: Target, runs: Sequence[Training], batch_tokens: int, longest: int, first: int = 0
) -> float:
    """MB that runs add to their models: gradients, optimizer and activations. Shapes are enough (`meta` tensors).

    `batch_tokens` are those of the largest batch, whose rows have `longest` tokens and whose chains
    start at `first`. Activations: the target's features and one of its layers, then what the most
    demanding run saves for its backward pass (counted on a short row) and one chunk of logits.
    """
    element = target.dtype.itemsize
    parameters = [p for m in runs for p in m.parameters]
    count = sum(p.numel() for p in parameters)
    optimizer = count * (4 + 8 / ranks.size())  # gradients, and this rank's share of AdamW's state
    config = target.model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * target.hidden_size
    features = batch_tokens * (runs[0].draft.feature_size + target.hidden_size) * element
    layer = batch_tokens * (8 * target.hidden_size + 3 * int(inner)) * max(element, 4) // 2
    held = most = 0.0
    for run in runs:
        most = max(most, _of_run(target, run, batch_tokens, longest, first))
        if len(runs) > 1:
            held = max(held, min(batch_tokens * columns(target, run.draft), HELD) * 4)
    activations = 2 * features + max(layer, most + held)
    return (optimizer + activations) / MB


def fits(device: torch.device, predicted: float) -> bool:
    """Whether a run with that peak (MB) leaves something free."""
    return predicted + LEAST_FREE_MB <= current_memory(device) + free_memory(device)


def check_memory(target: Target, predicted: float, batch_tokens: int, longest: int) -> None:
    """Raise UserError, saying what to change, for a run that does not fit into what is free."""
    if fits(target.device, predicted):
        return
    usable = current_memory(target.device) + free_memory(target.device)
    way = (
        f"lower train.batch_tokens ({batch_tokens:,})"
        if longest <= batch_tokens
        else f"leave out answers as long as the longest, a batch of its own with {longest:,} tokens"
    )
    raise UserError(
        f"training would take about {predicted:,.0f} MB at the peak and {usable:,.0f} MB can be had on "
        f"{target.device}: {way}, take a smaller draft vocabulary than {target.vocab_size:,} tokens, or "
        "train fewer parameters"
    )


def free_memory(device: torch.device) -> float:
    """Memory that could still be taken, MB: of the device, or of this machine and its control group;
    without bound where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MB
    found = [_from_meminfo("MemAvailable")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        folder = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text())
            found.append((most - int((folder / used).read_text())) / MB)
    return min(found)


def _of_run(target: Target, run: Training, batch_tokens: int, longest: int, first: int) -> float:
    """Bytes of a run's step: saved tensors, and one chunk of logits with its gradients."""
    draft, config = run.draft, run.config
    steps = config.rollout if draft.feeds_back else 1
    saved = _saved_per_token(draft, steps)
    chained = (longest - first) / max(longest, 1)
    rolled = batch_tokens * (saved[0] + chained * sum(saved[1:]))
    reads = LOSSES[config.loss].row.reads
    own = columns(target, draft)
    read = target.vocab_size if reads == WHOLE else own
    labels = max(round(batch_tokens * chained), 1)
    rows = min(labels, max(VALUES // max(read, own), 1))
    chunk = rows * 4 * (TEACHER_COPIES[reads] * read + DRAFT_COPIES * own)
    states = 2 * steps * labels * draft.hidden_size * 4
    head = sum(p.numel() for n, p in draft.named_parameters() if "head" in n and p.requires_grad)
    return rolled + chunk + states + 2 * 4 * head


def columns(target: Target, draft: Draft) -> int:
    """Tokens that a draft has logits for."""
    return target.vocab_size if draft.draft_vocab is None else len(draft.draft_vocab)


def _saved_per_token(draft: Draft, steps: int) -> list[float]:
    """Bytes that the backward pass of each rollout step keeps, per token, counted on a short row.

    It is rolled out twice: what both keep is there anyway, as parameters and tables of positions are.
    """
    device = next(draft.parameters()).device
    dtype = next(p.dtype for p in draft.parameters())
    tokens = torch.zeros(1, PROBE + steps, dtype=torch.long, device=device)
    features = torch.zeros(1, PROBE + steps, draft.feature_size, dtype=dtype, device=device)
    before: dict[int, torch.UntypedStorage] = {}  # by their place, kept so that none is used again
    now: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        now[storage._cdata] = storage
        return tensor

    alive = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for _ in range(2):
            found, counted, before, now = [], 0, now, {}
            for states in draft.rollout(tokens, features, 0, steps):
                alive.append(states)
                new = sum(storage.nbytes() for place, storage in now.items() if place not in before)
                found.append((new - counted) / states.shape[1])
                counted = new
    return found or [0.0]


class Returned:
    """Gives memory that is free but still held back to the system, when it has grown.

    With every new batch shape glibc's heap tears a little more: in bf16 training on SmolLM2 500 to 650 MB were free after
    eight steps. Giving them back takes about 40 ms, and a step after it somewhat longer.
    """

    GROWN_MB, EVERY_SECONDS = 256, 1.0

    def __init__(self, device: torch.device):
        self._trim = _malloc_trim() if device.type == "cpu" else None
        self._device, self._least, self._last = device, current_memory(device), time.monotonic()

    def after_step(self) -> None:
        if self._trim is None or time.monotonic() < self._last + self.EVERY_SECONDS:
            return
        if current_memory(self._device) >= self._least + self.GROWN_MB:
            self._trim(0)
            self._least, self._last = current_memory(self._device), time.monotonic()


def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function; None where the C library has none."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found


def current_memory(device: torch.device) -> float:
    """Memory in use now, MB: of the device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MB
    return _from_status("VmRSS")


def restart_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here; where the system cannot, it keeps counting from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Highest memory use since `restart_peak`, MB: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    return _from_status("VmHWM")


def _from_meminfo(key: str) -> float:
    """A figure of /proc/meminfo in MB; without bound elsewhere."""
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024 / MB
    return float("inf")


def _from_status(key: str) -> float:
    """A figure of /proc/self/status in MB; elsewhere the process's highest so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024 / MB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB
