"""Routed experts in checkpoint terms: what config.json says of them, their shapes, and the two forms they are stored in.

*Packed*, `mlp.experts.gate_up_proj` [E, 2I, H] and `mlp.experts.down_proj` [E, H, I], as the network has them; or one by one,
`mlp.experts.{e}.{gate,up,down}_proj.weight`. A head is written in the form that it was read in.

Names here are relative to the layer, or end as such names do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ..kind import Shapes
from ..stored.layer import config_values
from .routed import BEST_OF_GROUP, RoutedShape

COUNTS = {"softmax": "num_experts", "sigmoid": "n_routed_experts"}
"""The key of config.json that counts experts, by router."""
ROUTED = re.compile(r"\bmlp\.(?:experts\.|gate\.weight$)")
"""In the names of tensors that only an FFN of routed experts has."""
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def has_experts(names: Collection[str]) -> bool:
    """Whether an FFN of routed experts is among these tensors."""
    return any(ROUTED.search(name) for name in names)


def is_packed(names: Collection[str]) -> bool:
    """Whether tensors of all experts at once are among these."""
    return any(name.endswith((GATE_UP, DOWN)) for name in names)


def declared_experts(text: Mapping[str, Any], router: str) -> int:
    """How many routed experts config.json gives the target's layers; 0 where they are dense."""
    count = text.get(COUNTS.get(router, ""))
    return count if isinstance(count, int) else 0


def read_routed(
    text: Mapping[str, Any], names: Collection[str], router: str, where: Path
) -> RoutedShape:
    """How the experts are counted and routed. Raises UserError for a missing key, and for routing that is not computed."""
    config = config_values(text, where)
    experts, per_token = config.positive(COUNTS[router]), config.positive("num_experts_per_tok")
    width = config.positive("moe_intermediate_size")
    sigmoid = router == "sigmoid"
    groups = config.positive("n_group", 1) if sigmoid else 1
    kept = config.positive("topk_group", 1 if groups == 1 else None) if sigmoid else 1
    if per_token > experts:
        config.refuse("num_experts_per_tok", f"1 to {experts}, the number of experts")
    if experts % groups or (groups > 1 and experts // groups < BEST_OF_GROUP):
        config.refuse(
            "n_group", f"a divisor of {COUNTS[router]} ({experts}), {BEST_OF_GROUP} experts a group"
        )
    if kept > groups or per_token > experts // groups * kept:
        config.refuse(
            "topk_group", f"at most n_group ({groups}), and groups of {per_token} experts together"
        )
    scoring = config.text("scoring_func", router)
    if scoring != router:
        raise UserError(
            f"{where}/config.json: scoring_func is {scoring}, redraft computes {router} routers in this family"
        )
    if sigmoid:
        given = config.given("n_shared_experts")
        shared = config.positive("n_shared_experts") * width if given else 0
    else:
        given = bool(text.get("shared_expert_intermediate_size"))
        shared = config.positive("shared_expert_intermediate_size") if given else 0
    return RoutedShape(
        experts=experts,
        per_token=per_token,
        width=width,
        shared_width=shared,
        normalised=config.flag("norm_topk_prob", True),
        sigmoid=sigmoid,
        groups=groups,
        groups_per_token=kept,
        scale=config.number("routed_scaling_factor", 1.0) if sigmoid else 1.0,
        packed=is_packed(names),
    )


def routed_shapes(shape: RoutedShape, hidden: int) -> Shapes:
    """The FFN's tensors by redraft's names."""
    E, H, wide = shape.experts, hidden, shape.width
    shapes: Shapes = {
        "mlp.gate.weight": (E, H),
        GATE_UP: (E, 2 * wide, H),
        DOWN: (E, H, wide),
    }
    if shape.sigmoid:
        shapes["mlp.gate.e_score_correction_bias"] = (E,)
    if shape.shared_width:
        shared = "mlp.shared_experts" if shape.sigmoid else "mlp.shared_expert"
        neurons = shape.shared_width
        shapes |= {f"{shared}.{name}_proj.weight": (neurons, H) for name in ("gate", "up")}
        shapes[f"{shared}.down_proj.weight"] = (H, neurons)
        if not shape.sigmoid:
            shapes["mlp.shared_expert_gate.weight"] = (1, H)
    return shapes


def stored_shapes(shapes: Shapes, routed: RoutedShape | None) -> Shapes:
    """The shapes of a head's tensors in the form that its file has them in."""
    if routed is None or routed.packed:
        return shapes
    whole = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in one_by_one(whole).items()}


def one_by_one(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed experts as tensors of their own, views of the packed ones; all others unchanged."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        experts = _one_by_one(name)
        if experts is None:
            found[name] = tensor
            continue
        for e, expert in enumerate(tensor):
            halves = expert.chunk(len(experts))
            found |= {one.format(e): halves[part] for one, part in experts.items()}
    return found


def packed(tensors: Mapping[str, Tensor], routed: RoutedShape) -> dict[str, Tensor]:
    """Tensors that were checked, with the experts in two of them."""
    if routed.packed:
        return dict(tensors)
    prefix = next(name for name in tensors if ".experts." in name).partition("mlp.experts.")[0]
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    for whole in (GATE_UP, DOWN):
        names = _one_by_one(prefix + whole) or {}
        parts = [tensors[one.format(e)] for e in range(routed.experts) for one in names]
        rows, columns = parts[0].shape
        stacked = torch.stack(parts)
        found[prefix + whole] = stacked.view(routed.experts, len(names) * rows, columns)
    return found


def _one_by_one(name: str) -> dict[str, int] | None:
    """The names of single experts' tensors that a packed one is made of, with a place for the expert, in order; None for
    another tensor."""
    for whole, parts in ((GATE_UP, ("gate_proj", "up_proj")), (DOWN, ("down_proj",))):
        if name.endswith(whole):
            front = name.removesuffix(whole)
            return {f"{front}mlp.experts.{{}}.{part}.weight": at for at, part in enumerate(parts)}
    return None
