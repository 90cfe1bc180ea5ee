"""EAGLE-3 checkpoint folders: the layout that vLLM, SGLang and llama.cpp's converter all read.

Root-level names, `midlayer.` (or `layers.0.` on the way in), `lm_head.weight` over the draft
vocabulary, `d2t` as offsets (target id = draft id + d2t) and `t2d` as a mask, both only when the
draft vocabulary is smaller than the target's. Aux layers other than the default set are written in both
numberings (vLLM: hs[k]; SGLang: output of layer k-1), because the engines differ by one.

Variants that norm in other places are read as flags and computed as written; what else has another
function is refused by name, none is approximated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.config_values import ConfigValues, architectures_of
from ...core.errors import UserError
from ...models.target import Target, default_aux_layers
from ..base import vocabulary_map
from ..kind import Config, Files, Named, Tensors
from ..stored.layer import (
    ROUTED,
    check_rotary,
    check_tensors,
    config_values,
    layer_shapes,
    read_layer,
    refuse_other_layers,
    refuse_routing,
    renamed,
    write_layer,
)
from ..stored.rows import rows_in_words, with_embedding_rows
from .network import Eagle3Config, Eagle3Draft

ARCHITECTURE = "LlamaForCausalLMEagle3"
QWEN3 = "Eagle3Qwen3ForCausalLM"
LAYER = "midlayer."
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
"""The key of the aux layer ids: hs[] indices at the top level, layers in `eagle_config`."""


def wrapped(raw: Config) -> bool:
    """Whether a config.json wraps the layer's own, as speculators does."""
    return "speculators_model_type" in raw or "speculators_config" in raw


def recognises(raw: Config, tensors: Tensors, where: Path) -> bool:
    """Whether this is an EAGLE-3 draft: by its architecture, or by the norm only it has."""
    architectures = " ".join(architectures_of(raw))
    found = "eagle3" in architectures.lower() or any(
        name.startswith(LAYER) or name.endswith("hidden_norm.weight") for name in tensors
    )
    if found and any(ROUTED in name for name in tensors) and not wrapped(raw):
        refuse_routing(where)
    return found and not wrapped(raw)


def canonical(stored: str) -> str:
    """A tensor's name as redraft uses it: no prefix, the layer called `midlayer`."""
    stored = stored.removeprefix("model.")
    return LAYER + stored.removeprefix("layers.0.") if stored.startswith("layers.0.") else stored


def parse(
    raw: Mapping[str, Any], stored: Mapping[str, Tensor], where: Path
) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """The shape of a stored draft and its tensors under redraft's names.

    Raises UserError naming what is missing, extra, or of another function.
    """
    tensors = renamed(stored, canonical, where)
    values = config_values(raw, where)
    nested = values.inside("eagle_config")
    if not nested.flag("use_aux_hidden_state", True):
        raise UserError(f"{where}: the draft reads one hidden state (use_aux_hidden_state false)")
    if values.flag("bias"):
        raise UserError(
            f"{where}: config.json says bias: true, which engines read as attention biases; an "
            "EAGLE-3 draft has none: remove the key"
        )
    norm_output = values.flag("norm_output")
    if norm_output and "speculators_version" not in raw:
        raise UserError(
            f"{where}: norm_output means 'feed the normed state back' to engines and 'norm before "
            "lm_head' to SpecForge; this file does not say which, so it is not run. Remove the key "
            "if the draft was trained with SpecForge"
        )
    if values.flag("attention_bias") or values.flag("qkv_bias"):
        # Engines then create every attention bias; a missing one of o_proj counts as zero.
        out = tensors.get(f"{LAYER}self_attn.o_proj.weight", torch.zeros(0, 0))
        tensors.setdefault(f"{LAYER}self_attn.o_proj.bias", out.new_zeros(out.shape[:1]))
        raw = {**raw, "attention_bias": True}
    refuse_other_layers(tensors, where)
    relative = {n.removeprefix(LAYER): t for n, t in tensors.items() if n.startswith(LAYER)}
    layer = read_layer(raw, relative, where)
    features = _features(tensors, where)
    aux_layers = read_aux_layers(values)
    fc_norms = values.positive("num_aux_hidden_states", len(aux_layers or (0, 0, 0)))
    if values.flag("fc_norm") and features % fc_norms:
        raise UserError(
            f"{values.where}: fc_norm norms {fc_norms} aux layers of equal width, but fc.weight reads "
            f"{features} numbers, which {fc_norms} does not divide"
        )
    size = values.positive("draft_vocab_size", layer["vocab_size"])
    if size > layer["vocab_size"]:
        values.refuse("draft_vocab_size", f"at most vocab_size ({layer['vocab_size']})")
    config = Eagle3Config(
        **layer,
        draft_vocab_size=size,
        feature_size=features,
        aux_layers=aux_layers,
        norm_before_residual=values.flag("norm_before_residual"),
        norm_before_fc=nested.flag("norm_before_fc", values.flag("norm_before_fc")),
        fc_norm=fc_norms if values.flag("fc_norm") else 0,
        norm_output=norm_output,
    )
    d2t = tensors.get("d2t")
    if d2t is not None and not values.given("draft_vocab_size") and d2t.numel() != size:
        raise UserError(
            f"{where}: d2t maps {d2t.numel()} rows, but config.json has no draft_vocab_size, which "
            f"then counts as vocab_size ({size}); set it to the number of rows of lm_head.weight"
        )
    if size < config.vocab_size and d2t is None:
        raise UserError(
            f"{where}: the head has rows for {size} of {config.vocab_size} tokens "
            "(draft_vocab_size, vocab_size) and no d2t says for which; copy the d2t of the training "
            "run, or correct the sizes"
        )
    check_tensors(tensors, *expected_shapes(config), str(where))
    check_rotary(config, where)
    return config, _with_ascending_rows(config, tensors, where)


def _features(tensors: Mapping[str, Tensor], where: Path) -> int:
    """How many numbers `fc` reads."""
    weight = tensors.get("fc.weight")
    if weight is None:
        raise UserError(f"{where}: tensors do not match the layout: missing fc.weight")
    if weight.dim() != 2 or not weight.numel():
        raise UserError(f"{where}: fc.weight should be a matrix, found {list(weight.shape)}")
    return weight.shape[1]


def _with_ascending_rows(
    config: Eagle3Config, tensors: dict[str, Tensor], where: Path
) -> dict[str, Tensor]:
    """The tensors with the head's rows in the order of their target ids, as redraft has them.

    Files may have them in any order (by frequency, say): d2t tells what a row is. A map of the whole
    vocabulary is then the identity, and dropped.
    """
    try:
        ids = draft_vocabulary(config, tensors)
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from None
    others = {name: t for name, t in tensors.items() if name not in ("d2t", "t2d")}
    if ids is None:
        if "t2d" in tensors and not bool(tensors["t2d"].bool().all()):
            raise UserError(
                f"{where}: t2d leaves out tokens, but the head has a row for each of the "
                f"{config.vocab_size} and there is no d2t"
            )
        return others
    order = ids.argsort()
    if torch.equal(order, torch.arange(len(ids))) and len(ids) < config.vocab_size:
        return dict(tensors)
    others["lm_head.weight"] = tensors["lm_head.weight"][order]
    if len(ids) == config.vocab_size:
        return others
    maps = vocabulary_map(ids[order], config.vocab_size)
    return {**others, **{name: maps[name].to(tensors.get(name, maps[name])) for name in maps}}


def build(config: Eagle3Config, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Eagle3Draft:
    """A draft computing in `dtype` from tensors as stored."""
    draft = Eagle3Draft(config, draft_vocabulary(config, tensors))
    if "embed_tokens.weight" in tensors:
        draft.embed_tokens = torch.nn.Embedding(*tensors["embed_tokens.weight"].shape)
    weights = {n: t.to(dtype) for n, t in tensors.items() if n not in ("d2t", "t2d")}
    draft.to(dtype).load_state_dict(weights)
    return draft.eval().requires_grad_(False)


def draft_vocabulary(config: Eagle3Config, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Target ids of the draft's rows, int64 [D]; None for the whole vocabulary.

    Raises UserError when d2t cannot be offsets, or disagrees with t2d.
    """
    if "d2t" not in tensors:
        return None
    d2t = tensors["d2t"].long()
    ids = d2t + torch.arange(len(d2t))
    in_vocab = tensors["t2d"].bool().nonzero().flatten() if "t2d" in tensors else None
    absolute = "expected offsets (target id = row + d2t), these look like absolute ids"
    if in_vocab is not None and torch.equal(ids.sort().values, in_vocab):
        return ids
    if in_vocab is not None and torch.equal(d2t.sort().values, in_vocab):
        raise UserError(f"d2t holds the ids that t2d marks: {absolute}")
    problem = _wrong_ids(ids, config.vocab_size)
    if problem:
        hint = "" if _wrong_ids(d2t, config.vocab_size) else f": {absolute}"
        raise UserError(f"d2t {problem}{hint}")
    if in_vocab is not None:
        raise UserError(
            f"d2t and t2d disagree: d2t names {len(ids)} target ids, t2d marks {len(in_vocab)}, and "
            f"{int(torch.isin(ids, in_vocab).sum())} are the same"
        )
    if len(d2t) >= 64 and bool((d2t[1:] > d2t[:-1]).all()):
        raise UserError(f"d2t keeps no two neighbouring tokens: {absolute}")
    return ids


def _wrong_ids(ids: Tensor, vocab_size: int) -> str | None:
    """What is wrong with target ids of rows, if anything."""
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        return f"leads from row {row} to target id {int(ids[row])}, outside 0 to {vocab_size - 1}"
    ordered = ids.sort().values
    same = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(same):
        repeated = int(same[0])
        rows = (ids == repeated).nonzero().flatten().tolist()
        return f"leads from rows {rows[0]} and {rows[1]} to the same target id {repeated}"
    return None


def expected_shapes(
    c: Eagle3Config,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Required and optional tensors of a draft of shape `c`: name -> shape."""
    H, D, F = c.hidden_size, c.draft_vocab_size, c.feature_size
    required: dict[str, tuple[int, ...]] = {
        "fc.weight": (H, F),
        "norm.weight": (H,),
        "lm_head.weight": (D, H),
        **{LAYER + name: shape for name, shape in layer_shapes(c, 2 * H).items()},
        **{f"{LAYER}{name}.weight": (H,) for name in ("input_layernorm", "hidden_norm")},
    }
    if c.norm_before_fc:
        required["input_norm.weight"] = (F,)
    required.update({f"fc_norm.{k}.weight": (F // c.fc_norm,) for k in range(c.fc_norm)})
    if c.vocab_size != D:
        required["d2t"] = (D,)
    return required, {"embed_tokens.weight": (c.vocab_size, H), "d2t": (D,), "t2d": (c.vocab_size,)}


def read_aux_layers(values: ConfigValues) -> tuple[int, ...] | None:
    """hs[] indices from either numbering; None for the default set."""
    nested = values.inside("eagle_config").integers(AUX_LAYERS, least=-1)
    return values.integers(AUX_LAYERS) or tuple(k + 1 for k in nested) or None


def config_json(c: Eagle3Config) -> dict[str, Any]:
    """The config.json that vLLM, SGLang and llama.cpp's converter read."""
    config: dict[str, Any] = {
        "architectures": [QWEN3 if c.head_norms else ARCHITECTURE],
        **write_layer(c),
        "draft_vocab_size": c.draft_vocab_size,
    }
    count = len(c.aux_layers or (0, 0, 0))
    if c.feature_size // count != c.hidden_size:
        config["target_hidden_size"] = c.feature_size // count
    for flag in ("norm_before_residual", "norm_before_fc", "norm_output"):
        if getattr(c, flag):
            config[flag] = True
    if c.fc_norm:
        config["fc_norm"] = True
    if c.aux_layers is not None:
        config[AUX_LAYERS] = list(c.aux_layers)
        config["num_aux_hidden_states"] = len(c.aux_layers)
        config["eagle_config"] = {
            AUX_LAYERS: [aux_layer - 1 for aux_layer in c.aux_layers],
            "use_aux_hidden_state": True,
        }
    return config


def lay_out(c: Eagle3Config, tensors: dict[str, Tensor], target: str) -> Files:
    """config.json and tensors, unchanged."""
    return config_json(c), dict(tensors)


# -- vocabulary and readings ---------------------------------------------------------------------


def with_rows_of(c: Eagle3Config, tensors: Tensors, target: Target) -> Named:
    """Shape and tensors with the target's number of rows: the head keeps those that the target has.

    The draft then has a reduced vocabulary: the tokens that it was made for.
    """
    V = target.vocab_size
    vocab = draft_vocabulary(c, tensors)
    ids = torch.arange(c.vocab_size) if vocab is None else vocab
    kept = ids < V
    if not bool(kept.any()):
        raise UserError(f"none of the tokens that this draft says is among the target's {V}")
    config, found = with_embedding_rows(c, tensors, target)
    if not bool(kept.all()):
        found["lm_head.weight"] = tensors["lm_head.weight"][kept]
    found = {name: t for name, t in found.items() if name not in ("d2t", "t2d")}
    said = int(kept.sum())
    if said < V:
        found.update(vocabulary_map(ids[kept], V))
    return dataclasses.replace(config, draft_vocab_size=said), found


def vocabulary(c: Eagle3Config, tensors: Tensors) -> str:
    """The vocabulary, in words."""
    if "d2t" in tensors:
        return f"{c.draft_vocab_size:,} of {c.vocab_size:,} tokens, d2t as offsets"
    return rows_in_words(c, tensors)


def reads(c: Eagle3Config | None, num_layers: int | None) -> str:
    """The aux layers, in words."""
    if c is not None and c.aux_layers:
        return f"hs{list(c.aux_layers)} (vLLM's ids; SGLang's are {[t - 1 for t in c.aux_layers]})"
    n = num_layers
    default = f": hs[2], hs[{n // 2}], hs[{n - 3}] of this target" if n else ""
    return f"the engines' default, hs[2], hs[n//2], hs[n-3]{default}"


def config_variants(
    c: Eagle3Config, tensors: Tensors, target: Target
) -> Iterator[tuple[str, Named]]:
    """Other aux layers, and the other residual."""
    same, most = dict(tensors), target.num_layers
    aux_layers = c.aux_layers or default_aux_layers(most)
    readings = {tuple(aux_layer + by for aux_layer in aux_layers): by for by in (1, -1)}
    if c.aux_layers is not None and most >= 7 and len(c.aux_layers) == 3:
        readings.setdefault(default_aux_layers(most), 0)
    for other, by in readings.items():
        if other[0] < 0 or other[-1] >= most or other == aux_layers:
            continue
        why = (
            "written in the other numbering (hs[k] here, the output of layer k there)"
            if by
            else "the draft was trained on the default layers"
        )
        yield (
            f"the aux layers are wrong: config.json says hs{list(aux_layers)}, but hs{list(other)} accepts "
            f"more; {why}",
            (dataclasses.replace(c, aux_layers=other), same),
        )
    flipped = not c.norm_before_residual
    yield (
        f"norm_before_residual should be {str(flipped).lower()}",
        (dataclasses.replace(c, norm_before_residual=flipped), same),
    )
