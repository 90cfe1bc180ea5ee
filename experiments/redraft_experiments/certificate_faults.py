"""Faults that `redraft bench certificates` injects where they happen: in files and flags of a real server.

A row says what is done and which cause is to be named. The tensors of a draft are changed in its folder, after it was
written, so that no code of redraft looks at them again.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from redraft.checkpoints.load import StoredDraft
from redraft.core.folders import WEIGHTS
from redraft.serving.certificate_check import (
    ANOTHER_ARITHMETIC,
    ANOTHER_TARGET,
    ANOTHER_TEMPLATE,
    VARYING_K,
)
from redraft.serving.engine import Serving

Tensors = dict[str, Tensor]
LAYER = "midlayer."
NORMS = (
    f"{LAYER}input_layernorm",
    f"{LAYER}hidden_norm",
    f"{LAYER}post_attention_layernorm",
    "norm",
)
MATRICES = (
    *("fc", "lm_head"),
    *(f"{LAYER}self_attn.{part}_proj" for part in "qkvo"),
    *(f"{LAYER}mlp.{part}_proj" for part in ("gate", "up", "down")),
)
"""The tensors of an EAGLE-3 draft, of which an engine can lose any."""
LOST_IN_BOTH = ("norm", "fc", f"{LAYER}self_attn.o_proj", f"{LAYER}mlp.down_proj")
"""Tensors that are lost in vLLM too."""
ANOTHER = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
LLAMACPP, VLLM = "llama.cpp", "vllm"


@dataclass(frozen=True)
class Models:
    """The right target and draft, and a fine-tune of the target."""

    target: Path
    draft: StoredDraft
    tuned: Path
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Injected:
    """A row. `inject` gives what is served; it may write into a folder that is its own. `wanted` is the cause, `engines` those
    that can have this fault."""

    wanted: str
    inject: Callable[[Models, Serving, Path], Serving]
    engines: tuple[str, ...] = (LLAMACPP, VLLM)


def _with_draft(what: Serving, draft: Path) -> Serving:
    """The same with another draft."""
    assert what.speculation is not None
    return dataclasses.replace(
        what, speculation=dataclasses.replace(what.speculation, draft=str(draft))
    )


def _tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Models, Serving, Path], Serving]:
    def inject(models: Models, what: Serving, folder: Path) -> Serving:
        models.draft.save(folder / "draft")
        file = folder / "draft" / WEIGHTS
        save_file(change(load_file(file)), file, {"format": "pt"})
        return _with_draft(what, folder / "draft")

    return inject


def _lost(name: str) -> Injected:
    engines = (LLAMACPP, VLLM) if name in LOST_IN_BOTH else (LLAMACPP,)
    value = 1.0 if name in NORMS else 0.0
    weight = f"{name}.weight"
    return Injected(
        f"missing tensor {weight}",
        _tensors(lambda tensors: {**tensors, weight: torch.full_like(tensors[weight], value)}),
        engines,
    )


def _as_ids(tensors: Tensors) -> Tensors:
    """What makes an engine that adds the row read the offsets as ids."""
    offsets = tensors["d2t"]
    return {**tensors, "d2t": offsets - torch.arange(len(offsets))}


def _stored_as(name: str) -> Callable[[Tensors], Tensors]:
    """Matrices in a type of llama.cpp and back, by the package gguf."""

    def change(tensors: Tensors) -> Tensors:
        from gguf import GGMLQuantizationType, dequantize, quantize

        kind = GGMLQuantizationType[name]
        return {
            key: t
            if t.dim() < 2
            else torch.from_numpy(dequantize(quantize(t.float().numpy(), kind), kind)).to(t.dtype)
            for key, t in tensors.items()
        }

    return change


def _configured(**changes: object) -> Callable[[Models, Serving, Path], Serving]:
    def inject(models: Models, what: Serving, folder: Path) -> Serving:
        config = dataclasses.replace(models.draft.config, **changes)
        dataclasses.replace(models.draft, config=config).save(folder / "draft")
        return _with_draft(what, folder / "draft")

    return inject


def _layers(by: int) -> Callable[[Models, Serving, Path], Serving]:
    def inject(models: Models, what: Serving, folder: Path) -> Serving:
        shifted = tuple(layer + by for layer in models.layers)
        return _configured(aux_layers=shifted)(models, what, folder)

    return inject


def _full_head(models: Models, what: Serving, folder: Path) -> Serving:
    """The target's head over its whole vocabulary, and no map."""
    target = load_file(models.target / WEIGHTS)
    head = target.get("lm_head.weight", target["model.embed_tokens.weight"])
    tensors = {n: t for n, t in models.draft.tensors.items() if n not in ("d2t", "t2d")}
    config = dataclasses.replace(models.draft.config, draft_vocab_size=len(head))
    made = dataclasses.replace(
        models.draft, config=config, tensors={**tensors, "lm_head.weight": head}
    )
    made.save(folder / "draft")
    return _with_draft(what, folder / "draft")


def _tuned(models: Models, what: Serving, folder: Path) -> Serving:
    return dataclasses.replace(what, target=str(models.tuned))


def _template(models: Models, what: Serving, folder: Path) -> Serving:
    shutil.copytree(models.target, folder / "target")
    (folder / "target" / "chat_template.jinja").write_text(ANOTHER)
    return dataclasses.replace(what, target=str(folder / "target"))


def _flags(*flags: str) -> Callable[[Models, Serving, Path], Serving]:
    return lambda models, what, folder: dataclasses.replace(what, flags=(*what.flags, *flags))


INJECTED: dict[str, Injected] = {
    "layer ids one up": Injected("aux layers +1", _layers(1)),
    "layer ids one down": Injected("aux layers -1", _layers(-1)),
    "the target's head": Injected("head of the target", _full_head),
    "offsets as ids": Injected("d2t as absolute ids", _tensors(_as_ids)),
    "no offsets": Injected(
        "d2t ignored", _tensors(lambda t: {**t, "d2t": torch.zeros_like(t["d2t"])})
    ),
    "norm before the residual": Injected(
        "norm_before_residual read wrongly", _configured(norm_before_residual=True)
    ),
    "rotary base 10,000": Injected(
        "another rotary base",
        _configured(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    ),
    **{f"no {name}": _lost(name) for name in (*NORMS, *MATRICES)},
    "8 bits": Injected("draft quantised to 8 bits", _tensors(_stored_as("Q8_0")), (LLAMACPP,)),
    "4 bits": Injected("draft quantised to 4 bits", _tensors(_stored_as("Q4_0"))),
    "a fine-tune": Injected(ANOTHER_TARGET, _tuned),
    "a template": Injected(ANOTHER_TEMPLATE, _template),
    "a cache of 4 bits": Injected(
        ANOTHER_ARITHMETIC, _flags("-ctk", "q4_0", "-ctv", "q4_0", "-fa", "on"), (LLAMACPP,)
    ),
    "a cache of 8 bits": Injected(ANOTHER_ARITHMETIC, _flags("--kv-cache-dtype", "fp8"), (VLLM,)),
    "a least probability": Injected(VARYING_K, _flags("--spec-draft-p-min", "0.9"), (LLAMACPP,)),
}
