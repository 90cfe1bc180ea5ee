"""The steps of the main job that the flow and the single commands share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..adapters.adapter import Adapter
from ..adapters.expert import candidate_widths, shared_width, smallest_good
from ..adapters.kind import every_kind
from ..adapters.merge import home_of, merge, without_adapters
from ..adapters.table import read_method
from ..checkpoints.adapter_folder import TRAINING, check_belongs, save_adapter
from ..checkpoints.load import StoredDraft, made_for, read_draft, stored
from ..config import TrainConfig, read_width
from ..core.console import say
from ..core.errors import UserError
from ..core.files import write_text, writing
from ..core.folders import state_hash
from ..core.lock import held
from ..core.records import Answer, TrainRecord, to_json
from ..drafts.base import Draft
from ..drafts.new import new_draft
from ..features.stored_target import StoredTarget
from ..generation.answer_file import answers_for
from ..models.target import Target
from ..selection.select import read_selection
from ..training.train import Trained, train, train_adapters


def train_adapter(
    target: Target,
    shared: StoredDraft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    config: TrainConfig,
    k: int,
    checkpoints: Path | None = None,
    base: Target | None = None,
) -> Adapter:
    """Train an adapter next to a stored draft; tensors come back in the draft's own dtype.

    With `width` auto several widths are trained as joint training, and the smallest good one is taken.
    """
    draft = shared.build(target, torch.float32)
    if read_width(config.width) is not None or not read_method(config.method).reads("width"):
        trained = train(
            target, draft, answers, heldout, config, k=k, base=base, checkpoints=checkpoints
        )
        return as_adapter(target, shared, trained, answers, config)
    widths = candidate_widths(shared_width(draft))
    configs = [dataclasses.replace(config, width=str(width)) for width in widths]
    trained_together = train_adapters(
        target, draft, answers, heldout, configs, k=k, base=base, checkpoints=checkpoints
    )
    taus = [trained.record.best_tau() for trained in trained_together]
    chosen = smallest_good(widths, taus)
    tried = ", ".join(f"{width}: {tau:.3f}" for width, tau in zip(widths, taus, strict=True))
    say(f"width {chosen}: the smallest within 1 % of the best held-out tau ({tried})")
    at = widths.index(chosen)
    part = as_adapter(target, shared, trained_together[at], answers, configs[at])
    part.card["widths_tried"] = dict(zip(map(str, widths), taus, strict=True))
    return part


def as_adapter(
    target: Target,
    shared: StoredDraft,
    trained: Trained,
    answers: Sequence[Answer],
    config: TrainConfig,
) -> Adapter:
    """A trained part with its card, in the shared draft's dtypes, without what did not change."""
    tensors = {}
    for name, tensor in trained.tensors.items():
        home = shared.tensors[home_of(name)]
        stored_tensor = tensor.to(home.dtype) if tensor.is_floating_point() else tensor
        if home_of(name) != name or not torch.equal(stored_tensor, home):
            tensors[name] = stored_tensor
    card = {
        "shared": str(shared.folder),
        "shared_hash": shared.hash(),
        **{k: v for kind in every_kind() for k, v in kind.card(shared.tensors, tensors).items()},
        "adapter_hash": state_hash(tensors),
        "samples": len(answers),
        "config": asdict(config),
        "train": to_json(trained.record),
        **made_for(target),
    }
    return Adapter(config.method, tensors, card)


def merge_draft(shared: StoredDraft, part: Adapter, target: Target | None = None) -> StoredDraft:
    """The stock draft of a shared draft and its adapter. Raises UserError if they differ."""
    check_belongs(part, shared)
    if target is not None and part.card["tokenizer_hash"] != target.tokenizer_hash():
        raise UserError(
            f"this adapter was trained for tokenizer {part.card['tokenizer_hash']}, target "
            f"{target.name} has {target.tokenizer_hash()}"
        )
    provenance = {"method": part.method, **part.card}
    if "train" in provenance:
        provenance["train"] = TrainRecord(**provenance["train"]).lasting()
    return shared.with_tensors(merge(shared.tensors, part.tensors), provenance)


def save_fresh(folder: Path, draft: Draft, target: Target, record: TrainRecord) -> None:
    """Save a whole draft that was trained from nothing, and the record of its training.

    An expert trained next to it is left out: it belongs to the target, the draft is what is shared.
    """
    made = stored(draft, target)
    made = dataclasses.replace(made, tensors=without_adapters(made.tensors))
    made.provenance["train"] = record.lasting()
    write_text(folder / TRAINING, json.dumps(to_json(record), indent=2) + "\n")
    made.save(folder)


def chosen_answers(answers: Sequence[Answer], selection: Path | None) -> list[Answer]:
    """The answers that a selection file keeps; all of them without one."""
    if selection is None:
        return list(answers)
    kept = {sample.id for sample in read_selection(selection) if sample.kept}
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
    aux_layers: tuple[int, ...] | None = None,
    draft_vocab: int | None = None,
    draft_width: int | None = None,
    kind: str = "eagle3",
    base: Target | None = None,
) -> TrainRecord:
    """Train and save; an adapter, or for a method that starts fresh a whole stock draft.

    Raises UserError when another process works in `out`.
    """
    chosen = chosen_answers(answers_for(target, answers), selection)
    if heldout is None:
        raise UserError(
            "--heldout is needed: answers the training does not see decide when to stop; write "
            f"some with redraft regenerate --lookahead {k}"
        )
    stopping = answers_for(target, heldout)
    if isinstance(target, StoredTarget):
        said = target.check_says(chosen)
        say(f"the stored states make {said:.1%} of the answers' tokens the most likely")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with held(out):
        if draft is not None:
            shared = read_draft(draft).fitted(target)
            part = train_adapter(
                target, shared, chosen, stopping, config, k, out / "checkpoints", base
            )
            save_adapter(out, part)
            return TrainRecord(**part.card["train"])
        if not read_method(config.method).fresh:
            raise UserError(
                f"--method {config.method} trains next to a draft: name it with --draft"
            )
        fresh = new_draft(
            target,
            chosen,
            kind=kind,
            aux_layers=aux_layers,
            draft_vocab_size=draft_vocab,
            width=draft_width,
        )
        trained = train(
            target, fresh, chosen, stopping, config, k=k, checkpoints=out / "checkpoints"
        )
        save_fresh(out, fresh, target, trained.record)
        return trained.record
