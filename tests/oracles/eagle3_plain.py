"""EAGLE-3 written down a second time, position by position with explicit sums.

Shares no code with the package: plain tensors by checkpoint name, NumPy-style loops, one chain at
a time. Slow on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate one head vector by its position, pairing element i with i + half."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        c, s = math.cos(angle), math.sin(angle)
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i + half] * c + x[i] * s
    return out


class PlainEagle3:
    """A draft as tensors `w` by name; keys and values kept as Python lists."""

    def __init__(
        self, w: dict[str, Tensor], embedding: Tensor, heads: int, kv: int, eps: float, theta: float
    ):
        self.w, self.embedding = w, embedding
        self.heads, self.kv, self.eps, self.theta = heads, kv, eps, theta
        self.cache: list[tuple[list[Tensor], list[Tensor]]] = []

    def first(self, token: int, features: Tensor, position: int) -> Tensor:
        """A pair built from the target's features."""
        return self.layer(token, self.w["fc.weight"] @ features, position)

    def layer(self, token: int, state: Tensor, position: int) -> Tensor:
        """One pair through the layer; appends its key and value to the cache."""
        w, p = self.w, "midlayer."
        embedded = rms(self.embedding[token], w[p + "input_layernorm.weight"], self.eps)
        hidden = rms(state, w[p + "hidden_norm.weight"], self.eps)
        x = torch.cat([embedded, hidden])
        q, k, v = (w[f"{p}self_attn.{n}_proj.weight"] @ x for n in "qkv")
        size = len(q) // self.heads
        keys = [rope(part, position, self.theta) for part in k.split(size)]
        self.cache.append((keys, list(v.split(size))))
        attended = []
        for head, part in enumerate(q.split(size)):
            query = rope(part, position, self.theta)
            group = head // (self.heads // self.kv)
            scores = torch.stack([query @ ks[group] for ks, _ in self.cache]) / math.sqrt(size)
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            attended.append(
                sum(a * vs[group] for a, (_, vs) in zip(weights, self.cache, strict=True))
            )
        state = state + w[p + "self_attn.o_proj.weight"] @ torch.cat(attended)
        x = rms(state, w[p + "post_attention_layernorm.weight"], self.eps)
        gate = w[p + "mlp.gate_proj.weight"] @ x
        up = w[p + "mlp.up_proj.weight"] @ x
        return state + w[p + "mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)

    def logits(self, state: Tensor) -> Tensor:
        return self.w["lm_head.weight"] @ rms(state, self.w["norm.weight"], self.eps)


def chain_logits(
    plain: PlainEagle3, tokens: list[int], features: Tensor, start: int, steps: int
) -> list[Tensor]:
    """Logits of a chain that starts at pair `start` and continues on its own states."""
    plain.cache = []
    for i in range(start + 1):
        state = plain.first(tokens[i + 1], features[i], i)
    out = [plain.logits(state)]
    for step in range(1, steps):
        state = plain.layer(tokens[start + 1 + step], state, start + step)
        out.append(plain.logits(state))
    return out
