"""`redraft bench real-kinds`: the drafts of the suite of real models, kind by kind, on their base and on its fine-tunes.

    SUITE/kinds/TARGET-DOMAIN.jsonl   greedy answers of a target to people's questions, or of a domain
    SUITE/kinds/TARGET-DRAFT.json     a draft on all of these

Every part is a stage of a run folder, so only what is missing is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from redraft.checkpoints.load import load_draft, read_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import check_known
from redraft.core.records import Prompt, to_json, versions
from redraft.generation.answer_file import prompts_hash, read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics.acceptance import per_position
from redraft.metrics.cost import choose_k, measure_cost
from redraft.metrics.measure import measure_answers
from redraft.models.target import Target
from redraft.pipeline.run_folder import RunFolder
from redraft.prompts.prompts import read_prompts

from .real_drafts import DRAFTS, K
from .real_members import BASE, MEMBERS
from .real_suite import DOMAINS, load_real, prompts_of

PROMPTS = 32
"""Questions of each domain at most."""
ANSWERS = RegenerateConfig(max_new_tokens=128, batch_size=32)


@dataclass(frozen=True)
class KindCell:
    """A draft on a target, at K = 4, greedily, one prompt at a time.

    `tau` are (value, low, high) by domain. `c` is the time of a draft step over that of a target step, here; `best` the K with the
    largest predicted speed-up, of 1 to 4, over all domains, and `speedup` that.
    """

    target: str
    draft: str
    kind: str
    tau: Mapping[str, tuple[float, float, float]]
    prompts: Mapping[str, int]
    parameters: int
    c: float
    best: int
    speedup: float
    versions: Mapping[str, str]

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> KindCell:
        tau = {domain: (tau, low, high) for domain, (tau, low, high) in row["tau"].items()}
        return KindCell(**{**row, "tau": tau})


def bench_real_kinds(
    suite: Path, drafts: Sequence[str], members: Sequence[str] = ()
) -> list[KindCell]:
    """The cells of the base and of these fine-tunes with each of the suite's drafts.

    The base is asked the questions of every domain, a fine-tune those of its own and people's. Raises UserError for an unknown
    draft or member, and for one that the suite does not have.
    """
    check_known("draft", drafts, DRAFTS)
    check_known("member", members, MEMBERS)
    cells = []
    with RunFolder.open(suite / "kinds") as run:
        for name in (BASE, *members):
            target = load_real(suite, name)
            answers, keys = _answers(run, suite, name, target)
            for draft in drafts:
                folder, file = suite / DRAFTS[draft].folder, f"{name}-{draft}.json"
                run.stage(
                    file,
                    {"answers": keys, "draft": read_draft(str(folder)).hash()},
                    [file],
                    partial(_measure, run, file, target, folder, answers, name, draft),
                )
                found = (run.path / file).read_text(encoding="utf-8")
                cells.append(KindCell.from_json(json.loads(found)))
    return cells


def _answers(
    run: RunFolder, suite: Path, name: str, target: Target
) -> tuple[dict[str, Path], list[str]]:
    """The files of a target's answers, by domain, and the keys of their stages."""
    domains = DOMAINS if name == BASE else dict.fromkeys((MEMBERS[name].domain, DOMAINS[0]))
    files, keys = {}, []
    for domain in domains:
        questions = str(prompts_of(suite, domain, "eval"))
        asked = read_prompts(questions, target, PROMPTS, "last").prompts
        files[domain] = run.path / f"{name}-{domain}.jsonl"
        keys.append(
            run.stage(
                files[domain].name,
                {"target": target.fingerprint(), "prompts": prompts_hash(asked)},
                [files[domain].name],
                partial(_answer, target, asked, files[domain]),
                keeps=[files[domain].name],
            )
        )
    return files, keys


def _answer(target: Target, prompts: Sequence[Prompt], out: Path) -> None:
    regenerate(target, prompts, out, ANSWERS, K)


def _measure(
    run: RunFolder,
    file: str,
    target: Target,
    folder: Path,
    answers: Mapping[str, Path],
    name: str,
    row: str,
) -> None:
    draft = load_draft(str(folder), target)
    every = {domain: read_answers(path) for domain, path in answers.items()}
    measured = {domain: measure_answers(target, draft, some, k=K) for domain, some in every.items()}
    traces = [trace for found in measured.values() for trace in found.traces]
    first = next(iter(every.values()))[0]
    cost = measure_cost(target, draft, first.prompt, most=K)
    choice = choose_k(cost, per_position(traces, K), round(sum(t.steps for t in traces)))
    cell = KindCell(
        target=name,
        draft=row,
        kind=draft.kind,
        tau={d: (m.acceptance.tau, *m.acceptance.ci) for d, m in measured.items()},
        prompts={d: m.acceptance.prompts for d, m in measured.items()},
        parameters=sum(p.numel() for p in draft.parameters()),
        c=cost.c,
        best=choice.k,
        speedup=max(choice.speedups),
        versions=versions(),
    )
    run.write_json(file, to_json(cell))


def print_cells(cells: Sequence[KindCell]) -> None:
    """A line for each draft on each target."""
    for c in cells:
        taus = ", ".join(
            f"{domain} {tau:.2f} [{low:.2f}, {high:.2f}]"
            for domain, (tau, low, high) in c.tau.items()
        )
        typer.echo(
            f"{c.target}, {c.draft}: tau at K={K}: {taus}; a draft step costs {c.c:.2f} of a target step, so K={c.best} would "
            f"make it {c.speedup:.2f} times as fast"
        )
