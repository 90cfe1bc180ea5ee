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

from ..core.errors import UserError
from ..drafts.kind import Shape

GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def pad_ffn(
    config: Shape, tensors: Mapping[str, Tensor], tp: Sequence[int]
) -> tuple[Shape, dict[str, Tensor]]:
    """The draft with an FFN width that every size in `tp` divides.

    Raises UserError when its attention heads cannot be divided: those cannot be padded, and nor can
    an FFN that is not gated.
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
    other = [name for name in tensors if "mlp." in name and not name.endswith(GATED)]
    if missing and (other or not any(name.endswith(GATED) for name in tensors)):
        raise UserError(
            f"--tp {','.join(map(str, tp))}: an FFN of {config.intermediate_size} neurons would need "
            f"{missing} of zeros, and only one of gate_proj, up_proj and down_proj can be padded"
        )
    padded = {name: _padded(name, tensor, missing) for name, tensor in tensors.items()}
    wider = config.intermediate_size + missing
    return dataclasses.replace(config, intermediate_size=wider), padded


def _padded(name: str, tensor: Tensor, neurons: int) -> Tensor:
    if not neurons or not name.endswith(GATED):
        return tensor
    return pad(tensor, (0, neurons) if "down_proj" in name else (0, 0, 0, neurons))
