"""A fine-tune's own MTP head: grafted from the base, adapted, and stitched into the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..config import MeasureConfig, Resolved
from ..core import ranks
from ..core.errors import UserError
from ..core.records import Verification, to_json
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
    from ..pipeline.own_head import RUN, give_head
    from ..serving.engines import engine_named

    _check_flags(models, base, from_layer, only_check, verify_in, python)
    begin = models.load if from_layer else None
    if only_check:
        unused: dict[str, object] = {"--answers": answers, "--eval-prompts": eval_prompts}
        unused |= {"--off-domain": off_domain, "--verify-in": verify_in, "--limit": limit}
        if given := [name for name, value in unused.items() if value]:
            raise UserError(
                f"--check trains no head and does not use {', '.join(given)}; leave it out"
            )
        _check(models, prompts, Path(out), base, begin, config.config.measure, output)
        return
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

    report, written = give_head(models.target, base, Path(out), run, begin)
    served = None
    if verify_in is not None:
        how, finished = EngineFlags(engine=verify_in, python=python), read_run(str(Path(out) / RUN))
        served = tried(MaybeTargetFlags(**vars(models)), how, output, finished)
    _show(report, written, served, output)
    if served is not None and not served.good:
        raise typer.Exit(NOT_GOOD)


def _check_flags(
    models: TargetFlags,
    base: str | None,
    from_layer: bool,
    only_check: bool,
    verify_in: str | None,
    python: str | None,
) -> None:
    """Raises UserError for flags that do not go together."""
    from ..models.tensor_parallel import TENSOR_PARALLEL

    if models.target_adapter:
        raise UserError(
            "--target-adapter: an MTP head lies in the model's own checkpoint; merge the adapter into the model first"
        )
    if from_layer and models.device_map == TENSOR_PARALLEL:
        raise UserError(
            f"--from-layer reads the last layer of the target, which --device-map {TENSOR_PARALLEL} shares out; leave one "
            "of the two out"
        )
    if from_layer and base:
        raise UserError("name --base, whose head is grafted, or --from-layer, not both")
    if (only_check or verify_in) and ranks.size() > 1:
        raise UserError(
            "--check and --verify-in are the work of one process; run them without torchrun (`redraft verify --run OUT/run` tries a "
            "finished run)"
        )
    if python is not None and verify_in is None:
        raise UserError("--python is the environment of an engine; name that with --verify-in")


def _check(
    models: TargetFlags,
    prompts: str | None,
    out: Path,
    base: str | None,
    begin: Callable[[], Any] | None,
    measure: MeasureConfig,
    output: OutputFlags,
) -> None:
    """`redraft check` of the head that training would begin with."""
    from ..pipeline.own_head import CHECK, graft

    if prompts is None:
        raise UserError("--check asks a few prompts: name their file with --prompts")
    check(
        MaybeTargetFlags(**vars(models)),
        prompts,
        SamplingFlags(),
        output,
        draft=str(graft(models.target, base, out, begin)),
        base=base,
        k=measure.k,
        max_new_tokens=measure.eval_new_tokens,
        out=str(out / CHECK),
    )


def _show(
    report: AdaptReport,
    written: dict[str, Any],
    served: Verification | None,
    output: OutputFlags,
) -> None:
    from ..report.terminal import print_report

    if output.as_json:
        served_too = {} if served is None else {"verification": to_json(served)}
        print_json({**to_json(report), "checkpoint": written, **served_too})
        return
    print_report(report)
    if served is not None:
        print_tried(served)
    output.finish(STITCHED.format(**written), written)
