"""The neuron: one more FFN neuron in every layer, y = shared(x) + neuron(x)."""

from __future__ import annotations

import torch
from torch import Tensor

from redraft.adapters.kind import AddedTensors, Setup, Tensors
from redraft.adapters.table import Method
from redraft.core.rng import seeded
from redraft.drafts.base import Draft
from redraft.drafts.layers import GatedFFN

MARK = ".neuron."
"""In the name of every tensor of a neuron: `midlayer.mlp.neuron.gate_proj.weight`."""


def add_neurons(draft: Draft) -> dict[str, GatedFFN]:
    """Put a neuron next to the shared ones of every FFN that has none yet; returns the new ones."""
    found = {}
    for name, ffn in list(draft.named_modules()):
        if isinstance(ffn, GatedFFN) and name.endswith("mlp") and not hasattr(ffn, "neuron"):
            shared = ffn.gate_proj.weight
            ffn.neuron = found[name] = GatedFFN(shared.shape[1], 1, ffn.activation).to(shared)
            ffn.register_forward_hook(lambda ffn, inputs, y: y + ffn.neuron(inputs[0]))
    return found


def concatenated(name: str) -> int:
    """The dimension along which an FFN's tensor holds its neurons."""
    return 1 if name.endswith("down_proj.weight") else 0


class Neuron(AddedTensors):
    def attach(self, draft: Draft, method: Method, setup: Setup) -> None:
        for name, neuron in add_neurons(draft).items():
            with torch.no_grad():
                for linear in (neuron.gate_proj, neuron.up_proj):
                    linear.weight.normal_(std=0.02, generator=seeded(setup.seed, "neuron", name))
                neuron.down_proj.weight.zero_()  # so that training starts at the unadapted draft

    def adds(self, name: str) -> bool:
        return MARK in name

    def starts_at_zero(self, name: str) -> bool:
        return name.endswith("neuron.down_proj.weight")

    def home(self, name: str) -> str:
        return name.replace(MARK, ".")

    def restore(self, draft: Draft, tensors: Tensors) -> None:
        add_neurons(draft)
        super().restore(draft, tensors)

    def merge(self, merged: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        found = {}
        for name, own in tensors.items():
            shared = merged[self.home(name)]
            found[self.home(name)] = torch.cat([shared, own.to(shared)], concatenated(name))
        return found

    def extract(self, merged: Tensors, shared: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        own, before = {}, {}
        for name, whole in merged.items():
            if whole.shape != shared[name].shape:
                dim = concatenated(name)
                before[name], last = whole.split([whole.shape[dim] - 1, 1], dim)
                own[name.replace("mlp.", f"mlp{MARK}")] = last.contiguous()
        return own, before
