"""The layouts redraft writes: a stored draft as the config.json and tensors of its engine.

Names and shapes are checked before anything is written, because engines load a draft with a missing
tensor without complaint and serve it at low acceptance.
"""

from __future__ import annotations

from torch import Tensor

from ..core.errors import UserError
from ..drafts.kind import DraftKind, Files, Layout, Shape
from ..drafts.kinds import format_named
from ..drafts.stored.layer import check_tensors


def layout_for(kind: DraftKind, format: str) -> Layout:
    """The layout of that name, or the kind's first for `auto`: the one that vLLM reads.

    Raises UserError for an unknown format, and for one of another kind.
    """
    holds, layout = format_named(kind.formats[0] if format == "auto" else format)
    if holds is not kind:
        raise UserError(
            f"format {format} holds {holds.name} drafts, this one is of kind {kind.name}; it can be "
            f"exported as {', '.join(kind.formats)}"
        )
    return layout


def lay_out(
    layout: Layout, kind: DraftKind, config: Shape, tensors: dict[str, Tensor], target: str
) -> Files:
    """config.json and tensors of a draft in `layout`, for the target of that name.

    Raises UserError for tensors that do not match.
    """
    required, optional = kind.tensors(config)
    check_tensors(tensors, required, optional, "cannot export")
    assert layout.lay_out is not None, "a format is a layout that is written"
    return layout.lay_out(config, tensors, target)
