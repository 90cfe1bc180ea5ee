"""Drafts under a target whose vocabulary has other rows: the embedding that a folder stores."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...models.target import Target
from ..kind import Named, Tensors

EMBEDDING = "embed_tokens.weight"


def with_embedding_rows(config: Any, tensors: Tensors, target: Target) -> Named:
    """Shape and tensors with the target's number of rows, for a kind whose head is the target's."""
    found = dict(tensors)
    if EMBEDDING in tensors:
        found[EMBEDDING] = _embedding(tensors[EMBEDDING], target)
    return dataclasses.replace(config, vocab_size=target.vocab_size), found


def _embedding(own: Tensor, target: Target) -> Tensor:
    """The draft's embedding rows, those it lacks being the target's; zeros where widths differ."""
    missing = target.vocab_size - len(own)
    if missing <= 0:
        return own[: target.vocab_size].clone()
    rest = target.embedding_VH[len(own) : target.vocab_size].detach().to("cpu", own.dtype)
    if rest.shape != (missing, own.shape[1]):
        rest = own.new_zeros(missing, own.shape[1])
    return torch.cat([own, rest])


def rows_in_words(config: Any, tensors: Tensors) -> str:
    """The vocabulary of a kind that has the target's whole one."""
    return f"the target's whole vocabulary, {config.vocab_size:,} tokens"
