"""The FFN expert: added neurons next to the shared ones, y = shared(x) + private(x).

Source: the shared and private experts of EDA (arXiv 2603.09527). With one of each both routers
output exactly 1, so the pair is one wider FFN and merges by concatenation:

    gate = [Ws; Wp]    up = [Us; Up]    down = [Ds, Dp]

No arithmetic touches a stored weight, so the shared slices of a merged draft hash-equal the
published ones and `extract` gives the expert back bit for bit.

Two initialisations. `active`: gate and up copy the most active shared neurons plus noise, the down
projection is zero, so training starts exactly at the unadapted draft (at step 0 only the down
projection has a gradient, as with LoRA's B = 0). `random`: the paper's, which begins worse than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.rng import seeded
from ..drafts.base import Draft
from ..drafts.layers import GatedFFN
from .kind import AddedTensors, Setup, Tensors
from .table import Method

MARK = ".private."
"""In the name of every tensor of an expert."""
CONCATENATED = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
"""Dimension along which an FFN's stored tensor grows with its neurons."""
NOISE = 0.1
"""Noise on copied neurons, as a share of the shared weights' own standard deviation."""
AUTO_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Widths that `--width auto` tries, as shares of the shared FFN's."""
GOOD_ENOUGH = 0.99


class Expert(AddedTensors):
    def check(self, draft: Draft, method: Method, setup: Setup) -> None:
        widenable(draft)

    def attach(self, draft: Draft, method: Method, setup: Setup) -> None:
        """Add an expert to every FFN of the draft."""
        if setup.width is None:
            raise UserError(
                "train.width auto compares several experts of one draft; name a width here, for "
                "example 64"
            )
        width = resolve_width(setup.width, shared_width(draft))
        ffns = widenable(draft)
        measured = setup.init == "active" and setup.calibrate
        activity = measure_activity(ffns, setup.calibrate) if measured and setup.calibrate else {}
        for name, ffn in ffns.items():
            private = _empty(ffn, width)
            generator = seeded(setup.seed, "expert", name)
            with torch.no_grad():
                if setup.init == "random":
                    _randomise(private, generator)
                else:
                    score = activity.get(name, ffn.down_proj.weight.norm(dim=0))
                    _copy_strongest(private, ffn, score, generator)
            ffn.private = private

    def adds(self, name: str) -> bool:
        return MARK in name

    def starts_at_zero(self, name: str) -> bool:
        return name.endswith("private.down_proj.weight")

    def home(self, name: str) -> str:
        return name.replace(MARK, ".")

    def card(self, shared: Tensors, tensors: Tensors) -> dict[str, object]:
        widened = sorted({name.split(MARK)[0] for name in tensors if self.adds(name)})
        return {"shared_widths": {n: shared[f"{n}.gate_proj.weight"].shape[0] for n in widened}}

    def restore(self, draft: Draft, tensors: Tensors) -> None:
        for name, gate in tensors.items():
            ffn = draft.get_submodule(name.split(MARK)[0])
            if name.endswith("gate_proj.weight") and isinstance(ffn, GatedFFN) and not ffn.private:
                ffn.private = _empty(ffn, gate.shape[0])
        super().restore(draft, tensors)

    def merge(self, merged: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        homes = {name: merged[self.home(name)] for name in tensors}
        return {
            self.home(name): torch.cat([homes[name], t.to(homes[name])], dim=_dimension(name))
            for name, t in tensors.items()
        }

    def extract(self, merged: Tensors, shared: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        found, before = {}, {}
        for name, whole in merged.items():
            ffn, _, suffix = name.rpartition("mlp.")
            if suffix in CONCATENATED and whole.shape != shared[name].shape:
                dim, width = CONCATENATED[suffix], shared[name].shape[CONCATENATED[suffix]]
                added = whole.narrow(dim, width, whole.shape[dim] - width)
                found[f"{ffn}mlp{MARK}{suffix}"] = added.clone().contiguous()
                before[name] = whole.narrow(dim, 0, width).contiguous()
        return found, before


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


def _empty(ffn: GatedFFN, width: int) -> GatedFFN:
    """An FFN of `width` neurons that fits next to another."""
    like = ffn.gate_proj.weight
    return GatedFFN(like.shape[1], width, ffn.activation).to(like)


def _dimension(name: str) -> int:
    for suffix, dimension in CONCATENATED.items():
        if name.endswith(suffix):
            return dimension
    raise ValueError(f"{name} is not a tensor that grows with an FFN's neurons")


# -- widths ------------------------------------------------------------------------------------


def shared_width(draft: Draft) -> int:
    """Neurons of the draft's (widest) shared FFN."""
    return max(ffn.width for ffn in widenable(draft).values())


def resolve_width(width: int | float, shared: int) -> int:
    """A share (a float) of the `shared` neurons as a number; a number unchanged."""
    return width if isinstance(width, int) else max(1, round(width * shared))


def candidate_widths(shared: int) -> list[int]:
    """The ascending widths that `auto` tries next to `shared` neurons."""
    return sorted({max(1, round(shared * share)) for share in AUTO_SHARES})


def smallest_good(widths: Sequence[int], taus: Sequence[float]) -> int:
    """The smallest width whose held-out tau is within 1 % of the best."""
    best = max(taus)
    return min(w for w, tau in zip(widths, taus, strict=True) if tau >= GOOD_ENOUGH * best)
