"""Peak memory of training: predicted from shapes before the first step, read from the system after."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..private.lora import stored_name
from ..target import Target
from .lesson import VALUES

if TYPE_CHECKING:
    from .member import Member

MB = 1e6


def predict_peak(
    target: Target, members: Sequence[Member], batch_tokens: int, longest: int
) -> float:
    """Predicted peak in MB: what is resident now plus gradients, optimizer and activations.

    Activations: the target's logits and taps once (in its dtype, widened to float32 for the loss).
    The most demanding member adds, for each rollout step, its logits (three float32 copies: logits,
    log-softmax, gradient), about 24 H + 4 I floats of its layer per token and the attention
    weights over the longest row (scores, weights and gradient). Logits beyond VALUES are never
    held at once.
    """
    element = target.dtype.itemsize
    optimizer = sum(p.numel() for m in members for p in m.parameters) * 4 * 3
    heads: int = target.model.config.get_text_config().num_attention_heads
    logits = min(batch_tokens * target.vocab_size, VALUES)
    most = 0.0
    for member in members:
        draft = member.draft
        vocab = target.vocab_size if draft.draft_vocab is None else len(draft.draft_vocab)
        inner = sum(
            p.shape[0]
            for n, p in draft.named_parameters()
            if stored_name(n).endswith("gate_proj.weight")
        )
        own = batch_tokens * (4 * (24 * draft.hidden_size + 4 * inner) + 12 * heads * longest)
        own += 3 * 4 * min(batch_tokens * vocab, VALUES)
        most = max(most, own * (member.config.rollout if draft.feeds_back else 1))
    read = logits * (element + 4) + batch_tokens * members[0].draft.feature_size * element
    return current_memory(target.device) + (optimizer + read + most) / MB


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


def _from_status(key: str) -> float:
    """A figure of /proc/self/status in MB; elsewhere the process's highest so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024 / MB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB
