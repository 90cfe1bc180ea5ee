"""Stored features as commands: write, convert, capture and check them; load a target from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.console import Progress, say, set_quiet
from ..core.errors import UserError
from .flags import (
    AdapterFlag,
    DtypeFlag,
    JsonFlag,
    QuietFlag,
    TargetFlag,
    TemplateArgFlag,
    TemplateFlag,
    finish,
    load,
    template_args_from,
)

FeaturesFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--features",
        help="stored features of the answers (may be repeated): the target's layers are not loaded",
    ),
]
FeatureTapsFlag = Annotated[
    str | None,
    typer.Option(
        "--feature-aux-layers",
        "--feature-taps",
        help="hs[] indices that foreign features hold, where they do not record them, e.g. 2,14,25",
    ),
]
PickleFlag = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="open SpecForge's .ckpt files: pickles can run code; only tensors are accepted from them",
    ),
]
APART = 0.1
"""Relative difference at which stored states are no longer this target's."""


def features(
    target: TargetFlag,
    answers: Annotated[
        list[str] | None,
        typer.Option("--answers", help="answers file of `regenerate` (may be repeated)"),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="folder to write; run again to resume")
    ] = None,
    draft: Annotated[
        str | None, typer.Option("--draft", help="store what this draft reads of the target")
    ] = None,
    aux_layers: Annotated[
        str | None,
        typer.Option(
            "--aux-layers", "--taps", help="or these hs[] indices, e.g. 2,14,25 ('' for none)"
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="take stored or captured features instead of running the target's layers"
        ),
    ] = None,
    capture: Annotated[
        str | None,
        typer.Option(
            "--capture",
            help="address of a running vLLM that captures hidden states, e.g. http://localhost:8000",
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option("--check", help="check stored features: every checksum, some rows' states"),
    ] = None,
    layout: Annotated[
        str, typer.Option("--layout", help="layout to write: redraft, speculators or specforge")
    ] = "redraft",
    max_gb: Annotated[
        float | None, typer.Option("--max-gb", help="refuse to write more than this", min=0.0)
    ] = None,
    shard_mb: Annotated[
        float,
        typer.Option("--shard-mb", help="largest shard of a store; four times this is held", min=1),
    ] = 128.0,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", help="tokens that the target reads at a time", min=1)
    ] = 4096,
    allow_pickle: PickleFlag = False,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Store the target's hidden states of the answers, to train without the target in memory.

    Example: redraft features --target ./my-model --draft org/EAGLE3-base --answers answers.jsonl
    --out features
    """
    set_quiet(quiet)
    from ..core.records import to_json
    from ..features.extract import GB, Plan
    from ..generation.answer_file import read_answers

    asked = _Asked(
        target, target_adapter, chat_template, dtype, draft, aux_layers, allow_pickle, template_arg
    )
    if check is not None:
        _check(asked.load(), check, aux_layers, allow_pickle, as_json)
        return
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
    finish(
        as_json,
        f"features of {done.samples} answers, {done.tokens:,} tokens, {done.size / GB:,.3f} GB in {out} "
        f"({done.predicted / GB:,.3f} predicted)",
        {**to_json(done), "out": out},
    )


@dataclass(frozen=True)
class _Asked:
    """The target and the aux layers that the flags describe, and the three places features come from."""

    target: str
    adapter: str | None
    template: str | None
    dtype: str
    draft: str | None
    aux_layers: str | None
    allow_pickle: bool
    template_arg: list[str] | None

    def load(self) -> Any:
        return load(self.target, self.adapter, self.template, self.dtype, self.template_arg)

    def write(self, answers: list[Any], plan: Any) -> Any:
        """From the target itself."""
        from ..features.extract import write_features

        target = self.load()
        return write_features(target, answers, self.wanted(target), plan)

    def capture(self, address: str, answers: list[Any], plan: Any) -> Any:
        """From a running vLLM."""
        from ..features.extract import capture_features
        from ..serving.capture import Capture

        bare = self._stored([])
        aux_layers = self.wanted(bare)
        server = Capture(address, aux_layers, bare.num_layers, bare.dtype)
        return capture_features(bare, server, answers, aux_layers, plan, bare.normed)

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
        return load_beside(
            folders,
            self.aux_layers,
            self.allow_pickle,
            self.target,
            self.adapter,
            self.template,
            self.dtype,
            self.template_arg,
        )


def load_beside(
    folders: list[str],
    aux_layers: str | None,
    allow_pickle: bool,
    target: str,
    adapter: str | None,
    template: str | None,
    dtype: str,
    template_arg: list[str] | None = None,
) -> Any:
    """The target that the flags describe without its layers, with stored features in their place."""
    from ..features.layouts import open_features
    from ..features.stored_target import load_stored_target

    named = aux_layers_from(aux_layers)
    rows = [open_features(Path(folder), named, unpickle=allow_pickle) for folder in folders]
    return load_stored_target(
        target,
        rows,
        adapter=adapter,
        chat_template=template,
        template_args=template_args_from(template_arg),
        dtype=dtype,
    )


def aux_layers_from(text: str | None) -> tuple[int, ...] | None:
    """The numbers that --aux-layers names; none for ''."""
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(",") if text)
    except ValueError:
        raise UserError(
            f"--aux-layers takes layer numbers, for example 2,4,5; got '{text}'"
        ) from None


def _check(
    target: Any, folder: str, aux_layers: str | None, allow_pickle: bool, as_json: bool
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
    finish(
        as_json,
        f"{len(rows.tokens)} rows in {folder} are whole; against the target, relative difference {shown}",
        {"rows": len(rows.tokens), "difference": apart, "layout": rows.layout},
    )
