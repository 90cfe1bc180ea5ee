"""Peak memory of training: predicted from shapes before the first step, read from the system after."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from ..drafts.base import Draft
from ..target import Target

MB = 1e6


def predict_peak(
    target: Target,
    draft: Draft,
    trainable: list[tuple[str, nn.Parameter]],
    batch_tokens: int,
    longest: int,
    rollout: int,
) -> float:
    """Predicted peak in MB: what is resident now plus gradients, optimizer and activations.

    Activations: the target's logits and taps once (in its dtype, widened to float32 for the
    loss), and for each rollout step the draft's logits (three float32 copies: logits, log-softmax,
    gradient), about 24 H + 4 I floats of its layer per token and the attention weights over the
    longest row (scores, weights and gradient).
    """
    element = target.dtype.itemsize
    shapes = {name: p.shape for name, p in draft.named_parameters()}
    vocab = target.vocab_size if draft.draft_vocab is None else len(draft.draft_vocab)
    inner = sum(s[0] for n, s in shapes.items() if n.endswith("gate_proj.weight"))
    heads: int = target.model.config.get_text_config().num_attention_heads
    optimizer = sum(p.numel() for _, p in trainable) * 4 * 3
    per_token = target.vocab_size * (element + 4) + draft.feature_size * element
    per_step = 3 * 4 * vocab + 4 * (24 * draft.hidden_size + 4 * inner) + 3 * 4 * heads * longest
    return (
        current_memory(target.device)
        + (optimizer + batch_tokens * (per_token + rollout * per_step)) / MB
    )


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
