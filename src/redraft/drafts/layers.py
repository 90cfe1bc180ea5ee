"""The building blocks drafts share: RMS norm, gated FFN with a place for an expert, RoPE, attention.

Shapes: B batch, T tokens, N query heads, G key/value heads, C head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 as Llama does.

    With an `offset` of 1 the weight counts from there, x / rms(x) * (1 + weight), and the product is computed in
    float32 as well, as Gemma and Qwen3.5 do.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = F.rms_norm(wide, (x.shape[-1],), eps=self.eps)
        if self.offset:
            return ((self.weight.to(wide.dtype) + self.offset) * scaled).to(x.dtype)
        return self.weight * scaled.to(x.dtype)


class GatedFFN(nn.Module):
    """down(act(gate(x)) * up(x)): a sum over neurons, so it can be widened by concatenation.

    `private` is the expert next to the shared neurons: y = shared(x) + private(x).
    """

    def __init__(self, hidden: int, width: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.activation = activation
        self.private: GatedFFN | None = None

    @property
    def width(self) -> int:
        return self.gate_proj.out_features

    def forward(self, x: Tensor) -> Tensor:
        neurons = ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)
        y: Tensor = self.down_proj(neurons)
        return y if self.private is None else y + self.private(x)


class Rotary(nn.Module):
    """Rotary position embedding; frequencies come from Transformers, so scaled variants are theirs."""

    def __init__(self, config: Any):
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rotary = LlamaRotaryEmbedding(config)
        # Not a buffer: a draft cast to bf16 keeps exact frequencies, as engines do.
        self.inv_freq: Tensor = rotary.inv_freq.double().cpu()
        self.scaling = float(rotary.attention_scaling)
        self.table: tuple[Tensor, Tensor] | None = None

    def forward(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [length, C] of positions 0..length-1 in the dtype and device of `like`.

        The angles are computed in float64 whatever dtype the draft computes in.
        """
        table = self.table
        if (
            table is None
            or table[0].shape[0] < length
            or table[0].dtype != like.dtype
            or table[0].device != like.device
        ):
            size = 1 << max(length - 1, 255).bit_length()
            # The table outlives this call, so it must not be an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                angles = torch.outer(torch.arange(size), self.inv_freq)
                angles = torch.cat([angles, angles], dim=-1)
                table = (
                    (angles.cos() * self.scaling).to(device=like.device, dtype=like.dtype),
                    (angles.sin() * self.scaling).to(device=like.device, dtype=like.dtype),
                )
            self.table = table
        return table[0][:length], table[1][:length]


def rotate(x_BNTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Apply RoPE in the half-split layout of Llama checkpoints, to as many first elements as there are angles."""
    size = cos_TC.shape[-1]
    if size < x_BNTC.shape[-1]:
        turned, rest = x_BNTC[..., :size], x_BNTC[..., size:]
        return torch.cat([rotate(turned, cos_TC, sin_TC), rest], dim=-1)
    half = size // 2
    turned = torch.cat([-x_BNTC[..., half:], x_BNTC[..., :half]], dim=-1)
    return x_BNTC * cos_TC + turned * sin_TC


def causal_attention(
    q_BNTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, window: int | None = None
) -> Tensor:
    """Causal attention where queries are the last positions of the keys.

    With a `window` each query sees that many positions, its own included.
    """
    queries, keys = q_BNTC.shape[2], k_BGTC.shape[2]
    windowed = window is not None and window < keys
    if not windowed and (queries == keys or queries == 1):
        return F.scaled_dot_product_attention(
            q_BNTC, k_BGTC, v_BGTC, is_causal=queries > 1, enable_gqa=True
        )
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BNTC.device).tril(keys - queries)
    if windowed:
        mask = mask.triu(keys - queries - (window or 0) + 1)
    return masked_attention(q_BNTC, k_BGTC, v_BGTC, mask)


def masked_attention(q_BNTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, seen: Tensor) -> Tensor:
    """Attention to the keys that `seen` (bool, [B, 1, T, keys] or fewer dimensions) marks."""
    return F.scaled_dot_product_attention(q_BNTC, k_BGTC, v_BGTC, attn_mask=seen, enable_gqa=True)
