"""The whole job and its report."""

from __future__ import annotations

from pathlib import Path

from ..config import Resolved
from ..core.console import say
from ..core.errors import UserError
from .bundles import OutputFlags, TargetFlags, print_json

FLAGS_OF_ADAPT = (
    *("train.method", "train.width", "train.vocab", "select.select", "select.budget"),
    *("general.guard", "general.share", "general.prompts"),
    *(
        "regenerate.endpoints",
        "regenerate.endpoint_model",
        "regenerate.concurrency",
        "regenerate.timeout",
    ),
)
"""The settings that are flags of `redraft adapt`; the others are set with --set or --config."""


def adapt(
    models: TargetFlags,
    draft: str,
    out: str,
    config: Resolved,
    output: OutputFlags,
    prompts: str | None = None,
    answers: str | None = None,
    eval_prompts: str | None = None,
    off_domain: list[str] | None = None,
    safety_prompts: str | None = None,
    base: str | None = None,
    previous: str | None = None,
    limit: int | None = None,
) -> None:
    """The whole job: regenerate, select, train, export, measure before and after, report.

    Example: redraft adapt --target ./my-model --draft org/EAGLE3-base --prompts prompts.jsonl
    --out run --method expert+fc+norms --budget 2000
    """
    elsewhere = pairs(off_domain or [], "--off-domain")
    from ..pipeline import adapt as pipeline

    loaded = models.load()
    result = pipeline.adapt(
        loaded,
        draft,
        prompts,
        answers=answers,
        out=out,
        config=config,
        limit=limit,
        eval_prompts=eval_prompts,
        off_domain=elsewhere,
        safety_prompts=safety_prompts,
        base=models.load_plain(base),
        previous=previous,
    )
    if output.as_json:
        from ..core.records import to_json

        print_json(to_json(result.report))
    else:
        from ..core.remote import address_of
        from ..report.terminal import print_report

        print_report(result.report)
        if not result.worked:
            page = address_of(result.run / "report.html")
            say(f"nothing to do: every stage was done already; report {page}")


def report(folder: str, output: OutputFlags) -> None:
    """Show a finished run again, and write its HTML page again.

    Example: redraft report run
    """
    from ..core.folders import read_json
    from ..core.records import to_json
    from ..core.report_record import AdaptReport
    from ..report.page import write_page
    from ..report.terminal import print_report

    path = Path(folder) / "report.json"
    try:
        found = AdaptReport.from_json(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(
            f"{path} is no report of redraft ({problem!r}); redraft adapt in that folder writes it"
        ) from None
    write_page(Path(folder) / "report.html", found)
    output.show(to_json(found), lambda: print_report(found))


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(
                f"{flag} takes name=FILE, for example {flag} chat=chat.jsonl; got '{text}'"
            )
        pairs[name] = value
    return pairs
