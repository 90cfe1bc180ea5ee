"""Drafts as files: look at one, export one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.console import set_quiet
from ..core.errors import UserError
from .flags import DraftFlag, JsonFlag, QuietFlag, finish, load, print_json

PickleFlag = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="open .bin files: pickles can run code; only tensors are accepted from them",
    ),
]


def inspect(
    path: Annotated[str, typer.Argument(help="draft: folder or Hub id")],
    target: Annotated[
        str | None, typer.Option("--target", help="also check that it fits this target")
    ] = None,
    allow_pickle: PickleFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """What a draft is, what it computes, and what each engine will do with it.

    Example: redraft inspect org/EAGLE3-base
    """
    set_quiet(quiet)
    from ..checkpoints.inspect import inspect_draft
    from ..core.records import to_json
    from ..report.terminal import print_inspection

    loaded = load(target, None, None, "auto") if target else None
    found = inspect_draft(path, loaded, unpickle=allow_pickle)
    if as_json:
        print_json(to_json(found))
    else:
        print_inspection(found)
    if found.unreadable:
        raise typer.Exit(2)


def export(
    draft: DraftFlag,
    out: Annotated[str, typer.Option("--out", help="folder of the stock draft to write")],
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            "--private",
            help="adapter to merge in; without one only the layout changes",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="the target, where the draft has other vocabulary rows than it",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option("--format", help="auto (the kind's own for vLLM) or one of docs/formats.md"),
    ] = "auto",
    tp: Annotated[
        str, typer.Option("--tp", help="tensor-parallel sizes to pad the FFN for, e.g. 1,2,4,8")
    ] = "1",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="read the folder back by a second reader, compare logits"),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="also upload to this Hub id, privately")
    ] = None,
    allow_pickle: PickleFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write a stock checkpoint for vLLM, SGLang and others, with an adapter merged in.

    Example: redraft export --draft org/EAGLE3-base --adapter run/adapter --out my-draft --verify
    """
    set_quiet(quiet)
    from ..checkpoints.adapter_folder import load_adapter
    from ..checkpoints.load import read_draft
    from ..checkpoints.reload_check import check_export
    from ..core.hub import push_to_hub as push
    from ..pipeline.stages import merge_draft

    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} is not an empty folder; name a new one")
    stored = read_draft(draft, unpickle=allow_pickle)
    loaded = load(target, None, None, "auto") if target else None
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
    finish(as_json, "\n".join(lines), result)


def _sizes(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--tp takes sizes like 1,2,4; got '{text}'") from None
