"""Rotary embeddings of a draft, from either generation of config keys.

`rope_parameters` (Transformers 5) and `rope_scaling` with `rope_theta` say the same. The types of TYPES
are computed, by Transformers' own functions; every other is refused by name.

`mrope` gives a token three positions. On text all three are equal, so it is the default embedding
here; its keys are kept for engines that serve images.
"""

from __future__ import annotations

from typing import Any

from ...core.config_values import ConfigValues
from ...core.errors import UserError

CONTEXT = "original_max_position_embeddings"
TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""The numbers that a type needs."""
OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
BY_LAYER_TYPE = ("full_attention", "sliding_attention")


def read_rope(config: ConfigValues) -> dict[str, Any]:
    """The rope settings under the keys of `rope_parameters`, complete for their type.

    Raises UserError for a type that is not computed, and for a number that is missing or wrong.
    """
    named = config.inside("rope_parameters")
    scaling = config.inside("rope_scaling")  # wins over the other, as in Transformers
    rope = ConfigValues(_given(scaling) or _given(named), f"{config.where}, rotary embedding")
    kind = rope.text("rope_type", "default")
    if any(rope.given(key) for key in BY_LAYER_TYPE):
        kind = "one per layer type"
    if kind == "mrope":
        kind = "default"
    if kind not in TYPES:
        raise UserError(
            f"{config.where}: a draft with '{kind}' rotary embeddings is not supported; redraft "
            f"computes {', '.join(TYPES)} and mrope"
        )
    usual = config.number("rope_theta", named.number("rope_theta", 10000.0))
    theta = rope.number("rope_theta", usual)
    read: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    read |= {key: rope.number(key) for key in TYPES[kind]}
    if kind in ("llama3", "yarn"):
        context = config.positive("max_position_embeddings", 2048)
        read[CONTEXT] = rope.positive(CONTEXT, config.positive(CONTEXT, context))
    if kind == "yarn":
        read |= {key: rope.number(key) for key in OPTIONAL if rope.given(key)}
        read |= {"truncate": rope.flag("truncate")} if rope.given("truncate") else {}
    if kind == "llama3" and read["low_freq_factor"] >= read["high_freq_factor"]:
        rope.refuse("low_freq_factor", f"less than high_freq_factor {read['high_freq_factor']}")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        rope.refuse("partial_rotary_factor", "1")
    if rope.given("mrope_section"):
        read["mrope_section"] = list(rope.integers("mrope_section"))
    if rope.given("mrope_interleaved"):
        read["mrope_interleaved"] = rope.flag("mrope_interleaved")
    return read


def _given(values: ConfigValues) -> dict[str, Any]:
    """The keys that are not null, the old name of the type as the new one."""
    given = {key: value for key, value in values.raw.items() if value is not None}
    old = given.pop("type", None)
    return given if old is None else {"rope_type": old, **given}
