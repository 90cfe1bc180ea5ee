"""The report of a run, put together from what its stages left in the folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

from ..checkpoints.adapter_folder import load_adapter, read_training
from ..checkpoints.load import StoredDraft
from ..config import Resolved
from ..core.folders import read_json
from ..core.records import Answer, Safety, TrainRecord, acceptance, to_json
from ..core.remote import address_of
from ..core.report_record import AdaptReport, Change
from ..generation.answer_file import endpoints_of, read_answers
from ..metrics import intervals
from ..models.target import Target
from ..prompts.prompts import PromptSet
from ..report.answers import choose_answers
from ..report.page import write_page
from .auto_budget import ANSWERS, AUTO, trained_in_all
from .general import GENERAL
from .run_folder import RunFolder
from .stages import STEPS
from .start import FILE as START
from .start import read_start


def report_of(
    run: RunFolder,
    target: Target,
    shared: StoredDraft,
    prompts: PromptSet,
    resolved: Resolved,
    safety: Safety | None = None,
) -> AdaptReport:
    """Make report.json and report.html again, and return the record."""
    part = load_adapter(run.path / "adapter")
    in_rounds = resolved.config.select.budget == AUTO
    answers = read_answers(run.path / (ANSWERS if in_rounds else "answers/adapt.jsonl"))
    files = (run.path / "answers").glob("round-*.jsonl" if in_rounds else "adapt.jsonl")
    served = {url: about for file in sorted(files) for url, about in endpoints_of(file).items()}
    trained = TrainRecord(**read_training(run.path / "adapter"))
    paid = read_answers(run.path / "answers" / "heldout.jsonl")
    paid += answers if resolved.config.regenerate.answers == "regenerate" else []
    general = _general(run)
    off = {
        path.stem.removeprefix("off-"): acceptance(json.loads(path.read_text()))
        for path in sorted((run.path / "measure").glob("off-*.json"))
    }
    before = acceptance(json.loads((run.path / "measure/eval-before.json").read_text()))
    steps = read_json(run.path / STEPS) if (run.path / STEPS).exists() else {}
    report = AdaptReport(
        target=address_of(target.name),
        shared=address_of(shared.folder),
        adapter=address_of(run.path / "adapter"),
        draft=address_of(run.path / "draft"),
        prompts={
            "source": address_of(prompts.source),
            "kept": len(prompts.prompts),
            "left_out": prompts.left_out_count,
            "left_out_rows": [list(row) for row in prompts.left_out],
            "answered": len(answers),
            "trained_on": part.card["samples"],
            **({"general": len(general)} if general else {}),
            **_on_policy(run, resolved),
            **({"answered_by_endpoints": served} if served else {}),
        },
        before=before,
        after=acceptance(json.loads((run.path / "measure/eval-after.json").read_text())),
        off_domain=off,
        train=trained,
        cost={
            "unique_generated_tokens": sum(answer.length for answer in [*paid, *general]),
            "supervised_tokens": trained_in_all(run) if in_rounds else trained.supervised_tokens,
            **_choice_cost(run, resolved),
            "seconds": run.seconds(),
        },
        config=asdict(resolved.config),
        origins=resolved.origins,
        versions=run.versions(),
        safety=safety,
        changes=measured_changes(steps, before.k),
        shown=choose_answers(
            read_answers(run.path / "answers" / "eval.jsonl"),
            steps["eval-before"],
            steps["eval-after"],
            partial(target.tokenizer.decode, clean_up_tokenization_spaces=False),
        )
        if steps
        else (),
        start=read_start(run.path / START)[0] if (run.path / START).is_file() else None,
    )
    run.write_json("report.json", to_json(report))
    write_page(run.path / "report.html", report)
    return report


def _general(run: RunFolder) -> list[Answer]:
    """The answers to general prompts, but for those that are only measured."""
    files = sorted((run.path / "answers").glob(f"{GENERAL}*.jsonl"))
    return [answer for file in files for answer in read_answers(file)]


def measured_changes(steps: dict[str, list[list[int]]], k: int) -> dict[str, Change]:
    """By how much each measured set changed, on the same answers."""

    def counts(name: str) -> list[list[tuple[float, float]]]:
        return [[(sum(accepted), len(accepted)) for accepted in steps[name] if accepted]]

    names = [name.removesuffix("-after") for name in sorted(steps) if name.endswith("-after")]
    found = {n: intervals.difference(counts(f"{n}-after"), counts(f"{n}-before"), k) for n in names}
    return {name: Change(each.value, each.low, each.high) for name, each in found.items()}


def _choice_cost(run: RunFolder, resolved: Resolved) -> dict[str, Any]:
    """What choosing cost, or what answering in rounds saved."""
    if resolved.config.select.budget == AUTO:
        return {"rounds": read_json(run.path / "rounds.json")}
    return {"scored": read_json(run.path / "selection.cost.json")}


def _on_policy(run: RunFolder, resolved: Resolved) -> dict[str, Any]:
    """What was measured of answers that were taken unchanged."""
    if resolved.config.regenerate.answers != "original":
        return {}
    return {"given_answers": read_json(run.path / "on_policy.json")}
