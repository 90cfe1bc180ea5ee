"""A second reading of a draft folder: the same function, written down again and read apart.

Shares no code with the networks in `drafts/` nor with the readers next to it: config.json and
safetensors are taken as the engines take them (their names, their defaults), and the forward pass
goes position by position in float64 with explicit sums. Slow on purpose: `redraft export --verify`
and the tests compare the fast path with it.

Shapes: vectors unless said otherwise; F concatenated features, H hidden, D draft vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...core.errors import UserError


class Reference:
    """A draft folder read as engines read it. `embedding` and `head` are the target's, [V, H]."""

    def __init__(self, folder: Path, embedding: Tensor, head: Tensor | None = None):
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        wrapped = "transformer_layer_config" in raw
        self.c: dict[str, Any] = {**raw.pop("transformer_layer_config", {}), **raw}
        self.c.setdefault("norm_before_residual", wrapped)
        self.w: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118
                    plain = name.removeprefix("model.").replace("midlayer.", "layers.0.")
                    self.w[plain] = stream.get_tensor(name)
        self.d2t = self.w.pop("d2t", None)
        self.w = {name: t.double() for name, t in self.w.items()}
        self.embedding = self.w.get("embed_tokens.weight", embedding.double())
        self.head = self.w.get("lm_head.weight", None if head is None else head.double())
        self.eagle3 = "layers.0.hidden_norm.weight" in self.w
        self.heads = int(self.c["num_attention_heads"])
        self.groups = int(self.c.get("num_key_value_heads") or self.heads)
        self.size = int(self.c.get("head_dim") or self.c["hidden_size"] // self.heads)
        self.eps = float(self.c.get("rms_norm_eps", 1e-6))
        slides = (self.c.get("layer_types") or [None])[0] == "sliding_attention"
        self.window = int(self.c["sliding_window"]) if slides else 1 << 60
        self.angles = rotary_frequencies(self.c, self.size)
        self.seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def chain_logits(
        self, tokens: Sequence[int], features_TF: Tensor, start: int, steps: int
    ) -> list[Tensor]:
        """Logits [D] of a chain from pair `start`, which continues on its own states."""
        self.seen = []
        state = features_TF[0]
        for i in range(start + 1):
            state = self.pair(tokens[i + 1], self.first(features_TF[i].double()), i)
        found = [self.logits(state)]
        for step in range(1, steps):
            state = self.pair(tokens[start + 1 + step], state, start + step)
            found.append(self.logits(state))
        return found

    def first(self, features: Tensor) -> Tensor:
        """The state in which a chain starts."""
        if not self.eagle3:
            return features
        if "input_norm.weight" in self.w:
            features = self.rms(features, "input_norm")
        norms = sorted(n for n in self.w if n.startswith("fc_norm."))
        if norms:
            parts = features.chunk(len(norms))
            normed = [self.rms(p, f"fc_norm.{k}") for k, p in enumerate(parts)]
            features = torch.cat(normed)
        return self.w["fc.weight"] @ features

    def pair(self, token: int, state: Tensor, position: int) -> Tensor:
        """One pair through the layer; remembers its key and value, returns the next state."""
        if self.eagle3:
            normed = self.rms(state, "layers.0.hidden_norm")
            embedded = self.rms(self.embedding[token], "layers.0.input_layernorm")
            x = torch.cat([embedded, normed])
            residual = normed if self.c.get("norm_before_residual") else state
        else:
            x = self.linear(torch.cat([self.embedding[token], state]), "fc")
            residual = x
        state = residual + self.attention(x, position)
        x = self.rms(state, "layers.0.post_attention_layernorm")
        gate = self.linear(x, "layers.0.mlp.gate_proj")
        up = self.linear(x, "layers.0.mlp.up_proj")
        state = state + self.linear(gate / (1 + torch.exp(-gate)) * up, "layers.0.mlp.down_proj")
        return self.rms(state, "norm") if self.c.get("norm_output") else state

    def attention(self, x: Tensor, position: int) -> Tensor:
        q, k, v = (
            list(self.linear(x, f"layers.0.self_attn.{n}_proj").view(-1, self.size).unbind())
            for n in "qkv"
        )
        if "layers.0.self_attn.q_norm.weight" in self.w:
            q = [self.rms(part, "layers.0.self_attn.q_norm") for part in q]
            k = [self.rms(part, "layers.0.self_attn.k_norm") for part in k]
        self.seen.append(([self.turn(part, position) for part in k], v))
        visible = self.seen[-self.window :] if self.window < len(self.seen) else self.seen
        mixed = []
        for head, part in enumerate(q):
            group = head // (self.heads // self.groups)
            query = self.turn(part, position)
            scores = torch.stack([query @ keys[group] for keys, _ in visible])
            shares = torch.exp(scores / math.sqrt(self.size))
            shares = shares / shares.sum()
            mixed.append(
                torch.stack(
                    [s * vs[group] for s, (_, vs) in zip(shares, visible, strict=True)]
                ).sum(0)
            )
        return self.linear(torch.cat(mixed), "layers.0.self_attn.o_proj")

    def logits(self, state: Tensor) -> Tensor:
        if self.head is None:
            raise UserError("this draft uses the target's head: give one to compare with")
        normed = self.eagle3 and not self.c.get("norm_output")
        return self.head @ (self.rms(state, "norm") if normed else state)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def rms(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.eps) * self.w[f"{name}.weight"]

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Rotate one head vector by its position, pairing element i with i + half."""
        half = len(x) // 2
        out = torch.empty_like(x)
        for i in range(half):
            cos, sin = math.cos(position * self.angles[i]), math.sin(position * self.angles[i])
            out[i] = x[i] * cos - x[i + half] * sin
            out[i + half] = x[i + half] * cos + x[i] * sin
        return out


def rotary_frequencies(config: dict[str, Any], size: int) -> list[float]:
    """Radians per position of each pair of elements.

    Llama 3's stretch (its published rule): wavelengths beyond the original context are divided
    by the factor, those well inside are left, those between are blended.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return plain
    factor = float(rope["factor"])
    if kind == "linear":
        return [angle / factor for angle in plain]
    if kind != "llama3":
        raise UserError(f"no second reading for rotary embeddings of type '{kind}'")
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    stretched = []
    for angle in plain:
        turns = original * angle / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        stretched.append((1 - blend) * angle / factor + blend * angle)
    return stretched
