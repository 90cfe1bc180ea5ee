"""`redraft bench certificates`: real servers held against certificates, right ones and such with a fault.

    OUT/toy         a toy suite with three drafts of its fine-tune, for many right set-ups (as `redraft demo` builds it)
    OUT/smollm2     SmolLM2 with the kept draft, for faults and some right set-ups; its medical fine-tune
    OUT/written     certificates, by draft and dtype
    OUT/cells       one JSON file for each set-up

Only what is missing is done. Faults are those of `certificate_faults.py`; in float32 at K = 4.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer

from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.core.console import say
from redraft.core.errors import UserError, check_known
from redraft.core.files import write_text
from redraft.core.records import Prompt
from redraft.generation.answer_file import read_answers
from redraft.models.loading import load_target
from redraft.models.target import Target, default_aux_layers
from redraft.prompts.prompts import read_prompts
from redraft.serving.certificate import certify
from redraft.serving.certificate_check import Certificate, CheckError, check, read_certificate
from redraft.serving.engine import Engine, Serving, Speculation
from redraft.serving.engines import engine_named
from redraft.serving.environment import Environment
from redraft.serving.verify import method_of

from .certificate_faults import INJECTED, LLAMACPP, VLLM, Models
from .demo import AdaptedDraft, adapt_and_compare
from .kept_parts import KEPT, MEMBER, restore
from .language_model import save_merged
from .pretrained import build_model
from .real_demo import questions

TOY, REAL = "toy", "smollm2"
ROWS = 256
"""Of the toy's reduced vocabulary; its target has 2,048."""
PROMPTS, TOKENS = 16, {TOY: 64, REAL: 32}
"""Prompts of the real model's certificates, and tokens of an answer."""
CONTEXT = 512
FAULTY_K = 4
SLOTS = {"float32": (1, 2, 4), "bfloat16": (1, 4), "float16": (1, 4)}
"""Places for requests at a time, by dtype."""
FLAGS = {LLAMACPP: ("--threads", "1", "--threads-batch", "1", "-td", "1", "-tbd", "1"), VLLM: ()}
"""Threads of llama.cpp wait for each other by spinning, which next to any other process is slower than one."""
NOT_SERVED = "not served"


@dataclass(frozen=True)
class SetUp:
    """A server: of a model's draft, in a dtype, at K tokens, with places for so many requests; `fault` '' is a right one."""

    engine: str
    model: str
    draft: str
    dtype: str
    k: int
    slots: int = 1
    fault: str = ""

    @property
    def name(self) -> str:
        parts = (self.engine, self.model, self.draft, self.dtype, f"k{self.k}", f"x{self.slots}")
        return " ".join([*parts, self.fault]).strip()


@dataclass(frozen=True)
class CertificateCell:
    """What the check said of a set-up; `wanted` is the cause that it should name ('' for a right one)."""

    set_up: SetUp
    wanted: str
    holds: bool
    exact: bool
    cause: str
    conclusion: str
    server: str
    equal: int = 0
    near_ties: int = 0
    different: int = 0
    distance: int = 0
    accepted: int = 0
    drafted: int = 0

    @property
    def right(self) -> bool:
        """Whether a right set-up holds, or the cause of a fault is named."""
        return self.holds if not self.wanted else self.wanted in self.cause.split(" | ")

    @staticmethod
    def from_json(row: dict[str, Any]) -> CertificateCell:
        return CertificateCell(**{**row, "set_up": SetUp(**row["set_up"])})


def set_ups(engine: str) -> list[SetUp]:
    """Every set-up of an engine, right ones first. vLLM, whose server takes half a minute to start, has few."""
    right = [SetUp(engine, REAL, "kept", "float32", FAULTY_K)]
    right.append(dataclasses.replace(right[0], dtype="bfloat16"))
    if engine == LLAMACPP:
        right = [
            SetUp(engine, TOY, draft, dtype, k, slots)
            for draft in ("unadapted", "adapted", "from-scratch", "reduced")
            for dtype, places in SLOTS.items()
            for k in range(1, 8)
            for slots in places
        ]
        right += [
            SetUp(engine, REAL, "kept", dtype, k)
            for dtype in ("float32", "bfloat16")
            for k in range(1, 8)
        ]
    faulty = [
        SetUp(engine, REAL, "kept", "float32", FAULTY_K, fault=name)
        for name, row in INJECTED.items()
        if engine in row.engines
    ]
    return [*right, *faulty]


def bench_certificates(out: Path, engine: str, python: str | None = None) -> list[CertificateCell]:
    """Try what is missing in `out`, and return the engine's cells. `python` is one with the engine.

    Raises UserError for an engine that is not run here, or not there.
    """
    check_known("--engine", [engine], (LLAMACPP, VLLM))
    row = engine_named(engine)
    bench = _Bench(out, row, row.find(python))
    return [bench.cell(set_up) for set_up in set_ups(engine)]


class _Bench:
    def __init__(self, out: Path, engine: Engine, environment: Environment):
        self.out, self.engine, self.environment = out, engine, environment

    def cell(self, set_up: SetUp) -> CertificateCell:
        path = self.out / "cells" / f"{set_up.name}.json"
        if not path.is_file():
            say(set_up.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(self._tried(set_up))) + "\n")
        return CertificateCell.from_json(json.loads(path.read_text(encoding="utf-8")))

    def _tried(self, set_up: SetUp) -> CertificateCell:
        models = self._models(set_up)
        certificate = self._certificate(set_up, models)
        scratch = self.out / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        models.draft.save(scratch / "right")
        method = method_of(models.draft, self.engine)
        what = Serving(
            str(models.target),
            set_up.dtype,
            CONTEXT,
            speculation=Speculation(method, str(scratch / "right"), set_up.k),
            at_a_time=set_up.slots,
            flags=FLAGS[self.engine.name],
        )
        wanted = ""
        if set_up.fault:
            fault = INJECTED[set_up.fault]
            wanted, what = fault.wanted, fault.inject(models, what, scratch)
        version = f"{self.engine.title} {self.environment.version}"
        try:
            what = self.engine.prepare(self.environment, what, self.out / "converted")
            with self.engine.serve(self.environment, what, scratch / "log") as running:
                found = check(certificate, running.server.url)
        except (UserError, CheckError) as problem:
            if not set_up.fault:
                raise
            return CertificateCell(set_up, wanted, False, False, NOT_SERVED, str(problem), version)
        return CertificateCell(
            *(set_up, wanted, found.holds, found.exact, found.cause, found.conclusion, version),
            *(found.equal, found.near_ties, found.different, found.distance),
            *(found.served.accepted, found.served.drafted),
        )

    def _models(self, set_up: SetUp) -> Models:
        return self._toy(set_up.draft) if set_up.model == TOY else self._real()

    def _real(self) -> Models:
        """SmolLM2, the kept draft, and the kept fine-tune merged."""
        out = self.out / REAL
        if not (out / "tuned").is_dir():
            build_model("smollm2", out / "base")
            restore(out / "base", out / "draft")
            save_merged(out / "tuned", str(out / "base"), str(KEPT / MEMBER))
        layers = json.loads((out / "base" / "config.json").read_text())["num_hidden_layers"]
        draft = read_draft(str(out / "draft"))
        return Models(out / "base", draft, out / "tuned", default_aux_layers(layers))

    @cached_property
    def toy(self) -> AdaptedDraft:
        return adapt_and_compare(self.out / TOY, members=("sft", "lora4"), kinds=("eagle",))

    def _toy(self, draft: str) -> Models:
        found = self.toy
        folders = {
            "unadapted": found.result.report.shared,
            "adapted": found.result.report.draft,
            "from-scratch": str(found.from_scratch),
        }
        target = Path(found.target.sources[0])
        if draft in folders:
            stored = read_draft(folders[draft])
        else:
            answers = read_answers(found.result.run / "answers" / "eval.jsonl")
            stored = _reduced(
                read_draft(folders["adapted"]), [t for a in answers for t in a.answer]
            )
        layers = default_aux_layers(found.target.num_layers)
        return Models(target, stored, Path(found.suite["base"]), layers)

    def _certificate(self, set_up: SetUp, models: Models) -> Certificate:
        name = f"{set_up.model}-{set_up.draft}-{set_up.dtype}.json"
        file = self.out / "written" / name
        if not file.is_file():
            target = load_target(str(models.target), dtype=set_up.dtype)
            asked = self._asked(set_up.model, target)
            found = certify(target, models.draft, asked, TOKENS[set_up.model])
            if set_up.model == TOY:  # llama.cpp does not know how its tokenizer splits text
                found = dataclasses.replace(found, probe=None)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, found.to_text())
        return read_certificate(file)

    def _asked(self, model: str, target: Target) -> list[Prompt]:
        if model == REAL:
            rows = [{"role": "user", "content": text} for text in questions()[::18][:PROMPTS]]
            return [Prompt(str(i), tuple(target.render([row]))) for i, row in enumerate(rows)]
        files = sorted((self.out / TOY / "suite" / "prompts").glob("*-eval.jsonl"))
        return [p for file in files for p in read_prompts(str(file), target).prompts[:32]]


def _reduced(whole: StoredDraft, said: Sequence[int]) -> StoredDraft:
    """The rows of the tokens that were said most."""
    ids = torch.tensor(sorted(token for token, _ in Counter(said).most_common(ROWS)))
    head = whole.tensors["lm_head.weight"][ids]
    tensors = {**whole.tensors, "lm_head.weight": head, "d2t": ids - torch.arange(len(ids))}
    config = dataclasses.replace(whole.config, draft_vocab_size=len(ids))
    return dataclasses.replace(whole, config=config, tensors=tensors)


def read_cells(out: Path) -> list[CertificateCell]:
    """Every cell of a folder."""
    paths = sorted((out / "cells").glob("*.json"))
    return [CertificateCell.from_json(json.loads(path.read_text())) for path in paths]


def print_cells(cells: Sequence[CertificateCell]) -> None:
    """False alarms of the right set-ups, and what was said of each fault."""
    right = [cell for cell in cells if not cell.wanted]
    alarms = [cell for cell in right if not cell.holds]
    exact = sum(cell.exact for cell in right)
    typer.echo(f"right set-ups: {len(right)}, false alarms {len(alarms)}, exact {exact}")
    for cell in alarms:
        typer.echo(f"  {cell.set_up.name}: {cell.conclusion}")
    faulty = [cell for cell in cells if cell.wanted]
    typer.echo(f"faults: {len(faulty)}, named {sum(cell.right for cell in faulty)}")
    for cell in faulty:
        said = cell.cause or "it holds"
        mark = "" if cell.right else f"   wanted: {cell.wanted}"
        typer.echo(f"  {cell.set_up.engine:10} {cell.set_up.fault:42} {said}{mark}")
