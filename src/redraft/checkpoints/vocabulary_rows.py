"""A draft under a target whose vocabulary has other rows: tokens added at its end, or another padding.

Rows beyond a tokenizer's length mean nothing, and tools pad or cut them as they like. So a draft's surplus
rows are cut, and rows that it lacks are never proposed: an EAGLE-3 draft then speaks a reduced vocabulary,
the tokens it was made for (d2t, t2d), until it is trained with `vocab: remap`. The result is a
stock checkpoint with the target's number of rows.

Shapes: V vocabulary of the target, D of the draft, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.errors import UserError
from ..drafts.base import token_count, vocabulary_map
from ..drafts.eagle3 import Eagle3Config
from ..drafts.one_layer import LayerShape
from ..drafts.token_lm import MOST_PADDING
from ..models.target import Target
from .eagle3 import draft_vocabulary

Shape = TypeVar("Shape", bound=LayerShape)


def grew(target: Target, tokenizer_hash: str) -> bool:
    """Whether `target`'s tokenizer is the one of that hash with some tokens added at its end."""
    return tokenizer_hash in target.earlier_tokenizer_hashes


def may_have_grown(target: Target, vocab_size: int) -> bool:
    """Whether every token of `target` past the first `vocab_size` is one that was added to its tokenizer.

    As much as can be seen for a draft that records no tokenizer, as published ones do not.
    """
    past = {at for at in target.tokenizer.get_vocab().values() if at >= vocab_size}
    return bool(past) and past <= set(target.tokenizer.get_added_vocab().values())


def same_tokens(target: Target, rows: int, recorded: str | None) -> bool:
    """Whether the `rows` of a draft's vocabulary mean what the target's ids mean.

    Decided by the hash of the tokenizer that the draft was made for, where it records one. Else by
    what there is: a draft with a row for every token of the target's tokenizer, and as many rows
    as the target but for padding, or a target that has added tokens besides.
    """
    if recorded is not None:
        return recorded == target.tokenizer_hash() or grew(target, recorded)
    if rows >= min(token_count(target), target.vocab_size):
        return abs(rows - target.vocab_size) <= MOST_PADDING
    return may_have_grown(target, rows)


def with_rows_of(
    config: Shape, tensors: Mapping[str, Tensor], target: Target
) -> tuple[Shape, dict[str, Tensor]]:
    """Shape and tensors of a draft with the target's number of vocabulary rows."""
    V, found = target.vocab_size, dict(tensors)
    own = tensors.get("embed_tokens.weight")
    if own is not None:
        found["embed_tokens.weight"] = _embedding(own, target)
    sizes: dict[str, Any] = {"vocab_size": V}
    if isinstance(config, Eagle3Config):  # other kinds use the target's head
        vocab = draft_vocabulary(config, tensors)
        ids = torch.arange(config.vocab_size) if vocab is None else vocab
        kept = ids < V
        if not bool(kept.any()):
            raise UserError(f"none of the tokens that this draft says is among the target's {V}")
        if not bool(kept.all()):
            found["lm_head.weight"] = tensors["lm_head.weight"][kept]
        found = {name: t for name, t in found.items() if name not in ("d2t", "t2d")}
        sizes["draft_vocab_size"] = said = int(kept.sum())
        if said < V:
            found.update(vocabulary_map(ids[kept], V))
    return dataclasses.replace(config, **sizes), found


def _embedding(own: Tensor, target: Target) -> Tensor:
    """The draft's embedding rows, those it lacks being the target's; zeros where widths differ."""
    missing = target.vocab_size - len(own)
    if missing <= 0:
        return own[: target.vocab_size].clone()
    rest = target.embedding_VH[len(own) : target.vocab_size].detach().to("cpu", own.dtype)
    if rest.shape != (missing, own.shape[1]):
        rest = own.new_zeros(missing, own.shape[1])
    return torch.cat([own, rest])
