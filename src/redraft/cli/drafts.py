"""Drafts as files: look at one, export one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..core.errors import UserError
from .bundles import OutputFlags, TargetFlags

STITCHED = "{out}: the target with head {head} in {file}; serve it with method mtp"


def inspect(
    path: str,
    output: OutputFlags,
    target: str | None = None,
    base: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """What a draft is, what it computes, and what each engine will do with it. Of a target (without --target): its own MTP head.

    Ends with 2 for a draft that cannot be used, with 3 for a target that lacks the head it declares.

    Example: redraft inspect org/EAGLE3-base
    """
    from ..checkpoints.inspect import inspect_draft
    from ..checkpoints.own_head import BROKEN, MISSING, inspect_head
    from ..core.records import to_json
    from ..report.terminal import print_inspection, print_own_head

    own = None if target else inspect_head(path, base)
    if own is not None:
        output.show(to_json(own), lambda: print_own_head(own))
        if own.state in (MISSING, BROKEN):
            raise typer.Exit(3)
        return
    loaded = TargetFlags(target).load() if target else None
    found = inspect_draft(path, loaded, unpickle=allow_pickle)
    output.show(to_json(found), lambda: print_inspection(found))
    if found.unreadable:
        raise typer.Exit(2)


def export(
    draft: str,
    out: str,
    output: OutputFlags,
    adapter: str | None = None,
    target: str | None = None,
    format: str = "auto",
    tp: str = "1",
    verify: bool = False,
    push_to_hub: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """Write a stock checkpoint for vLLM, SGLang and others, with an adapter merged in.

    Example: redraft export --draft org/EAGLE3-base --adapter run/adapter --out my-draft --verify
    """
    from ..checkpoints.adapter_folder import load_adapter
    from ..checkpoints.load import read_draft
    from ..checkpoints.reload_check import check_export
    from ..core.hub import push_to_hub as push
    from ..pipeline.stages import merge_draft

    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} is not an empty folder; name a new one")
    stored = read_draft(draft, unpickle=allow_pickle)
    loaded = TargetFlags(target).load() if target else None
    if loaded is not None:
        stored = stored.fitted(loaded)
    if adapter is not None:
        stored = merge_draft(stored, load_adapter(Path(adapter)), loaded)
    stored.save(folder, format, _sizes(tp))
    result: dict[str, Any] = {"out": out, "hash": read_draft(out).hash()}
    lines = [f"draft written to {out}"]
    if verify:
        result["worst_difference"] = worst = check_export(stored, folder)
        lines.append(f"verified by a second reading: logits differ by {worst:.1e} of their size")
    if push_to_hub:
        result["hub"] = push(folder, push_to_hub)
        lines.append(f"uploaded to {result['hub']}")
    output.finish("\n".join(lines), result)


def stitch(target: str, draft: str, out: str, output: OutputFlags) -> None:
    """Write a target's checkpoint again with a draft as its MTP head; its other files are linked.

    Example: redraft stitch --target ./my-model --draft run/draft --out my-model-mtp
    """
    from ..checkpoints.load import read_draft
    from ..checkpoints.own_head import stitch as write

    result = write(target, read_draft(draft), Path(out))
    output.finish(STITCHED.format(**result), result)


def _sizes(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--tp takes sizes like 1,2,4; got '{text}'") from None
