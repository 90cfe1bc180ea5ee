"""Stored features as commands: write, convert, capture and check them; load a target from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import ranks
from ..core.console import Progress, say
from ..core.errors import UserError
from .bundles import OutputFlags, TargetFlags, aux_layers_from, load_stored

APART = 0.1
"""Relative difference at which stored states are no longer this target's."""


def features(
    models: TargetFlags,
    output: OutputFlags,
    answers: list[str] | None = None,
    out: str | None = None,
    draft: str | None = None,
    aux_layers: str | None = None,
    source: str | None = None,
    capture: str | None = None,
    check: str | None = None,
    layout: str = "redraft",
    max_gb: float | None = None,
    shard_mb: float = 128.0,
    batch_tokens: int = 4096,
    allow_pickle: bool = False,
) -> None:
    """Store the target's hidden states of the answers, to train without the target in memory.

    Example: redraft features --target ./my-model --draft org/EAGLE3-base --answers answers.jsonl
    --out features
    """
    from ..core.records import to_json
    from ..features.extract import GB, Plan
    from ..generation.answer_file import read_answers

    asked = _Asked(models, draft, aux_layers, allow_pickle)
    if check is not None:
        _check(models.load(), check, aux_layers, allow_pickle, output)
        return
    if capture is not None and ranks.size() > 1:
        raise UserError("--capture starts one engine; run it in one process, without torchrun")
    if out is None:
        raise UserError("--out is needed: the folder to write features to")
    rows = [answer for file in answers or () for answer in read_answers(Path(file))]
    if not rows and source is None:
        raise UserError("--answers is needed: the rows whose features are to be stored")
    most = float("inf") if max_gb is None else max_gb
    plan = Plan(Path(out), layout, most, shard_mb, batch_tokens)
    if source is not None:
        done = asked.convert(source, rows if answers else None, plan)
    elif capture is not None:
        done = asked.capture(capture, rows, plan)
    else:
        done = asked.write(rows, plan)
    output.finish(
        f"features of {done.samples} answers, {done.tokens:,} tokens, {done.size / GB:,.3f} GB in {out} "
        f"({done.predicted / GB:,.3f} predicted)",
        {**to_json(done), "out": out},
    )


@dataclass(frozen=True)
class _Asked:
    """The target and the aux layers that the flags describe, and the three places features come from."""

    models: TargetFlags
    draft: str | None
    aux_layers: str | None
    allow_pickle: bool

    def write(self, answers: list[Any], plan: Any) -> Any:
        """From the target itself."""
        from ..features.extract import write_features

        target = self.models.load()
        return write_features(target, answers, self.wanted(target), plan)

    def capture(self, address: str, answers: list[Any], plan: Any) -> Any:
        """From a running vLLM, or several."""
        from ..features.extract import capture_features
        from ..serving.capture import Capture
        from ..serving.capture_fleet import CaptureFleet

        bare = self._stored([])
        aux_layers = self.wanted(bare)
        servers = [
            Capture(one, aux_layers, bare.num_layers, bare.dtype) for one in address.split(",")
        ]
        asked = servers[0] if len(servers) == 1 else CaptureFleet(servers)
        return capture_features(bare, asked, answers, aux_layers, plan, bare.normed)

    def convert(self, folder: str, answers: list[Any] | None, plan: Any) -> Any:
        """From stored features, whose last state has to predict their answers."""
        from ..features.extract import convert_features

        target = self._stored([folder])
        (stored,) = target.features
        agreed = target.check_says(stored.answers() if answers is None else answers)
        say(f"the stored states make {agreed:.1%} of the answers' tokens the most likely")
        return convert_features(target, stored, answers, plan, target.normed)

    def wanted(self, target: Any) -> tuple[int, ...]:
        """The aux layers that the draft reads of the target, or those named, or the usual ones."""
        from ..checkpoints.load import read_draft
        from ..models.target import check_aux_layers, default_aux_layers

        if self.draft is not None and self.aux_layers is not None:
            raise UserError(
                "--draft decides which aux layers are read; name --aux-layers or --draft, not both"
            )
        if self.draft is not None:
            aux_layers = read_draft(self.draft).build(target).aux_layers
            return tuple(
                aux_layer for aux_layer in aux_layers if aux_layer != target.num_layers
            )  # that is stored anyway
        named = aux_layers_from(self.aux_layers)
        if named is None:
            return default_aux_layers(target.num_layers)
        return check_aux_layers(named, target.num_layers)

    def _stored(self, folders: list[str]) -> Any:
        return load_stored(self.models, folders, self.aux_layers, self.allow_pickle)


def _check(
    target: Any, folder: str, aux_layers: str | None, allow_pickle: bool, output: OutputFlags
) -> None:
    from ..features.extract import compare_features
    from ..features.layouts import open_features
    from ..features.store import FeatureStore

    rows = open_features(Path(folder), aux_layers_from(aux_layers), unpickle=allow_pickle)
    if isinstance(rows, FeatureStore):
        with Progress("checksums", rows.shards(), "shards") as progress:
            for name in rows.check():
                progress.advance(1, name)
    apart = compare_features(target, rows)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    if not max(apart.values()) < APART:
        raise UserError(
            f"{folder}: its states are not what target {target.name} computes for these rows (relative "
            f"difference {shown}): another target, other aux layers, or shifted"
        )
    output.finish(
        f"{len(rows.tokens)} rows in {folder} are whole; against the target, relative difference {shown}",
        {"rows": len(rows.tokens), "difference": apart, "layout": rows.layout},
    )
