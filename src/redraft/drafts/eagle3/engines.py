"""What each engine does with an EAGLE-3 folder: facts about the loaders of vLLM 0.32 and llama.cpp 11434 and
11549 (run), and of SGLang 0.5.23 (read)."""

from __future__ import annotations

from typing import Any

import torch

from ...core.config_values import architectures_of
from ...core.errors import UserError
from ...models.target import default_aux_layers
from ..kind import Config, Rule, Tensors
from ..stored.engine_names import (
    LAYER_TENSORS,
    LLAMA_CPP,
    LLAMA_CPP_TARGETS,
    NOT_IN_LLAMA_CPP,
    NOT_IN_SGLANG,
    NOT_LLAMA_CPP_TARGETS,
    SGLANG_EAGLE3,
    VLLM_EAGLE3,
)
from ..stored.engine_rules import (
    TARGET_LAYERS,
    TARGET_ROWS,
    TARGET_TYPE,
    Findings,
    architecture,
    flat,
    layers,
    missing,
    no_window,
    silu,
    surplus,
    through_redraft,
    unknown_attention,
    vllm_biases,
    vllm_model_type,
    vllm_window,
)
from ..stored.layer import has_values
from .files import AUX_LAYERS as TOP
from .files import LAYER, QWEN3, wrapped

PLACED = (
    "fc.weight",
    "norm.weight",
    *(
        f"{LAYER}{name}"
        for name in (*LAYER_TENSORS, "input_layernorm.weight", "hidden_norm.weight")
    ),
)
"""Tensors that every engine needs."""
KNOWN = (
    *PLACED,
    "embed_tokens.weight",
    f"{LAYER}self_attn.rotary_emb.",
    "lm_head.weight",
    "d2t",
    "t2d",
    "input_norm.weight",
    "fc_norm.",
    *(f"{LAYER}self_attn.{name}_norm.weight" for name in "qk"),
)
"""Beginnings of names that have a place, are judged by a rule of their own, or that nobody reads."""


def judged(raw: Config, tensors: Tensors) -> tuple[Config, list[str]]:
    """Without aux layer ids that name the target's default layers, which are harmless."""
    return _without_default_aux_layers(raw), unknown_attention(raw, tensors)


def _nested(raw: Config, key: str) -> Any:
    """A key of `eagle_config`."""
    return (raw.get("eagle_config") or {}).get(key)


def _needed(raw: Config) -> list[str]:
    needed = list(PLACED)
    needed += ["input_norm.weight"] if _norm_before_fc(raw) else []
    needed += ["fc_norm.0.weight"] if flat(raw).get("fc_norm") else []
    return needed


def _layers(raw: Config, tensors: Tensors) -> Findings:
    if wrapped(raw) and flat(raw).get("num_hidden_layers") is None:
        yield "refused", "no num_hidden_layers in transformer_layer_config"
    else:
        yield from layers(raw, tensors)


def _fc_width(raw: Config, tensors: Tensors) -> Findings:
    plain, fc = flat(raw), tensors.get("fc.weight")
    width = plain.get("target_hidden_size") or plain.get("hidden_size")
    counted = raw.get("num_aux_hidden_states") or len(_nested(raw, TOP) or (0, 0, 0))
    if plain.get("model_type") == "qwen3" and raw.get(TOP):
        counted = raw.get("num_aux_hidden_states") or len(raw[TOP])
    if fc is not None and fc.dim() == 2 and width and fc.shape[1] != width * counted:
        yield (
            "refused",
            f"fc.weight reads {fc.shape[1]} numbers, config.json says {counted} aux layers "
            f"(num_aux_hidden_states) of {width} (target_hidden_size)",
        )


def _head_rows(raw: Config, tensors: Tensors) -> tuple[int, int]:
    """Rows of the draft's head, and of the vocabulary that it was made for; 0 where not known."""
    plain = flat(raw)
    vocab = plain.get("vocab_size") or 0
    head = tensors.get("lm_head.weight")
    stored = len(head) if head is not None and head.dim() else None
    return stored or plain.get("draft_vocab_size") or vocab, vocab


def _no_map(raw: Config, tensors: Tensors) -> Findings:
    rows, vocab = _head_rows(raw, tensors)
    if "d2t" not in tensors and rows < vocab:
        yield (
            "wrong",
            f"no d2t for a head of {rows} rows: row i is taken for token i, so the first {rows} of "
            f"{vocab} tokens are proposed, whatever the rows were trained for",
        )


def _target_rows(raw: Config, tensors: Tensors) -> Findings:
    rows, vocab = _head_rows(raw, tensors)
    theirs = raw.get(TARGET_ROWS)
    if theirs is None or "d2t" in tensors or rows < vocab or rows == theirs:
        return
    if rows > theirs:
        yield (
            "wrong",
            f"{rows} rows for the target's {theirs}: ids that it does not have are proposed; redraft "
            "export --target cuts them",
        )
    else:
        yield "note", f"{rows} rows for the target's {theirs}: ids without a row are not proposed"


def _map_values(level: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Findings:
        d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
        vocab = flat(raw).get("vocab_size")
        if d2t is None or d2t.dim() != 1 or d2t.is_floating_point() or d2t.is_complex():
            return
        ids = (d2t.long() + torch.arange(len(d2t))).sort().values
        in_vocab = None if t2d is None else t2d.bool().nonzero().flatten()
        if len(ids) and (int(ids[0]) < 0 or (vocab is not None and int(ids[-1]) >= vocab)):
            where = "leads out of the vocabulary"
        elif bool((ids[1:] == ids[:-1]).any()):
            where = "leads two rows to the same token"
        elif in_vocab is not None and not torch.equal(in_vocab, ids):
            where = "leads to other tokens than t2d marks"
        else:
            return
        yield level, f"d2t is read as offsets (target id = row + d2t) and {where}: absolute ids?"

    return rule


def _vllm_architecture(raw: Config, tensors: Tensors) -> Findings:
    if wrapped(raw):
        model_type = flat(raw).get("model_type") or "llama"
        if model_type not in ("llama", "qwen3"):
            yield "refused", f"a speculators draft of model_type '{model_type}' (llama, qwen3)"
        verifier = (raw.get("speculators_config") or {}).get("verifier") or {}
        if not verifier.get("name_or_path"):
            yield "refused", "speculators_config.verifier.name_or_path is missing"
        layer = model_type
    else:
        # vLLM writes Eagle3 in front of names without.
        names = [
            name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}"
            for name in architectures_of(raw)
        ]
        yield from architecture(VLLM_EAGLE3, (), names)
        yield from vllm_model_type(raw, tensors)
        layer = VLLM_EAGLE3.get(names[0], "llama") if names else "llama"
    head_norms = "midlayer.self_attn.q_norm.weight" in tensors
    if head_norms and layer != "qwen3":
        yield "refused", f"q_norm and k_norm in the file; only {QWEN3} has them"
    if layer == "qwen3" and not head_norms:
        yield "wrong", "its Qwen3 layer norms q and k, and the file has no q_norm and k_norm"


def _vllm_vocabulary(raw: Config, tensors: Tensors) -> Findings:
    plain = flat(raw)
    if "d2t" in tensors and plain.get("draft_vocab_size") in (None, plain.get("vocab_size")):
        yield "refused", "d2t with a draft_vocab_size that is missing or equal to vocab_size"
    if "lm_head.weight" not in tensors:
        reduced = plain.get("draft_vocab_size") not in (None, plain.get("vocab_size"))
        if reduced:
            yield "wrong", "no lm_head.weight for the reduced vocabulary: uninitialised values"
        else:
            yield "note", "no lm_head.weight: the target's head is used"


def _vllm_aux_layers(raw: Config, tensors: Tensors) -> Findings:
    top, nested = raw.get(TOP), _nested(raw, TOP)
    if top:
        if list(top) != sorted(set(top)):
            yield "wrong", f"aux layer ids {top} are sorted and deduplicated before use"
        counted = raw.get("num_aux_hidden_states") or nested
        if len(top) != 3 and not counted and flat(raw).get("model_type") != "qwen3":
            yield "refused", f"{len(top)} aux layers need num_aux_hidden_states in config.json"
        if nested and [k + 1 for k in nested] != list(top):
            yield (
                "wrong",
                f"aux layer ids {top} are hs[] indices here, while eagle_config says {nested}, which in "
                f"its own numbering is {[k + 1 for k in nested]}: one of them is off by one",
            )
    elif nested:
        yield (
            "wrong",
            "aux layer ids only in eagle_config: the present runner ignores them and aux layers the default "
            "layers (harmless only if these are the default ones)",
        )


def _vllm_norms(raw: Config, tensors: Tensors) -> Findings:
    if wrapped(raw) and raw.get("norm_before_residual") is None:
        yield "note", "norm_before_residual is absent and counts as true in this layout"
    if raw.get("norm_output") and not wrapped(raw):
        yield (
            "note",
            "norm_output feeds the normed state back; SpecForge writes the same key and means "
            "another thing",
        )


def _sglang_eagle3(raw: Config, tensors: Tensors) -> Findings:
    if wrapped(raw):
        yield "refused", "the speculators layout; export with --format eagle3"
        return
    yield from architecture(SGLANG_EAGLE3, NOT_IN_SGLANG, architectures_of(raw))
    if "draft_vocab_size" not in raw:
        yield "refused", "config.json has no draft_vocab_size"
    elif raw["draft_vocab_size"] is None and "lm_head.weight" in tensors:
        yield "wrong", "draft_vocab_size null: the target's head is used, not lm_head.weight"
    if raw.get("tie_word_embeddings"):
        yield "refused", "tie_word_embeddings must be false"
    if raw.get("norm_before_residual"):
        yield "wrong", "norm_before_residual is not implemented: the plain function is served"
    biased = sorted(n for n in tensors if "self_attn" in n and n.endswith(".bias"))
    biased = [name for name in biased if has_values(tensors[name])]
    if biased:
        yield "wrong", f"{', '.join(biased)}: attention biases are skipped"
    if "fc.bias" in tensors and not raw.get("bias") and has_values(tensors["fc.bias"]):
        yield "wrong", "fc.bias is skipped"
    if "midlayer.self_attn.q_norm.weight" in tensors:
        yield "wrong", "q_norm and k_norm are skipped"
    if "embed_tokens.weight" in tensors and "target_hidden_size" not in raw:
        yield "note", "embed_tokens.weight is ignored: the target's embedding is used"
    if raw.get(TOP) and not _nested(raw, TOP):
        yield "wrong", "aux layer ids only at the top level: the default layers are auxiliary"


def _llama_cpp(raw: Config, tensors: Tensors) -> Findings:
    """Its converter: layer ids and norms from the top level of config.json, biases nowhere."""
    plain, speculators = flat(raw), wrapped(raw)
    yield from architecture(LLAMA_CPP, NOT_IN_LLAMA_CPP, architectures_of(raw))
    if "draft_vocab_size" not in plain or plain.get("num_hidden_layers") != 1:
        yield (
            "refused",
            "its converter knows an EAGLE-3 draft by draft_vocab_size and num_hidden_layers 1",
        )
    aux_layers = raw.get(TOP)
    if aux_layers and len(aux_layers) != 3:
        yield "refused", f"{len(aux_layers)} aux layer ids; it takes exactly three"
    if _nested(raw, TOP) and not aux_layers:
        yield "wrong", "aux layer ids only in eagle_config: the default layers are auxiliary"
    if _norm_before_fc(raw) and not raw.get("norm_before_fc"):
        yield "refused", "norm_before_fc is read at the top level of config.json only"
    if plain.get("fc_norm"):
        yield "refused", "fc_norm: it has no such tensors"
    if speculators and raw.get("norm_before_residual") is None:
        yield "wrong", "norm_before_residual is absent and counts as false; this layout means true"
    if plain.get("norm_output"):
        yield "wrong", "norm_output is ignored: the state before the norm is fed back"
    if plain.get("hidden_act", "silu") != "silu":
        yield "wrong", f"hidden_act '{plain['hidden_act']}' is ignored: silu is computed"
    unplaced = sorted(n for n in tensors if n.endswith((".bias", "q_norm.weight", "k_norm.weight")))
    if unplaced:
        yield "refused", f"{', '.join(unplaced[:3])}: it has no such tensors"
    rope = plain.get("rope_parameters") or plain.get("rope_scaling") or {}
    if "mrope_section" in rope:
        yield "unknown", "mrope in a draft is not known to redraft's rules"
    rows, vocab = _head_rows(raw, tensors)
    if "d2t" not in tensors and rows != (raw.get(TARGET_ROWS) or vocab):
        yield "refused", f"no d2t for a head of {rows} rows, which are not the target's vocabulary"


def _llama_cpp_target(raw: Config, tensors: Tensors) -> Findings:
    """What it does with the target: keeps the inputs of its layers in some architectures only."""
    model_type, layer_count = raw.get(TARGET_TYPE), raw.get(TARGET_LAYERS)
    if model_type in NOT_LLAMA_CPP_TARGETS:
        yield "refused", f"it keeps no layers' states of a target of model_type '{model_type}'"
    elif model_type is not None and model_type not in LLAMA_CPP_TARGETS:
        yield "unknown", f"a target of model_type '{model_type}' is not known to redraft's rules"
    if layer_count is not None and layer_count in (raw.get(TOP) or ()):
        yield (
            "wrong",
            f"aux layer id {layer_count} is the state after the last layer, which it does not keep: the draft "
            "reads numbers that nothing has set",
        )


def _llama_cpp_slots(raw: Config, tensors: Tensors) -> Findings:
    yield (
        "note",
        "with more than one slot (--parallel) its default drafting loses acceptance, half of it at four: "
        "start it with --no-spec-draft-backend-sampling",
    )


def _norm_before_fc(raw: Config) -> bool:
    nested = _nested(raw, "norm_before_fc")
    return bool(flat(raw).get("norm_before_fc") if nested is None else nested)


def _without_default_aux_layers(raw: Config) -> Config:
    """The config without aux layer ids, where all that it has name the layers auxiliary anyway."""
    nested = raw.get("eagle_config") or {}
    named = [tuple(raw[TOP])] if raw.get(TOP) else []
    named += [tuple(k + 1 for k in nested[TOP])] if nested.get(TOP) else []
    if raw.get(TARGET_LAYERS) is None:
        return raw
    try:
        default = default_aux_layers(raw[TARGET_LAYERS])
    except UserError:  # a target too shallow for them
        return raw
    if any(aux_layers != default for aux_layers in named):
        return raw
    kept = {key: value for key, value in raw.items() if key != TOP}
    if nested:
        kept["eagle_config"] = {key: value for key, value in nested.items() if key != TOP}
    return kept


ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": (
        _vllm_architecture,
        missing(_needed),
        surplus(KNOWN, "refused"),
        _layers,
        _fc_width,
        _vllm_vocabulary,
        _no_map,
        _target_rows,
        _map_values("wrong"),
        _vllm_aux_layers,
        vllm_biases(LAYER),
        _vllm_norms,
        vllm_window,
        silu,
    ),
    "sglang": (
        _sglang_eagle3,
        missing(_needed),
        surplus(KNOWN, "wrong"),
        _layers,
        _fc_width,
        _no_map,
        _target_rows,
        _map_values("wrong"),
        no_window,
        silu,
    ),
    "llama.cpp": (
        _llama_cpp,
        _llama_cpp_target,
        _llama_cpp_slots,
        missing(_needed, "refused"),
        surplus(KNOWN, "refused"),
        _map_values("refused"),
        no_window,
    ),
    "transformers": (through_redraft,),
}
