"""Why a draft does badly in an engine: sentences that name the cause, from what can be compared."""

from __future__ import annotations

import torch

from ..checkpoints.load import StoredDraft
from ..core.records import Verification
from ..models.target import Target
from .judgement import below_record, engine_disagrees

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def diagnose(stored: StoredDraft, target: Target, found: Verification) -> list[str]:
    """The causes of what `found` shows, most likely first."""
    causes = []
    if engine_disagrees(found):
        causes.append(_other_function(found))
    elif below_record(found) and not found.findings:
        causes += _other_parts(stored, target)
    return causes


def _other_function(found: Verification) -> str:
    text = (
        "the engine computes another function from these files than redraft does: engines do not "
        "refuse a missing tensor, a shifted aux layer or another norm, they only accept fewer tokens"
    )
    if found.findings:
        return f"{text}; in the files: {'; '.join(found.findings)}"
    return f"{text}; nothing in the files explains it"


def _other_parts(stored: StoredDraft, target: Target) -> list[str]:
    """Which part of what the draft was made for is no longer there."""
    made_for = stored.provenance
    if "target_fingerprint" not in made_for:
        return [
            f"redraft counts the same low tau, and {stored.folder} does not record which target it was "
            "made for (it has no redraft.json): this is not the draft or target of the run's record"
        ]
    causes = []
    if made_for.get("template_hash") != target.template_hash():
        causes.append(
            "the chat template is not the one this draft was adapted with (hash "
            f"{made_for.get('template_hash')} then, {target.template_hash()} now)"
        )
    recorded, now = made_for["target_fingerprint"], target.fingerprint()
    if recorded != now:
        causes.append(_changed_target(target, recorded, now))
    return causes or [
        "redraft counts the same low tau with the draft and target of the run's record: these "
        "prompts are harder for it than those it was measured on"
    ]


def _changed_target(target: Target, recorded: str, now: str) -> str:
    for dtype in DTYPES:
        if target.fingerprint(dtype) == recorded:
            before, here = (str(d).removeprefix("torch.") for d in (dtype, target.dtype))
            return (
                f"this draft was adapted to the target in {before}, here the target runs in {here}"
            )
    return (
        f"the target changed since this draft was adapted (fingerprint {recorded} then, {now} now)"
    )
