"""Draft folders with one value changed: the changes, and what a folder must do with any of them.

It is read and built, inspected, bound to a target and run, or refused by a sentence; nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import read_draft
from redraft.core.errors import UserError
from redraft.models.target import Target
from redraft.report.terminal import print_inspection

Change = tuple[str, Callable[[Path], None]]
VALUES: list[Any] = [
    0,
    -1,
    1,
    3,
    7,
    64,
    "x",
    "",
    None,
    0.0,
    1.5,
    -2.0,
    1e300,
    [],
    [1, 2],
    ["x"],
    [[1]],
    {},
    {"a": 1},
    True,
    False,
    1 << 31,
    1 << 40,
    10**30,
    float("nan"),
    float("inf"),
    "nan",
]
ROPES: list[Any] = [
    {"rope_type": "llama3"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": "x"},
    {"rope_type": "yarn"},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
    {"type": "linear"},
    {"type": "linear", "factor": 0},
    {"type": "linear", "factor": 2.0},
    {"type": "mrope", "mrope_section": [1, 1, 2]},
    {"type": "mrope", "mrope_section": "x"},
    {"type": "su", "short_factor": [1.0], "long_factor": [1.0]},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "foo", "factor": 2},
    {"rope_type": ["default"]},
    {"rope_type": "default", "rope_theta": "a"},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": None},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default"}},
]
EXTRA = (
    "architectures",
    "attention_bias",
    "bias",
    "draft_vocab_size",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
    "fc_norm",
    "head_dim",
    "hidden_act",
    "kv_lora_rank",
    "layer_types",
    "logit_scale",
    "model_type",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "num_aux_hidden_states",
    "num_key_value_heads",
    "partial_rotary_factor",
    "qkv_bias",
    "quantization_config",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "speculators_config",
    "speculators_model_type",
    "target_hidden_size",
    "text_config",
    "tie_word_embeddings",
    "transformer_layer_config",
    "use_sliding_window",
)
"""Keys that some layout has, tried on every folder."""
INDEXES: list[Any] = [
    *VALUES[:19],
    *({"weight_map": value} for value in (None, [], "x", {}, {"a": 1}, {"a": ".."}, {"a": ""})),
    *({"weight_map": {"fc.weight": name}} for name in ("../../etc/passwd", "none", "config.json")),
    {"weight_map": {"fc.weight": "model.safetensors", "absent": "model.safetensors"}},
    {"weight_map": {"fc.weight": "a\0b"}},
]
BYTES = (
    b"",
    b"\xff" * 8,
    b"\xff" * 64,
    (1 << 40).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}",
    (10).to_bytes(8, "little") + b'{"a":[[[[[',
    (70).to_bytes(8, "little")
    + b'{"fc.weight":{"dtype":"F4","shape":[4,4],"data_offsets":[0,8]}}'.ljust(70)
    + bytes(8),
)
DEEP = b'{"rope_parameters": ' * 200 + b"{}" + b"}" * 200
TEXTS = (b"", b"{", b"[]", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a": NaN}', DEEP)


def changes(config: dict[str, Any]) -> Iterator[Change]:
    """Every folder with one thing changed; what it is, and the change."""
    for key in sorted({*config, *EXTRA}):
        for value in [*VALUES, *([{key: v} for v in VALUES[:4]] if "config" in key else [])]:
            yield f"{key}={value!r}", _setting((key,), value)
    for outer, inner in config.items():
        for key in inner if isinstance(inner, dict) else ():
            for value in VALUES:
                yield f"{outer}.{key}={value!r}", _setting((outer, key), value)
    for key in ("rope_parameters", "rope_scaling"):
        for value in ROPES:
            yield f"{key}={value!r}", _setting((key,), value)
    for value in INDEXES:
        yield f"index={value!r}", _indexed(value)
    for value in [*VALUES, {"tensors_hash": 1}, {"tokenizer_hash": []}, {"config": "x"}]:
        yield f"redraft.json={value!r}", _written("redraft.json", json.dumps(value).encode())
    for raw in BYTES:
        yield f"weights {raw[:12]!r}", _written("model.safetensors", raw)
    for raw in TEXTS:
        yield f"config.json {raw[:12]!r}", _written("config.json", raw)


def sample(config: dict[str, Any], count: int, seed: int) -> list[Change]:
    """Some of them, the same ones for the same seed."""
    return random.Random(seed).sample(list(changes(config)), count)


def _setting(path: tuple[str, ...], value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        inside = config
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
        if path[0] == "rope_scaling":
            config.pop("rope_parameters", None)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _indexed(value: Any) -> Callable[[Path], None]:
    """An index next to a whole file is not read, so that file gets another name."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(value))

    return change


def _written(name: str, raw: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(raw) and None


def outcome(folder: Path, target: Target) -> tuple[str, str]:
    """`runs` or `refused`, alone and with the target; raises what a folder must not raise."""
    alone = _attempt(lambda: read_draft(str(folder)).build() and None)
    bound = _attempt(lambda: _run(folder, target))
    found = _attempt(lambda: print_inspection(inspect_draft(str(folder))))
    if found == "runs" and alone == "refused":
        assert inspect_draft(str(folder)).unreadable, "inspected as if all were well"
    return alone, bound


def _run(folder: Path, target: Target) -> None:
    draft = read_draft(str(folder)).build(target, torch.float32)
    tokens = torch.randint(5, 200, (1, 10), generator=torch.Generator().manual_seed(0))
    features = torch.randn(1, 10, draft.feature_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rolled = [draft.logits(states) for states in draft.rollout(tokens, features, 0, 3)]
    assert all(not bool(logits.isnan().any()) for logits in rolled), "NaN"


def _attempt(work: Callable[[], None]) -> str:
    try:
        work()
    except UserError:
        return "refused"
    return "runs"
