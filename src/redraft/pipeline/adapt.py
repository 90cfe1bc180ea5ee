"""The main job, in the order it happens.

    prompts -> regenerate -> select -> train -> merge and export -> measure before/after -> report

Each step is one function below and one stage of the run folder; each is also a command of its own.
What is measured as "after" is the exported folder, read back as an engine would read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapters.table import ADAPTERS, Method, read_method
from ..checkpoints.adapter_folder import load_adapter, save_adapter
from ..checkpoints.load import StoredDraft, load_draft, read_draft
from ..checkpoints.routed import refuse_routed
from ..config import AdaptConfig, RegenerateConfig, Resolved, resolve
from ..core.console import say
from ..core.errors import UserError
from ..core.folders import read_json
from ..core.records import Acceptance, AdaptReport, Answer, Prompt, to_json
from ..drafts.base import Draft
from ..generation.answer_file import answer_inputs, prompts_hash, read_answers
from ..generation.on_policy import ownership
from ..generation.regenerate import check_backend, regenerate
from ..metrics.measure import measure_answers
from ..models.target import Target
from ..prompts.clock import continue_time, kept_time
from ..prompts.disk_list import Picked
from ..prompts.prompts import PromptSet, read_prompts, split_prompts
from ..selection.scoring import NEEDS, Scorers, as_samples, check_scorers
from ..selection.select import read_selection, select, write_selection
from ..training.preconditions import check_fits
from .auto_budget import AUTO, answer_in_rounds, in_order
from .run_folder import RunFolder
from .safety import OFF, measure_safety, read_safety_prompts
from .stages import chosen_answers, merge_draft, train_adapter
from .summary import report_of

WHOLE = 1 << 30
"""As `max_new_tokens`: answers are as long as they are, within the target's context."""


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` returns: the report, and the merged draft as it was exported."""

    report: AdaptReport
    merged: StoredDraft
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
    prompts: str | None = None,
    *,
    answers: str | None = None,
    out: str | Path = "redraft-run",
    method: str | None = None,
    config: Resolved | None = None,
    limit: int | None = None,
    eval_prompts: str | None = None,
    off_domain: dict[str, str] | None = None,
    safety_prompts: str | None = None,
    base: Target | None = None,
) -> AdaptResult:
    """Re-align a draft with `target` on `prompts`, in the run folder `out`.

    `answers` is a file of prompts with answers that are trained on as they are, in place of
    `prompts`; whether they are the target's own is measured and said.
    `draft` is a folder, a Hub id, or what `load_draft` returned. Tau is measured before and after on
    `eval_prompts`, a file of its own, or on prompts kept aside from `prompts`. `off_domain` names
    further files (label -> path) that are measured but never trained on; `safety_prompts` is one more,
    on which the target's answers with the exported draft are compared with those without any. `base`
    is the model that the target was tuned from, for the methods that compare the two (feature-map, weight-sync).
    Running again in the same folder does only what is missing. Raises UserError for bad input, for a folder
    that another process works in, and when the disk refuses a write.
    """
    if config is not None and method is not None:
        raise UserError(
            "name the method in the configuration (train.method) or as method=, not both"
        )
    for name in off_domain or ():
        if not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"off-domain name '{name}': use letters, digits, - and _")
        if name == OFF and safety_prompts:
            raise UserError(
                f"off-domain name '{name}' is that of --safety-prompts, whose tau is measured as well; "
                "choose another"
            )
    resolved = config or resolve([("argument", {"train.method": method} if method else {})])
    source, resolved = _source(prompts, answers, resolved)
    shared = read_draft(_source_of(draft)).fitted(target)
    # What does not fit is refused before anything is paid for.
    check_backend(resolved.config.regenerate, 0)
    _check_measured(resolved.config)
    refuse_routed(getattr(shared.config, "routed", None))
    c, built = resolved.config, shared.build(target)
    check_fits(built, c.train, target, base)
    check_scorers(c.select, Scorers(target, base, built, c.measure.k))
    _check_auto(c)
    continue_time(target, [Path(out) / "run.json"])
    everything = read_prompts(source, target, limit, c.regenerate.turns)
    say(everything.summary())
    elsewhere = {
        name: read_prompts(file, target, c.measure.eval_limit, c.regenerate.turns)
        for name, file in (off_domain or {}).items()
    }
    safety = None
    if safety_prompts:
        safety = read_safety_prompts(safety_prompts, target, c.safety.limit)
        say(safety.asked.summary())
        elsewhere[OFF] = safety.asked
    asked = _ask(target, everything, eval_prompts, elsewhere, c)
    with RunFolder.open(out) as run:
        described = _describe(target, shared, everything, resolved)
        _refuse_other_run(run.path, read_method(c.train.method), described)
        run.write_json("run.json", described)
        if c.select.budget == AUTO:
            answered = _regenerate(run, target, (), asked[1:], elsewhere, c)
            order = in_order(asked[0], c.select.seed)
            trained = answer_in_rounds(run, target, shared, base, order, answered["heldout"], c)
        else:
            answered, selected = _answer_and_select(run, target, shared, base, asked, elsewhere, c)
            trained = _train(run, [selected, answered["heldout"]], target, shared, c, base)
        exported = _export(run, trained, target, shared, c)
        _measure(run, exported, answered, target, shared, c)
        shown = None
        if safety:
            shown = measure_safety(
                *(run, exported, answered[f"off-{OFF}"], target, safety, c, everything.prompts)
            )
        report = report_of(run, target, shared, everything, resolved, shown)
        return AdaptResult(report, read_draft(str(run.path / "draft")), run.path, run.worked)


def _check_auto(c: AdaptConfig) -> None:
    """Rounds ask the target, in a random order."""
    if c.select.budget != AUTO:
        return
    wrong = {
        "--answers": c.regenerate.answers != "regenerate",
        f"--select {c.select.select}": c.select.select != "random",
        "select.by=prompts": c.select.by != "answers",
        "select.coverage": bool(c.select.coverage),
    }
    if any(wrong.values()):
        raise UserError(
            "--budget auto asks prompts in a random order until answers stop paying: leave out "
            f"{', '.join(name for name, there in wrong.items() if there)}, or name a budget (500, "
            "0.5 or 20000t)"
        )


def _check_measured(c: AdaptConfig) -> None:
    if c.measure.answers == "endpoints" and not c.regenerate.endpoints:
        raise UserError(
            "measure.answers=endpoints needs a server that writes the answers; name one with --endpoint, or "
            "leave it out"
        )


def _source(prompts: str | None, answers: str | None, resolved: Resolved) -> tuple[str, Resolved]:
    """The file that is adapted on, and the settings with the answers taken as they are if given."""
    if (prompts is None) == (answers is None):
        raise UserError(
            "name either prompts, which the target answers, or answers that are used as they are "
            "(--prompts FILE or --answers FILE)"
        )
    if answers is None:
        return str(prompts), resolved
    changed: dict[str, Any] = {"answers": "original"}
    if resolved.origins["regenerate.max_new_tokens"] == "default":
        changed["max_new_tokens"] = WHOLE  # as long as they are
    config = dataclasses.replace(
        resolved.config, regenerate=dataclasses.replace(resolved.config.regenerate, **changed)
    )
    origins = {f"regenerate.{name}": "--answers" for name in changed}
    return answers, Resolved(config, {**resolved.origins, **origins})


def _refuse_other_run(folder: Path, method: Method, described: dict[str, Any]) -> None:
    """A folder that holds an adapter is not trained over with another method, or for other files."""
    if not (folder / "adapter").is_dir():
        return
    try:
        before = read_json(folder / "run.json")
        known = read_method(before["config"]["train"]["method"])
        known_by = {"target": "target_fingerprint", "shared": "shared_hash", "prompts": "prompts"}
        other = [name for name, by in known_by.items() if before[by] != described[by]]
    except (UserError, KeyError, TypeError, ValueError):
        return  # its stages will say what is damaged
    if known != method:
        raise UserError(
            f"{folder} holds a run of method {known.name}; for {method.name} name another folder with "
            f"--out, or remove {folder / 'adapter'} to train anew on the same answers (adapters: "
            f"{', '.join(ADAPTERS)})"
        )
    if other:
        was = ", ".join(f"{name} {before[name]}" for name in other)
        raise UserError(
            f"{folder} holds a run with {was}; name another folder with --out, or remove this one"
        )


def _ask(
    target: Target,
    everything: PromptSet,
    eval_prompts: str | None,
    elsewhere: dict[str, PromptSet],
    c: AdaptConfig,
) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
    """Disjoint prompts to adapt on, to stop early by, and to measure on."""
    own = eval_prompts and read_prompts(
        eval_prompts, target, c.measure.eval_limit, c.regenerate.turns
    )
    files = [*([own] if own else []), *elsewhere.values()]
    measured_on = {prompt.tokens for file in files for prompt in file.prompts}
    rest = Picked(
        everything.prompts,
        (i for i, prompt in enumerate(everything.prompts) if prompt.tokens not in measured_on),
    )
    if len(rest) < len(everything.prompts):
        say(f"{len(everything.prompts) - len(rest)} prompts are measured on, so not trained on")
    evaluation = 0 if own else c.measure.eval_limit
    parts = split_prompts(rest, evaluation, c.measure.heldout, c.regenerate.seed)
    return (parts[0], parts[1], own.prompts if own else parts[2])


def _regenerate(
    run: RunFolder,
    target: Target,
    adapt: Sequence[Prompt],
    aside: Sequence[Sequence[Prompt]],
    elsewhere: dict[str, PromptSet],
    c: AdaptConfig,
) -> dict[str, str]:
    """The target answers every prompt, those to `adapt` on and those kept `aside`.

    One stage per file, so that one more file costs only itself.

    What is measured is answered at `measure.temperature`, with an lookahead of K, and in this process
    unless `measure.answers` says otherwise: the words of endpoints part from the target's at near-ties.
    Safety prompts are answered greedily and here, to be compared with greedy decoding. Returns each
    file's stage key.
    """
    there = c.measure.answers == "endpoints"
    if c.regenerate.endpoints and not there:
        say("the answers to adapt on come from the endpoints; those measured on, from this process")
    measured = dataclasses.replace(
        c.regenerate,
        answers="regenerate",
        endpoints=c.regenerate.endpoints if there else "",
        temperature=c.measure.temperature,
        max_new_tokens=c.measure.eval_new_tokens,
    )
    greedy = dataclasses.replace(measured, temperature=0.0, endpoints="")
    jobs = {
        **({"adapt": (adapt, c.regenerate, 0)} if len(adapt) else {}),
        "heldout": (aside[0], measured, c.measure.k),
        "eval": (aside[1], measured, c.measure.k),
        **{
            f"off-{n}": (p.prompts, greedy if n == OFF else measured, c.measure.k)
            for n, p in elsewhere.items()
        },
    }
    keys = {}
    for name, (prompts, config, lookahead) in jobs.items():
        file = f"answers/{name}.jsonl"
        inputs = answer_inputs(target, prompts, config, lookahead)

        def work(
            file: str = file,
            prompts: Sequence[Prompt] = prompts,
            config: RegenerateConfig = config,
            lookahead: int = lookahead,
        ) -> None:
            found = regenerate(target, prompts, run.path / file, config, lookahead)
            if config.answers == "original":
                whose = ownership(target, found, config.batch_tokens)
                run.write_json("ownership.json", asdict(whose))
                say(whose.describe())

        keys[name] = run.stage(f"regenerate {name}", inputs, [file], work, keeps=[file])
    return keys


def _answer_and_select(
    run: RunFolder,
    target: Target,
    shared: StoredDraft,
    base: Target | None,
    asked: tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]],
    elsewhere: dict[str, PromptSet],
    c: AdaptConfig,
) -> tuple[dict[str, str], str]:
    """Answers, then the choice among them; or a choice among the prompts, and only their answers.

    Returns each answers file's stage key, and the key of what is trained on.
    """

    def choose(pool: Callable[[], Sequence[Answer]], pool_key: str) -> str:
        def work() -> None:
            asks_draft = "draft" in NEEDS[c.select.select]
            draft = load_draft(str(shared.folder), target) if asks_draft else None
            found = select(pool(), c.select, Scorers(target, base, draft, c.measure.k))
            write_selection(run.path / "selection.jsonl", found)
            cost = {"tokens": found.tokens, "flops": found.flops, "seconds": found.seconds}
            run.write_json("selection.cost.json", cost)
            say(f"select: {found.summary()}")

        known = {"target": target.fingerprint(), "draft": shared.hash(), "k": c.measure.k}
        known["base"] = base.fingerprint() if base else None
        asks = {name: known[name] for name in (*NEEDS[c.select.select], "k")}
        inputs = {"pool": pool_key, **asks, **asdict(c.select)}
        return run.stage("select", inputs, ["selection.jsonl"], work)

    if c.select.by == "prompts":
        choose(lambda: as_samples(asked[0]), prompts_hash(asked[0]))
        kept = {s.id for s in read_selection(run.path / "selection.jsonl") if s.kept}
        chosen = Picked(asked[0], (i for i, p in enumerate(asked[0]) if p.id in kept))
        answered = _regenerate(run, target, chosen, asked[1:], elsewhere, c)
        return answered, answered["adapt"]
    answered = _regenerate(run, target, asked[0], asked[1:], elsewhere, c)
    answers = run.path / "answers" / "adapt.jsonl"
    return answered, choose(lambda: read_answers(answers), answered["adapt"])


def _train(
    run: RunFolder,
    chosen: list[str],
    target: Target,
    shared: StoredDraft,
    c: AdaptConfig,
    base: Target | None,
) -> str:
    def work() -> None:
        selection = run.path / "selection.jsonl" if c.select.by == "answers" else None
        samples = chosen_answers(read_answers(run.path / "answers" / "adapt.jsonl"), selection)
        heldout = read_answers(run.path / "answers" / "heldout.jsonl")
        part = train_adapter(
            target, shared, samples, heldout, c.train, c.measure.k, run.path / "checkpoints", base
        )
        save_adapter(run.path / "adapter", part)

    inputs = {
        "chosen": chosen,
        "shared": shared.hash(),
        "k": c.measure.k,
        "base": base.fingerprint() if base and read_method(c.train.method).closed_form else None,
        **asdict(c.train),
    }
    # Not training.json, which holds seconds: the same tensors trained anew are the same part.
    outputs = ["adapter/model.safetensors", "adapter/adapter.json"]
    return run.stage("train", inputs, outputs, work, ["checkpoints"])


def _export(
    run: RunFolder, trained: str, target: Target, shared: StoredDraft, c: AdaptConfig
) -> str:
    def work() -> None:
        merged = merge_draft(shared, load_adapter(run.path / "adapter"), target)
        merged.save(run.path / "draft", c.export.format)

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
        "template_args": target.template_args,
        **kept_time(target),
    }
