"""The private expert: FFN neurons next to the shared ones, y = shared(x) + private(x).

Source: the shared and private experts of EDA (arXiv 2603.09527). With one of each both routers
output exactly 1, so the pair is one wider FFN and merges by concatenation (see `merge.py`).

Two starts. `active`: gate and up copy the most active shared neurons plus noise, the down
projection is zero, so training starts exactly at reuse (at step 0 only the down projection has a
gradient, as with LoRA's B = 0). `random`: the paper's, which begins worse than reuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.rng import seeded
from ..drafts.base import Draft
from ..drafts.layers import GatedFFN

NOISE = 0.1
"""Noise on copied neurons, as a share of the shared weights' own standard deviation."""


def widenable(draft: Draft) -> dict[str, GatedFFN]:
    """The draft's FFNs that an expert can be added to, by module name.

    Raises UserError when there is none: only an FFN that sums over neurons can be widened.
    """
    found = {
        name: module
        for name, module in draft.named_modules()
        if isinstance(module, GatedFFN) and not name.endswith(".private")
    }
    if not found:
        kinds = sorted({type(m).__name__ for n, m in draft.named_modules() if n.endswith("mlp")})
        raise UserError(
            f"method 'expert' cannot widen this {draft.kind} draft: it needs an FFN that sums over "
            f"neurons (gate_proj, up_proj, down_proj), found {', '.join(kinds) or 'no FFN'}; use "
            "--method lora or full"
        )
    return found


def attach(
    draft: Draft, width: int, init: str, seed: int, calibrate: Callable[[], None] | None
) -> None:
    """Add a private expert of `width` neurons to every FFN of the draft, in place.

    `calibrate` runs the draft on a few batches; it decides which shared neurons are most active.
    Without it (or with `init='random'`) no activity is needed.
    """
    ffns = widenable(draft)
    activity = measure_activity(ffns, calibrate) if init == "active" and calibrate else {}
    for name, ffn in ffns.items():
        like = ffn.gate_proj.weight
        private = GatedFFN(like.shape[1], width, ffn.activation).to(like)
        generator = seeded(seed, "expert", name)
        with torch.no_grad():
            if init == "random":
                _randomise(private, generator)
            else:
                score = activity.get(name, ffn.down_proj.weight.norm(dim=0))
                _copy_strongest(private, ffn, score, generator)
        ffn.private = private


def detach(draft: Draft) -> None:
    """Leave a draft its shared neurons alone, as the first stage of the paper's recipe does."""
    for module in draft.modules():
        if isinstance(module, GatedFFN):
            module.private = None


def measure_activity(ffns: dict[str, GatedFFN], calibrate: Callable[[], None]) -> dict[str, Tensor]:
    """Mean size of each shared neuron's contribution, |act(gate) * up| * |down column|: [width]."""
    totals = {name: torch.zeros(ffn.width) for name, ffn in ffns.items()}
    hooks = []
    for name, ffn in ffns.items():

        def record(_: object, inputs: tuple[Tensor, ...], name: str = name) -> None:
            totals[name] += inputs[0].detach().abs().flatten(0, -2).float().sum(0).cpu()

        hooks.append(ffn.down_proj.register_forward_pre_hook(record))
    try:
        with torch.no_grad():
            calibrate()
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: totals[name] * ffn.down_proj.weight.detach().float().norm(dim=0).cpu()
        for name, ffn in ffns.items()
    }


def _copy_strongest(
    private: GatedFFN, shared: GatedFFN, score: Tensor, generator: torch.Generator
) -> None:
    order = score.argsort(descending=True, stable=True)
    chosen = order[torch.arange(private.width) % len(order)].to(shared.gate_proj.weight.device)
    for mine, theirs in ((private.gate_proj, shared.gate_proj), (private.up_proj, shared.up_proj)):
        noise = torch.randn(mine.weight.shape, generator=generator).to(theirs.weight)
        mine.weight.copy_(theirs.weight[chosen] + NOISE * theirs.weight.std() * noise)
    private.down_proj.weight.zero_()


def _randomise(private: GatedFFN, generator: torch.Generator) -> None:
    for linear in (private.gate_proj, private.up_proj, private.down_proj):
        noise = torch.randn(linear.weight.shape, generator=generator).to(linear.weight)
        linear.weight.copy_(noise * linear.weight.shape[1] ** -0.5)
