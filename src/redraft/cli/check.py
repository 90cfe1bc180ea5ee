"""Whether a repair is worth it, told before any training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..config import RegenerateConfig, resolve
from ..core.console import set_quiet
from ..core.errors import UserError
from .flags import (
    AdapterFlag,
    DtypeFlag,
    EndpointModelFlag,
    JsonFlag,
    MinPFlag,
    PromptsFlag,
    QuietFlag,
    TemperatureFlag,
    TemplateArgFlag,
    TemplateFlag,
    TopKFlag,
    TopPFlag,
    load,
    print_json,
    template_args_from,
)

OURS = "ours"
"""What `--cases` calls the table that comes with redraft."""


def check(
    prompts: PromptsFlag,
    target: Annotated[
        str | None, typer.Option("--target", help="target model: folder or Hub id")
    ] = None,
    draft: Annotated[
        str | None, typer.Option("--draft", help="draft model: folder or Hub id")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            help="a vLLM server that serves both, asked in place of the weights (key: $REDRAFT_API_KEY)",
        ),
    ] = None,
    endpoint_model: EndpointModelFlag = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="what the target was tuned from: retention, causes, refreshing"
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="requests served at a time")] = 1,
    k: Annotated[int, typer.Option("--k", min=1, max=16, help="draft tokens per step")] = 4,
    most: Annotated[
        int, typer.Option("--most", min=1, help="most prompts answered; 16 where these suffice")
    ] = 64,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="longest answer, in tokens")
    ] = 128,
    temperature: TemperatureFlag = 0.0,
    top_k: TopKFlag = 0,
    top_p: TopPFlag = 1.0,
    min_p: MinPFlag = 0.0,
    published: Annotated[
        float | None,
        typer.Option(
            "--published", min=1.0, help="the draft's tau on its base, where that is not at hand"
        ),
    ] = None,
    worth: Annotated[
        float,
        typer.Option(
            "--worth", min=0.0, help="the gain in speed from which adapting is worth it (0.1: 10 %)"
        ),
    ] = 0.1,
    serve: Annotated[
        int | None,
        typer.Option(
            "--serve", min=1, help="tokens that will be served: the least time in all decides"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="adapters whose training is timed, for drafts that lack the default's [default: expert+fc+norms]",
        ),
    ] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--cases",
            help="known cases of `bench case` or `bench triage`, in place of those that come with "
            "redraft; repeatable, `ours` adds those",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="keep the answers here; run again to resume")
    ] = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Is a repair worth it? From a few prompts: acceptance kept, its cause, speed, cost, a verdict.

    Nothing is trained beyond a trial of its speed. Time and outcome are those of a repair with the settings of
    the known cases, which are said.

    With --endpoint a server's own counters are read; no weights are needed, and less is known.

    Example: redraft check --target ./my-model --draft org/EAGLE3-base --base org/base
    --prompts prompts.jsonl --batch 4
    """
    set_quiet(quiet)
    from ..check.check import check as run
    from ..check.prediction import SHIPPED, Case, check_enough, read_cases
    from ..check.screen import print_check, print_served
    from ..check.served import check_served
    from ..checkpoints.load import read_draft
    from ..core.files import writing
    from ..core.lock import held
    from ..core.records import to_json

    tables = [SHIPPED if table == OURS else Path(table) for table in cases or [OURS]]
    known: list[Case] = []
    for table in tables:
        known += [case for case in read_cases(table) if case not in known]
    check_enough(known)  # before a model is loaded
    answering = RegenerateConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
    )
    if endpoint:
        given: dict[str, object] = {
            "--target": target,
            "--draft": draft,
            "--base": base,
            "--serve": serve,
            "--method": method,
            "--out": out,
            "--target-adapter": target_adapter,
            "--chat-template": chat_template,
            "--min-p": min_p or None,  # vLLM refuses it where it speculates
        }
        _refuse(given)
        served = check_served(
            endpoint,
            prompts,
            rows=batch,
            most=most,
            answering=answering,
            worth=worth,
            published=published,
            model=endpoint_model,
            cases=known,
            template_args=template_args_from(template_arg),
        )
        if as_json:
            print_json(to_json(served))
        else:
            print_served(served)
        return
    if target is None or draft is None:
        raise UserError(
            "name what is checked: --target and --draft (folders or Hub ids), or --endpoint URL of the server "
            "that serves them"
        )
    tried = resolve([("flag", {"train.method": method} if method else {})]).config.train
    loaded = load(target, target_adapter, chat_template, dtype, template_arg)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            found = run(
                loaded,
                read_draft(draft),
                prompts,
                folder,
                base=load(base, None, None, dtype) if base else None,
                k=k,
                rows=batch,
                most=most,
                answering=answering,
                worth=worth,
                serve=serve,
                published=published,
                cases=known,
                method=tried.method,
            )
    if as_json:
        print_json(to_json(found))
    else:
        print_check(found)


def _refuse(given: dict[str, object]) -> None:
    """What needs the weights cannot be told by a server."""
    named = [flag for flag, value in given.items() if value is not None]
    if named:
        raise UserError(
            f"--endpoint asks a server, which cannot use {', '.join(named)}: leave these "
            "out, or leave out --endpoint"
        )
