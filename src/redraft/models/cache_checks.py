"""What a model's attention cache must allow, found out by trying it once.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor

from ..core.errors import UserError
from . import versions
from .kv_cache import RowCache, Rows, is_recurrent, keep_rows, new_cache
from .target import Target

UNSTEADY = 0.2
"""Relative difference of logits that no rounding explains."""


def check_reads_on(target: Target) -> None:
    """Raise UserError for a model that does not read on from its cache as speculative decoding needs, or as answering in
    batches needs where the model keeps a recurrent state: two rows, one padded on the left, of which one leaves.
    """
    if not is_recurrent(target.model):
        check_rolls_back(target.model, target.name)
        return
    if not versions.at_least(versions.READS_ON):
        needed = ".".join(map(str, versions.READS_ON))
        raise UserError(
            f"{target.name} keeps a recurrent state, and Transformers {transformers.__version__} does not read on from it "
            f"exactly; install {needed} or later, or let a server that runs it answer (--endpoint)"
        )
    tokens = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 1, 2, 3]], device=target.device)
    tokens, padded = tokens.clamp(max=target.vocab_size - 1), torch.tensor([0, 2])
    mask = (torch.arange(5)[None] >= padded[:, None]).long().to(target.device)
    places = (torch.arange(5)[None] - padded[:, None]).clamp(min=0).to(target.device)
    try:
        cache = new_cache(target)
        with torch.no_grad():
            whole = target.read(tokens[1:, 2:], (), keep=1).logits_BTV.double()
            first: dict[str, Tensor] = {
                "attention_mask": mask[:, :4],
                "position_ids": places[:, :4],
            }
            target.read(tokens[:, :4], (), cache, keep=1, **first)
            keep_rows(cache, torch.tensor([1], device=target.device))
            then = {"attention_mask": mask[1:], "position_ids": places[1:, 4:]}
            stepwise = target.read(tokens[1:, 4:], (), cache, keep=1, **then).logits_BTV.double()
    except Exception as problem:
        raise UserError(
            f"{target.name} keeps a recurrent state, and does not read on from Transformers' cache of it "
            f"({type(problem).__name__}: {problem}); let a server that runs it answer (--endpoint)"
        ) from problem
    far = float((stepwise - whole).norm() / whole.norm().clamp(min=1e-30))
    if not far <= UNSTEADY:
        raise UserError(
            f"{target.name} keeps a recurrent state, and reading on from Transformers' cache of it gives logits that differ by "
            f"{far:.1e} of their size; let a server that runs it answer (--endpoint)"
        )


def check_rolls_back(model: Any, name: str) -> None:
    """Raise UserError for a model that does not read on after its cache was rolled back.

    Found by trying once: three tokens, the last of them forgotten and read again.
    """
    rows = Rows(model, 1, name)
    parameter = next(model.parameters())
    tokens = torch.tensor([[0, 1, 2]], device=parameter.device).clamp(
        max=model.config.get_text_config().vocab_size - 1
    )
    read = []
    try:
        for begin in (0, 2):
            placed = rows.place(3 - begin)
            with torch.no_grad():
                output = model(
                    input_ids=tokens[:, begin:],
                    past_key_values=rows.layers,
                    use_cache=True,
                    logits_to_keep=1,
                    **placed,
                )
            read.append(output.logits[0, -1].double())
            rows.grow([3 - begin])
            rows.roll_back([1])
    except Exception as problem:
        raise UserError(
            f"{name}: its model does not read on from an attention cache that was rolled back "
            f"({type(problem).__name__}: {problem}); speculative decoding needs that"
        ) from problem
    far = float((read[1] - read[0]).norm() / read[0].norm().clamp(min=1e-30))
    if not far <= UNSTEADY and parameter.dtype in (torch.float32, torch.float64):
        raise UserError(
            f"{name}: after its cache was rolled back its model answers the same token with logits that "
            f"differ by {far:.1e} of their size; speculative decoding needs a cache that rolls back exactly"
        )


def why_alone(target: Target) -> str:
    """Why rows of different lengths cannot be read together by this target; empty if they can.

    Found by trying once: two rows together, and the shorter one alone.
    """
    if target not in _ALONE:
        _ALONE[target] = _try_uneven(target)
    return _ALONE[target]


ROUNDINGS = {torch.bfloat16: 4.0, torch.float16: 8.0, torch.float32: 64.0, torch.float64: 64.0}
"""Relative difference of logits that is always rounding, in units of eps."""
_ALONE: WeakKeyDictionary[Target, str] = WeakKeyDictionary()


def _try_uneven(target: Target) -> str:
    """Two rows of different lengths read together, and the shorter one alone in two ways.

    How far the two ways alone lie apart is what rounding does in this model and dtype.
    """
    long, short, new = 5 + _local_window(target), 2, 4
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, target.vocab_size, (2, long + new), generator=draw)
    tokens = tokens.to(target.device)
    row = torch.cat([tokens[1:, :short], tokens[1:, long:]], 1)
    try:
        cache = RowCache(target, 2)
        cache.read(tokens[:, :long], (), counts=[long, short], keep=1)
        together = cache.read(tokens[:, long:], (), keep=new).logits_BTV[1].double()
        cache = RowCache(target, 1)
        cache.read(row[:, :short], (), keep=1)
        stepwise = cache.read(row[:, short:], (), keep=new).logits_BTV[0].double()
        alone = target.read(row, (), keep=new).logits_BTV[0].double()
    except Exception as problem:  # noqa: BLE001 - any refusal of the model's means the same here
        return f"its model refuses a mask per row ({type(problem).__name__}: {problem})"
    scale = alone.square().mean().sqrt()
    far, own = ((x - alone).square().mean().sqrt() / scale for x in (together, stepwise))
    if not own <= UNSTEADY:
        return f"its model answers the same tokens with logits that differ by {float(own):.1e} of their size"
    if not far <= max(4 * float(own), ROUNDINGS[target.dtype] * torch.finfo(target.dtype).eps):
        return (
            f"its model does not keep to a mask per row (logits are off by {float(far):.1e} of their "
            f"size, by {float(own):.1e} through rounding alone)"
        )
    return ""


def _local_window(target: Target) -> int:
    """The longest local window that a model has apart from the masks it is given; 0 without one."""
    config = target.model.config.get_text_config()
    named = {k: v for k, v in vars(config).items() if "window" in k and k != "sliding_window"}
    sizes = [v for v in named.values() if isinstance(v, int) and not isinstance(v, bool)]
    return max((size for size in sizes if size < target.max_positions // 2), default=0)
