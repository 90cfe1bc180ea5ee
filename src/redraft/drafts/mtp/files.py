"""MTP heads on disk: the tensors as the family's checkpoints name them, under the target's own config.json.

The same tensors lie inside a checkpoint that has its head (`checkpoints/own_head.py`), and in a folder of their own, which
vLLM takes as `model`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.config_values import architectures_of
from ...core.errors import UserError
from ...models.target import Target
from ..base import Draft
from ..kind import Config, Files, Named, Shapes, Tensors
from ..routing import wide
from ..stored.layer import check_rotary, check_tensors, layer_shapes, read_layer, write_layer
from .families import (
    TRUNK,
    Family,
    count_declared,
    declared_by,
    family_named,
    feeds_raw,
    found_in,
    has_trunk,
    layers_of,
    text_config,
    unknown_key,
)
from .network import BIAS, MtpConfig, MtpDraft
from .routed_files import (
    declared_experts,
    has_experts,
    one_by_one,
    packed,
    read_routed,
    routed_shapes,
    stored_shapes,
)

LAYER = "layers.0."
WIDTH = "intermediate_size"
SHARE = "partial_rotary_factor"
MORE = re.compile(r"(?:^|\.)mtp(?:_layers|\.layers)\.[1-9]\d*\.")
"""In the names of a second MTP layer."""
NOT_COMPUTED = {
    re.compile(r"\.kv_[ab]_(?:proj|layernorm)"): "multi-head latent attention",
    re.compile(
        r"_scale(?:_inv)?$|\.qweight$|\.scales$|\.qzeros$|\.weight_packed$"
    ): "quantised weights",
}
"""What names of tensors tell of heads that redraft does not compute."""


def recognises(raw: Config, tensors: Tensors, where: Path) -> bool:
    """Whether a folder holds an MTP head and no target."""
    return found_in(raw, tensors) is not None and not has_trunk(raw, list(tensors))


def parse(raw: Config, stored: Tensors, where: Path) -> tuple[MtpConfig, dict[str, Tensor]]:
    """Shape and tensors of the head among `stored`, under redraft's names; other tensors are left.

    Raises UserError naming what is missing, surplus, or of a function that redraft does not compute.
    """
    found = found_in(raw, stored)
    if found is None:
        raise UserError(f"{where}: no tensors of an MTP head")
    family, prefix = found
    if beyond := next(iter(_beyond(raw, stored)), None):
        raise UserError(f"{where}: expected one MTP layer, found a second ({beyond})")
    mine = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    if reason := not_computed(raw, [prefix + name for name in mine]):
        raise UserError(f"{where}: {reason}")
    tensors = {_named(family, name): t for name, t in mine.items() if name not in family.copies}
    layer = {n.removeprefix(LAYER): t for n, t in tensors.items() if n.startswith(LAYER)}
    config = _shape(raw, family, layer, where)
    required = stored_shapes(expected_shapes(config)[0], config.routed)
    native = {_stored(family, prefix, name): shape for name, shape in required.items()}
    check_tensors(
        {_stored(family, prefix, n): t for n, t in tensors.items()}, native, {}, str(where)
    )
    check_rotary(config, where)
    return config, tensors if config.routed is None else packed(tensors, config.routed)


def _beyond(raw: Config, names: Collection[str]) -> list[str]:
    """The names of tensors of a second MTP layer."""
    layers = {name: TRUNK.match(name) for name in names}
    more = (n for n, at in layers.items() if at and layers_of(raw) and int(at[1]) > layers_of(raw))
    return sorted([*(name for name in names if MORE.search(name)), *more])


def not_computed(raw: Config, names: Collection[str]) -> str | None:
    """Why redraft does not compute a head with these tensors; None where it does."""
    found = found_in(raw, names)
    if found is not None and not found[0].router and has_experts(names):
        return f"an MTP head of family {found[0].name} with routed experts is seen, but neither checked, run nor adapted by redraft"
    for pattern, what in NOT_COMPUTED.items():
        name = next((name for name in sorted(names) if pattern.search(name)), None)
        if name is not None:
            return f"an MTP head with {what} ({name}) is seen, but neither checked, run nor adapted by redraft"
    return None


def _shape(raw: Config, family: Family, layer: Tensors, where: Path) -> MtpConfig:
    text = dict(text_config(raw))
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    share = rope.pop(SHARE, text.pop(SHARE, family.rotary_share))
    for key in ("layer_types", "rope_scaling", "sliding_window", "use_sliding_window"):
        text.pop(key, None)  # of the target's layers; the head's attends to everything
    text |= {"rope_parameters": rope, "attention_bias": "self_attn.o_proj.bias" in layer}
    routed = read_routed(text, layer, family.router, where) if has_experts(layer) else None
    if routed is not None:
        text[WIDTH] = routed.width
    fields = read_layer(text, layer, where)
    return MtpConfig(
        **{
            **fields,
            "qkv_bias": "self_attn.q_proj.bias" in layer,
            "head_norms": "self_attn.q_norm.weight" in layer,
            "output_gate": family.gated and bool(text.get("attn_output_gate", True)),
            "rotary_share": float(share),
            "norm_offset": family.norm_offset,
        },
        family=family.name,
        state_first=family.state_first,
        before_norm=family.before_norm,
        raw_feedback=feeds_raw(raw, family),
        zero_first=family.zero_first,
        routed=routed,
        checkpoint=dict(raw),
    )


def _named(family: Family, relative: str) -> str:
    """redraft's name of a tensor, from its name relative to the prefix."""
    if relative in family.names:
        return family.names[relative]
    return (
        LAYER + relative.removeprefix(family.layer)
        if relative.startswith(family.layer)
        else relative
    )


def _stored(family: Family, prefix: str, name: str) -> str:
    """The name in a file of a tensor that redraft calls `name`."""
    if name.startswith(LAYER):
        return prefix + family.layer + name.removeprefix(LAYER)
    return prefix + next((stored for stored, own in family.names.items() if own == name), name)


def as_stored(c: MtpConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the family's checkpoints have."""
    family = family_named(c.family)
    prefix = family.write.replace("{n}", str(layers_of(c.checkpoint)))
    if c.routed is not None and not c.routed.packed:
        tensors = one_by_one(tensors)
    return {_stored(family, prefix, name): tensor for name, tensor in tensors.items()}


def build(config: MtpConfig, tensors: Tensors, dtype: torch.dtype) -> MtpDraft:
    """A head computing in `dtype` from tensors as stored; it shares those that are never trained.

    A router's bias stays in float32, as engines have it: it decides, and is no share.
    """
    with torch.device("meta"):
        draft = MtpDraft(config)
    trained = set(draft.trainable_names())
    own = {
        name: t.to(wide(t) if name.endswith(BIAS) else dtype, copy=name in trained)
        for name, t in tensors.items()
    }
    draft.load_state_dict(own, assign=True)
    return draft.eval().requires_grad_(False)


def expected_shapes(c: MtpConfig) -> tuple[Shapes, Shapes]:
    """Required and optional tensors of a head of shape `c`: name -> shape."""
    H = c.hidden_size
    norms = {f"{name}.weight": (H,) for name in ("embedding_norm", "hidden_norm", "norm")}
    layer = {**layer_shapes(c, H), "input_layernorm.weight": (H,)}
    if c.routed is not None:
        layer = {n: s for n, s in layer.items() if not n.startswith("mlp.")}
        layer |= routed_shapes(c.routed, H)
    return {"fc.weight": (H, 2 * H), **norms, **{LAYER + n: s for n, s in layer.items()}}, {}


def lay_out(c: MtpConfig, tensors: dict[str, Tensor], target: str) -> Files:
    """A folder of the head alone: the checkpoint's config.json, but for the width of the head's FFN."""
    return config_json(c), as_stored(c, tensors)


def config_json(c: MtpConfig) -> dict[str, Any]:
    """config.json of the checkpoint, declaring one layer; made of the head's own shape where there is none."""
    family = family_named(c.family)
    if c.checkpoint:
        return declaring(
            c.checkpoint, family, {} if c.routed is not None else {WIDTH: c.intermediate_size}
        )
    rope = {**c.rope_parameters, SHARE: c.rotary_share}
    return {
        **write_layer(c),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "attn_output_gate": c.output_gate,
        "rope_parameters": rope,
        family.declared: 1,
    }


def declaring(raw: Config, family: Family, changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with one MTP layer declared where engines look, and these changes of the language model's keys."""
    found = dict(raw)
    inner = found.get("text_config")
    if isinstance(inner, Mapping):
        found["text_config"] = {**inner, family.declared: 1, **changes}
        return found
    return {**found, family.declared: 1, **changes}


def find_inside(raw: Config, names: Collection[str]) -> tuple[str, list[str]] | None:
    """The family of the head inside a checkpoint, and the names of its tensors."""
    found = found_in(raw, names)
    if found is None:
        return None
    family, prefix = found
    own = {name for name in names if name.startswith(prefix)}
    return family.name, sorted(own | set(_beyond(raw, names)))


def declared_inside(raw: Config) -> tuple[str, str, int | None] | None:
    """The family that a target's config.json declares, by which key or else by its architecture, and the count."""
    family, key = declared_by(raw), unknown_key(raw)
    if family is not None:
        count = count_declared(raw, family)
        counted = count is None or any(family.declared in c for c in (raw, text_config(raw)))
        return family.name, family.declared if counted else architectures_of(raw)[0], count
    return None if key is None else ("", key, text_config(raw).get(key, raw.get(key)))


def declare_inside(raw: Config, c: MtpConfig) -> dict[str, Any]:
    """The target's config.json, declaring this head. Raises UserError for one that it cannot hold."""
    family, width = (
        declared_by(declaring(raw, family_named(c.family), {})),
        text_config(raw).get(WIDTH),
    )
    if family is None or family.name != c.family:
        raise UserError(
            f"a head of family {c.family} is no part of {list(architectures_of(raw))}, which engines serve "
            f"{'with heads of family ' + family.name if family else 'without one that redraft knows'}"
        )
    if raw.get("quantization_config"):
        raise UserError(
            "the target is quantised (quantization_config), and engines would take the head for quantised too, and pass over its "
            "weights; stitch it into the unquantised model, and quantise that with the head left out"
        )
    experts = declared_experts(text_config(raw), family.router)
    if bool(experts) != (c.routed is not None):
        raise UserError(
            f"this head's FFN is {c.routed or 'dense'}, the target's config.json counts {experts} routed experts a layer, which "
            "engines take for the head as well; serve the head as a folder of its own"
        )
    if width != c.intermediate_size and c.routed is None:
        raise UserError(
            f"this head's FFN has {c.intermediate_size} neurons, the target's config.json says {width}, which engines take for "
            "the head as well; adapt without an expert (--method body), or serve the head as a folder of its own"
        )
    return declaring(raw, family_named(c.family), {})


def rename_inside(
    raw: Config, c: MtpConfig, tensors: Tensors, names: Collection[str]
) -> dict[str, Tensor]:
    """The head's tensors by the names that engines look for in a checkpoint with these `names`."""
    stored = as_stored(dataclasses.replace(c, checkpoint=raw), tensors)
    inner = "model.language_model."
    if not any(name.startswith(f"{inner}layers.") for name in names):
        return stored
    numbered = re.compile(r"^model\.(?=layers\.\d)")
    return {numbered.sub(inner, name): tensor for name, tensor in stored.items()}


def fitting(c: MtpConfig, tensors: Tensors, target: Target) -> Named:
    """The head under a target of another number of vocabulary rows, of which it has none itself."""
    return dataclasses.replace(c, vocab_size=target.vocab_size), dict(tensors)


def reads(c: MtpConfig | None, num_layers: int | None) -> str:
    """What it reads of the target, in words."""
    if c is not None and c.before_norm:
        return "the state before the target's final norm"
    return "hs[n], the state after the target's final norm"


def other_readings(c: MtpConfig, tensors: Tensors, target: Target) -> Iterator[tuple[str, Named]]:
    """The other state of the target, and the other order of fc's halves."""
    here, there = ("before", "after") if c.before_norm else ("after", "before")
    yield (
        f"it was trained on the state {there} the target's final norm, not {here} it",
        (dataclasses.replace(c, before_norm=not c.before_norm), dict(tensors)),
    )
    yield (
        "the halves of fc are swapped",
        (dataclasses.replace(c, state_first=not c.state_first), dict(tensors)),
    )


def second_reading(draft: Draft, folder: Path) -> float:
    """The worst relative difference of a chain's logits from those of the second reader."""
    from .second_reading import by_the_second_reader

    assert isinstance(draft, MtpDraft)
    return by_the_second_reader(draft, folder)
