"""Whether adapting is worth it, before any training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from ..check.calibration_runs import CalibrationRun

OURS = "ours"
"""What `--calibration` calls the runs that come with redraft."""


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
            "--base", help="what the target was tuned from: for retention, causes, the closed form"
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
            "--published", min=1.0, help="the draft's tau on its base, for retention without --base"
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
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            "--cases",
            help="calibration runs of `bench case` or `bench triage`, in place of those that come with "
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
    """Is adapting worth it? From a few prompts: retention, causes, speed, cost, a recommendation.

    Nothing is trained beyond a trial of its speed. Time and outcome are predicted for the settings of the
    calibration runs, which are printed.

    With --endpoint a server's own counters are read; no weights are needed, and less is known.

    Example: redraft check --target ./my-model --draft org/EAGLE3-base --base org/base
    --prompts prompts.jsonl --batch 4
    """
    set_quiet(quiet)
    from ..check.check import check as run
    from ..check.screen import print_check, print_served
    from ..check.served import check_served
    from ..checkpoints.load import read_draft
    from ..core.files import writing
    from ..core.lock import held
    from ..core.records import to_json

    known = _known_runs(calibration or [OURS])
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
            runs=known,
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
                runs=known,
                method=tried.method,
            )
    if as_json:
        print_json(to_json(found))
    else:
        print_check(found)


def _known_runs(files: list[str]) -> list[CalibrationRun]:
    """The runs of all files, each once. Raises UserError where they are too few, before a model is loaded."""
    from ..check.calibration_runs import SHIPPED, read_runs
    from ..check.prediction import check_enough

    known: list[CalibrationRun] = []
    for file in files:
        runs = read_runs(SHIPPED if file == OURS else Path(file))
        known += [run for run in runs if run not in known]
    check_enough(known)
    return known


def _refuse(given: dict[str, object]) -> None:
    """Raises UserError for flags that need the weights."""
    named = [flag for flag, value in given.items() if value is not None]
    if named:
        raise UserError(
            f"--endpoint asks a server, which cannot use {', '.join(named)}: leave these "
            "out, or leave out --endpoint"
        )
