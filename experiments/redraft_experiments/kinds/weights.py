"""Members made from others' weights without training: merged, and rounded to integers.

Shapes: O output channels, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..language_model import load_tokenizer, save_model
from ..members import Merged, Rounded
from .folders import folder_of, load_model


def make_merged(out: Path, name: str, row: Merged) -> None:
    models = [load_model(out, part) for part in row.of]
    model = models[0]
    model.load_state_dict(mean_of([m.state_dict() for m in models], row.shares))
    save_model(folder_of(out, name), model, load_tokenizer(out / "tokenizer"))


def mean_of(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of states with the same names and shapes, in float32, stored unchanged."""
    return {
        name: sum(
            (share * state[name].float() for share, state in zip(shares, states, strict=True)),
            start=torch.zeros_like(first, dtype=torch.float32),
        ).to(first.dtype)
        for name, first in states[0].items()
    }


def make_rounded(out: Path, name: str, row: Rounded) -> None:
    model = load_model(out, row.on)  # frozen, so that its weights can be set in place
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(rounded(module.weight, row.bits, row.group))
    save_model(folder_of(out, name), model, load_tokenizer(out / "tokenizer"))


def rounded(weight_OI: Tensor, bits: int, group: int | None = None) -> Tensor:
    """A weight [O, I] rounded to the nearest of 2^bits - 1 symmetric steps, dequantised.

    The step is a row's largest magnitude (or that of each `group` inputs of a row) over the largest
    integer. `group` must divide I.
    """
    wide = weight_OI.float()
    parts = wide.reshape(len(wide), -1, group or wide.shape[1])
    largest = 2 ** (bits - 1) - 1
    step = (parts.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(wide.dtype).tiny)
    found_OI: Tensor = ((parts / step).round() * step).reshape(wide.shape)
    return found_OI.to(weight_OI.dtype)
