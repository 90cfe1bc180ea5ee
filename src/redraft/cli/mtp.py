"""A fine-tune's own MTP head: grafted from the base, adapted, and stitched into the checkpoint."""

from __future__ import annotations

from pathlib import Path

import typer

from ..config import Resolved
from ..core.errors import UserError
from ..core.report_record import AdaptReport
from .bundles import MaybeTargetFlags, OutputFlags, SamplingFlags, TargetFlags, print_json
from .check import check
from .drafts import STITCHED
from .engine import NOT_GOOD, EngineFlags, print_tried, read_run, tried
from .job import pairs


def mtp(
    models: TargetFlags,
    out: str,
    config: Resolved,
    output: OutputFlags,
    prompts: str | None = None,
    answers: str | None = None,
    eval_prompts: str | None = None,
    off_domain: list[str] | None = None,
    base: str | None = None,
    from_layer: bool = False,
    only_check: bool = False,
    verify_in: str | None = None,
    python: str | None = None,
    limit: int | None = None,
) -> None:
    """Give a fine-tune its MTP head back: the base's is grafted, measured, adapted, and stitched into the checkpoint.

    Without --base the target's own head is adapted; with --from-layer a new one is trained. OUT/run is the run of `redraft adapt`, OUT/checkpoint the target with the
    adapted head. --check only grafts, and recommends from a few prompts whether to keep that head, adapt it, or serve without one.
    --verify-in tries the adapted head in an engine at the end, as `redraft verify` does, and ends with its exit code.

    Example: redraft mtp --target ./my-model --base org/base --prompts prompts.jsonl --out run
    """
    from ..pipeline import adapt as pipeline
    from ..pipeline.own_head import CHECK, RUN, give_head, graft
    from ..serving.engines import engine_named

    if models.target_adapter:
        raise UserError(
            "--target-adapter: an MTP head lies in the model's own checkpoint; merge the adapter into the model first"
        )
    if from_layer and base:
        raise UserError("name --base, whose head is grafted, or --from-layer, not both")
    if verify_in is not None:
        engine_named(verify_in).find(python)  # before anything is trained
    elsewhere = pairs(off_domain or [], "--off-domain")

    def run(head: str, folder: Path) -> AdaptReport:
        return pipeline.adapt(
            models.load(),
            head,
            prompts,
            answers=answers,
            out=folder,
            config=config,
            limit=limit,
            eval_prompts=eval_prompts,
            off_domain=elsewhere,
        ).report

    begin = models.load if from_layer else None
    if only_check:
        if prompts is None:
            raise UserError("--check asks a few prompts: name their file with --prompts")
        head, measure = graft(models.target, base, Path(out), begin), config.config.measure
        check(
            MaybeTargetFlags(**vars(models)),
            prompts,
            SamplingFlags(),
            output,
            draft=str(head),
            base=base,
            k=measure.k,
            max_new_tokens=measure.eval_new_tokens,
            out=str(Path(out) / CHECK),
        )
        return
    report, written = give_head(models.target, base, Path(out), run, begin)
    served = None
    if verify_in is not None:
        how = EngineFlags(engine=verify_in, python=python)
        served = tried(
            MaybeTargetFlags(**vars(models)), how, output, read_run(str(Path(out) / RUN))
        )
    if output.as_json:
        from ..core.records import to_json

        served_too = {} if served is None else {"verification": to_json(served)}
        print_json({**to_json(report), "checkpoint": written, **served_too})
    else:
        from ..report.terminal import print_report

        print_report(report)
        if served is not None:
            print_tried(served)
        output.finish(STITCHED.format(**written), written)
    if served is not None and not served.good:
        raise typer.Exit(NOT_GOOD)
