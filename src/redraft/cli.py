"""The command line: thin commands over `flow` and the rooms it names.

Flags of a stage derive one to one from its dataclass in `config.py`. Exit codes: 0 done, 2 the
user's mistake (one sentence, no traceback), 1 our fault. Machine-readable output (`--json`) goes to
stdout, progress to stderr.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .config import Resolved, parse_set, read_yaml, recipe_names, recipe_path, resolve, stage_fields
from .console import console, say, set_quiet
from .errors import UserError

app = typer.Typer(
    name="redraft",
    help="Re-align a speculative-decoding draft model with a fine-tuned LLM, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(no_args_is_help=True, help="Build model families and run benches on them.")
recipes = typer.Typer(invoke_without_command=True, help="List the named recipes, or copy one.")
app.add_typer(bench, name="bench")
app.add_typer(recipes, name="recipes")

TargetFlag = Annotated[str, typer.Option("--target", help="target model: folder or Hub id")]
AdapterFlag = Annotated[
    str | None, typer.Option("--target-adapter", help="PEFT adapter on top of the target")
]
TemplateFlag = Annotated[
    str | None, typer.Option("--chat-template", help="Jinja file, where the tokenizer has none")
]
DtypeFlag = Annotated[
    str, typer.Option("--dtype", help="target's dtype: auto (as stored), float32, bfloat16, ...")
]
DraftFlag = Annotated[str, typer.Option("--draft", help="draft model: folder or Hub id")]
PromptsFlag = Annotated[str, typer.Option("--prompts", help="JSONL file of prompts (.gz is fine)")]
LimitFlag = Annotated[int | None, typer.Option("--limit", help="use only the first N prompts")]
JsonFlag = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]


def with_settings(*stages: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for every setting of these stages; the command receives those that were given as
    `settings`, by dotted key."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        fields = {k: f for k, (stage, f) in stage_fields().items() if stage in stages}
        by_name = {key.replace(".", "__"): key for key in fields}

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            settings = {
                key: given.pop(name)
                for name, key in by_name.items()
                if given.get(name) is not None or given.pop(name, None) is not None
            }
            command(settings=settings, **given)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "settings"]
        kinds = {"int": int, "float": float, "str": str}
        for name, key in by_name.items():
            field = fields[key]
            choices = field.metadata.get("choices")
            text = f"{field.metadata['help']} [default: {field.default}]"
            text += f" (one of: {', '.join(choices)})" if choices else ""
            flag = typer.Option(f"--{field.name.replace('_', '-')}", help=text, show_default=False)
            own.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kinds[str(field.type)] | None, flag],
                )
            )
        ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in ordered}
        return wrapper

    return wrap


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        typer.echo(f"redraft {__version__}")
        raise typer.Exit()


@app.command()
def adapt(
    target: TargetFlag,
    draft: DraftFlag,
    prompts: PromptsFlag,
    out: Annotated[str, typer.Option("--out", help="run folder; run again to resume")],
    method: Annotated[str | None, typer.Option("--method", help="private part")] = None,
    select: Annotated[str | None, typer.Option("--select", help="selection score")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="samples kept: 500, 0.5 or 20000t")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="recipe name or YAML file of settings")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="one setting, e.g. train.lr=1e-3; repeatable")
    ] = None,
    off_domain: Annotated[
        list[str] | None,
        typer.Option("--off-domain", help="name=FILE of prompts measured but not trained on"),
    ] = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    dtype: DtypeFlag = "auto",
    limit: LimitFlag = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """The whole job: regenerate, select, train, export, measure before and after, report.

    Example: redraft adapt --target ./my-model --draft org/EAGLE3-base --prompts prompts.jsonl
    --out run --method expert+fc --budget 2000
    """
    set_quiet(quiet)
    flags = {"train.method": method, "select.select": select, "select.budget": budget}
    resolved = _resolve(config, assignments, {k: v for k, v in flags.items() if v is not None})
    elsewhere = _pairs(off_domain or [], "--off-domain")
    from . import flow

    loaded = _target(target, target_adapter, chat_template, dtype)
    result = flow.adapt(
        loaded, draft, prompts, out=out, config=resolved, limit=limit, off_domain=elsewhere
    )
    if as_json:
        from .records import to_json

        _print_json(to_json(result.report))
    else:
        from .report.terminal import print_report

        print_report(result.report)


@app.command()
@with_settings("regenerate")
def regenerate(
    target: TargetFlag,
    prompts: PromptsFlag,
    out: Annotated[str, typer.Option("--out", help="answers file (JSONL); run again to resume")],
    settings: Any,
    overrun: Annotated[
        int, typer.Option("--overrun", help="tokens kept past each answer's end, for replay at K")
    ] = 0,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    dtype: DtypeFlag = "auto",
    limit: LimitFlag = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """The target answers the prompts through its own chat template.

    Example: redraft regenerate --target ./my-model --prompts prompts.jsonl --out answers.jsonl
    """
    set_quiet(quiet)
    c = resolve([("flag", settings)]).config.regenerate
    from .data.prompts import read_prompts
    from .data.regenerate import regenerate as run

    loaded = _target(target, target_adapter, chat_template, dtype)
    found = read_prompts(prompts, loaded, limit)
    say(found.summary())
    answers = run(loaded, found.prompts, Path(out), c, overrun)
    _finish(
        as_json,
        f"{len(answers)} answers, {sum(a.length for a in answers):,} tokens in {out}",
        {
            "answers": len(answers),
            "tokens": sum(a.length for a in answers),
            "unfinished": sum(a.finish == "length" for a in answers),
            "left_out": len(found.left_out),
            "out": out,
        },
    )


@app.command()
@with_settings("select")
def select(
    answers: Annotated[str, typer.Option("--answers", help="answers file of `regenerate`")],
    out: Annotated[str, typer.Option("--out", help="selection file (JSONL) to write")],
    settings: Any,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Choose the answers worth training on, within a budget.

    Example: redraft select --answers answers.jsonl --out selection.jsonl --budget 0.5
    """
    set_quiet(quiet)
    c = resolve([("flag", settings)]).config.select
    from dataclasses import asdict

    from .data.regenerate import read_answers
    from .data.select import select as run
    from .formats.folders import write_text

    scored = run(read_answers(Path(answers)), c)
    write_text(Path(out), "".join(json.dumps(asdict(s)) + "\n" for s in scored))
    kept = [s for s in scored if s.kept]
    tokens = sum(s.tokens for s in kept)
    _finish(
        as_json,
        f"kept {len(kept)} of {len(scored)} answers, {tokens:,} tokens, in {out}",
        {"kept": len(kept), "scored": len(scored), "tokens": tokens, "out": out},
    )


@app.command()
@with_settings("train")
def train(
    target: TargetFlag,
    answers: Annotated[str, typer.Option("--answers", help="answers file to train on")],
    out: Annotated[str, typer.Option("--out", help="folder of the private part (draft: scratch)")],
    settings: Any,
    draft: Annotated[
        str | None, typer.Option("--draft", help="the shared draft (for scratch: only its shape)")
    ] = None,
    heldout: Annotated[
        str | None,
        typer.Option("--heldout", help="answers (with --overrun K) for early stopping"),
    ] = None,
    selection: Annotated[
        str | None, typer.Option("--selection", help="selection file of `select`")
    ] = None,
    k: Annotated[int, typer.Option("--k", help="draft tokens per step of held-out tau")] = 4,
    taps: Annotated[
        str | None, typer.Option("--taps", help="scratch without --draft: hs[] indices, e.g. 2,4,5")
    ] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option("--draft-vocab", help="scratch without --draft: size of the draft vocabulary"),
    ] = None,
    draft_width: Annotated[
        int | None, typer.Option("--draft-width", help="scratch without --draft: FFN neurons")
    ] = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    dtype: DtypeFlag = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train a private part beside a shared draft, or a whole draft with --method scratch.

    Example: redraft train --target ./my-model --draft org/EAGLE3-base --answers answers.jsonl
    --out private --method expert --width 256
    """
    set_quiet(quiet)
    c = resolve([("flag", settings)]).config.train
    from .steps import train_command

    loaded = _target(target, target_adapter, chat_template, dtype)
    record = train_command(
        loaded,
        draft=draft,
        answers=Path(answers),
        heldout=Path(heldout) if heldout else None,
        selection=Path(selection) if selection else None,
        out=Path(out),
        config=c,
        k=k,
        taps=_taps(taps),
        draft_vocab=draft_vocab,
        draft_width=draft_width,
    )
    best = max((tau for _, tau in record.heldout_tau), default=float("nan"))
    from .records import to_json

    _finish(
        as_json,
        f"held-out tau {best:.3f} at step {record.best_step}; {record.trained_parameters:,} "
        f"parameters in {out}",
        {**to_json(record), "out": out},
    )


@app.command()
def measure(
    target: TargetFlag,
    draft: DraftFlag,
    prompts: PromptsFlag,
    k: Annotated[int, typer.Option("--k", min=1, max=16, help="draft tokens per step")] = 4,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="longest answer, in tokens")
    ] = 128,
    mode: Annotated[str, typer.Option("--mode", help="replay (exact, batched) or live")] = "replay",
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="of the target's answers (replay)")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="seed of sampled answers")] = 0,
    save_ids: Annotated[
        str | None,
        typer.Option("--save-ids", help="write the rendered prompts as a JSON list of id lists"),
    ] = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    dtype: DtypeFlag = "auto",
    limit: LimitFlag = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """How many tokens a target pass yields with this draft: tau with interval, per position.

    Example: redraft measure --target ./my-model --draft ./draft --prompts prompts.jsonl --k 4
    """
    set_quiet(quiet)
    if mode not in ("replay", "live"):
        raise UserError(f"--mode must be replay or live; got '{mode}'")
    from .data.prompts import read_prompts
    from .formats.folders import write_text
    from .formats.load import load_draft
    from .measuring.measure import measure as run
    from .records import to_json
    from .report.terminal import print_acceptance

    loaded = _target(target, target_adapter, chat_template, dtype)
    proposer = load_draft(draft, loaded)
    found = read_prompts(prompts, loaded, limit)
    say(found.summary())
    if save_ids:
        write_text(Path(save_ids), json.dumps([list(p.tokens) for p in found.prompts]) + "\n")
    measured = run(
        loaded,
        proposer,
        found.prompts,
        k=k,
        max_new_tokens=max_new_tokens,
        mode=mode,
        temperature=temperature,
        seed=seed,
    ).acceptance
    if as_json:
        _print_json({**to_json(measured), "left_out": len(found.left_out)})
    else:
        print_acceptance(measured)


@app.command()
def export(
    draft: DraftFlag,
    private: Annotated[str, typer.Option("--private", help="folder of the private part")],
    out: Annotated[str, typer.Option("--out", help="folder of the stock draft to write")],
    format: Annotated[str, typer.Option("--format", help="layout: eagle3")] = "eagle3",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Fuse a private part into its shared draft: a stock checkpoint for vLLM and SGLang.

    Example: redraft export --draft org/EAGLE3-base --private run/private --out my-draft
    """
    set_quiet(quiet)
    from .formats.load import read_draft
    from .formats.private_part import load_private
    from .steps import fuse_draft

    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder")
    fused = fuse_draft(read_draft(draft), load_private(Path(private)))
    fused.save(out, format)
    _finish(as_json, f"draft written to {out}", {"out": out, "hash": fused.hash()})


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="run folder of `redraft adapt`")],
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show a finished run again, and write its HTML page anew.

    Example: redraft report run
    """
    set_quiet(quiet)
    from .formats.folders import read_json
    from .records import AdaptReport, to_json
    from .report.page import write_page
    from .report.terminal import print_report

    found = AdaptReport.from_json(read_json(Path(run) / "report.json"))
    write_page(Path(run) / "report.html", found)
    if as_json:
        _print_json(to_json(found))
    else:
        print_report(found)


@recipes.callback()
def recipes_list(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Recipes are YAML files of settings: redraft adapt --config NAME. Example: redraft recipes"""
    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        _print_json({name: read_yaml(recipe_path(name)) for name in recipe_names()})
        return
    for name in recipe_names():
        first = recipe_path(name).read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:14} {first.lstrip('# ')}")


@recipes.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="name of a recipe")],
    to: Annotated[
        str | None, typer.Argument(help="file to write (default: NAME.yaml here)")
    ] = None,
) -> None:
    """Copy a recipe here, to edit it. Example: redraft recipes copy default"""
    destination = Path(to or f"{name}.yaml")
    if destination.exists():
        raise UserError(f"{destination} exists already; name another file")
    shutil.copyfile(recipe_path(name), destination)
    typer.echo(f"wrote {destination}; use it with: redraft adapt --config {destination} ...")


@bench.command("family")
def bench_family(
    out: Annotated[str, typer.Option("--out", help="folder of the family; run again to resume")],
    size: Annotated[str, typer.Option("--size", help="nano or micro")] = "nano",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    members: Annotated[
        str | None, typer.Option("--members", help="fine-tunes to build, comma-separated")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="seed of everything")] = 0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build a small family from nothing: base, fine-tunes, the base's draft, prompts, gates.

    Example: redraft bench family --size nano --out family
    """
    set_quiet(quiet)
    from .bench.family import build_family, describe_family

    family = build_family(
        Path(out),
        size=size,
        data=data,
        members=members.split(",") if members else None,
        seed=seed,
    )
    if as_json:
        _print_json(family)
    else:
        describe_family(family)


@bench.command("pipeline")
def bench_pipeline(
    family: Annotated[str, typer.Option("--family", help="folder of `bench family`")],
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Speed and memory of replay, training and regeneration on a family.

    Example: redraft bench pipeline --family family
    """
    set_quiet(quiet)
    from .bench.pipeline import bench_pipeline as run

    result = run(Path(family))
    if as_json:
        _print_json(result)
    else:
        for name, value in result.items():
            typer.echo(f"{name:36} {value}")


@bench.command("repair")
def bench_repair(
    out: Annotated[str, typer.Option("--out", help="folder; run again to resume")],
    size: Annotated[str, typer.Option("--size", help="nano, or micro on real data")] = "micro",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    record: Annotated[
        str | None, typer.Option("--record", help="also write the result to this JSON file")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """The demo's comparison at any size: reused, adapted and dedicated draft of a fine-tune.

    Example: redraft bench repair --size micro --data data --out repair
    """
    set_quiet(quiet)
    from .bench.demo import print_demo, run_demo
    from .formats.folders import write_text

    result = run_demo(Path(out), size, data)
    if record:
        write_text(Path(record), json.dumps(result, indent=2) + "\n")
    if as_json:
        _print_json(result)
    else:
        print_demo(result)


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="folder of the demo")] = "demo",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build a small family in front of you, break its draft by a fine-tune, and repair it.

    Example: redraft demo
    """
    set_quiet(quiet)
    from .bench.demo import print_demo, run_demo

    result = run_demo(Path(out))
    if as_json:
        _print_json(result)
    else:
        print_demo(result)


def main() -> None:
    """Entry point: exceptions become exit codes."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _calm_libraries()
        app(standalone_mode=True)
    except UserError as mistake:
        console.print(f"redraft: {mistake}", style="red", soft_wrap=True, markup=False)
        if os.environ.get("REDRAFT_TRACEBACK"):
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("redraft: interrupted; run the same command again to continue")
        sys.exit(130)


def _calm_libraries() -> None:
    """Loading bars and advice of the libraries would drown our own progress."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _resolve(config: str | None, assignments: list[str] | None, flags: dict[str, Any]) -> Resolved:
    layers: list[tuple[str, dict[str, Any]]] = []
    if config:
        path = recipe_path(config)
        layers.append((str(path), read_yaml(path)))
    layers += [("--set", parse_set(assignments or [])), ("flag", flags)]
    return resolve(layers)  # type: ignore[arg-type]


def _target(source: str, adapter: str | None, template: str | None, dtype: str) -> Any:
    from .target import load_target

    return load_target(source, adapter=adapter, chat_template=template, dtype=dtype)


def _pairs(texts: list[str], flag: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(
                f"{flag} takes name=FILE, for example {flag} chat=chat.jsonl; got '{text}'"
            )
        pairs[name] = value
    return pairs


def _taps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--taps takes layer numbers, for example 2,4,5; got '{text}'") from None


def _finish(as_json: bool, text: str, content: dict[str, Any]) -> None:
    if as_json:
        _print_json(content)
    else:
        typer.echo(text)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content))


if __name__ == "__main__":
    main()
