"""Padding for tensor parallelism: FFN neurons of zeros, so that every rank gets as many.

A neuron whose gate, up and down weights are zero adds exactly zero to the sum. No stored weight
changes; only the order in which a matrix product adds may, as it does with any other width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.functional import pad

from ..drafts.one_layer import LayerShape
from ..errors import UserError


def pad_ffn(
    config: LayerShape, tensors: Mapping[str, Tensor], tp: Sequence[int]
) -> tuple[LayerShape, dict[str, Tensor]]:
    """The draft with an FFN width that every size in `tp` divides.

    Raises UserError when its attention heads cannot be divided: those cannot be padded.
    """
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    for size in tp:
        if size < 1 or heads % size or (kv % size and size % kv):
            raise UserError(
                f"--tp {size}: a draft of {heads} attention heads and {kv} key/value heads cannot be "
                f"divided over {size} ranks; engines need heads to be a multiple of the ranks, and "
                "key/value heads a multiple or a divisor"
            )
    missing = -config.intermediate_size % math.lcm(*tp)
    padded = {name: _padded(name, tensor, missing) for name, tensor in tensors.items()}
    wider = config.intermediate_size + missing
    return dataclasses.replace(config, intermediate_size=wider), padded


def _padded(name: str, tensor: Tensor, neurons: int) -> Tensor:
    if not neurons or ".mlp." not in name:
        return tensor
    return pad(tensor, (0, neurons) if "down_proj" in name else (0, 0, 0, neurons))
