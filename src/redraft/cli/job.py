"""The whole job and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import Resolved, parse_set, read_yaml, recipe_path, resolve
from ..core.console import say, set_quiet
from ..core.errors import UserError
from .flags import (
    AdapterFlag,
    BaseFlag,
    ConcurrencyFlag,
    DraftFlag,
    DtypeFlag,
    EndpointFlag,
    EndpointModelFlag,
    JsonFlag,
    LimitFlag,
    QuietFlag,
    TargetFlag,
    TemplateArgFlag,
    TemplateFlag,
    TimeoutFlag,
    joined,
    load,
    print_json,
)


def adapt(
    target: TargetFlag,
    draft: DraftFlag,
    out: Annotated[str, typer.Option("--out", help="run folder; run again to resume")],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="prompts that the target answers: file, or data set on the Hub"
        ),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option("--answers", help="prompts with answers (production logs), used unchanged"),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="adapter")] = None,
    width: Annotated[
        str | None, typer.Option("--width", help="added neurons: 64, 0.25 of the shared, or auto")
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option("--vocab", help="remap: exchange tokens of a reduced draft vocabulary"),
    ] = None,
    select: Annotated[str | None, typer.Option("--select", help="selection score")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="samples kept: 500, 0.5 or 20000t; auto: until answers stop paying"
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="recipe name or YAML file of settings")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="one setting, e.g. train.lr=1e-3; repeatable")
    ] = None,
    eval_prompts: Annotated[
        str | None,
        typer.Option("--eval-prompts", help="measure on this file, not on a part of --prompts"),
    ] = None,
    off_domain: Annotated[
        list[str] | None,
        typer.Option("--off-domain", help="name=FILE of prompts measured but not trained on"),
    ] = None,
    safety_prompts: Annotated[
        str | None,
        typer.Option(
            "--safety-prompts",
            help="prompts on which the answers with the adapted draft are compared with those without",
        ),
    ] = None,
    endpoint: EndpointFlag = None,
    endpoint_model: EndpointModelFlag = None,
    concurrency: ConcurrencyFlag = None,
    timeout: TimeoutFlag = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    base: BaseFlag = None,
    limit: LimitFlag = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """The whole job: regenerate, select, train, export, measure before and after, report.

    Example: redraft adapt --target ./my-model --draft org/EAGLE3-base --prompts prompts.jsonl
    --out run --method expert+fc+norms --budget 2000
    """
    set_quiet(quiet)
    flags = {
        "train.method": method,
        "train.width": width,
        "train.vocab": vocab,
        "select.select": select,
        "select.budget": budget,
        "regenerate.endpoints": joined(endpoint),
        "regenerate.endpoint_model": endpoint_model,
        "regenerate.concurrency": concurrency,
        "regenerate.timeout": timeout,
    }
    resolved = _resolve(config, assignments, {k: v for k, v in flags.items() if v is not None})
    elsewhere = _pairs(off_domain or [], "--off-domain")
    from ..pipeline import adapt as pipeline

    loaded = load(target, target_adapter, chat_template, dtype, template_arg)
    result = pipeline.adapt(
        loaded,
        draft,
        prompts,
        answers=answers,
        out=out,
        config=resolved,
        limit=limit,
        eval_prompts=eval_prompts,
        off_domain=elsewhere,
        safety_prompts=safety_prompts,
        base=load(base, None, None, dtype) if base else None,
    )
    if as_json:
        from ..core.records import to_json

        print_json(to_json(result.report))
    else:
        from ..report.terminal import print_report

        print_report(result.report)
        if not result.worked:
            say(f"nothing to do: every stage was done already; report {result.run / 'report.html'}")


def report(
    run: Annotated[str, typer.Argument(help="run folder of `redraft adapt`")],
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show a finished run again, and write its HTML page again.

    Example: redraft report run
    """
    set_quiet(quiet)
    from ..core.folders import read_json
    from ..core.records import to_json
    from ..core.report_record import AdaptReport
    from ..report.page import write_page
    from ..report.terminal import print_report

    path = Path(run) / "report.json"
    try:
        found = AdaptReport.from_json(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(
            f"{path} is no report of redraft ({problem!r}); redraft adapt in that folder writes it"
        ) from None
    write_page(Path(run) / "report.html", found)
    if as_json:
        print_json(to_json(found))
    else:
        print_report(found)


def _resolve(config: str | None, assignments: list[str] | None, flags: dict[str, Any]) -> Resolved:
    layers: list[tuple[str, dict[str, Any]]] = []
    if config:
        path = recipe_path(config)
        layers.append((str(path), read_yaml(path)))
    layers += [("--set", parse_set(assignments or [])), ("flag", flags)]
    return resolve(layers)  # type: ignore[arg-type]


def _pairs(texts: list[str], flag: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(
                f"{flag} takes name=FILE, for example {flag} chat=chat.jsonl; got '{text}'"
            )
        pairs[name] = value
    return pairs
