"""Is this base the target's parent, and what did the fine-tune change that can be read off the files?

Shapes: V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.records import Prompt
from ..models.target import Target

RENAMED = 0.01
"""The share of tokens that a fine-tune may have renamed, as reserved ones are."""
RELATED = 0.5
"""Least cosine between the embeddings of parent and child. Models trained apart have about 0."""


@dataclass(frozen=True)
class Changes:
    """What differs between a target and its base, on the tokens that both have.

    `renders` is the share of the prompts that the two render to other tokens. `added_tokens` are
    entries of the tokenizer that the base lacks. `embedding` and `head` are relative: the Frobenius norm of
    the difference over the base's (None: a head that is no matrix, a quantised one). `renamed` is how many
    tokens have another name.
    """

    template: bool
    renders: float
    added_tokens: int
    renamed: int
    embedding: float
    head: float | None


def compare(target: Target, base: Target, prompts: list[Prompt], theirs: list[Prompt]) -> Changes:
    """`theirs` are the same prompts as the base renders them, by id.

    Raises UserError when `base` is not the model that `target` was tuned from.
    """
    added, renamed = _tokens(target, base)
    rows = min(target.embedding_VH.shape[0], base.embedding_VH.shape[0])
    ours_VH, theirs_VH = target.embedding_VH[:rows], base.embedding_VH[:rows].to(target.device)
    alike = float(torch.cosine_similarity(ours_VH.float(), theirs_VH.float(), dim=-1).mean())
    if alike < RELATED:
        raise UserError(
            f"{base.name} is not what {target.name} was tuned from: their embeddings have a mean cosine of "
            f"{alike:.2f}, expected nearly 1; name the target's own base with --base, or leave it out"
        )
    rendered = {prompt.id: prompt.tokens for prompt in theirs}
    other = [rendered.get(prompt.id) != prompt.tokens for prompt in prompts]
    return Changes(
        template=target.template_hash() != base.template_hash(),
        renders=sum(other) / len(other),
        added_tokens=added,
        renamed=renamed,
        embedding=_moved(ours_VH, theirs_VH),
        head=_head_moved(target, base, rows),
    )


def _head_moved(target: Target, base: Target, rows: int) -> float | None:
    ours, theirs = target.head_VH, base.head_VH
    if ours is None or theirs is None:
        return None
    return _moved(ours[:rows], theirs[:rows].to(ours.device))


def _tokens(target: Target, base: Target) -> tuple[int, int]:
    """Tokens that the base's tokenizer lacks, and those that have another name.

    Raises UserError for a base of another shape, or when more than RENAMED of its tokens differ.
    """
    ours, theirs = target.tokenizer.get_vocab(), base.tokenizer.get_vocab()
    if target.hidden_size != base.hidden_size or target.num_layers != base.num_layers:
        raise UserError(
            f"{base.name} is not what {target.name} was tuned from: it has {base.num_layers} layers of "
            f"size {base.hidden_size}, the target {target.num_layers} of {target.hidden_size}; name the "
            "target's own base with --base, or leave it out"
        )
    moved = [token for token, at in theirs.items() if ours.get(token) != at]
    if len(moved) > RENAMED * len(theirs):
        raise UserError(
            f"{base.name} is not what {target.name} was tuned from: {len(moved)} of its tokens mean "
            f"something else to the target (first: {moved[0]!r}); name the target's own base with "
            "--base, or leave it out"
        )
    return len(ours) - len(theirs), len(moved)


def _moved(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
