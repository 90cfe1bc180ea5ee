"""Rules about engines' loaders that several kinds of draft share (see `checkpoints/engine_rules.py`).

Names of tensors are as a kind's `canonical` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from ..kind import Config, Rule, Tensors
from .engine_names import MODEL_TYPES
from .layer import QKV, SLIDING, has_values

Findings = Iterator[tuple[str, str]]
TARGET_ROWS = "(the target's) vocab_size"
TARGET_LAYERS = "(the target's) num_hidden_layers"
TARGET_TYPE = "(the target's) model_type"
"""Not keys of any config.json: where `judge` tells rules about the target."""
DEFAULT_LAYERS = 32
"""What Llama and Qwen3 configs of Transformers have where num_hidden_layers is absent."""


def flat(raw: Config) -> Config:
    """The layer's own keys next to the others, whatever the layout."""
    return {**(raw.get("transformer_layer_config") or {}), **raw}


def architecture(
    served: Collection[str], others: Collection[str], names: Sequence[str]
) -> Findings:
    """What an engine does with the first of `names`; `others` are those it is known to refuse."""
    if not names or names[0] in others:
        yield "refused", f"architectures {list(names)}; it serves {', '.join(sorted(served))}"
    elif names[0] not in served:
        yield "unknown", f"architecture {names[0]} is not known to redraft's rules"


def missing(needed: Callable[[Config], list[str]], level: str = "wrong") -> Rule:
    """Tensors that are not there: an engine refuses the file, or takes whatever was in memory."""

    def rule(raw: Config, tensors: Tensors) -> Findings:
        absent = [name for name in needed(raw) if name not in tensors]
        if absent and level == "refused":
            yield level, f"{', '.join(absent)} missing"
        elif absent:
            yield level, f"loads without {', '.join(absent)} and runs on uninitialised values"

    return rule


def surplus(known: tuple[str, ...], level: str) -> Rule:
    """Tensors that an engine has no place for: `known` are how names begin; biases are judged apart."""
    does = "is skipped" if level == "wrong" else "in the file, which it has no place for"

    def rule(raw: Config, tensors: Tensors) -> Findings:
        others = sorted(n for n in tensors if not n.startswith(known) and not n.endswith(".bias"))
        if others:
            yield level, f"{', '.join(others[:3])} {does}"

    return rule


def layers(raw: Config, tensors: Tensors) -> Findings:
    made = flat(raw).get("num_hidden_layers") or DEFAULT_LAYERS
    if made > 1:
        yield (
            "wrong",
            f"makes {made} layers (num_hidden_layers) of which the file fills one; the others run "
            "on uninitialised values",
        )


def no_window(raw: Config, tensors: Tensors) -> Findings:
    plain = flat(raw)
    slides = SLIDING in (plain.get("layer_types") or [])[:1] or plain.get("use_sliding_window")
    if plain.get("sliding_window") and slides:
        yield "wrong", "the sliding window is ignored: attention sees everything"


def silu(raw: Config, tensors: Tensors) -> Findings:
    act = flat(raw).get("hidden_act", "silu")
    if act != "silu":
        yield "refused", f"hidden_act '{act}'; only silu"


def vllm_model_type(raw: Config, tensors: Tensors) -> Findings:
    model_type = raw.get("model_type")
    if model_type is None:
        yield "refused", "config.json has no model_type"
    elif model_type not in MODEL_TYPES:
        yield "unknown", f"model_type '{model_type}' is not known to redraft's rules"


def vllm_biases(layer: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Findings:
        plain = flat(raw)
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


def vllm_window(raw: Config, tensors: Tensors) -> Findings:
    plain = flat(raw)
    asked = plain.get("use_sliding_window") and plain.get("sliding_window")
    if asked and not plain.get("layer_types") and plain.get("model_type") != "qwen3":
        yield "wrong", "use_sliding_window without layer_types: attention sees everything"


def through_redraft(raw: Config, tensors: Tensors) -> Findings:
    yield "note", "has no EAGLE drafts of its own: redraft.generate runs them inside its generate"


def unknown_attention(raw: Config, tensors: Tensors) -> list[str]:
    """What keeps rules from judging: a kind of attention that they do not know."""
    if raw.get("kv_lora_rank") or any("kv_a_proj" in name for name in tensors):
        return ["multi-head latent attention (kv_lora_rank) is not known to redraft's rules"]
    return []
