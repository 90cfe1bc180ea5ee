"""Attention of all chains at one rollout step, a block of starts at a time.

Start i sees the true pairs 0..i and then its own chain's keys, one per step so far, the present one
included: a diagonal. Equal to decoding each chain alone. Neither pass holds scores of more than one
block of starts: the forward pass keeps the log of each softmax's sum, from which the backward pass
makes a block's weights again (FlashAttention, arXiv 2205.14135, appendix B).

Shapes: B batch, S chain starts, T pairs that they see, N query heads, G key/value heads, R = N / G
queries per key/value head, C head_dim, M steps of a chain so far.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES = 1 << 22
"""Scores held at once: a block has so many starts as keep to it (one at least)."""


def chain_attention(
    q_BNSC: Tensor,
    base_k_BGTC: Tensor,
    base_v_BGTC: Tensor,
    own_k: Sequence[Tensor],
    own_v: Sequence[Tensor],
    first: int,
    window: int | None = None,
) -> Tensor:
    """Attention [B, N, S, C] of chain starts first..first+S-1 at one rollout step.

    `base_k` and `base_v` are those of the true pairs, `own_k[m]` [B, G, >=S, C] those of step m of
    the chains, aligned by start. A `window` counts from the present step's position, so it leaves
    out pairs on the far side, and in the end the chain's own.
    """
    B, N, S, C = q_BNSC.shape
    G, step = base_k_BGTC.shape[1], len(own_k)
    if window is not None:
        own_k, own_v = own_k[-window:], own_v[-window:]
    reach = (
        None if window is None else window - step
    )  # true pairs that a start sees, its own included
    shape = _Shape(first, reach, len(own_k))
    q_BGRSC = q_BNSC.view(B, G, N // G, S, C)
    dtype = q_BNSC.dtype
    seen = [base_k_BGTC[:, :, : first + S], base_v_BGTC[:, :, : first + S]]
    seen += [part[:, :, :S] for part in (*own_k, *own_v)]
    seen = [part.to(dtype) for part in seen]
    with _without_autocast(q_BNSC.device.type):
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q_BGRSC, *seen)):
            out: Tensor = _ChainAttention.apply(shape, q_BGRSC, *seen)  # type: ignore[no-untyped-call]
        else:
            out, _ = _forward(shape, q_BGRSC, seen)
    return out.view(B, N, S, C)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Where there are shapes only, PyTorch has no autocast at all."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@dataclass(frozen=True)
class _Shape:
    first: int
    reach: int | None
    steps: int

    def blocks(self, q_BGRSC: Tensor) -> Iterator[tuple[slice, slice]]:
        """Blocks of starts, and the true pairs that any of a block's starts sees."""
        B, G, R, S, _ = q_BGRSC.shape
        size = max(1, SCORES // (B * G * R * (self.first + S)))
        for begin in range(0, S, size):
            end = min(begin + size, S)
            low = 0
            if self.reach is not None:
                low = max(0, self.first + begin + 1 - self.reach)
            yield slice(begin, end), slice(low, max(self.first + end, low))

    def hidden(self, starts: slice, pairs: slice, device: torch.device) -> Tensor:
        """Which of the pairs a start does not see, bool [starts, pairs]."""
        at_S1 = torch.arange(starts.start, starts.stop, device=device)[:, None] + self.first
        pair_T = torch.arange(pairs.start, pairs.stop, device=device)
        hidden = pair_T > at_S1
        return hidden if self.reach is None else hidden | (pair_T <= at_S1 - self.reach)

    def scores(self, q_BGRSC: Tensor, k_BGTC: Tensor, starts: slice, pairs: slice) -> Tensor:
        """Scaled scores [B, G, R, starts, pairs], those of hidden pairs -inf."""
        q = q_BGRSC[:, :, :, starts].flatten(2, 3) / math.sqrt(q_BGRSC.shape[-1])
        found = q @ k_BGTC[:, :, pairs].transpose(-1, -2)
        found = _by_query(found.to(_wide(found)), q_BGRSC.shape[2])
        hidden = self.hidden(starts, pairs, found.device)
        return found.masked_fill_(hidden, -math.inf)


def _forward(shape: _Shape, q_BGRSC: Tensor, seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What each start attends to [B, G, R, S, C], and the log of its softmax's sum [B, G, R, S]."""
    k, v, own_k, own_v = _apart(shape, seen)
    out = torch.empty_like(q_BGRSC)
    log_sum = q_BGRSC.new_empty(q_BGRSC.shape[:-1], dtype=_wide(q_BGRSC))
    own_scores = _own_scores(q_BGRSC, own_k)
    for starts, pairs in shape.blocks(q_BGRSC):
        scores = shape.scores(q_BGRSC, k, starts, pairs)
        own = own_scores[:, :, :, starts]
        total = torch.logaddexp(scores.logsumexp(-1), own.logsumexp(-1))
        weights = scores.sub_(total[..., None]).exp_().to(v.dtype)
        block = _by_query(weights.flatten(2, 3) @ v[:, :, pairs], q_BGRSC.shape[2])
        for m, value in enumerate(own_v):
            weight = (own[..., m] - total).exp().to(v.dtype)
            block += weight[..., None] * value[:, :, None, starts]
        out[:, :, :, starts], log_sum[:, :, :, starts] = block, total
    return out, log_sum


class _ChainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: _Shape, q_BGRSC: Tensor, *seen: Tensor) -> Tensor:
        out, log_sum = _forward(shape, q_BGRSC, seen)
        ctx.shape = shape
        ctx.save_for_backward(q_BGRSC, out, log_sum, *seen)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, log_sum, *seen = ctx.saved_tensors
        shape: _Shape = ctx.shape
        k, v, own_k, own_v = _apart(shape, seen)
        scale = 1 / math.sqrt(q.shape[-1])
        grad_q, *grads = (torch.zeros_like(tensor) for tensor in (q, *seen))
        grad_k, grad_v, grad_own_k, grad_own_v = _apart(shape, grads)
        # Of a softmax's input: weight * (gradient of the weight - its mean under the weights).
        mean = (grad * out).sum(-1, dtype=log_sum.dtype)
        own_scores = _own_scores(q, own_k)
        for m, (key, value) in enumerate(zip(own_k, own_v, strict=True)):
            weight = (own_scores[..., m] - log_sum).exp()
            of_weight = (grad * value[:, :, None]).sum(-1, dtype=log_sum.dtype)
            of_score = (scale * weight * (of_weight - mean)).to(q.dtype)[..., None]
            grad_q += of_score * key[:, :, None]
            grad_own_k[m].copy_((of_score * q).sum(2))
            grad_own_v[m].copy_((weight.to(q.dtype)[..., None] * grad).sum(2))
        for starts, pairs in shape.blocks(q):
            weights = shape.scores(q, k, starts, pairs).sub_(log_sum[:, :, :, starts, None]).exp_()
            of_out = grad[:, :, :, starts].flatten(2, 3)
            grad_v[:, :, pairs] += weights.to(q.dtype).flatten(2, 3).transpose(-1, -2) @ of_out
            of_weights = _by_query(of_out @ v[:, :, pairs].transpose(-1, -2), q.shape[2])
            of_scores = weights.mul_(of_weights - mean[:, :, :, starts, None]).mul_(scale)
            of_scores = of_scores.to(q.dtype).flatten(2, 3)
            block = of_scores @ k[:, :, pairs]
            grad_q[:, :, :, starts] += _by_query(block, q.shape[2])
            queries = q[:, :, :, starts].flatten(2, 3)
            grad_k[:, :, pairs] += of_scores.transpose(-1, -2) @ queries
        return None, grad_q, *grads


def _apart(
    shape: _Shape, seen: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]:
    k, v, *own = seen
    return k, v, own[: shape.steps], own[shape.steps :]


def _by_query(x: Tensor, R: int) -> Tensor:
    """[B, G, R * starts, ...] as [B, G, R, starts, ...]."""
    return x.view(*x.shape[:2], R, x.shape[2] // R, x.shape[-1])


def _own_scores(q_BGRSC: Tensor, own_k: Sequence[Tensor]) -> Tensor:
    """Scaled scores of each start with its own chain's keys [B, G, R, S, M]."""
    q = q_BGRSC / math.sqrt(q_BGRSC.shape[-1])
    found = [(q * key[:, :, None]).sum(-1) for key in own_k]
    return torch.stack(found, -1).to(_wide(q_BGRSC))


def _wide(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
