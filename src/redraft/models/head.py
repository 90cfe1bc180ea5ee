"""From final states to logits, by the model's own code.

Between its last state and its logits a model may do more than one matrix product: soft-cap (Gemma),
scale (Granite, Cohere), add a bias, upcast. So its own forward pass runs here, with the body of the
model replaced by states that are there already. The head may be narrowed to some tokens for the
call, where it is a plain linear layer.

Shapes: N states, H hidden size, V vocabulary, D chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def logits_from(model: Any, states_NH: Tensor, columns_D: Tensor | None = None) -> Tensor:
    """Logits [N, V] of states after the model's final norm; [N, D] of the token ids `columns_D`.

    `model` is a causal LM of Transformers, or a PEFT model around one.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    narrow = columns_D is not None and type(head) is nn.Linear
    filler_1N = torch.zeros(1, len(states_NH), dtype=torch.long, device=states_NH.device)
    with _forward(inner.base_model, lambda *_, **__: _Output(states_NH[None])):
        if narrow and columns_D is not None:
            weight, bias = head.weight[columns_D], head.bias
            chosen = None if bias is None else bias[columns_D]
            with _forward(head, lambda x: linear(x, weight, chosen)):
                logits: Tensor = inner(input_ids=filler_1N, use_cache=False).logits[0]
                return logits
        logits = inner(input_ids=filler_1N, use_cache=False).logits[0]
    return logits if columns_D is None else logits.index_select(-1, columns_D)


class _Output:
    """What a body returns: the last states, and nothing of whatever else its model asks for."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, at: Any) -> Any:
        return (self.last_hidden_state,)[at]


@contextmanager
def _forward(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass for one module; its hooks stay."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = instead
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:  # accelerate's dispatch has put one there
            module.__dict__["forward"] = before
