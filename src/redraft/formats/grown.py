"""A draft under a vocabulary that grew at its end, as fine-tunes with added tokens have it.

An EAGLE-3 draft then speaks a reduced vocabulary: the tokens it was made for (d2t, t2d), until it is
trained with `vocab: retarget`. The result is a stock checkpoint for the grown target.

Shapes: V vocabulary of the target, D of the draft, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..drafts.base import vocabulary_map
from ..drafts.eagle3 import Eagle3Config
from ..target import Target
from .eagle3 import draft_vocabulary


def grew(target: Target, tokenizer_hash: str) -> bool:
    """Whether `target`'s tokenizer is the one of that hash with some tokens added at its end."""
    return tokenizer_hash in target.earlier_tokenizer_hashes


def may_have_grown(target: Target, vocab_size: int) -> bool:
    """Whether every token of `target` past the first `vocab_size` is one that was added to its tokenizer.

    As much as can be seen for a draft that records no tokenizer, as published ones do not.
    """
    past = {at for at in target.tokenizer.get_vocab().values() if at >= vocab_size}
    return bool(past) and past <= set(target.tokenizer.get_added_vocab().values())


def grow(
    config: Eagle3Config, tensors: Mapping[str, Tensor], target: Target
) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """Shape and tensors for a target with more tokens. An own embedding gets the target's rows for them."""
    vocab = draft_vocabulary(config, tensors)
    spoken = torch.arange(config.vocab_size) if vocab is None else vocab
    found = {**tensors, **vocabulary_map(spoken, target.vocab_size)}
    own = tensors.get("embed_tokens.weight")
    if own is not None:
        rest = target.embedding_VH[config.vocab_size :].detach().to("cpu", own.dtype)
        found["embed_tokens.weight"] = torch.cat([own, rest])
    return dataclasses.replace(config, vocab_size=target.vocab_size), found
