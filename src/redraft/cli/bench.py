"""Families and benches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..console import set_quiet
from .flags import JsonFlag, QuietFlag, print_json

app = typer.Typer(no_args_is_help=True, help="Build model families and run benches on them.")


@app.command("family")
def bench_family(
    out: Annotated[str, typer.Option("--out", help="folder of the family; run again to resume")],
    size: Annotated[str, typer.Option("--size", help="nano or micro")] = "nano",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    members: Annotated[
        str | None, typer.Option("--members", help="fine-tunes to build, comma-separated")
    ] = None,
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="kinds of draft beside eagle3, comma-separated")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="seed of everything")] = 0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build a small family from nothing: base, fine-tunes, the base's draft, prompts, gates.

    Example: redraft bench family --size nano --out family
    """
    set_quiet(quiet)
    from ..bench.family import build_family, describe_family

    family = build_family(
        Path(out),
        size=size,
        data=data,
        members=members.split(",") if members else None,
        kinds=kinds.split(",") if kinds else (),
        seed=seed,
    )
    if as_json:
        print_json(family)
    else:
        describe_family(family)


@app.command("pipeline")
def bench_pipeline(
    family: Annotated[str, typer.Option("--family", help="folder of `bench family`")],
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Speed and memory of replay, training and regeneration on a family.

    Example: redraft bench pipeline --family family
    """
    set_quiet(quiet)
    from ..bench.pipeline import bench_pipeline as run

    result = run(Path(family))
    if as_json:
        print_json(result)
    else:
        for name, value in result.items():
            typer.echo(f"{name:36} {value}")


@app.command("repair")
def bench_repair(
    out: Annotated[str, typer.Option("--out", help="folder; run again to resume")],
    size: Annotated[str, typer.Option("--size", help="nano, or micro on real data")] = "micro",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    record: Annotated[
        str | None, typer.Option("--record", help="also write the result to this JSON file")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """The demo's comparison at any size: reused, adapted and dedicated draft of a fine-tune.

    Example: redraft bench repair --size micro --data data --out repair
    """
    set_quiet(quiet)
    from ..bench.demo import print_demo, run_demo
    from ..formats.folders import write_text

    result = run_demo(Path(out), size, data)
    if record:
        write_text(Path(record), json.dumps(result, indent=2) + "\n")
    if as_json:
        print_json(result)
    else:
        print_demo(result)
