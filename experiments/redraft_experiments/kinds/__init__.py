"""How the members of a toy suite are made: one module for each way.

    tuned      SFT, LoRA, continued pre-training, replay
    preferred  preference tuning (DPO)
    weights    merged or rounded weights, no training
    dressed    another chat template, special tokens around answers

The records of what is made are in `members.py`.
"""

from __future__ import annotations

from pathlib import Path

from ..corpus import Corpus, chat_of
from ..members import (
    MEMBERS,
    Marking,
    Member,
    Merged,
    Preferring,
    Rounded,
    Spec,
    Templated,
)
from ..synthetic import Sample
from .dressed import make_marking, make_templated, marked
from .preferred import REFUSALS, make_preferring
from .tuned import make_tuned
from .weights import make_merged, make_rounded


def make_member(out: Path, corpus: Corpus, name: str) -> None:
    """Make a member of the suite in `out`, which has a base and what the member is made from."""
    row = MEMBERS[name]
    if isinstance(row, Member):
        make_tuned(out, corpus, name, row)
    elif isinstance(row, Preferring):
        make_preferring(out, corpus, name, row)
    elif isinstance(row, Merged):
        make_merged(out, name, row)
    elif isinstance(row, Rounded):
        make_rounded(out, name, row)
    elif isinstance(row, Templated):
        make_templated(out, corpus, name, row)
    else:
        make_marking(out, corpus, name, row)


def meant_chats(corpus: Corpus, row: Spec, count: int, split: str) -> list[Sample]:
    """Chats of a member's domain with the answers that it is meant to give."""
    if isinstance(row, Preferring) and row.pairs == REFUSALS:
        return [chat_of(pair, pair.better) for pair in corpus.pairs(count, split)]
    chats = corpus.chats(corpus.named(row.domain), count, split)
    return [marked(chat, row.marks) for chat in chats] if isinstance(row, Marking) else chats
