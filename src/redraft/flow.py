"""The main job, in the order it happens.

    prompts -> regenerate -> select -> train -> fuse and export -> measure before/after -> report

Each step is one function below and one stage of the run folder; each is also a command of its own.
What is measured as "after" is the exported folder, read back as an engine would read it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import AdaptConfig, RegenerateConfig, Resolved, resolve
from .console import say
from .data.prompts import PromptSet, read_prompts, split_prompts
from .data.regenerate import (
    answer_inputs,
    check_backend,
    endpoints_of,
    read_answers,
    regenerate,
)
from .data.select import select
from .drafts.base import Draft
from .errors import UserError
from .files import write_text
from .formats.folders import read_json
from .formats.load import StoredDraft, load_draft, read_draft
from .formats.private_part import load_private, read_training, save_private
from .formats.routed import refuse_routed
from .measuring.measure import measure_answers
from .methods import PARTS, Method, read_method
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
from .training.fitness import check_fits


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` returns: the report, and the fused draft as it was exported."""

    report: AdaptReport
    fused: StoredDraft
    run: Path
    worked: bool  # False when every stage was done already

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
    base: Target | None = None,
) -> AdaptResult:
    """Re-align a draft with `target` on `prompts`, in the run folder `out`.

    `draft` is a folder, a Hub id, or what `load_draft` returned. Tau is measured before and after on
    `eval_prompts`, a file of its own, or on prompts kept aside from `prompts`. `off_domain` names
    further files (label -> path) that are measured but never trained on. `base` is the model that
    the target was tuned from, for the methods that compare the two (relay, refresh). Running
    again in the same folder does only what is missing. Raises UserError for bad input, for a folder
    that another process works in, and when the disk refuses a write.
    """
    if config is not None and method is not None:
        raise UserError(
            "name the method in the configuration (train.method) or as method=, not both"
        )
    for name in off_domain or ():
        if not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"off-domain name '{name}': use letters, digits, - and _")
    resolved = config or resolve([("argument", {"train.method": method} if method else {})])
    shared = read_draft(_source_of(draft))
    # What does not fit is refused before anything is paid for.
    check_backend(resolved.config.regenerate, 0)
    refuse_routed(getattr(shared.config, "routed", None))
    check_fits(shared.build(target), resolved.config.train, target, base)
    everything = read_prompts(prompts, target, limit)
    say(everything.summary())
    c = resolved.config
    elsewhere = {
        name: read_prompts(file, target, c.measure.eval_limit)
        for name, file in (off_domain or {}).items()
    }
    asked = _ask(target, everything, eval_prompts, elsewhere, c)
    with RunFolder.open(out) as run:
        _refuse_other_method(run.path, read_method(c.train.method))
        run.write_json("run.json", _describe(target, shared, everything, resolved))
        answered = _regenerate(run, target, asked, elsewhere, c)
        selected = _select(run, answered["adapt"], c)
        trained = _train(run, [selected, answered["heldout"]], target, shared, c, base)
        exported = _export(run, trained, target, shared, c)
        _measure(run, exported, answered, target, shared, c)
        report = _report(run, target, shared, everything, resolved)
        return AdaptResult(report, read_draft(str(run.path / "draft")), run.path, run.worked)


def _refuse_other_method(folder: Path, method: Method) -> None:
    """A folder that holds the private part of one method is not trained over with another."""
    if not (folder / "private").is_dir():
        return
    try:
        known = read_method(read_json(folder / "run.json")["config"]["train"]["method"])
    except (UserError, KeyError, TypeError, ValueError):
        return  # its stages will say what is damaged
    if known != method:
        raise UserError(
            f"{folder} holds a run of method {known.name}; for {method.name} name another folder with "
            f"--out, or remove {folder / 'private'} to train anew on the same answers (parts: "
            f"{', '.join(PARTS)})"
        )


def _ask(
    target: Target,
    everything: PromptSet,
    eval_prompts: str | None,
    elsewhere: dict[str, PromptSet],
    c: AdaptConfig,
) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
    """Disjoint prompts to adapt on, to stop early by, and to measure on."""
    own = eval_prompts and read_prompts(eval_prompts, target, c.measure.eval_limit)
    files = [*([own] if own else []), *elsewhere.values()]
    measured_on = {prompt.tokens for file in files for prompt in file.prompts}
    rest = [prompt for prompt in everything.prompts if prompt.tokens not in measured_on]
    if len(rest) < len(everything.prompts):
        say(f"{len(everything.prompts) - len(rest)} prompts are measured on, so not trained on")
    evaluation = 0 if own else c.measure.eval_limit
    parts = split_prompts(rest, evaluation, c.measure.heldout, c.regenerate.seed)
    return (parts[0], parts[1], own.prompts if own else parts[2])


def _regenerate(
    run: RunFolder,
    target: Target,
    asked: Sequence[Sequence[Prompt]],
    elsewhere: dict[str, PromptSet],
    c: AdaptConfig,
) -> dict[str, str]:
    """The target answers every prompt; one stage per file, so that one more file costs only itself.

    What is measured is answered greedily, with an overrun of K, and in this process: endpoints give
    no overrun, and their words part from the target's at near-ties. Returns each file's stage key.
    """
    if c.regenerate.endpoints:
        say("the answers to adapt on come from the endpoints; those measured on, from this process")
    greedy = dataclasses.replace(
        c.regenerate,
        answers="regenerate",
        endpoints="",
        temperature=0.0,
        max_new_tokens=c.measure.eval_new_tokens,
    )
    jobs = {
        "adapt": (asked[0], c.regenerate, 0),
        "heldout": (asked[1], greedy, c.measure.k),
        "eval": (asked[2], greedy, c.measure.k),
        **{f"off-{n}": (p.prompts, greedy, c.measure.k) for n, p in elsewhere.items()},
    }
    keys = {}
    for name, (prompts, config, overrun) in jobs.items():
        file = f"answers/{name}.jsonl"
        inputs = answer_inputs(target, prompts, config, overrun)

        def work(
            file: str = file,
            prompts: Sequence[Prompt] = prompts,
            config: RegenerateConfig = config,
            overrun: int = overrun,
        ) -> None:
            regenerate(target, prompts, run.path / file, config, overrun)

        continues = [file, f"answers/{name}.about.json"]
        keys[name] = run.stage(f"regenerate {name}", inputs, [file], work, continues)
    return keys


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
    run: RunFolder,
    chosen: list[str],
    target: Target,
    shared: StoredDraft,
    c: AdaptConfig,
    base: Target | None,
) -> str:
    def work() -> None:
        samples = chosen_answers(
            read_answers(run.path / "answers" / "adapt.jsonl"), run.path / "selection.jsonl"
        )
        heldout = read_answers(run.path / "answers" / "heldout.jsonl")
        part = train_private(
            target, shared, samples, heldout, c.train, c.measure.k, run.path / "checkpoints", base
        )
        save_private(run.path / "private", part)

    inputs = {
        "chosen": chosen,
        "shared": shared.hash(),
        "k": c.measure.k,
        "base": base.fingerprint() if base and read_method(c.train.method).starts else None,
        **asdict(c.train),
    }
    # Not training.json, which holds seconds: the same tensors trained anew are the same part.
    outputs = ["private/model.safetensors", "private/private.json"]
    return run.stage("train", inputs, outputs, work, ["checkpoints"])


def _export(
    run: RunFolder, trained: str, target: Target, shared: StoredDraft, c: AdaptConfig
) -> str:
    def work() -> None:
        fused = fuse_draft(shared, load_private(run.path / "private"), target)
        fused.save(run.path / "draft", c.export.format)

    return run.stage("export", {"trained": trained, **asdict(c.export)}, ["draft"], work)


def _measure(
    run: RunFolder,
    exported: str,
    answered: dict[str, str],
    target: Target,
    shared: StoredDraft,
    c: AdaptConfig,
) -> None:
    measured = {n: k for n, k in answered.items() if n == "eval" or n.startswith("off-")}

    def work() -> None:
        for when, source in (("before", str(shared.folder)), ("after", str(run.path / "draft"))):
            draft = load_draft(source, target)
            for name in measured:
                answers = read_answers(run.path / "answers" / f"{name}.jsonl")
                found = measure_answers(target, draft, answers, k=c.measure.k)
                run.write_json(f"measure/{name}-{when}.json", to_json(found.acceptance))

    inputs = {"exported": exported, "answers": measured, "k": c.measure.k}
    run.stage("measure", inputs, ["measure"], work)


def _report(
    run: RunFolder, target: Target, shared: StoredDraft, prompts: PromptSet, resolved: Resolved
) -> AdaptReport:
    part = load_private(run.path / "private")
    answers = read_answers(run.path / "answers" / "adapt.jsonl")
    served = endpoints_of(run.path / "answers" / "adapt.jsonl")
    trained = TrainRecord(**read_training(run.path / "private"))
    generated = sum(
        answer.length
        for name in ("adapt", "heldout")
        for answer in read_answers(run.path / "answers" / f"{name}.jsonl")
        if name == "heldout" or resolved.config.regenerate.answers == "regenerate"
    )
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
            **({"answered_by_endpoints": served} if served else {}),
        },
        before=acceptance(json.loads((run.path / "measure/eval-before.json").read_text())),
        after=acceptance(json.loads((run.path / "measure/eval-after.json").read_text())),
        off_domain=off,
        train=trained,
        cost={
            "unique_generated_tokens": generated,
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
