"""A draft under a target whose vocabulary has other rows: tokens added at its end, or another padding.

Rows beyond a tokenizer's length mean nothing, and tools pad or cut them as they like. So a draft's surplus
rows are cut, and rows that it lacks are never proposed: one with a head of its own then has a reduced
vocabulary, the tokens it was made for (d2t, t2d), until it is trained with `vocab: remap`. The result is a
stock checkpoint with the target's number of rows; how it gets them is the kind's (`with_rows_of`).
"""

from __future__ import annotations

from ..drafts.base import MOST_PADDING, token_count
from ..models.target import Target


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
