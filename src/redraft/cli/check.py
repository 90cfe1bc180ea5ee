"""Whether adapting is worth it, by a few prompts."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MeasureConfig, RegenerateConfig, resolve
from ..core.errors import UserError
from .bundles import (
    MaybeTargetFlags,
    OutputFlags,
    SamplingFlags,
    refuse_with_endpoint,
    template_args_from,
)

if TYPE_CHECKING:
    from ..check.calibration_runs import CalibrationRun
    from ..check.check import Check

OURS = "ours"
"""What `--calibration` calls the runs that come with redraft."""


def check(
    models: MaybeTargetFlags,
    prompts: str,
    drawn: SamplingFlags,
    output: OutputFlags,
    draft: str | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    base: str | None = None,
    batch: int = 1,
    k: int = MeasureConfig.k,
    most: int = 64,
    max_new_tokens: int = 128,
    published: float | None = None,
    worth: float = 0.1,
    serve: int | None = None,
    method: str | None = None,
    calibration: list[str] | None = None,
    out: str | None = None,
) -> None:
    """Is adapting worth it? From a few prompts: retention, causes, speed, cost, a recommendation.

    A short adaptation is tried, and thrown away. Small targets' outcomes are predicted from calibration runs.

    With --endpoint a server's own counters are read; no weights are needed, and less is known.

    Example: redraft check --target ./my-model --draft org/EAGLE3-base --base org/base
    --prompts prompts.jsonl --batch 4
    """
    from ..check.recommendation import WORTH
    from ..check.screen import print_check, print_served
    from ..check.served import check_served
    from ..core.records import to_json

    asked: dict[str, Any] = {
        "rows": batch,
        "most": most,
        "answering": RegenerateConfig(**dataclasses.asdict(drawn), max_new_tokens=max_new_tokens),
        "worth": worth,
        "published": published,
        "runs": _known_runs(calibration or [OURS]),
    }
    if endpoint:
        _refuse(models, drawn, draft=draft, base=base, serve=serve, method=method, out=out)
        if worth != WORTH and not calibration:
            raise UserError(
                f"--worth {worth:g} is the least gain that is recommended, and through a server nothing is without runs of your "
                "own; name them with --calibration, or leave --worth out"
            )
        variables = template_args_from(models.template_arg)
        served = check_served(
            endpoint, prompts, model=endpoint_model, template_args=variables, **asked
        )
        output.show(to_json(served), lambda: print_served(served))
        return
    tried = resolve([("flag", {"train.method": method} if method else {})]).config.train
    found = _check_weights(
        models, draft, prompts, out, base, k=k, serve=serve, method=tried.method, **asked
    )
    output.show(to_json(found), lambda: print_check(found))


def _check_weights(
    models: MaybeTargetFlags,
    draft: str | None,
    prompts: str,
    out: str | None,
    base: str | None,
    **asked: Any,
) -> Check:
    """The check of a target and a draft that are loaded here; answers are kept in `out`, if that is named."""
    from ..check.check import check as run
    from ..checkpoints.load import read_draft
    from ..core.files import writing
    from ..core.lock import held

    named = models.named()
    if named is None or draft is None:
        raise UserError(
            "name what is checked: --target and --draft (folders or Hub ids), or --endpoint URL of the server "
            "that serves them"
        )
    target = named.load()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            stored, origin = read_draft(draft), named.load_plain(base)
            return run(target, stored, prompts, folder, base=origin, **asked)


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


def _refuse(models: MaybeTargetFlags, drawn: SamplingFlags, **given: object) -> None:
    """Raises UserError for flags that need the weights."""
    flags = {
        "target": models.target,
        **given,
        "target-adapter": models.target_adapter,
        "chat-template": models.chat_template,
        "min-p": drawn.min_p or None,  # vLLM refuses it where it speculates
    }
    refuse_with_endpoint(flags)
