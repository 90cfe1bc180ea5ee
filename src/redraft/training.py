"""`redraft train`: a private part beside a stored draft, or a draft from nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from .adapt.train import train
from .config import TrainConfig
from .data.regenerate import read_answers
from .drafts.base import as_taps
from .drafts.eagle3 import Eagle3Draft, shape_for
from .errors import UserError
from .flow import chosen_answers, train_private
from .formats.load import read_draft, stored
from .formats.private_part import save_private
from .private.table import METHODS
from .records import Answer, TrainRecord, to_json
from .target import Target


def train_command(
    target: Target,
    *,
    draft: str | None,
    answers: Path,
    heldout: Path | None,
    selection: Path | None,
    out: Path,
    config: TrainConfig,
    k: int,
    taps: str | None = None,
    draft_vocab: int | None = None,
    draft_width: int | None = None,
) -> TrainRecord:
    """Train and save; a private part, or for a method that starts fresh a whole stock draft."""
    chosen = chosen_answers(read_answers(answers), selection)
    if heldout is None:
        raise UserError(
            "--heldout is needed: answers the training does not see decide when to stop; write "
            f"some with redraft regenerate --overrun {k}"
        )
    held = read_answers(heldout)
    if draft is not None:
        shared = read_draft(draft)
        part = train_private(target, shared, chosen, held, config, k, out / "checkpoints")
        save_private(out, part)
        return TrainRecord(**part.card["train"])
    if not METHODS[config.method].fresh:
        raise UserError(f"--method {config.method} trains beside a draft: name it with --draft")
    fresh = new_draft(
        target,
        chosen,
        taps=as_taps(taps) if taps else None,
        draft_vocab_size=draft_vocab,
        width=draft_width,
    )
    trained = train(target, fresh, chosen, held, config, k=k, checkpoints=out / "checkpoints")
    made = stored(fresh, target)
    made.provenance["train"] = to_json(trained.record)
    made.save(out)
    return trained.record


def new_draft(
    target: Target,
    answers: Sequence[Answer],
    *,
    taps: tuple[int, ...] | None = None,
    draft_vocab_size: int | None = None,
    width: int | None = None,
) -> Eagle3Draft:
    """An untrained draft of the usual shape for `target`, in float32 and bound to it.

    A reduced vocabulary takes the tokens that the answers use most (ties by id), padded with the
    lowest ids if they use fewer. Raises UserError for a vocabulary larger than the target's.
    """
    size = draft_vocab_size or target.vocab_size
    if size > target.vocab_size:
        raise UserError(
            f"a draft vocabulary of {size} is larger than the target's {target.vocab_size} tokens"
        )
    shape = shape_for(target, width=width, draft_vocab_size=size, taps=taps)
    vocabulary = None if size == target.vocab_size else frequent_tokens(answers, size)
    draft = Eagle3Draft(shape, vocabulary)
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
