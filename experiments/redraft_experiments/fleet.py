"""`redraft bench fleet`: one draft for many adapters, against what else could be done with as many answers.

    unadapted   the draft of the base
    shared      `redraft fleet adapt`: the budget split by need, the base among the members, nobody worse off
    union       every adapter's answers in equal parts, none of the base's, no guard
    own         a draft for each adapter, on its part of the same answers
    average     the mean of the drafts of `own`, tensor by tensor (task arithmetic)

    OUT/shared/             the run of `redraft fleet adapt`
    OUT/answers/NAME.jsonl  an adapter's answers in equal parts
    OUT/union, OUT/own/NAME adapters of the draft
    OUT/counts.json         (accepted, steps) of each measured answer, by draft, then by member

All are measured on the answers that `shared` keeps aside. Every part is a stage of a run folder: building again continues where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import typer

from redraft.adapters.adapter import Adapter
from redraft.adapters.merge import merge
from redraft.checkpoints.adapter_folder import load_adapter, save_adapter
from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.config import Resolved, key_of
from redraft.core.errors import UserError
from redraft.core.folders import read_json
from redraft.core.records import Answer
from redraft.fleet.adapt import FleetAdapted, adapt_fleet, fleet_prompts
from redraft.fleet.member import PER, Member
from redraft.generation.answer_file import answer_inputs, read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics import intervals
from redraft.metrics.acceptance import prompt_counts
from redraft.metrics.replay import replay
from redraft.models.target import Target
from redraft.models.target_adapters import BASE, fleet_on
from redraft.pipeline.run_folder import RunFolder
from redraft.pipeline.stages import train_adapter
from redraft.selection.select import most_kept

UNADAPTED, SHARED, UNION, OWN, AVERAGE = DRAFTS = (
    "unadapted",
    "shared",
    "union",
    "own",
    "average",
)
COUNTS = "counts.json"


@dataclass(frozen=True)
class FleetCell:
    """tau of a kind of draft on a member, with its interval, and the change against the unadapted one on the same answers."""

    draft: str
    member: str
    k: int
    prompts: int
    trained_on: int
    tau: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float


@dataclass(frozen=True)
class _Bench:
    base: Target
    stored: StoredDraft
    members: Sequence[Member]
    config: Resolved
    run: RunFolder

    @property
    def asked(self) -> list[Member]:
        return [member for member in self.members if member.adapter is not None]

    @property
    def adapters(self) -> dict[str, str]:
        return {member.name: str(member.adapter) for member in self.asked}

    def answers(self, name: str) -> list[Answer]:
        return read_answers(self.run.path / "answers" / f"{name}.jsonl")

    def aside(self, name: str, what: str) -> list[Answer]:
        found = read_answers(self.run.path / SHARED / "answers" / name / f"{what}.jsonl")
        return [answer for answer in found if answer.length > 1]


def bench_fleet(
    base: Target, draft: str, members: Sequence[Member], out: Path, config: Resolved
) -> list[FleetCell]:
    """Build what is missing in `out`; a cell for each draft and member.

    `config` is that of `redraft fleet adapt`, whose budget all drafts share.
    """
    with RunFolder.open(out) as run:
        shared = adapt_fleet(base, draft, members, out / SHARED, config)
        bench = _Bench(base, read_draft(draft), members, config, run)
        keys = _answer(bench)
        train = key_of(config.config.train)
        inputs = {"answers": keys, "draft": bench.stored.hash(), **train}
        trained = {
            UNION: run.stage(UNION, inputs, [UNION], partial(_train_union, bench), [_steps(UNION)])
        }
        for member in bench.asked:
            name = f"{OWN}/{member.name}"
            inputs = {"answers": keys[member.name], "draft": bench.stored.hash(), **train}
            trained[name] = run.stage(
                name, inputs, [name], partial(_train_own, bench, member), [_steps(name)]
            )
        inputs = {"trained": trained, "shared": read_draft(shared.draft).hash()}
        run.stage("measure", inputs, [COUNTS], partial(_measure, bench, shared))
        counts = read_json(out / COUNTS)
        return _cells(bench, shared, counts)


def _answer(bench: _Bench) -> dict[str, str]:
    """Every adapter's answers, in equal parts of the budget."""
    c = bench.config.config
    parts = fleet_prompts(bench.base, bench.members, c)
    pool = sum(len(parts[member.name].adapt) for member in bench.members)
    each = most_kept(pool, c.select.budget_value) // len(bench.asked)
    keys = {}
    for member in bench.asked:
        prompts, file = parts[member.name].adapt[:each], f"answers/{member.name}.jsonl"
        with member.on(bench.base) as target:
            inputs = answer_inputs(target, prompts, c.regenerate, 0)
            work = partial(regenerate, target, prompts, bench.run.path / file, c.regenerate, 0)
            keys[member.name] = bench.run.stage(file, inputs, [file], work, keeps=[file])  # type: ignore[arg-type]
    return keys


def _steps(name: str) -> str:
    return f"checkpoints/{name}"


def _train_union(bench: _Bench) -> None:
    answers = [a for member in bench.asked for a in bench.answers(member.name)]
    heldout = [a for member in bench.asked for a in bench.aside(member.name, "heldout")]
    with fleet_on(bench.base, bench.adapters) as fleet:
        _train(bench, fleet, answers, heldout, UNION)


def _train_own(bench: _Bench, member: Member) -> None:
    with member.on(bench.base) as target:
        answers, heldout = bench.answers(member.name), bench.aside(member.name, "heldout")
        _train(bench, target, answers, heldout, f"{OWN}/{member.name}")


def _train(
    bench: _Bench, target: Target, answers: list[Answer], heldout: list[Answer], name: str
) -> None:
    c, checkpoints = bench.config.config, bench.run.path / _steps(name)
    adapter = train_adapter(
        target, bench.stored, answers, heldout, c.train, c.measure.k, checkpoints
    )
    save_adapter(bench.run.path / name, adapter)


def _measure(bench: _Bench, shared: FleetAdapted) -> None:
    own = {m.name: load_adapter(bench.run.path / OWN / m.name) for m in bench.asked}
    everywhere = {
        UNADAPTED: bench.stored,
        SHARED: read_draft(shared.draft),
        UNION: _merged(bench.stored, load_adapter(bench.run.path / UNION).tensors),
        AVERAGE: _merged(bench.stored, mean_tensors(bench.stored, list(own.values()))),
    }
    counts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for member in [*bench.asked, Member(BASE, None, "")]:
        drafts = dict(everywhere)
        if member.name in own:
            drafts[OWN] = _merged(bench.stored, own[member.name].tensors)
        answers = bench.aside(member.name, "eval")
        with member.on(bench.base) as target:
            for name, draft in drafts.items():
                traces = replay(target, draft.build(target), answers, shared.k)
                used = prompt_counts([t for t in traces if t.steps])[0]
                counts.setdefault(name, {})[member.name] = used
    bench.run.write_json(COUNTS, counts)


def _merged(stored: StoredDraft, tensors: Mapping[str, torch.Tensor]) -> StoredDraft:
    return dataclasses.replace(stored, tensors=merge(stored.tensors, tensors))


def mean_tensors(stored: StoredDraft, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """The mean of adapters that replace the draft's tensors; one that leaves a tensor unchanged counts with the draft's."""
    found = {}
    for name in sorted({name for adapter in adapters for name in adapter.tensors}):
        if name not in stored.tensors:
            raise UserError(
                f"a mean is taken of methods that replace the draft's tensors, such as body; {name} is added to them"
            )
        home = stored.tensors[name]
        some = [adapter.tensors.get(name, home).double() for adapter in adapters]
        found[name] = torch.stack(some).mean(0).to(home.dtype)
    return found


def _cells(
    bench: _Bench, shared: FleetAdapted, counts: Mapping[str, Mapping[str, list[list[float]]]]
) -> list[FleetCell]:
    split = {row.name: row.trained_on for row in shared.members}
    equal = {member.name: len(bench.answers(member.name)) for member in bench.asked}
    trained_on = {SHARED: split, UNION: equal, OWN: equal, AVERAGE: equal}
    cells = []
    for draft in DRAFTS:
        for member, each in counts[draft].items():
            one = [[(float(a), float(s)) for a, s in each]]
            other = [[(float(a), float(s)) for a, s in counts[UNADAPTED][member]]]
            tau = intervals.tau(one, shared.k)
            change = intervals.difference(one, other, shared.k)
            cells.append(
                FleetCell(
                    draft,
                    member,
                    shared.k,
                    len(each),
                    trained_on.get(draft, {}).get(member, 0),
                    tau.value,
                    *tau.ends,
                    change.value,
                    *change.ends,
                )
            )
    return cells


def print_cells(cells: Sequence[FleetCell]) -> None:
    """A line for each draft: tau by member, and the passes per 1,000 tokens of equal traffic of the adapters."""
    names = list(dict.fromkeys(cell.member for cell in cells))
    typer.echo(f"{'':10}" + "".join(f"{name:>26}" for name in names) + f"{'passes':>9}")
    for draft in DRAFTS:
        found = {cell.member: cell for cell in cells if cell.draft == draft}
        shown = (
            f"{found[n].tau:.2f} {found[n].change:+.2f} [{found[n].change_low:+.2f}, {found[n].change_high:+.2f}]"
            if n in found
            else "-"
            for n in names
        )
        own = [PER / cell.tau for name, cell in found.items() if name != BASE]
        typer.echo(
            f"{draft:10}" + "".join(f"{text:>26}" for text in shown) + f"{sum(own) / len(own):9.0f}"
        )
