"""`redraft bench versions`: a draft kept up with a service whose model gets new versions.

    v0   SmolLM2, for which the draft was trained
    v1   v0 fine-tuned on medical answers (LoRA, merged)
    v2   v1 tuned by preferences on what is safe to say (DPO, LoRA, merged)
    v3   v2 with weights rounded to 4 bits in groups of 32, as a quantised model computes

    OUT/models/NAME       a version
    OUT/prompts.jsonl     what the service is asked: medical questions, chat, requests to refuse, in turn
    OUT/runs/NAME-base    the base's draft adapted to a version
    OUT/runs/NAME-last    the draft of the version before (of its NAME-last) adapted to it
    OUT/base.jsonl        v0's answers to what is measured
    OUT/counts.json       (accepted, steps) of each measured answer, by version that answered, then by draft

Both runs of a version share its answers. Every part is a stage of a run folder: building again continues where it stopped.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import typer
from torch import nn

from redraft.checkpoints.load import read_draft
from redraft.config import RegenerateConfig, resolve
from redraft.core.errors import UserError
from redraft.core.files import remove, write_text
from redraft.core.folders import read_json
from redraft.core.records import Prompt
from redraft.generation.answer_file import read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics import intervals
from redraft.metrics.acceptance import prompt_counts
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.pipeline.adapt import adapt
from redraft.pipeline.run_folder import RunFolder

from .datasets import VARIABLE, data_folder
from .kinds.weights import rounded
from .language_model import save_merged, save_model
from .real_members import BASE, MEMBERS, SAFETY, make_member, prefer_safe
from .real_suite import SETTINGS, prompts_of

VERSIONS = ("v1", "v2", "v3")
FIRST = "v0"
TUNED = "medical-lora"
PREFERRED = MEMBERS["safety-dpo"]
TRAFFIC = ("medical", "chat", SAFETY)
ASKED = 330
"""Prompts of a run; 72 are kept aside."""
FROM_BASE, FROM_LAST = "base", "last"
UNADAPTED = "unadapted"
BITS, GROUP = 4, 32


@dataclass(frozen=True)
class VersionCell:
    """A draft on a version's answers: tau with its interval, and the change against the base's draft on the same answers.

    `draft` is `unadapted` or `VERSION-base`, `VERSION-last`; `trained_on` are answers, `tokens` those trained on with
    repetition, `seconds` those of training; `heldout_start` is the held-out tau that it began with.
    """

    version: str
    draft: str
    k: int
    prompts: int
    tau: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    heldout_start: float | None = None
    trained_on: int = 0
    tokens: int = 0
    seconds: float = 0.0


def bench_versions(suite: Path, out: Path, data: str | None = None) -> list[VersionCell]:
    """Build what is missing in `out` from the suite of `redraft bench real`; a cell for each version and draft on it."""
    folder = data_folder(data)
    if folder is None:
        raise UserError(f"name a folder of real data: --data FOLDER, or ${VARIABLE}")
    with RunFolder.open(out) as run:
        base = {"base": (suite / BASE / "config.json").read_text(encoding="utf-8")}
        made = run.stage("v1", base, ["models/v1"], partial(_tune, suite, out, folder))
        made = run.stage("v2", {"on": made}, ["models/v2"], partial(_prefer, out, folder))
        run.stage("v3", {"on": made}, ["models/v3"], partial(_round, out))
        write_text(out / "prompts.jsonl", _prompts(suite))
        last = str(suite / "draft")
        keys = []
        for version in VERSIONS:
            keys.append(_adapt(suite, out, version, FROM_BASE, str(suite / "draft")))
            if version == VERSIONS[0]:
                last = str(_run(out, version, FROM_BASE) / "draft")
                continue
            _share_answers(out, version)
            keys.append(_adapt(suite, out, version, FROM_LAST, last))
            last = str(_run(out, version, FROM_LAST) / "draft")
        run.stage("measure", {"drafts": keys}, ["counts.json"], partial(_measure, suite, run))
        return _cells(out)


def _run(out: Path, version: str, start: str) -> Path:
    return out / "runs" / f"{version}-{start}"


def _tune(suite: Path, out: Path, data: Path) -> None:
    if not (suite / "members" / TUNED).is_dir():
        make_member(suite, data, TUNED)
    save_merged(out / "models" / "v1", str(suite / BASE), str(suite / "members" / TUNED))


def _prefer(out: Path, data: Path) -> None:
    adapter = out / "models" / "v2-adapter"
    prefer_safe(out / "models" / "v1", data, adapter, "v2", PREFERRED)
    save_merged(out / "models" / "v2", str(out / "models" / "v1"), str(adapter))


def _round(out: Path) -> None:
    target = load_target(str(out / "models" / "v2"))
    head = target.model.get_output_embeddings()
    for module in target.model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = rounded(module.weight.data, BITS, GROUP)
    save_model(out / "models" / "v3", target.model, target.tokenizer)


def _prompts(suite: Path) -> str:
    """Lines of the domains in turn."""
    files = [prompts_of(suite, domain, "adapt") for domain in TRAFFIC]
    lists = [file.read_text(encoding="utf-8").splitlines() for file in files]
    rows = [line for row in zip_longest(*lists) for line in row if line is not None]
    return "".join(f"{line}\n" for line in rows[:ASKED])


def _share_answers(out: Path, version: str) -> None:
    """The run from the last draft takes up the answers of the run from the base's."""
    source, there = _run(out, version, FROM_BASE), _run(out, version, FROM_LAST)
    if not (there / "state.json").is_file():
        remove(there)
        shutil.copytree(source / "answers", there / "answers")
        write_text(there / "state.json", "{}\n")


def _adapt(suite: Path, out: Path, version: str, start: str, draft: str) -> str:
    """The hash of the draft that comes out."""
    found = adapt(
        load_target(str(out / "models" / version)),
        draft,
        str(out / "prompts.jsonl"),
        out=_run(out, version, start),
        off_domain={"chat": str(prompts_of(suite, "chat", "eval"))},
        config=resolve([("bench versions", {**SETTINGS, "export.certificate": "off"})]),
    )
    return found.merged.hash()


def _measure(suite: Path, run: RunFolder) -> None:
    """Every draft of a version on its own answers and on those of the versions before."""
    asked = read_answers(_run(run.path, VERSIONS[0], FROM_BASE) / "answers" / "eval.jsonl")
    prompts = [Prompt(answer.id, tuple(answer.prompt)) for answer in asked]
    k, longest = _config(run.path)
    regenerate(
        load_target(str(suite / BASE)),
        prompts,
        run.path / "base.jsonl",
        RegenerateConfig(temperature=0.0, max_new_tokens=longest),
        lookahead=k,
    )
    drafts = {UNADAPTED: str(suite / "draft")}
    for version in VERSIONS:
        for start in (FROM_BASE, FROM_LAST):
            folder = _run(run.path, version, start) / "draft"
            if folder.is_dir():
                drafts[folder.parent.name] = str(folder)
    counts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for version in (FIRST, *VERSIONS):
        folder = suite / BASE if version == FIRST else run.path / "models" / version
        file = _run(run.path, version, FROM_BASE) / "answers" / "eval.jsonl"
        target = load_target(str(folder))
        answers = read_answers(run.path / "base.jsonl" if version == FIRST else file)
        answers = [answer for answer in answers if answer.length > 1]
        counts[version] = {}
        for name, stored in drafts.items():
            traces = replay(target, read_draft(stored).build(target), answers, k)
            counts[version][name] = prompt_counts([t for t in traces if t.steps])[0]
    run.write_json("counts.json", counts)


def _config(out: Path) -> tuple[int, int]:
    """K, and the tokens of the longest measured answer."""
    config: dict[str, Any] = read_json(_run(out, VERSIONS[0], FROM_BASE) / "run.json")["config"]
    return config["measure"]["k"], config["measure"]["eval_new_tokens"]


def _cells(out: Path) -> list[VersionCell]:
    counts, (k, _) = read_json(out / "counts.json"), _config(out)
    cells = []
    for version, drafts in counts.items():
        other = [[(float(a), float(s)) for a, s in drafts[UNADAPTED]]]
        for name, each in drafts.items():
            one = [[(float(a), float(s)) for a, s in each]]
            tau, change = intervals.tau(one, k), intervals.difference(one, other, k)
            cells.append(
                VersionCell(
                    version,
                    name,
                    k,
                    len(each),
                    tau.value,
                    *tau.ends,
                    change.value,
                    *change.ends,
                    **(_cost(out, name) if name != UNADAPTED else {}),
                )
            )
    return cells


def _cost(out: Path, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "runs" / name / "report.json").read_text())
    train = report["train"]
    return {
        "heldout_start": train["heldout_tau"][0][1],
        "trained_on": report["prompts"]["trained_on"],
        "tokens": train["supervised_tokens"],
        "seconds": report["cost"]["seconds"]["train"],
    }


def print_cells(cells: list[VersionCell]) -> None:
    """A line for each draft: tau on each version's answers, and the change against the base's draft."""
    versions = list(dict.fromkeys(cell.version for cell in cells))
    typer.echo(f"{'':10}" + "".join(f"{name:>28}" for name in versions) + f"{'seconds':>9}")
    for draft in dict.fromkeys(cell.draft for cell in cells):
        found = {cell.version: cell for cell in cells if cell.draft == draft}
        shown = (
            f"{c.tau:.2f} {c.change:+.2f} [{c.change_low:+.2f}, {c.change_high:+.2f}]"
            for c in (found[name] for name in versions)
        )
        typer.echo(
            f"{draft:10}"
            + "".join(f"{text:>28}" for text in shown)
            + f"{found[versions[0]].seconds:9.0f}"
        )
