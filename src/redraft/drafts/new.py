"""A draft from nothing: its shape from the target, its vocabulary from the target's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from ..core.errors import UserError
from ..core.records import Answer
from ..models.target import Target
from .base import Draft
from .kinds import KINDS, kind_named


def new_draft(
    target: Target,
    answers: Sequence[Answer],
    *,
    kind: str | None = None,
    aux_layers: tuple[int, ...] | None = None,
    draft_vocab_size: int | None = None,
    width: int | None = None,
) -> Draft:
    """An untrained draft of the usual shape for `target`, in float32 and bound to it.

    Without a `kind` it is the first of the table.

    A reduced vocabulary takes the tokens that the answers use most (ties by id), padded with the
    lowest ids if they use fewer. Raises UserError for an unknown kind, for a vocabulary larger
    than the target's, and for what a kind does not have.
    """
    row = KINDS[0] if kind is None else kind_named(kind)
    size = draft_vocab_size or target.vocab_size
    if size > target.vocab_size:
        raise UserError(
            f"a draft vocabulary of {size} is larger than the target's {target.vocab_size} tokens"
        )
    vocabulary = None if size == target.vocab_size else frequent_tokens(answers, size)
    given = {"draft_vocab": vocabulary, "aux_layers": aux_layers}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in set(chosen) - set(row.choices):
        others = ", ".join(kind.name for kind in KINDS if name in kind.choices)
        raise UserError(
            f"a {row.name} draft takes no --{name.replace('_', '-')}; it is for --kind {others}"
        )
    draft = row.new(target, width=width, **chosen)
    draft.bind(target)
    return draft


def frequent_tokens(answers: Sequence[Answer], size: int) -> torch.Tensor:
    """The `size` most frequent supervised tokens, ascending, int64 [size]."""
    counts = Counter(token for answer in answers for token in answer.answer[1:])
    ranked = sorted(counts, key=lambda token: (-counts[token], token))[:size]
    chosen = set(ranked)
    spare = (token for token in range(size * 2) if token not in chosen)
    while len(chosen) < size:
        chosen.add(next(spare))
    return torch.tensor(sorted(chosen), dtype=torch.int64)
