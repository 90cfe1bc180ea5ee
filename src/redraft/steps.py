"""The steps of the main job that the flow and the single commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .config import TrainConfig
from .data.regenerate import read_answers
from .drafts.base import Draft
from .drafts.new import new_draft
from .errors import UserError
from .files import write_text
from .formats.folders import state_hash
from .formats.load import StoredDraft, made_for, read_draft, stored
from .formats.private_part import TRAINING, check_belongs, save_private
from .private.expert import widenable
from .private.fuse import fuse
from .private.part import PrivatePart
from .private.table import METHODS
from .records import Answer, TrainRecord, to_json
from .target import Target
from .training.train import train


def train_private(
    target: Target,
    shared: StoredDraft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    config: TrainConfig,
    k: int,
    checkpoints: Path | None = None,
) -> PrivatePart:
    """Train a private part beside a stored draft; tensors come back in the draft's own dtype."""
    draft = shared.build(target, torch.float32)
    widths = {}
    if METHODS[config.method].expert:
        widths = {name: ffn.width for name, ffn in widenable(draft).items()}
    trained = train(target, draft, answers, heldout, config, k=k, checkpoints=checkpoints)
    tensors = {
        name: tensor.to(shared.tensors[name.replace(".private.", ".")].dtype)
        for name, tensor in trained.tensors.items()
    }
    card = {
        "shared": str(shared.folder),
        "shared_hash": shared.hash(),
        "shared_widths": widths,
        "private_hash": state_hash(tensors),
        "samples": len(answers),
        "config": asdict(config),
        "train": to_json(trained.record),
        **made_for(target),
    }
    return PrivatePart(config.method, tensors, card)


def fuse_draft(shared: StoredDraft, part: PrivatePart, target: Target | None = None) -> StoredDraft:
    """The stock draft of a shared draft and its private part. Raises UserError if they differ."""
    check_belongs(part, shared)
    if target is not None and part.card["tokenizer_hash"] != target.tokenizer_hash():
        raise UserError(
            f"this private part was trained for tokenizer {part.card['tokenizer_hash']}, target "
            f"{target.name} has {target.tokenizer_hash()}"
        )
    provenance = {"method": part.method, **part.card}
    if "train" in provenance:
        provenance["train"] = TrainRecord(**provenance["train"]).lasting()
    return shared.with_tensors(fuse(shared.tensors, part.tensors), provenance)


def save_fresh(folder: Path, draft: Draft, target: Target, record: TrainRecord) -> None:
    """Save a whole draft that was trained from nothing, and the record of its training."""
    made = stored(draft, target)
    made.provenance["train"] = record.lasting()
    write_text(folder / TRAINING, json.dumps(to_json(record), indent=2) + "\n")
    made.save(folder)


def chosen_answers(answers: Sequence[Answer], selection: Path | None) -> list[Answer]:
    """The answers that a selection file keeps; all of them without one."""
    if selection is None:
        return list(answers)
    try:
        rows = [json.loads(line) for line in selection.read_text(encoding="utf-8").splitlines()]
        kept = {row["id"] for row in rows if row["kept"]}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"{selection} is damaged ({problem}); write it again with redraft select"
        ) from None
    return [answer for answer in answers if answer.id in kept and answer.length >= 2]


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
    taps: tuple[int, ...] | None = None,
    draft_vocab: int | None = None,
    draft_width: int | None = None,
    kind: str = "eagle3",
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
        kind=kind,
        taps=taps,
        draft_vocab_size=draft_vocab,
        width=draft_width,
    )
    trained = train(target, fresh, chosen, held, config, k=k, checkpoints=out / "checkpoints")
    save_fresh(out, fresh, target, trained.record)
    return trained.record
