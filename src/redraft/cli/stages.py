"""Each stage of the job as a command of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import MeasureConfig, Resolved
from ..core.console import say
from ..core.errors import UserError
from .bundles import (
    FeatureFlags,
    MaybeTargetFlags,
    OutputFlags,
    SamplingFlags,
    TargetFlags,
    aux_layers_from,
    k_from,
)
from .examples import print_examples

AUTO_PROMPTS = 8
"""--k auto decodes this many prompts to see how often drafted tokens are accepted."""


def regenerate(
    models: TargetFlags,
    prompts: str,
    out: str,
    config: Resolved,
    output: OutputFlags,
    lookahead: int = 0,
    selection: str | None = None,
    limit: int | None = None,
) -> None:
    """The target answers the prompts through its own chat template, here or behind endpoints.

    An endpoint's API key is read from $REDRAFT_API_KEY and stored nowhere.

    Example: redraft regenerate --target ./my-model --prompts prompts.jsonl --out answers.jsonl
    --endpoint http://127.0.0.1:8000
    """
    c = config.config.regenerate
    from ..generation.answer_file import about
    from ..generation.regenerate import check_backend
    from ..pipeline.stages import answer_file
    from ..prompts.clock import continue_time
    from ..prompts.prompts import read_prompts
    from ..selection.select import kept_prompts

    check_backend(c, lookahead)
    loaded = models.load()
    continue_time(loaded, [about(Path(out))])
    found = read_prompts(prompts, loaded, limit, c.turns)
    say(found.summary())
    asked = kept_prompts(found.prompts, Path(selection)) if selection else found.prompts
    answers, _ = answer_file(loaded, asked, Path(out), c, lookahead, grow=True)
    output.finish(
        f"{len(answers)} answers, {sum(a.length for a in answers):,} tokens in {out}",
        {
            "answers": len(answers),
            "tokens": sum(a.length for a in answers),
            "unfinished": sum(a.finish == "length" for a in answers),
            "left_out": found.left_out_count,
            "out": out,
        },
    )


def select(
    models: MaybeTargetFlags,
    out: str,
    config: Resolved,
    output: OutputFlags,
    answers: str | None = None,
    prompts: str | None = None,
    draft: str | None = None,
    base: str | None = None,
    k: int = MeasureConfig.k,
    examples: bool = False,
    limit: int | None = None,
) -> None:
    """Choose the samples worth training on, within a budget: answers, or prompts not yet answered.

    Example: redraft select --answers answers.jsonl --out selection.jsonl --select rejection
    --target ./my-model --draft org/EAGLE3-base --budget 0.5 --explain
    """
    c = config.config.select
    from ..checkpoints.load import load_draft
    from ..core.records import Answer
    from ..generation.answer_file import answers_for, read_answers
    from ..prompts.prompts import read_prompts
    from ..selection.explain import explain
    from ..selection.scoring import Scorers, as_samples
    from ..selection.select import select as run
    from ..selection.select import write_selection

    given, missing = (prompts, "--prompts") if c.by == "prompts" else (answers, "--answers")
    if given is None:
        raise UserError(f"--by {c.by} chooses among {c.by}: name them with {missing}")
    named = models.named()
    loaded = named.load() if named else None
    if c.by == "answers":
        pool = (answers_for(loaded, Path(given)) if loaded else read_answers(Path(given)))[:limit]
    elif loaded:
        found = read_prompts(given, loaded, limit)
        say(found.summary())
        pool = as_samples(found.prompts)
    if loaded is None and (c.by == "prompts" or examples):
        flag = "--explain" if examples else "--by prompts"
        raise UserError(f"{flag} needs the target's tokenizer: name the target with --target")
    scorers = Scorers(
        loaded,
        models.load_plain(base),
        load_draft(draft, loaded) if draft and loaded else None,
        k,
    )
    selection = run(pool, c, scorers)
    write_selection(Path(out), selection)
    if examples and loaded:
        shown = {s.id: s for s in pool}
        if c.by == "prompts":  # whole prompts, that have no answer
            shown = {p.id: Answer(p.id, p.tokens, (), 0, "length") for p in found.prompts}
        print_examples(explain(selection.samples, shown, loaded))
    output.finish(
        f"{selection.summary()}, in {out}",
        {
            "kept": len(selection.kept),
            "scored": len(selection.samples),
            "tokens": sum(s.tokens for s in selection.kept),
            "scoring": {
                "tokens": selection.tokens,
                "flops": selection.flops,
                "seconds": selection.seconds,
            },
            "out": out,
        },
    )


def train(
    models: TargetFlags,
    answers: str,
    out: str,
    config: Resolved,
    stored: FeatureFlags,
    output: OutputFlags,
    draft: str | None = None,
    heldout: str | None = None,
    selection: str | None = None,
    k: int = MeasureConfig.k,
    kind: str | None = None,
    aux_layers: str | None = None,
    draft_vocab: int | None = None,
    draft_width: int | None = None,
    base: str | None = None,
) -> None:
    """Train an adapter of a shared draft, or a whole draft with --method scratch.

    Example: redraft train --target ./my-model --draft org/EAGLE3-base --answers answers.jsonl
    --out adapter --method expert --width 256
    """
    c = config.config.train
    if heldout is None:
        raise UserError(
            "--heldout is needed: answers that are not trained on decide when to stop; write some with "
            f"redraft regenerate --lookahead {k}"
        )
    from ..pipeline.stages import Shape, train_files

    loaded = stored.load(models)
    record = train_files(
        *(loaded, Path(answers), Path(heldout), Path(out), c, k),
        selection=Path(selection) if selection else None,
        draft=draft,
        shape=Shape(kind, aux_layers_from(aux_layers), draft_vocab, draft_width),
        base=models.load_plain(base),
    )
    from ..core.records import to_json

    output.finish(
        f"held-out tau {record.best_tau():.3f} at step {record.best_step}; {record.trained_parameters:,} "
        f"parameters in {out}",
        {**to_json(record), "out": out},
    )


def measure(
    models: TargetFlags,
    draft: str,
    stored: FeatureFlags,
    drawn: SamplingFlags,
    output: OutputFlags,
    prompts: str | None = None,
    answers: str | None = None,
    k: str = str(MeasureConfig.k),
    max_new_tokens: int = 128,
    mode: str = "replay",
    acceptance: str = "",
    draft_token: str = "",
    seed: int = 0,
    save_ids: str | None = None,
    limit: int | None = None,
) -> None:
    """How many tokens a target pass yields with this draft: tau with interval, per position.

    At a temperature the default is what engines do: sampled acceptance, deterministic draft tokens.

    With --answers nothing is decoded. Answers of this target, written here or by an endpoint, are scored. With
    --features its stored states are read in place of its layers, where it does not fit here.

    Example: redraft measure --target ./my-model --draft ./draft --prompts prompts.jsonl --k 4
    """
    from ..checkpoints.load import load_draft
    from ..core.records import to_json
    from ..decoding.acceptance_modes import Decoding
    from ..pipeline.stages import measure_file
    from ..report.terminal import print_acceptance

    chosen = k_from(k)
    _check_sources(mode, prompts, answers, stored)
    if answers is not None:
        _check_scores_only(mode, chosen, drawn, save_ids)
    loaded = stored.load(models)
    proposer, left_out = load_draft(draft, loaded), 0
    if answers is not None:
        measured = measure_file(
            *(loaded, proposer, Path(answers), chosen or MeasureConfig.k),
            mode=mode,
            acceptance=acceptance,
            draft_token=draft_token,
            limit=limit,
        ).acceptance
    else:
        decoding = Decoding(
            acceptance or ("sampled" if drawn.temperature else "greedy"),
            drawn.sampling(),
            draft_token or ("" if acceptance else "deterministic"),
        )
        measured, left_out = _of_prompts(
            *(loaded, proposer, str(prompts), limit, chosen, mode, decoding),
            max_new_tokens=max_new_tokens,
            seed=seed,
            save_ids=save_ids,
        )
    output.show({**to_json(measured), "left_out": left_out}, lambda: print_acceptance(measured))


def _check_sources(
    mode: str, prompts: str | None, answers: str | None, stored: FeatureFlags
) -> None:
    """Raises UserError where it is not clear what is measured, or it cannot be."""
    from ..metrics.measure import WAYS

    if mode not in WAYS:
        raise UserError(f"--mode must be one of {', '.join(WAYS)}; got '{mode}'")
    if (prompts is None) == (answers is None):
        raise UserError(
            "name either prompts, which the target answers first, or an answers file, which is scored "
            "unchanged (--prompts FILE or --answers FILE)"
        )
    if stored.features and prompts:
        raise UserError(
            "--features stand in for the target's layers, which cannot answer prompts; name --answers"
        )


def _check_scores_only(
    mode: str, k: int | None, drawn: SamplingFlags, save_ids: str | None
) -> None:
    """Refuse the flags of answering, where answers are given."""
    given = {
        "--mode live": mode == "live",
        "--k auto": k is None,
        "--temperature, --top-k, --top-p or --min-p": drawn != SamplingFlags(),
        "--save-ids": save_ids,
    }
    if wrong := [flag for flag, there in given.items() if there]:
        raise UserError(f"--answers are scored unchanged, which leaves no use for {wrong[0]}")


def _of_prompts(
    target: Any,
    draft: Any,
    source: str,
    limit: int | None,
    k: int | None,
    mode: str,
    decoding: Any,
    *,
    max_new_tokens: int,
    seed: int,
    save_ids: str | None,
) -> tuple[Any, int]:
    """The acceptance of a draft on prompts that the target answers first; how many rows were left out."""
    from ..core.files import write_text
    from ..metrics.cost import auto_k
    from ..metrics.measure import measure as run
    from ..prompts.prompts import read_prompts

    found = read_prompts(source, target, limit)
    say(found.summary())
    if k is None:
        choice = auto_k(target, draft, found.prompts[:AUTO_PROMPTS], decoding)
        k = choice.k
        say(choice.explain())
    if save_ids:
        write_text(Path(save_ids), json.dumps([list(p.tokens) for p in found.prompts]) + "\n")
    measured = run(
        *(target, draft, found.prompts),
        k=k,
        max_new_tokens=max_new_tokens,
        mode=mode,
        decoding=decoding,
        seed=seed,
    )
    return measured.acceptance, found.left_out_count
