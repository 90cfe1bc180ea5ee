"""The functions of SGLang 0.5.23's `sgl_kernel` that its CPU path calls, which no wheel has, in PyTorch.

For chains (top-k 1), full causal attention and one process. `rows` [B] are places in `table` [R, P], which holds
the cache slot of each position. Lengths are as SGLang counts them: `lens` [B] are positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# -- indices ---------------------------------------------------------------------------------------


def _spans(*each: Tensor) -> Iterator[tuple[int, ...]]:
    return zip(*(one.tolist() for one in each), strict=True)


def assign_req_to_token_pool_cpu(
    rows: Tensor, table: Tensor, start: Tensor, end: Tensor, slots: Tensor, pool: int
) -> None:
    at = 0
    for row, begin, stop in _spans(rows, start, end):
        table[row, begin:stop] = slots[at : at + stop - begin].to(table.dtype)
        at += stop - begin


def assign_extend_cache_locs_cpu(
    rows: Tensor, table: Tensor, start: Tensor, end: Tensor, out: Tensor, pool: int
) -> None:
    at = 0
    for row, begin, stop in _spans(rows, start, end):
        out[at : at + stop - begin] = table[row, begin:stop].to(out.dtype)
        at += stop - begin


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor, table: Tensor, lens: Tensor, out: Tensor, pool: int, topk: int, steps: int
) -> None:
    count = topk * steps
    for i, (row, length) in enumerate(_spans(rows, lens)):
        out[i * count : (i + 1) * count] = table[row, length : length + count].to(out.dtype)


def fill_bonus_tokens_cpu(tokens: Tensor, lens: Tensor, bonus: Tensor, stride: int) -> None:
    flat = tokens.reshape(-1)
    for i, (length,) in enumerate(_spans(lens)):
        bonus[i] = flat[stride * i + length - 1]


def fill_accept_out_cache_loc_cpu(index: Tensor, slots: Tensor, out: Tensor) -> None:
    flat = index.reshape(-1)
    kept = flat[flat > -1].long()
    out[: len(kept)] = slots[kept]


def rotate_input_ids_cpu(
    ids: Tensor, start: Tensor, lens: Tensor, new: Tensor, select: Tensor | None = None
) -> None:
    for i, (begin, length) in enumerate(_spans(start, lens)):
        if length > 1:
            ids[begin : begin + length - 1] = ids[begin + 1 : begin + length].clone()
        if length > 0:
            ids[begin + length - 1 if select is None else int(select[i])] = new[i]


def copy_all_layer_kv_cache_cpu(
    addresses: Tensor, strides: Tensor, target: Tensor, source: Tensor
) -> None:
    for address, stride in _spans(addresses.view(torch.int64), strides):
        base = address % (1 << 64)
        kept = [ctypes.string_at(base + slot * stride, stride) for slot in source.tolist()]
        for slot, content in zip(target.tolist(), kept, strict=True):
            ctypes.memmove(base + slot * stride, content, stride)


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    choice = target_predict.reshape(-1)
    for b in range(candidates.shape[0]):
        last, kept, node = int(retrive_index[b, 0]), 0, 0
        accept_index[b, 0] = last
        for _ in range(1, accept_index.shape[1]):
            node = int(retrive_next_token[b, node])
            while node != -1 and int(candidates[b, node]) != int(choice[last]):
                node = int(retrive_next_sibling[b, node])
            if node == -1:
                break
            predicts[last] = choice[last]
            last, kept = int(retrive_index[b, node]), kept + 1
            accept_index[b, kept] = last
        accept_token_num[b] = kept
        predicts[last] = choice[last]


def build_tree_kernel_efficient_cpu(
    parents: Tensor,
    selected: Tensor,
    lens: Tensor,
    mask: Tensor,
    positions: Tensor,
    index: Tensor,
    following: Tensor,
    sibling: Tensor,
    topk: int,
    depth: int,
    drafted: int,
    mode: int,
) -> None:
    """`mode` 1 masks among the drafted tokens alone, 0 with the positions before them too."""
    if topk != 1:
        raise NotImplementedError("chains only")
    triangle = torch.ones(drafted, drafted, dtype=torch.bool).tril()
    at = 0
    for b, (length,) in enumerate(_spans(lens)):
        own = slice(b * drafted, (b + 1) * drafted)
        positions.view(-1)[own] = torch.arange(length, length + drafted)
        index.view(-1)[own] = torch.arange(own.start, own.stop)
        following.view(-1)[own] = torch.tensor([*range(1, drafted), -1])
        before = 0 if mode == 1 else length
        for row in triangle:
            mask.view(-1)[at + before : at + before + drafted] = row
            at += before + drafted
    sibling.fill_(-1)


def build_draft_decode_metadata_cpu(
    table: Tensor, rows: Tensor, lens: Tensor, topk: int, steps: int, pool: int
) -> Tensor:
    """For each row and candidate its positions' slots [B * topk, P]."""
    out = torch.empty(len(rows) * topk, pool, dtype=table.dtype)
    for b, (row, length) in enumerate(_spans(rows, lens)):
        for t in range(topk):
            drafted = table[row, length + t * steps : length + (t + 1) * steps]
            out[b * topk + t, : length + steps] = torch.cat([table[row, :length], drafted])
    return out


# -- attention -------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Queries [T, H, D], keys and values [P, G, D], mask [T, P] -> [T, H, D]."""
    first, second, third = (one.transpose(0, 1).unsqueeze(0) for one in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        first, second, third, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _check(cap: float, cross: bool, window: int, sinks: Any, scales: tuple[float, float]) -> None:
    if cap or cross or window > 0 or sinks is not None or scales != (1.0, 1.0):
        raise NotImplementedError("full causal attention only")


def decode_attention_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: float,
    value_scale: float,
    out: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    slots: Tensor,
    logits: Tensor,
    table: Tensor,
    rows: Tensor,
    lens: Tensor,
    scale: float,
    cap: float,
    cross: bool,
    window: int,
    encoder_lens: Any,
    sinks: Any,
) -> None:
    """One query for each row; its key and value are stored first."""
    _check(cap, cross, window, sinks, (key_scale, value_scale))
    if k is not None and v is not None:
        keys[slots] = k.view(-1, *keys.shape[1:])
        values[slots] = v.view(-1, *values.shape[1:])
    for i, (row, length) in enumerate(_spans(rows, lens)):
        own = table[row, :length].long()
        out[i : i + 1] = _attend(q[i : i + 1], keys[own], values[own], scale, None)


def extend_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: float,
    value_scale: float,
    table: Tensor,
    rows: Tensor,
    lens: Tensor,
    extend_lens: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    cap: float,
    cross: bool,
    window: int,
    encoder_lens: Any,
    sinks: Any,
    tree_mask: Tensor | None,
    causal: bool,
) -> None:
    """The last `extend_lens` of each row's `lens` positions are queries."""
    _check(cap, cross, window, sinks, (key_scale, value_scale))
    if tree_mask is not None or not causal:
        raise NotImplementedError("chains only")
    for row, length, count, start in _spans(rows, lens, extend_lens, starts):
        before, new = table[row, : length - count].long(), slice(start, start + count)
        all_keys = torch.cat([keys[before], k[new].view(count, *keys.shape[1:])])
        all_values = torch.cat([values[before], v[new].view(count, *values.shape[1:])])
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        out[new] = _attend(q[new], all_keys, all_values, scale, mask)


torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu
