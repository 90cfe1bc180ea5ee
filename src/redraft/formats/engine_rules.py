"""What each engine does with a draft folder: reads it, refuses it, or serves something else.

Verification hides every mistake here: the text stays right and only acceptance falls. The rules
are facts about the engines' loaders (vLLM 0.32 run here; SGLang 0.5.23 and llama.cpp's converter
read, not run; those of token LMs all read). They look at config.json and tensors as stored, so a
broken folder can be judged that redraft's own readers refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..target import default_taps
from . import eagle, eagle3, speculators
from .layer import QKV

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
TOP = "eagle_aux_hidden_state_layer_ids"
"""The key of the tap ids: hs[] indices at the top level, layers in `eagle_config`."""
TARGET_ROWS = "(the target's) vocab_size"
"""Not a key of any config.json: where `judge` tells rules about the target."""
_PROJECTIONS = [*(f"self_attn.{name}" for name in (*QKV, "o_proj"))]
_FFN = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
_LAYER = [f"{name}.weight" for name in (*_PROJECTIONS, *_FFN, "post_attention_layernorm")]
_NORMS = ["input_layernorm.weight", "hidden_norm.weight"]
REQUIRED = {
    "eagle": ["fc.weight", *(f"{eagle.LAYER}{name}" for name in _LAYER)],
    "eagle3": [
        "fc.weight",
        "norm.weight",
        *(f"{eagle3.LAYER}{name}" for name in (*_LAYER, *_NORMS)),
    ],
}
"""What every engine needs of a kind, where config.json does not say it. The readers derive theirs from config.json, which may itself
be broken here."""
CANONICAL: dict[str, Callable[[str], str]] = {
    "eagle3": eagle3.canonical,
    "eagle": lambda name: name.removeprefix("model."),
    "token_lm": lambda name: name,
}
"""A stored tensor's name as the rules have it."""


@dataclass(frozen=True)
class Finding:
    """One thing an engine does with a folder.

    `level`: a harmless "note"; "wrong" where it loads and serves another function without a word;
    "refused" where it does not load.
    """

    engine: str
    level: str
    says: str


Rule = Callable[[Config, Tensors], Iterator[tuple[str, str]]]


def judge(
    kind: str,
    raw: Config,
    stored: Tensors,
    num_layers: int | None = None,
    vocab_size: int | None = None,
) -> list[Finding]:
    """What every engine does with a folder of this kind, engine by engine.

    With the target's `num_layers`, tap ids that name the default layers are known to be harmless;
    with its `vocab_size`, whether a token LM's is the same.
    """
    if num_layers is not None:
        raw = _without_default_taps(raw, num_layers)
    if vocab_size is not None:
        raw = {**raw, TARGET_ROWS: vocab_size}
    canonical = CANONICAL[kind]
    named = {canonical(name): tensor for name, tensor in stored.items()}
    return [
        Finding(engine, level, says)
        for engine, rules in RULES[kind].items()
        for rule in rules
        for level, says in rule(raw, named)
    ]


# -- EAGLE-3 -------------------------------------------------------------------------------------


def _missing(kind: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
        absent = [name for name in REQUIRED[kind] if name not in tensors]
        if absent:
            yield "wrong", f"loads without {', '.join(absent)} and runs on uninitialised values"

    return rule


def _vllm_architecture(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    if speculators.recognises(raw):
        model_type = (raw.get("transformer_layer_config") or {}).get("model_type", "llama")
        if model_type not in ("llama", "qwen3"):
            yield "refused", f"a speculators draft of model_type '{model_type}' (llama, qwen3)"
        if not ((raw.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path"):
            yield "refused", "speculators_config.verifier.name_or_path is missing"
        return
    known = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM", eagle3.QWEN3)
    names = raw.get("architectures") or []
    if not names or names[0] not in known:
        yield "refused", f"architectures {names}; for EAGLE-3 one of {', '.join(known)}"
    if "model_type" not in raw:
        yield "refused", "config.json has no model_type"


def _vllm_vocabulary(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    plain = _flat(raw)
    if "d2t" in tensors and plain.get("draft_vocab_size") in (None, plain.get("vocab_size")):
        yield "refused", "d2t with a draft_vocab_size that is missing or equal to vocab_size"
    if "lm_head.weight" not in tensors:
        reduced = plain.get("draft_vocab_size") not in (None, plain.get("vocab_size"))
        if reduced:
            yield "wrong", "no lm_head.weight for the reduced vocabulary: uninitialised values"
        else:
            yield "note", "no lm_head.weight: the target's head is used"


def _map_values(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    vocab = _flat(raw).get("vocab_size")
    if d2t is None or d2t.dtype.is_floating_point:
        return
    ids = d2t.long() + torch.arange(len(d2t))
    spoken = None if t2d is None else t2d.bool().nonzero().flatten()
    outside = vocab is not None and len(ids) and int(ids.max()) >= vocab
    if outside or (spoken is not None and not torch.equal(spoken, ids)):
        yield (
            "wrong",
            "d2t is read as offsets (target id = row + d2t) and leads to other tokens than "
            f"{'t2d marks' if not outside else 'the vocabulary has'}: absolute ids?",
        )


def _vllm_taps(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    top, nested = raw.get(TOP), (raw.get("eagle_config") or {}).get(TOP)
    if top:
        if list(top) != sorted(set(top)):
            yield "wrong", f"tap ids {top} are sorted and deduplicated before use"
        if len(top) != 3 and not raw.get("num_aux_hidden_states") and not nested:
            yield "refused", f"{len(top)} taps need num_aux_hidden_states in config.json"
        if nested and [k + 1 for k in nested] != list(top):
            yield (
                "wrong",
                f"tap ids {top} are hs[] indices here, while eagle_config says {nested}, which in "
                f"its own numbering is {[k + 1 for k in nested]}: one of them is off by one",
            )
    elif nested:
        yield (
            "wrong",
            "tap ids only in eagle_config: the present runner ignores them and taps the default "
            "layers (harmless only if these are the default ones)",
        )


def _vllm_biases(layer: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
        plain = _flat(raw)
        if plain.get("bias"):
            yield "wrong", "bias: true is read as attention biases, which nothing fills"
        expected = any(plain.get(key) for key in ("attention_bias", "bias", "qkv_bias"))
        for name in sorted(tensors):
            read = expected and name.startswith(layer)
            if name.endswith(".bias") and not read and bool(tensors[name].any()):
                yield "wrong", f"{name} is dropped without a word"
        absent = [
            name
            for name in (f"{layer}self_attn.{n}.bias" for n in (*QKV, "o_proj"))
            if name not in tensors
        ]
        if plain.get("attention_bias") and absent:
            yield "wrong", f"attention_bias without {', '.join(absent)}: uninitialised values"

    return rule


def _vllm_norms(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    if speculators.recognises(raw) and "norm_before_residual" not in raw:
        yield "note", "norm_before_residual is absent and counts as true in this layout"
    if raw.get("norm_output") and not speculators.recognises(raw):
        yield (
            "note",
            "norm_output feeds the normed state back; SpecForge writes the same key and means "
            "another thing",
        )


def _silu(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    act = _flat(raw).get("hidden_act", "silu")
    if act != "silu":
        yield "refused", f"hidden_act '{act}'; only silu"


def _sglang_eagle3(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    if speculators.recognises(raw):
        yield "refused", "the speculators layout; export with --format eagle3"
        return
    names = raw.get("architectures") or []
    if names[:1] != [eagle3.ARCHITECTURE]:
        yield "refused", f"architectures {names}; only {eagle3.ARCHITECTURE}"
    if "draft_vocab_size" not in raw:
        yield "refused", "config.json has no draft_vocab_size"
    if raw.get("tie_word_embeddings"):
        yield "refused", "tie_word_embeddings must be false"
    if raw.get("norm_before_residual"):
        yield "wrong", "norm_before_residual is not implemented: the plain function is served"
    biased = [n for n in tensors if "self_attn" in n and n.endswith(".bias") and tensors[n].any()]
    if biased:
        yield "wrong", f"{', '.join(sorted(biased))}: attention biases are skipped"
    if "midlayer.self_attn.q_norm.weight" in tensors:
        yield "wrong", "q_norm and k_norm are skipped"
    if "embed_tokens.weight" in tensors and "target_hidden_size" not in raw:
        yield "note", "embed_tokens.weight is ignored: the target's embedding is used"
    top, nested = raw.get(TOP), (raw.get("eagle_config") or {}).get(TOP)
    if top and not nested:
        yield "wrong", "tap ids only at the top level: the default layers are tapped"


def _llama_cpp(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    if _flat(raw).get("draft_vocab_size") is None:
        yield "refused", "the converter needs draft_vocab_size"
    if eagle3.read_taps(raw) is not None:
        yield "wrong", "the converter taps the default layers whatever config.json says"
    for key in ("norm_before_fc", "fc_norm", "norm_output", "attention_bias"):
        if raw.get(key):
            yield "wrong", f"{key} is not known to the converter"


# -- EAGLE-1/2 -----------------------------------------------------------------------------------


def _vllm_eagle(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    known = ("LlamaForCausalLM", "EagleLlamaForCausalLM")
    names = raw.get("architectures") or []
    if not names or names[0] not in known:
        yield "refused", f"architectures {names}; for EAGLE-1/2 one of {', '.join(known)}"
    if "model_type" not in raw:
        yield "refused", "config.json has no model_type"
    for name in ("layers.0.input_layernorm.weight", "norm.weight", "lm_head.weight"):
        if name in tensors:
            yield "refused", f"{name} in the file"
    if "embed_tokens.weight" in tensors:
        yield "note", "embed_tokens.weight is kept where it differs from the target's"


def _sglang_eagle(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    names = raw.get("architectures") or []
    known = ("LlamaForCausalLMEagle", "Qwen2ForCausalLMEagle", "MistralForCausalLMEagle")
    if not names or names[0] not in known:
        yield "refused", f"architectures {names}; one of {', '.join(known)}"
    if "fc.bias" not in tensors:
        yield "wrong", "no fc.bias: fc has one all the same, at random values"
    if raw.get("bias"):
        yield "wrong", "bias: true is read as attention biases, which nothing fills"
    if "embed_tokens.weight" in tensors:
        yield "note", "embed_tokens.weight is ignored: the target's embedding is used"


def _no_eagle(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    yield "refused", "EAGLE-1/2 drafts are not supported"


def _through_redraft(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    yield "note", "has no EAGLE drafts of its own: redraft.generate runs them inside its generate"


# -- token LMs -----------------------------------------------------------------------------------


def _equal_rows(what: str, most_apart: int, remedy: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
        own, theirs = int(raw.get("vocab_size") or 0), raw.get(TARGET_ROWS)
        allowed = f"within {most_apart} of" if most_apart else "equal to"
        if theirs is None:
            yield "note", f"{what} needs a vocab_size {allowed} the target's (here {own})"
        elif abs(theirs - own) > most_apart:
            yield (
                "refused",
                f"{what} needs a vocab_size {allowed} the target's {theirs}, here it is {own}; "
                f"{remedy}",
            )

    return rule


PAD = "pad the draft's embedding and head with rows of zeros, where it is the narrower one"


def _without_default_taps(raw: Config, num_layers: int) -> Config:
    """The config without tap ids, where all that it has name the layers tapped anyway."""
    nested = raw.get("eagle_config") or {}
    named = [tuple(raw[TOP])] if raw.get(TOP) else []
    named += [tuple(k + 1 for k in nested[TOP])] if nested.get(TOP) else []
    try:
        default = default_taps(num_layers)
    except UserError:  # a target too shallow for them
        return raw
    if any(taps != default for taps in named):
        return raw
    kept = {key: value for key, value in raw.items() if key != TOP}
    if nested:
        kept["eagle_config"] = {key: value for key, value in nested.items() if key != TOP}
    return kept


def _flat(raw: Config) -> Config:
    """The layer's own keys beside the others, whatever the layout."""
    return {**(raw.get("transformer_layer_config") or {}), **raw}


RULES: dict[str, dict[str, list[Rule]]] = {
    "eagle3": {
        "vllm": [
            _vllm_architecture,
            _missing("eagle3"),
            _vllm_vocabulary,
            _map_values,
            _vllm_taps,
            _vllm_biases("midlayer."),
            _vllm_norms,
            _silu,
        ],
        "sglang": [_sglang_eagle3, _missing("eagle3"), _map_values],
        "llama.cpp": [_llama_cpp, _map_values],
        "transformers": [_through_redraft],
    },
    "eagle": {
        "vllm": [_vllm_eagle, _missing("eagle"), _vllm_biases("layers.0."), _silu],
        "sglang": [_sglang_eagle, _missing("eagle")],
        "llama.cpp": [_no_eagle],
        "transformers": [_through_redraft],
    },
    "token_lm": {
        "vllm": [_equal_rows("method draft_model", 0, PAD)],
        "sglang": [_equal_rows("STANDALONE", 0, PAD)],
        "llama.cpp": [_equal_rows("a draft model", 128, PAD)],
        "transformers": [
            _equal_rows("assistant_model=", 0, "redraft.generate cuts or fills the difference")
        ],
    },
}
