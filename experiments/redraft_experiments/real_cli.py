"""The commands of the suite of real models: building it, the race on it, its drafts in vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from redraft.cli.bundles import OutputFlags, TargetFlags
from redraft.config import Resolved
from redraft.core.errors import UserError, nearest

from .cli_parts import numbers, show_cells


def bench_real(
    out: str,
    output: OutputFlags,
    data: str | None = None,
    members: str | None = None,
    drafts: str = "eagle3",
    python: str | None = None,
    adapt_to: str | None = None,
    record: str | None = None,
) -> None:
    """Build a suite of real models: SmolLM2, fine-tunes of it, and a draft trained on its own answers.

    About two hours on two cores, one with --members math-sft; answers come from vLLM. With --drafts kept the draft is
    the one that comes with the package, which leaves some minutes for each fine-tune. With --adapt-to
    the draft is adapted to that fine-tune, which is the run that README shows.

    Example: redraft bench real --data data --python .venv-vllm/bin/python --out real
    """
    from redraft.core.files import write_text
    from redraft.core.records import to_json
    from redraft.report.terminal import print_report

    from .real_members import MEMBERS
    from .real_suite import adapt_real, build_real_suite

    chosen = members.split(",") if members else list(MEMBERS)
    if adapt_to is not None and adapt_to not in chosen:
        raise UserError(
            f"--adapt-to {adapt_to} is not among the members; {nearest(adapt_to, chosen)}"
        )
    suite = build_real_suite(
        Path(out), data=data, members=chosen, drafts=drafts.split(","), python=python
    )
    if adapt_to is None:
        output.show(suite, lambda: typer.echo(f"suite    {out}  ({', '.join(suite['members'])})"))
        return
    report = adapt_real(Path(out), adapt_to).report
    if record:
        write_text(Path(record), json.dumps(to_json(report), indent=2) + "\n")
    output.show(to_json(report), lambda: print_report(report))


def bench_real_kinds(
    suite: str,
    output: OutputFlags,
    drafts: str = "kept,eagle,small-lm",
    members: str | None = None,
    record: str | None = None,
) -> None:
    """The drafts of the suite of real models, kind by kind, on their base and on its fine-tunes: tau, cost of a step, speed-up.

    Example: redraft bench real-kinds --suite real --members code-lora
    """
    from .real_kinds import bench_real_kinds as run
    from .real_kinds import print_cells

    cells = run(Path(suite), drafts.split(","), members.split(",") if members else ())
    show_cells(output, cells, print_cells, record, cells)


def bench_real_methods(
    suite: str,
    out: str,
    output: OutputFlags,
    members: str = "math-sft",
    rows: str = "all",
    seeds: str = "1",
    python: str | None = None,
    record: str | None = None,
    base_draft: str | None = None,
) -> None:
    """The race on real models: ways to get a draft for a fine-tune, on the same answers of a real vLLM.

    With --draft an MTP head is adapted instead (the folder `head` of `bench real-mtp`): which loss, and how many steps deep.

    Example: redraft bench real-methods --suite real --python .venv-vllm/bin/python --out race
    """
    from .real_cells import print_real_cells, read_real_cells
    from .real_methods import bench_real_methods as run

    cells = run(
        Path(suite),
        Path(out),
        members=members.split(","),
        rows=[] if rows == "all" else rows.split(","),
        seeds=numbers("--seeds", seeds),
        python=python,
        draft=Path(base_draft) if base_draft else None,
    )
    show_cells(output, cells, print_real_cells, record, read_real_cells(Path(out), cells[0].draft))


def bench_real_serving(
    suite: str,
    race: str,
    output: OutputFlags,
    member: str = "math-sft",
    rows: str = "unadapted,body",
    ks: str = "2,4",
    seed: int = 1,
    python: str | None = None,
    record: str | None = None,
) -> None:
    """The drafts of the race on real models in a real vLLM, at 1, 4 and 16 requests at a time, and in Transformers.

    Example: redraft bench real-serving --suite real --race race --python .venv-vllm/bin/python
    """
    from .real_generate import bench_real_generate
    from .real_serving import bench_real_serving as run
    from .real_serving import drafts_of, print_served, read_served

    what: dict[str, Any] = {"member": member, "ks": numbers("--ks", ks), "seed": seed}
    names, folder = rows.split(","), Path(race)
    drafts = drafts_of(Path(suite), folder, member, names, seed)
    cells = run(Path(suite), folder, rows=names, python=python, **what)
    cells += bench_real_generate(Path(suite), folder / member, drafts=drafts, **what)
    show_cells(output, cells, print_served, record, read_served(Path(race)))


def bench_real_mtp(
    suite: str,
    out: str,
    output: OutputFlags,
    member: str = "medical-lora",
    record: str | None = None,
) -> None:
    """A real model with an MTP head, a fine-tune that lost it, and `redraft mtp` on that.

    Example: redraft bench real-mtp --suite real --out mtp
    """
    from redraft.core.files import write_text

    from .real_mtp import bench_real_mtp as run
    from .real_mtp import in_words

    found = run(Path(suite), Path(out), member)
    if record:
        write_text(Path(record), json.dumps(found, indent=2) + "\n")
    output.show(found, lambda: typer.echo(in_words(found)))


def bench_fleet(
    models: TargetFlags,
    draft: str,
    fleet: str,
    out: str,
    config: Resolved,
    output: OutputFlags,
    record: str | None = None,
) -> None:
    """One draft for many adapters, against a draft for each, the mean of those, and one without split and guard.

    Example: redraft bench fleet --target real/base --draft real/draft --fleet real/fleet.yaml --out fleet
    --budget 360
    """
    from redraft.fleet.member import read_fleet

    from .fleet import bench_fleet as run
    from .fleet import print_cells

    cells = run(models.load(), draft, read_fleet(Path(fleet)), Path(out), config)
    show_cells(output, cells, print_cells, record, cells)


def bench_versions(
    suite: str, out: str, output: OutputFlags, data: str | None = None, record: str | None = None
) -> None:
    """A draft kept up with new versions of a model (SFT, then DPO, then 4 bits): from the last version's draft, or from the
    base's.

    Example: redraft bench versions --suite real --data data --out versions
    """
    from .versions import bench_versions as run
    from .versions import print_cells

    cells = run(Path(suite), Path(out), data)
    show_cells(output, cells, print_cells, record, cells)


def bench_quantised(
    suite: str,
    out: str,
    output: OutputFlags,
    member: str = "medical-lora",
    forms: str = "q4_k_m,nf4",
    python: str | None = None,
    record: str | None = None,
) -> None:
    """A fine-tune that is served with fewer bits: a draft adapted to it before it lost them, and on its own answers and states.

    Example: redraft bench quantised --suite real --python .venv-llamacpp/bin/python --out quantised
    """
    from .quantised import bench_quantised as run
    from .quantised import print_cells

    cells = run(Path(suite), Path(out), member, forms.split(","), python)
    show_cells(output, cells, print_cells, record, cells)


def bench_certificates(
    out: str,
    output: OutputFlags,
    engine: str = "llama.cpp",
    python: str | None = None,
    record: str | None = None,
) -> None:
    """Certificates held against real servers: how often a right one is called wrong, and which faults are named.

    Example: redraft bench certificates --engine llama.cpp --python .venv-llamacpp/bin/python --out certificates
    """
    from .certificates import bench_certificates as run
    from .certificates import print_cells, read_cells

    cells = run(Path(out), engine, python)
    show_cells(output, cells, print_cells, record, read_cells(Path(out)))


def bench_bank(
    draft: str,
    output: OutputFlags,
    adapters: int = 100,
    rank: int = 8,
    record: str | None = None,
) -> None:
    """Disk, memory and time of a bank of many adapters of one draft.

    Example: redraft bench bank --draft real/draft
    """
    from .bank import bench_bank as run
    from .bank import print_cell

    cell = run(draft, adapters, rank)
    show_cells(output, [cell], lambda cells: print_cell(cells[0]), record, [cell])


def bench_watch(
    run: str, output: OutputFlags, simulations: int = 20, record: str | None = None
) -> None:
    """False alarms and delays of `redraft watch`, simulated on the requests of a real run.

    Example: redraft bench watch --run run
    """
    from .watch import bench_watch as work
    from .watch import print_cells

    cells = work(Path(run), simulations)
    show_cells(output, cells, print_cells, record, cells)


def bench_plan(runs: list[str], output: OutputFlags, record: str | None = None) -> None:
    """What `redraft plan` says of finished runs, next to what they measured.

    Example: redraft bench plan --runs run
    """
    from .plan import bench_plan as work
    from .plan import print_cells

    cells = work([Path(run) for run in runs])
    show_cells(output, cells, print_cells, record, cells)


def bench_contexts(
    target: str,
    draft: str,
    out: str,
    output: OutputFlags,
    called: str | None = None,
    data: str | None = None,
    lengths: str = "256,1024,2048,4096",
    prompts: int = 24,
    k: int = 4,
    record: str | None = None,
) -> None:
    """A draft's acceptance by how much the target has read before it answers.

    Example: redraft bench contexts --target real/base --draft real/draft --data data --out contexts
    """
    from .contexts import bench_contexts as work
    from .contexts import print_cells, read_cells

    name = called or Path(draft).resolve().name
    cells = work(target, draft, name, Path(out), data, numbers("--lengths", lengths), prompts, k)
    show_cells(output, cells, print_cells, record, read_cells(Path(out)))


def bench_scale(
    target: str,
    draft: str,
    out: str,
    output: OutputFlags,
    data: str | None = None,
    lengths: str = "1024,2048,4096,8192",
    processes: str = "1,2",
    repeats: int = 2,
    record: str | None = None,
) -> None:
    """A draft trained in several processes, and on long rows: tokens per second, and memory against what was predicted.

    Example: redraft bench scale --target real/base --draft real/draft --data data --out scale
    """
    from .scale import bench_scale as work
    from .scale import print_cells

    cells = work(
        Path(target),
        Path(draft),
        Path(out),
        data,
        numbers("--lengths", lengths),
        numbers("--processes", processes),
        repeats,
    )
    show_cells(output, cells, print_cells, record, cells)
