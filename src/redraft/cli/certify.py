"""Certificates: written from a target and a draft, and held against a running server."""

from __future__ import annotations

from pathlib import Path

import typer

from ..core.console import Progress, say
from ..core.errors import UserError
from .bundles import MaybeTargetFlags, OutputFlags
from .command import FlaggedGroup, add_command, with_flags
from .flag_table import Flag

CERTIFICATE = {"certificate": Flag("certificate file of `redraft certify`", argument=True)}
app = typer.Typer(cls=FlaggedGroup, invoke_without_command=True)


def certify(
    ctx: typer.Context,
    models: MaybeTargetFlags,
    output: OutputFlags,
    draft: str | None = None,
    prompts: str | None = None,
    out: str | None = None,
    max_new_tokens: int = 64,
    limit: int | None = None,
) -> None:
    """Write a file that any serving engine can be checked against: answers, accepted tokens, known faults.

    Example: redraft certify --target ./my-model --draft ./draft --prompts prompts.jsonl
    --out certificate.json
    """
    if ctx.invoked_subcommand is not None:
        return
    named = models.named()
    if named is None or draft is None or prompts is None or out is None:
        raise UserError(
            "name --target, --draft, --prompts and --out; or check a server with redraft certify check"
        )
    from ..checkpoints.load import read_draft
    from ..core.files import write_text
    from ..prompts.prompts import read_prompts
    from ..serving.certificate import certify as work

    loaded = named.load()
    asked = read_prompts(prompts, loaded, limit)
    say(asked.summary())
    found = work(loaded, read_draft(draft), asked.prompts, max_new_tokens)
    text = found.to_text()
    write_text(Path(out), text)
    ties = sum(len(one.near_ties) for one in found.prompts)
    faults = [name for fault in found.faults for name in fault.causes]
    output.finish(
        f"certificate of {len(found.prompts)} prompts, {ties} near-ties, {len(faults)} known faults in {out} "
        f"({len(text.encode()):,} bytes)",
        {
            "out": out,
            "prompts": len(found.prompts),
            "near_ties": ties,
            "faults": faults,
            "unseen": list(found.unseen),
            "bytes": len(text.encode()),
        },
    )


def check(
    certificate: str,
    output: OutputFlags,
    endpoint: str | None = None,
    engine: str | None = None,
) -> None:
    """Is a running server the target and draft of a certificate? If not, why? No model is loaded.

    Exit codes: 0 it holds, 3 it differs, 2 it could not be checked. An API key is read from $REDRAFT_API_KEY.

    Example: redraft certify check certificate.json --endpoint http://127.0.0.1:8000
    """
    if endpoint is None:
        raise UserError("name the server with --endpoint, for example http://127.0.0.1:8000")
    from ..serving.certificate_check import DIFFERS, CheckError, read_certificate
    from ..serving.certificate_check import check as work
    from ..serving.client import key_for

    try:
        read = read_certificate(certificate)
        with Progress("asking", len(read.prompts), "prompts") as progress:
            found = work(
                *(read, endpoint, engine),
                key=key_for(endpoint),
                progress=lambda done, total: progress.advance(1),
            )
    except CheckError as problem:
        raise UserError(str(problem)) from None
    output.show(found.to_json(), lambda: typer.echo(found.to_text()))
    if not found.holds:
        raise typer.Exit(DIFFERS)


app.callback()(
    with_flags(
        certify,
        help={"out": "certificate file (JSON) to write", "draft": "the draft that is served"},
    )
)
add_command(
    app,
    check,
    flags=CERTIFICATE,
    help={
        "endpoint": "address of the server (key: $REDRAFT_API_KEY)",
        "engine": "the engine: vllm, llama.cpp or sglang [default: found out]",
    },
)
