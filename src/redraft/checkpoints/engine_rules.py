"""What each engine does with a draft folder: reads it, refuses it, or serves something else.

Verification hides every mistake here: the text stays right and only acceptance falls. The rules
are facts about the engines' loaders (vLLM 0.32 run here; SGLang 0.5.23 and llama.cpp 11434, its
converter and its loader, read, not run; those of token LMs all read). They look at config.json and
tensors as stored, so a broken folder can be judged that redraft's own readers refuse.

Where no rule applies, nothing is claimed: a name, a value or a kind of attention that the rules do
not know is a finding of level "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config_values import architectures_of, is_object, shown
from ..core.errors import UserError
from ..models.target import default_aux_layers
from . import eagle3, speculators
from .eagle3 import TAPS as TOP
from .engine_names import (
    KEYS,
    LLAMA_CPP,
    MODEL_TYPES,
    NOT_IN_LLAMA_CPP,
    NOT_IN_SGLANG,
    NOT_IN_VLLM_EAGLE,
    OPTIONAL,
    REQUIRED,
    SGLANG_EAGLE,
    SGLANG_EAGLE3,
    VLLM_EAGLE,
    VLLM_EAGLE3,
)
from .layer import QKV, SLIDING, has_values

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Findings = Iterator[tuple[str, str]]
Rule = Callable[[Config, Tensors], Findings]
TARGET_ROWS = "(the target's) vocab_size"
"""Not a key of any config.json: where `judge` tells rules about the target."""
DEFAULT_LAYERS = 32
"""What Llama and Qwen3 configs of Transformers have where num_hidden_layers is absent."""
CANONICAL: dict[str, Callable[[str], str]] = {
    "eagle3": eagle3.canonical,
    "eagle": lambda name: name.removeprefix("model."),
    "token_lm": lambda name: name,
}
"""A stored tensor's name as the rules have it."""


@dataclass(frozen=True)
class Finding:
    """One thing an engine does with a folder.

    `level`: a harmless "note"; "unknown" where the rules cannot tell; "wrong" where it loads and
    serves another function without a word; "refused" where it does not load.
    """

    engine: str
    level: str
    says: str


def judge(
    kind: str,
    raw: Config,
    stored: Tensors,
    num_layers: int | None = None,
    vocab_size: int | None = None,
) -> list[Finding]:
    """What every engine does with a folder of this kind, engine by engine.

    With the target's `num_layers`, aux layer ids that name the default layers are known to be harmless;
    with its `vocab_size`, whether a draft's rows are as many.
    """
    raw, unread = _readable(raw)
    if num_layers is not None:
        raw = _without_default_aux_layers(raw, num_layers)
    if vocab_size is not None:
        raw = {**raw, TARGET_ROWS: vocab_size}
    canonical = CANONICAL[kind]
    named = {canonical(name): tensor for name, tensor in stored.items()}
    if kind != "token_lm" and (raw.get("kv_lora_rank") or any("kv_a_proj" in n for n in named)):
        unread.append("multi-head latent attention (kv_lora_rank) is not known to redraft's rules")
    return [
        Finding(engine, level, says)
        for engine, rules in RULES[kind].items()
        for level, says in (
            [("unknown", says) for says in unread]
            or [found for rule in rules for found in rule(raw, named)]
        )
    ]


def _readable(raw: Config) -> tuple[dict[str, Any], list[str]]:
    """A config without the values that are none of their key's kind, and a sentence for each."""
    kept: dict[str, Any] = {}
    unread: list[str] = []
    for key, value in raw.items():
        if value is None or key not in KEYS:
            kept[key] = value
        elif not KEYS[key](value):
            unread.append(f"{key} in config.json is {shown(value)}, which no rule can judge")
        elif is_object(value):
            kept[key], more = _readable(value)
            unread += more
        else:
            kept[key] = value
    return kept, unread


def _flat(raw: Config) -> Config:
    """The layer's own keys next to the others, whatever the layout."""
    return {**(raw.get("transformer_layer_config") or {}), **raw}


def _nested(raw: Config, key: str) -> Any:
    """A key of `eagle_config`."""
    return (raw.get("eagle_config") or {}).get(key)


# -- names, tensors, layers ----------------------------------------------------------------------


def _architecture(
    served: Collection[str], others: Collection[str], names: Sequence[str]
) -> Findings:
    """What an engine does with the first of `names`; `others` are those it is known to refuse."""
    if not names or names[0] in others:
        yield "refused", f"architectures {list(names)}; it serves {', '.join(sorted(served))}"
    elif names[0] not in served:
        yield "unknown", f"architecture {names[0]} is not known to redraft's rules"


def _missing(kind: str, level: str = "wrong") -> Rule:
    """Tensors that are not there: an engine refuses the file, or takes whatever was in memory."""

    def rule(raw: Config, tensors: Tensors) -> Findings:
        needed = list(REQUIRED[kind])
        if kind == "eagle3":
            needed += ["input_norm.weight"] if _norm_before_fc(raw) else []
            needed += ["fc_norm.0.weight"] if _flat(raw).get("fc_norm") else []
        absent = [name for name in needed if name not in tensors]
        if absent and level == "refused":
            yield level, f"{', '.join(absent)} missing"
        elif absent:
            yield level, f"loads without {', '.join(absent)} and runs on uninitialised values"

    return rule


def _norm_before_fc(raw: Config) -> bool:
    nested = _nested(raw, "norm_before_fc")
    return bool(_flat(raw).get("norm_before_fc") if nested is None else nested)


def _surplus(kind: str, level: str) -> Rule:
    """Tensors that an engine has no place for; biases are judged apart."""
    does = "is skipped" if level == "wrong" else "in the file, which it has no place for"

    def rule(raw: Config, tensors: Tensors) -> Findings:
        known = (*REQUIRED[kind], *OPTIONAL[kind])
        surplus = sorted(n for n in tensors if not n.startswith(known) and not n.endswith(".bias"))
        if surplus:
            yield level, f"{', '.join(surplus[:3])} {does}"

    return rule


def _layers(raw: Config, tensors: Tensors) -> Findings:
    layers = _flat(raw).get("num_hidden_layers")
    if layers is None and speculators.recognises(raw):
        yield "refused", "no num_hidden_layers in transformer_layer_config"
    elif (layers := layers or DEFAULT_LAYERS) > 1:
        yield (
            "wrong",
            f"makes {layers} layers (num_hidden_layers) of which the file fills one; the others run "
            "on uninitialised values",
        )


def _fc_width(raw: Config, tensors: Tensors) -> Findings:
    plain, fc = _flat(raw), tensors.get("fc.weight")
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


def _no_window(raw: Config, tensors: Tensors) -> Findings:
    plain = _flat(raw)
    slides = SLIDING in (plain.get("layer_types") or [])[:1] or plain.get("use_sliding_window")
    if plain.get("sliding_window") and slides:
        yield "wrong", "the sliding window is ignored: attention sees everything"


def _silu(raw: Config, tensors: Tensors) -> Findings:
    act = _flat(raw).get("hidden_act", "silu")
    if act != "silu":
        yield "refused", f"hidden_act '{act}'; only silu"


# -- vocabularies --------------------------------------------------------------------------------


def _head_rows(raw: Config, tensors: Tensors) -> tuple[int, int]:
    """Rows of the draft's head, and of the vocabulary that it was made for; 0 where not known."""
    plain = _flat(raw)
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
        vocab = _flat(raw).get("vocab_size")
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


# -- EAGLE-3 -------------------------------------------------------------------------------------


def _vllm_architecture(raw: Config, tensors: Tensors) -> Findings:
    if speculators.recognises(raw):
        model_type = _flat(raw).get("model_type") or "llama"
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
        yield from _architecture(VLLM_EAGLE3, (), names)
        yield from _vllm_model_type(raw, tensors)
        layer = VLLM_EAGLE3.get(names[0], "llama") if names else "llama"
    head_norms = "midlayer.self_attn.q_norm.weight" in tensors
    if head_norms and layer != "qwen3":
        yield "refused", f"q_norm and k_norm in the file; only {eagle3.QWEN3} has them"
    if layer == "qwen3" and not head_norms:
        yield "wrong", "its Qwen3 layer norms q and k, and the file has no q_norm and k_norm"


def _vllm_model_type(raw: Config, tensors: Tensors) -> Findings:
    model_type = raw.get("model_type")
    if model_type is None:
        yield "refused", "config.json has no model_type"
    elif model_type not in MODEL_TYPES:
        yield "unknown", f"model_type '{model_type}' is not known to redraft's rules"


def _vllm_vocabulary(raw: Config, tensors: Tensors) -> Findings:
    plain = _flat(raw)
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
        if len(top) != 3 and not counted and _flat(raw).get("model_type") != "qwen3":
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


def _vllm_biases(layer: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Findings:
        plain = _flat(raw)
        if plain.get("bias"):
            yield "wrong", "bias: true is read as attention biases, which nothing fills"
        expected = any(plain.get(key) for key in ("attention_bias", "bias", "qkv_bias"))
        for name in sorted(tensors):
            read = expected and name.startswith(layer)
            if name.endswith(".bias") and not read and has_values(tensors[name]):
                yield "wrong", f"{name} is dropped without a word"
        absent = [
            name
            for name in (f"{layer}self_attn.{n}.bias" for n in (*QKV, "o_proj"))
            if name not in tensors
        ]
        if plain.get("attention_bias") and absent:
            yield "wrong", f"attention_bias without {', '.join(absent)}: uninitialised values"

    return rule


def _vllm_norms(raw: Config, tensors: Tensors) -> Findings:
    if speculators.recognises(raw) and raw.get("norm_before_residual") is None:
        yield "note", "norm_before_residual is absent and counts as true in this layout"
    if raw.get("norm_output") and not speculators.recognises(raw):
        yield (
            "note",
            "norm_output feeds the normed state back; SpecForge writes the same key and means "
            "another thing",
        )


def _vllm_window(raw: Config, tensors: Tensors) -> Findings:
    plain = _flat(raw)
    asked = plain.get("use_sliding_window") and plain.get("sliding_window")
    if asked and not plain.get("layer_types") and plain.get("model_type") != "qwen3":
        yield "wrong", "use_sliding_window without layer_types: attention sees everything"


def _sglang_eagle3(raw: Config, tensors: Tensors) -> Findings:
    if speculators.recognises(raw):
        yield "refused", "the speculators layout; export with --format eagle3"
        return
    yield from _architecture(SGLANG_EAGLE3, NOT_IN_SGLANG, architectures_of(raw))
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
    """Build 11434: layer ids and norms from the top level of config.json, biases nowhere."""
    plain, wrapped = _flat(raw), speculators.recognises(raw)
    yield from _architecture(LLAMA_CPP, NOT_IN_LLAMA_CPP, architectures_of(raw))
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
    if wrapped and raw.get("norm_before_residual") is None:
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


# -- EAGLE-1/2 -----------------------------------------------------------------------------------


def _vllm_eagle(raw: Config, tensors: Tensors) -> Findings:
    yield from _architecture(VLLM_EAGLE, NOT_IN_VLLM_EAGLE, architectures_of(raw))
    yield from _vllm_model_type(raw, tensors)
    if "embed_tokens.weight" in tensors:
        yield "note", "embed_tokens.weight is kept where it differs from the target's"


def _sglang_eagle(raw: Config, tensors: Tensors) -> Findings:
    yield from _architecture(SGLANG_EAGLE, NOT_IN_SGLANG, architectures_of(raw))
    if "fc.bias" not in tensors:
        yield "wrong", "no fc.bias: fc has one all the same, at random values"
    if raw.get("bias"):
        yield "wrong", "bias: true is read as attention biases, which nothing fills"
    if "embed_tokens.weight" in tensors:
        yield "note", "embed_tokens.weight is ignored: the target's embedding is used"


def _no_routing(raw: Config, tensors: Tensors) -> Findings:
    if any("block_sparse_moe" in name for name in tensors):
        yield "refused", "routed experts (block_sparse_moe): it has no such layer"


def _no_eagle(raw: Config, tensors: Tensors) -> Findings:
    yield "refused", "EAGLE-1/2 drafts are not supported"


def _through_redraft(raw: Config, tensors: Tensors) -> Findings:
    yield "note", "has no EAGLE drafts of its own: redraft.generate runs them inside its generate"


# -- token LMs -----------------------------------------------------------------------------------


def _equal_rows(what: str, most_apart: int, remedy: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Findings:
        own, theirs = raw.get("vocab_size") or 0, raw.get(TARGET_ROWS)
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


def _without_default_aux_layers(raw: Config, num_layers: int) -> Config:
    """The config without aux layer ids, where all that it has name the layers auxiliary anyway."""
    nested = raw.get("eagle_config") or {}
    named = [tuple(raw[TOP])] if raw.get(TOP) else []
    named += [tuple(k + 1 for k in nested[TOP])] if nested.get(TOP) else []
    try:
        default = default_aux_layers(num_layers)
    except UserError:  # a target too shallow for them
        return raw
    if any(aux_layers != default for aux_layers in named):
        return raw
    kept = {key: value for key, value in raw.items() if key != TOP}
    if nested:
        kept["eagle_config"] = {key: value for key, value in nested.items() if key != TOP}
    return kept


RULES: dict[str, dict[str, list[Rule]]] = {
    "eagle3": {
        "vllm": [
            _vllm_architecture,
            _missing("eagle3"),
            _surplus("eagle3", "refused"),
            _layers,
            _fc_width,
            _vllm_vocabulary,
            _no_map,
            _target_rows,
            _map_values("wrong"),
            _vllm_aux_layers,
            _vllm_biases("midlayer."),
            _vllm_norms,
            _vllm_window,
            _silu,
        ],
        "sglang": [
            _sglang_eagle3,
            _missing("eagle3"),
            _surplus("eagle3", "wrong"),
            _layers,
            _fc_width,
            _no_map,
            _target_rows,
            _map_values("wrong"),
            _no_window,
            _silu,
        ],
        "llama.cpp": [
            _llama_cpp,
            _missing("eagle3", "refused"),
            _surplus("eagle3", "refused"),
            _map_values("refused"),
            _no_window,
        ],
        "transformers": [_through_redraft],
    },
    "eagle": {
        "vllm": [
            _vllm_eagle,
            _no_routing,
            _missing("eagle"),
            _surplus("eagle", "refused"),
            _layers,
            _vllm_biases("layers.0."),
            _vllm_window,
            _silu,
        ],
        "sglang": [
            _sglang_eagle,
            _no_routing,
            _missing("eagle"),
            _surplus("eagle", "wrong"),
            _layers,
            _no_window,
            _silu,
        ],
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
