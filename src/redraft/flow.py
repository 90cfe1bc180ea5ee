"""The main job, in the order it happens.

    prompts -> regenerate -> select -> train -> fuse and export -> measure before/after -> report

Each step is one function below and one stage of the run folder; each is also a command of its own.
What is measured as "after" is the exported folder, read back as an engine would read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import AdaptConfig, Resolved, resolve
from .console import say
from .data.prompts import PromptSet, read_prompts, split_prompts
from .data.regenerate import read_answers, regenerate
from .data.select import select
from .drafts.base import Draft
from .errors import UserError
from .formats.folders import write_text
from .formats.load import StoredDraft, load_draft, read_draft
from .formats.private_part import load_private, save_private
from .measuring.measure import measure_answers
from .records import (
    Acceptance,
    AdaptReport,
    Prompt,
    TrainRecord,
    acceptance,
    to_json,
    versions,
)
from .report.page import write_page
from .run_folder import RunFolder
from .steps import chosen_answers, fuse_draft, train_private
from .target import Target


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` returns: the report, and the fused draft as it was exported."""

    report: AdaptReport
    fused: StoredDraft
    run: Path

    @property
    def before(self) -> Acceptance:
        return self.report.before

    @property
    def after(self) -> Acceptance:
        return self.report.after


def adapt(
    target: Target,
    draft: Draft | str,
    prompts: str,
    *,
    out: str | Path = "redraft-run",
    method: str | None = None,
    config: Resolved | None = None,
    limit: int | None = None,
    eval_prompts: str | None = None,
    off_domain: dict[str, str] | None = None,
) -> AdaptResult:
    """Re-align a draft with `target` on `prompts`, in the run folder `out`.

    `draft` is a folder, a Hub id, or what `load_draft` returned. Tau is measured before and after on
    `eval_prompts`, a file of its own, or on prompts kept aside from `prompts`. `off_domain` names
    further files (label -> path) that are measured but never trained on. Running
    again in the same folder does only what is missing. Raises UserError for bad input.
    """
    resolved = config or resolve([("argument", {"train.method": method} if method else {})])
    shared = read_draft(_source_of(draft))
    shared.build(target)  # refuses a draft that does not fit, before anything is paid for
    run = RunFolder(out)
    everything = read_prompts(prompts, target, limit)
    say(everything.summary())
    run.write_json("run.json", _describe(target, shared, everything, resolved))

    c = resolved.config
    asked = _ask(target, everything, eval_prompts, c)
    elsewhere = {
        k: read_prompts(v, target, c.measure.eval_limit) for k, v in (off_domain or {}).items()
    }
    key = _regenerate(run, target, asked, elsewhere, c)
    key = _select(run, key, c)
    key = _train(run, key, target, shared, c)
    key = _export(run, key, target, shared, c)
    _measure(run, key, target, shared, c)
    report = _report(run, target, shared, everything, resolved)
    return AdaptResult(report, read_draft(str(run.path / "draft")), run.path)


def _ask(
    target: Target, everything: PromptSet, eval_prompts: str | None, c: AdaptConfig
) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
    """Disjoint prompts to adapt on, to stop early by, and to measure on."""
    seed, heldout = c.regenerate.seed, c.measure.heldout
    if eval_prompts is None:
        return split_prompts(everything.prompts, c.measure.eval_limit, heldout, seed)
    own = read_prompts(eval_prompts, target, c.measure.eval_limit).prompts
    measured_on = {prompt.tokens for prompt in own}
    rest = [prompt for prompt in everything.prompts if prompt.tokens not in measured_on]
    if len(rest) < len(everything.prompts):
        say(f"{len(everything.prompts) - len(rest)} prompts are also in {eval_prompts}: left out")
    adapt_on, stop_by, _ = split_prompts(rest, 0, heldout, seed)
    return adapt_on, stop_by, own


def _regenerate(
    run: RunFolder,
    target: Target,
    asked: Sequence[Sequence[Prompt]],
    elsewhere: dict[str, PromptSet],
    c: AdaptConfig,
) -> str:
    """The target answers every prompt. Evaluation answers are greedy and overrun their end by K."""
    greedy = {"answers": "regenerate", "temperature": 0.0}
    evaluated = {**asdict(c.regenerate), **greedy, "max_new_tokens": c.measure.eval_new_tokens}
    jobs = {
        "adapt": (asked[0], c.regenerate, 0),
        "heldout": (asked[1], type(c.regenerate)(**evaluated), c.measure.k),
        "eval": (asked[2], type(c.regenerate)(**evaluated), c.measure.k),
    }
    for name, prompts in elsewhere.items():
        jobs[f"off-{name}"] = (prompts.prompts, type(c.regenerate)(**evaluated), c.measure.k)

    def work() -> None:
        for name, (prompts, config, overrun) in jobs.items():
            regenerate(target, prompts, run.path / "answers" / f"{name}.jsonl", config, overrun)

    inputs = {
        "target": target.fingerprint(),
        "jobs": [
            (name, [(p.id, p.tokens, p.reference) for p in prompts], asdict(config), overrun)
            for name, (prompts, config, overrun) in jobs.items()
        ],
    }
    return run.stage("regenerate", inputs, ["answers"], work)


def _select(run: RunFolder, answered: str, c: AdaptConfig) -> str:
    def work() -> None:
        scored = select(read_answers(run.path / "answers" / "adapt.jsonl"), c.select)
        lines = "".join(json.dumps(asdict(s)) + "\n" for s in scored)
        write_text(run.path / "selection.jsonl", lines)
        kept = [s for s in scored if s.kept]
        say(
            f"select: kept {len(kept)} of {len(scored)} answers, {sum(s.tokens for s in kept):,} tokens"
        )

    return run.stage("select", {"answers": answered, **asdict(c.select)}, ["selection.jsonl"], work)


def _train(
    run: RunFolder, selected: str, target: Target, shared: StoredDraft, c: AdaptConfig
) -> str:
    def work() -> None:
        chosen = chosen_answers(
            read_answers(run.path / "answers" / "adapt.jsonl"), run.path / "selection.jsonl"
        )
        heldout = read_answers(run.path / "answers" / "heldout.jsonl")
        part = train_private(
            target, shared, chosen, heldout, c.train, c.measure.k, run.path / "checkpoints"
        )
        save_private(run.path / "private", part)

    inputs = {
        "selected": selected,
        "shared": shared.hash(),
        "k": c.measure.k,
        **asdict(c.train),
    }
    return run.stage("train", inputs, ["private", "checkpoints"], work)


def _export(
    run: RunFolder, trained: str, target: Target, shared: StoredDraft, c: AdaptConfig
) -> str:
    def work() -> None:
        fused = fuse_draft(shared, load_private(run.path / "private"), target)
        fused.save(run.path / "draft", c.export.format)

    return run.stage("export", {"trained": trained, **asdict(c.export)}, ["draft"], work)


def _measure(
    run: RunFolder, exported: str, target: Target, shared: StoredDraft, c: AdaptConfig
) -> str:
    def work() -> None:
        for when, source in (("before", str(shared.folder)), ("after", str(run.path / "draft"))):
            draft = load_draft(source, target)
            for file in sorted((run.path / "answers").glob("*.jsonl")):
                if file.stem == "eval" or file.stem.startswith("off-"):
                    answers = read_answers(file)
                    measured = measure_answers(target, draft, answers, k=c.measure.k)
                    run.write_json(f"measure/{file.stem}-{when}.json", to_json(measured.acceptance))

    inputs = {"exported": exported, "k": c.measure.k}
    return run.stage("measure", inputs, ["measure"], work)


def _report(
    run: RunFolder, target: Target, shared: StoredDraft, prompts: PromptSet, resolved: Resolved
) -> AdaptReport:
    part = load_private(run.path / "private")
    answers = read_answers(run.path / "answers" / "adapt.jsonl")
    trained = TrainRecord(**part.card["train"])
    off = {
        path.stem.removeprefix("off-"): acceptance(json.loads(path.read_text()))
        for path in sorted((run.path / "measure").glob("off-*.json"))
    }
    report = AdaptReport(
        target=target.name,
        shared=str(shared.folder),
        private=str(run.path / "private"),
        draft=str(run.path / "draft"),
        prompts={
            "source": prompts.source,
            "kept": len(prompts.prompts),
            "left_out": len(prompts.left_out),
            "answered": len(answers),
            "trained_on": part.card["samples"],
        },
        before=acceptance(json.loads((run.path / "measure/eval-before.json").read_text())),
        after=acceptance(json.loads((run.path / "measure/eval-after.json").read_text())),
        off_domain=off,
        train=trained,
        cost={
            "unique_generated_tokens": sum(a.length for a in answers),
            "supervised_tokens": trained.supervised_tokens,
            "seconds": run.seconds(),
        },
        config=asdict(resolved.config),
        origins=resolved.origins,
        versions=versions(),
    )
    run.write_json("report.json", to_json(report))
    write_page(run.path / "report.html", report)
    return report


def _source_of(draft: Draft | str) -> str:
    if isinstance(draft, str):
        return draft
    if draft.source is None:
        raise UserError("this draft was made in memory; save it to a folder before adapting it")
    return draft.source


def _describe(
    target: Target, shared: StoredDraft, prompts: PromptSet, resolved: Resolved
) -> dict[str, Any]:
    return {
        "target": target.name,
        "target_fingerprint": target.fingerprint(),
        "shared": str(shared.folder),
        "shared_hash": shared.hash(),
        "prompts": prompts.source,
        "left_out": [list(row) for row in prompts.left_out],
        "config": asdict(resolved.config),
        "origins": resolved.origins,
        "versions": versions(),
    }
