"""Each stage of the job as a command of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import MeasureConfig, resolve
from ..core.console import say, set_quiet
from ..core.errors import UserError
from .features import (
    FeaturesFlag,
    FeatureTapsFlag,
    PickleFlag,
    aux_layers_from,
    load_beside,
)
from .flags import (
    AcceptanceFlag,
    AdapterFlag,
    BaseFlag,
    DraftFlag,
    DraftTokenFlag,
    DtypeFlag,
    JsonFlag,
    KFlag,
    LimitFlag,
    MinPFlag,
    PromptsFlag,
    QuietFlag,
    TargetFlag,
    TemperatureFlag,
    TemplateArgFlag,
    TemplateFlag,
    TopKFlag,
    TopPFlag,
    decoding_from,
    finish,
    k_from,
    load,
    print_examples,
    print_json,
    with_settings,
)

AUTO_PROMPTS = 8
"""--k auto decodes this many prompts to see how often drafted tokens are accepted."""


@with_settings("regenerate")
def regenerate(
    target: TargetFlag,
    prompts: PromptsFlag,
    out: Annotated[str, typer.Option("--out", help="answers file (JSONL); run again to resume")],
    settings: Any,
    lookahead: Annotated[
        int,
        typer.Option(
            "--lookahead", "--overrun", help="tokens kept past each answer's end, for replay at K"
        ),
    ] = 0,
    selection: Annotated[
        str | None,
        typer.Option("--selection", help="answer only the prompts that `select --by prompts` kept"),
    ] = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    limit: LimitFlag = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """The target answers the prompts through its own chat template, here or behind endpoints.

    An endpoint's API key is read from $REDRAFT_API_KEY and stored nowhere.

    Example: redraft regenerate --target ./my-model --prompts prompts.jsonl --out answers.jsonl
    --endpoint http://127.0.0.1:8000
    """
    set_quiet(quiet)
    c = resolve([("flag", settings)]).config.regenerate
    from ..generation.answer_file import about
    from ..generation.regenerate import check_backend
    from ..pipeline.stages import answer_file
    from ..prompts.clock import continue_time
    from ..prompts.prompts import read_prompts
    from ..selection.select import kept_prompts

    check_backend(c, lookahead)
    loaded = load(target, target_adapter, chat_template, dtype, template_arg)
    continue_time(loaded, [about(Path(out))])
    found = read_prompts(prompts, loaded, limit, c.turns)
    say(found.summary())
    asked = kept_prompts(found.prompts, Path(selection)) if selection else found.prompts
    answers, _ = answer_file(loaded, asked, Path(out), c, lookahead, grow=True)
    finish(
        as_json,
        f"{len(answers)} answers, {sum(a.length for a in answers):,} tokens in {out}",
        {
            "answers": len(answers),
            "tokens": sum(a.length for a in answers),
            "unfinished": sum(a.finish == "length" for a in answers),
            "left_out": found.left_out_count,
            "out": out,
        },
    )


@with_settings("select")
def select(
    out: Annotated[str, typer.Option("--out", help="selection file (JSONL) to write")],
    settings: Any,
    answers: Annotated[
        str | None, typer.Option("--answers", help="answers file of `regenerate`")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="with --by prompts: the file to choose from")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="target model, for every score but random")
    ] = None,
    draft: Annotated[
        str | None, typer.Option("--draft", help="the draft in use, for draft_loss and rejection")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="what the target was tuned from, for the shifts")
    ] = None,
    k: Annotated[
        int, typer.Option("--k", min=1, help="draft tokens per step of rejection")
    ] = MeasureConfig.k,
    examples: Annotated[
        bool, typer.Option("--explain", help="print samples from the top, the middle, the bottom")
    ] = False,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    limit: LimitFlag = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Choose the samples worth training on, within a budget: answers, or prompts not yet answered.

    Example: redraft select --answers answers.jsonl --out selection.jsonl --select rejection
    --target ./my-model --draft org/EAGLE3-base --budget 0.5 --explain
    """
    set_quiet(quiet)
    c = resolve([("flag", settings)]).config.select
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
    loaded = load(target, target_adapter, chat_template, dtype, template_arg) if target else None
    if c.by == "answers":
        pool = (answers_for(loaded, Path(given)) if loaded else read_answers(Path(given)))[:limit]
    elif loaded:
        found = read_prompts(given, loaded, limit)
        say(found.summary())
        pool = as_samples(found.prompts)
    if loaded is None and (c.by == "prompts" or examples):
        flag = "--explain" if examples else "--by prompts"
        raise UserError(f"{flag} needs the target's tokenizer: name the target with --target")
    models = Scorers(
        loaded,
        load(base, None, None, dtype) if base else None,
        load_draft(draft, loaded) if draft and loaded else None,
        k,
    )
    selection = run(pool, c, models)
    write_selection(Path(out), selection)
    if examples and loaded:
        shown = {s.id: s for s in pool}
        if c.by == "prompts":  # whole prompts, that have no answer
            shown = {p.id: Answer(p.id, p.tokens, (), 0, "length") for p in found.prompts}
        print_examples(explain(selection.samples, shown, loaded))
    finish(
        as_json,
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


@with_settings("train")
def train(
    target: TargetFlag,
    answers: Annotated[str, typer.Option("--answers", help="answers file to train on")],
    out: Annotated[str, typer.Option("--out", help="folder of the adapter (draft: scratch)")],
    settings: Any,
    draft: Annotated[
        str | None, typer.Option("--draft", help="the shared draft (for scratch: only its shape)")
    ] = None,
    heldout: Annotated[
        str | None,
        typer.Option("--heldout", help="answers (with --lookahead K) for early stopping"),
    ] = None,
    selection: Annotated[
        str | None, typer.Option("--selection", help="selection file of `select`")
    ] = None,
    k: Annotated[
        int, typer.Option("--k", help="draft tokens per step of held-out tau")
    ] = MeasureConfig.k,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="scratch without --draft: a kind of docs/formats.md"),
    ] = None,
    aux_layers: Annotated[
        str | None,
        typer.Option(
            "--aux-layers", "--taps", help="scratch without --draft: hs[] indices, e.g. 2,4,5"
        ),
    ] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option("--draft-vocab", help="scratch without --draft: size of the draft vocabulary"),
    ] = None,
    draft_width: Annotated[
        int | None, typer.Option("--draft-width", help="scratch without --draft: FFN neurons")
    ] = None,
    base: BaseFlag = None,
    features: FeaturesFlag = None,
    feature_aux_layers: FeatureTapsFlag = None,
    allow_pickle: PickleFlag = False,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train an adapter of a shared draft, or a whole draft with --method scratch.

    Example: redraft train --target ./my-model --draft org/EAGLE3-base --answers answers.jsonl
    --out adapter --method expert --width 256
    """
    set_quiet(quiet)
    c = resolve([("flag", settings)]).config.train
    if heldout is None:
        raise UserError(
            "--heldout is needed: answers that are not trained on decide when to stop; write some with "
            f"redraft regenerate --lookahead {k}"
        )
    from ..pipeline.stages import Shape, train_files

    if features:
        loaded = load_beside(
            features,
            feature_aux_layers,
            allow_pickle,
            target,
            target_adapter,
            chat_template,
            dtype,
            template_arg,
        )
    else:
        loaded = load(target, target_adapter, chat_template, dtype, template_arg)
    record = train_files(
        *(loaded, Path(answers), Path(heldout), Path(out), c, k),
        selection=Path(selection) if selection else None,
        draft=draft,
        shape=Shape(kind, aux_layers_from(aux_layers), draft_vocab, draft_width),
        base=load(base, None, None, dtype) if base else None,
    )
    from ..core.records import to_json

    finish(
        as_json,
        f"held-out tau {record.best_tau():.3f} at step {record.best_step}; {record.trained_parameters:,} "
        f"parameters in {out}",
        {**to_json(record), "out": out},
    )


def measure(
    target: TargetFlag,
    draft: DraftFlag,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="prompts that the target answers first")
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            "--answers", help="or an answers file (of `regenerate --lookahead K`), scored unchanged"
        ),
    ] = None,
    features: FeaturesFlag = None,
    feature_aux_layers: FeatureTapsFlag = None,
    allow_pickle: PickleFlag = False,
    k: KFlag = str(MeasureConfig.k),
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="longest answer, in tokens")
    ] = 128,
    mode: Annotated[
        str,
        typer.Option(
            "--mode", help="replay (exact, batched), expected (over sampled draft tokens), or live"
        ),
    ] = "replay",
    temperature: TemperatureFlag = 0.0,
    top_k: TopKFlag = 0,
    top_p: TopPFlag = 1.0,
    min_p: MinPFlag = 0.0,
    acceptance: AcceptanceFlag = "",
    draft_token: DraftTokenFlag = "",
    seed: Annotated[int, typer.Option("--seed", help="seed of sampled answers")] = 0,
    save_ids: Annotated[
        str | None,
        typer.Option("--save-ids", help="write the rendered prompts as a JSON list of id lists"),
    ] = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    limit: LimitFlag = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """How many tokens a target pass yields with this draft: tau with interval, per position.

    At a temperature the default is what engines do: sampled acceptance, deterministic draft tokens.

    With --answers nothing is decoded. Answers of this target, written here or by an endpoint, are scored. With
    --features its stored states are read in place of its layers, where it does not fit here.

    Example: redraft measure --target ./my-model --draft ./draft --prompts prompts.jsonl --k 4
    """
    set_quiet(quiet)
    from ..checkpoints.load import load_draft
    from ..core.records import to_json
    from ..metrics.measure import WAYS
    from ..pipeline.stages import measure_file
    from ..report.terminal import print_acceptance

    if mode not in WAYS:
        raise UserError(f"--mode must be one of {', '.join(WAYS)}; got '{mode}'")
    if (prompts is None) == (answers is None):
        raise UserError(
            "name either prompts, which the target answers first, or an answers file, which is scored "
            "unchanged (--prompts FILE or --answers FILE)"
        )
    if features and prompts:
        raise UserError(
            "--features stand in for the target's layers, which cannot answer prompts; name --answers"
        )
    chosen, sampling = k_from(k), (temperature, top_k, top_p, min_p)
    if answers is not None:
        _check_scores_only(mode, chosen, sampling, save_ids)
    if features:
        loaded = load_beside(
            *(
                features,
                feature_aux_layers,
                allow_pickle,
                target,
                target_adapter,
                chat_template,
                dtype,
            ),
            template_arg,
        )
    else:
        loaded = load(target, target_adapter, chat_template, dtype, template_arg)
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
        decoding = decoding_from(
            acceptance or ("sampled" if temperature else "greedy"),
            draft_token or ("" if acceptance else "deterministic"),
            *sampling,
        )
        measured, left_out = _of_prompts(
            *(loaded, proposer, str(prompts), limit, chosen, mode, decoding),
            max_new_tokens=max_new_tokens,
            seed=seed,
            save_ids=save_ids,
        )
    if as_json:
        print_json({**to_json(measured), "left_out": left_out})
    else:
        print_acceptance(measured)


def _check_scores_only(
    mode: str, k: int | None, sampling: tuple[Any, ...], save_ids: str | None
) -> None:
    """Refuse the flags of answering, where answers are given."""
    given = {
        "--mode live": mode == "live",
        "--k auto": k is None,
        "--temperature, --top-k, --top-p or --min-p": sampling != (0.0, 0, 1.0, 0.0),
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
