"""`redraft bench methods`: every adapter on the same data, against reuse and a from-scratch draft.

One cell is one row (see `rows.py`) on one fine-tune of a toy suite, one kind of answers and one seed,
and one JSON file. Cells that share target, answers and seed are trained as joint training: the target reads
each batch once for all of them. Only what is missing is run. A cell is charged the readings of the
batches it stepped on as if it had been alone.

Before the first cell, each row's learning rate is chosen among three by held-out tau, on the full
SFT with a seed of its own.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from redraft.adapters.expert import resolve_width, shared_width, widenable
from redraft.adapters.lora import LowRank
from redraft.adapters.merge import home_of, merge
from redraft.adapters.table import ADAPTERS, read_method
from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.config import RegenerateConfig, TrainConfig
from redraft.core.console import say
from redraft.core.errors import UserError, check_known
from redraft.core.files import write_text
from redraft.core.records import Answer, StepTrace, to_json, versions
from redraft.drafts.base import Draft
from redraft.generation.answer_file import read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay_each
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.stages import save_fresh
from redraft.prompts.prompts import read_prompts
from redraft.training.train import Trained, train, train_adapters

from .cells import MethodCell
from .corpus import DRAFT, DRAFT_LR, SIZES, Corpus
from .datasets import data_folder
from .members import MEMBERS as FINE_TUNES
from .rows import (
    ALL,
    IDEAS,
    KINDS_OF_ANSWERS,
    ORIGINAL,
    PAPER,
    REGENERATED,
    SAMPLED,
    TUNED_LIKE,
)
from .suite import (
    base_draft_answers,
    draft_folder,
    load_member,
    read_manifest,
    write_chats,
)

K = 4
TEMPERATURE = 0.7
TUNED_ON = "sft"
TUNING_SEED = 100
RATES = (0.8, 1.6, 3.2)
"""Learning rates tried, times the hidden size."""
TUNING_EPOCHS = 2.0


@dataclass(frozen=True)
class Scale:
    """How much data a toy suite's cells get. `epochs` are passes over the adapt answers."""

    answers: int
    epochs: float
    pool: int
    pool_epochs: float
    longest: int
    batch_tokens: int
    heldout: int = 48
    evaluated: int = 128
    off: int = 64


SCALES = {
    "tiny": Scale(16, 1, 32, 1, 24, 512, heldout=8, evaluated=16, off=8),
    "pico": Scale(240, 4, 2400, 3, 96, 512),
    "nano": Scale(240, 4, 2400, 3, 128, 512),
    "micro": Scale(240, 4, 2400, 3, 160, 1024),
}


def bench_methods(
    suite: Path,
    out: Path,
    *,
    members: Sequence[str],
    rows: Sequence[str],
    answers: Sequence[str],
    seeds: Sequence[int],
    data: str | None = None,
) -> list[MethodCell]:
    """Run the cells that are missing in `out` and return all that were asked for.

    Raises UserError for unknown rows and members, and for a toy suite that lacks a member or draft.
    """
    check_known("row", rows, ALL)
    check_known("kind of answers", answers, KINDS_OF_ANSWERS)
    manifest = read_manifest(suite, members, SCALES)
    bench = _Bench(suite, out, manifest, data)
    cells: list[MethodCell] = []
    for member in members:
        for seed in seeds:
            for kind in answers:
                wanted = [row for row in rows if kind in ALL[row].answers]
                cells += bench.cells(member, wanted, kind, seed)
    return cells


class _Bench:
    """One suite's cells. Targets, answers and drafts are made when first needed, and kept on disk."""

    def __init__(self, suite: Path, out: Path, manifest: dict[str, Any], data: str | None):
        self.suite, self.out, self.data = suite, out, data
        self.size: str = manifest["size"]
        self.scale = SCALES[self.size]
        self.corpus = Corpus(SIZES[self.size], _data(self.size, data), manifest["seed"])
        self.general: list[str] = manifest["general_domains"]
        self.target: Target | None = None
        self.member = ""

    def cells(self, member: str, rows: Sequence[str], answers: str, seed: int) -> list[MethodCell]:
        missing = [row for row in rows if not self._path(member, row, answers, seed).is_file()]
        if missing:
            self._load(member)
            groups: dict[tuple[str, str, Any, float], list[str]] = {}
            for row in missing:
                r = ALL[row]
                key = (r.draft, r.pool, r.settings.get("epochs"), r.share)
                groups.setdefault(key, []).append(row)
            for (draft, pool, _, share), some in groups.items():
                say(f"{self.size} {member}, {answers} answers, seed {seed}: {', '.join(some)}")
                self._run(member, some, answers, seed, draft, pool, share)
        found = []
        for row in rows:
            text = self._path(member, row, answers, seed).read_text(encoding="utf-8")
            found.append(MethodCell.from_json(json.loads(text)))
        return found

    def _path(self, member: str, row: str, answers: str, seed: int) -> Path:
        return self.out / "cells" / self.size / member / f"{row}.{answers}.s{seed}.json"

    def _load(self, member: str) -> None:
        if self.member != member:
            self.member, self.target = member, load_member(self.suite, member)

    def _run(
        self,
        member: str,
        rows: list[str],
        answers: str,
        seed: int,
        draft: str,
        pool: str,
        share: float,
    ) -> None:
        """Train the rows as joint training, measure them together, write their cells."""
        shared = self._shared(draft)
        built = shared.build(self._target(), torch.float32)
        used = self._pool(member, answers)
        used = used if pool == "whole" else used[: round(share * self.scale.answers)]
        heldout = self._asked(member, "heldout")
        learning = [row for row in rows if ALL[row].settings]
        configs = {row: self._config(built, row, self._rate(row, built), seed) for row in learning}
        trained: dict[str, Trained | None] = dict.fromkeys(rows)
        if learning:
            trained_together = self._train(built, list(configs.values()), used, heldout)
            trained.update(zip(learning, trained_together, strict=True))
        drafts = [self._merged(shared, one) for one in trained.values()]
        steps = {
            name: replay_each(self._target(), drafts, self._asked(member, name), K)
            for name in ("eval", "sampled-eval", "off")
        }
        paid = self._paid(member, answers, used, heldout)
        for i, (row, one) in enumerate(trained.items()):
            cell = MethodCell(
                size=self.size,
                member=member,
                row=row,
                answers=answers,
                seed=seed,
                tau=_tau(steps["eval"][i]),
                tau_sampled=_tau(steps["sampled-eval"][i]),
                tau_off=_tau(steps["off"][i]),
                steps=tuple((int(t.gained), int(t.steps)) for t in steps["eval"][i]),
                draft_parameters=drafts[i].parameter_count(),
                versions=versions(),
                **(_training(one, shared, configs[row].lr, paid) if one else {}),
            )
            write_text(self._path(member, row, answers, seed), json.dumps(to_json(cell)) + "\n")
            say(f"{self.size} {member} {row}, {answers}, seed {seed}: tau {cell.tau:.3f}")

    def _paid(
        self, member: str, answers: str, used: Sequence[Answer], heldout: Sequence[Answer]
    ) -> dict[str, Any]:
        """What the answers cost: those that the target generated, and reading the held-out ones
        once (`scoring_flops`)."""
        generated = [*used, *heldout] if answers != ORIGINAL else list(heldout)
        per_token = self._flops_per_token()
        return {
            "unique_tokens": sum(a.length for a in generated),
            "generation_flops": per_token * sum(len(a.prompt) + a.length for a in generated),
            "scoring_flops": per_token * sum(len(a.prompt) + len(a.tokens) for a in heldout),
            "generation_seconds": self._seconds(member, answers, generated),
        }

    def _train(
        self,
        draft: Draft,
        configs: Sequence[TrainConfig],
        answers: Sequence[Answer],
        heldout: Sequence[Answer],
    ) -> list[Trained]:
        base = None
        if any(read_method(c.method).closed_form for c in configs):
            base = load_target(str(self.suite / "base"))
        return train_adapters(self._target(), draft, answers, heldout, configs, k=K, base=base)

    def _merged(self, shared: StoredDraft, trained: Trained | None) -> Draft:
        """The stock draft that a trained part makes; without one, the shared draft."""
        tensors = merge(shared.tensors, trained.tensors) if trained else shared.tensors
        return shared.with_tensors(tensors, {}).build(self._target(), torch.float32)

    def _config(self, draft: Draft, row: str, rate: float, seed: int) -> TrainConfig:
        r, s = ALL[row], self.scale
        settings = dict(r.settings)
        if r.width is not None:
            settings["width"] = str(resolve_width(r.width, shared_width(draft)))
        if r.matched is not None:
            settings["rank"] = matched_rank(draft, resolve_width(r.matched, shared_width(draft)))
        return TrainConfig(
            **{
                "lr": rate,
                "epochs": s.pool_epochs if r.pool == "whole" else s.epochs,
                "batch_tokens": s.batch_tokens,
                "evaluations": 6,
                "patience": 3,
                "rollout": K,
                "seed": seed,
                "precision": "fp32",
                **settings,
            }
        )

    def _rate(self, row: str, draft: Draft) -> float:
        """The row's tuned learning rate; tuned now where it was not yet."""
        if not ALL[row].tuned:
            return DRAFT_LR / draft.hidden_size
        name = TUNED_LIKE.get(row, "expert+fc" if _follows(row) else row)
        path = self.out / "rates" / self.size / f"{name}.json"
        if not path.is_file():
            self._tune(name, path)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return float(found["rate"])

    def _tune(self, row: str, path: Path) -> None:
        say(f"{self.size}: choosing the learning rate of {row}")
        member = self.member
        self._load(TUNED_ON)
        draft = self._shared(ALL[row].draft).build(self.target, torch.float32)
        rates = [rate / draft.hidden_size for rate in RATES]
        configs = [
            dataclasses.replace(self._config(draft, row, rate, TUNING_SEED), epochs=TUNING_EPOCHS)
            for rate in rates
        ]
        answers = self._pool(TUNED_ON, REGENERATED)[: self.scale.answers]
        heldout = self._asked(TUNED_ON, "heldout")
        trained_together = self._train(draft, configs, answers, heldout)
        taus = [one.record.best_tau() for one in trained_together]
        best = max(zip(taus, rates, strict=True))[1]
        tried = dict(zip((f"{rate:.4g}" for rate in rates), taus, strict=True))
        write_text(path, json.dumps({"rate": best, "heldout_tau": tried}) + "\n")
        self._load(member)

    # -- data ------------------------------------------------------------------------------------

    def _target(self) -> Target:
        if self.target is None:
            raise AssertionError("a member is loaded before its cells are run")
        return self.target

    def _domain(self, member: str) -> str:
        return self.corpus.named(FINE_TUNES[member].domain)

    def _pool(self, member: str, answers: str) -> list[Answer]:
        """The whole pool of answers to train on; the first `scale.answers` of them are the adapt part."""
        prompts = self.out / "prompts" / self.size / f"{self._domain(member)}.jsonl"
        if not prompts.is_file():
            write_chats(
                prompts,
                self._domain(member),
                self.corpus.chats(self._domain(member), self.scale.pool, "adapt"),
            )
        config = RegenerateConfig(
            temperature=TEMPERATURE if answers == SAMPLED else 0.0,
            max_new_tokens=self.scale.longest,
            batch_size=128,
            answers="original" if answers == ORIGINAL else "regenerate",
        )
        count = self.scale.answers if answers != REGENERATED else self.scale.pool
        return self._answered(member, answers, prompts, count, config, 0)

    def _asked(self, member: str, what: str) -> list[Answer]:
        """Answers to measure on, or to stop early by."""
        domain = self.general[0] if what == "off" else self._domain(member)
        split = "heldout" if what == "heldout" else "eval"
        count = {"heldout": self.scale.heldout, "off": self.scale.off}.get(
            what, self.scale.evaluated
        )
        config = RegenerateConfig(
            temperature=TEMPERATURE if what == "sampled-eval" else 0.0,
            max_new_tokens=self.scale.longest,
            batch_size=128,
        )
        prompts = self.suite / "prompts" / f"{domain}-{split}.jsonl"
        return self._answered(member, what, prompts, count, config, K)

    def _answered(
        self,
        member: str,
        name: str,
        prompts: Path,
        count: int,
        config: RegenerateConfig,
        lookahead: int,
    ) -> list[Answer]:
        file = self.out / "answers" / self.size / member / f"{name}.jsonl"
        asked = read_prompts(str(prompts), self._target(), count, "last").prompts
        done = file.with_suffix(".seconds.json")
        if not done.is_file():
            began = time.monotonic()
            regenerate(self._target(), asked, file, config, lookahead)
            write_text(done, json.dumps({"seconds": time.monotonic() - began}) + "\n")
        order = {prompt.id: i for i, prompt in enumerate(asked)}
        found = sorted(read_answers(file), key=lambda a: order[a.id])
        return [a for a in found if a.length >= 2]

    def _seconds(self, member: str, answers: str, used: Sequence[Answer]) -> float:
        """Seconds of generating the answers used, as their share of the tokens of their file."""
        total = 0.0
        for name in (answers, "heldout"):
            if name == ORIGINAL:
                continue
            folder = self.out / "answers" / self.size / member
            whole = read_answers(folder / f"{name}.jsonl")
            ids = {a.id for a in used}
            share = sum(a.length for a in whole if a.id in ids) / sum(a.length for a in whole)
            total += share * json.loads((folder / f"{name}.seconds.json").read_text())["seconds"]
        return total

    def _flops_per_token(self) -> float:
        """Of one forward pass of the target, counted on a batch of the lengths in use."""
        tokens = torch.ones(4, 128, dtype=torch.long, device=self._target().device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._target().read(tokens, ())
        return float(counter.get_total_flops()) / tokens.numel()

    # -- drafts ----------------------------------------------------------------------------------

    def _shared(self, draft: str) -> StoredDraft:
        if draft == "paper":
            folder = self.out / "paper" / self.size
            if not (folder / "config.json").is_file():
                self._first_stage(folder)
            return read_draft(str(folder))
        folder = self.suite / draft_folder(draft)
        if not folder.is_dir():
            raise UserError(
                f"suite {self.suite} has no {draft} draft; add one with redraft bench suite "
                f"--kinds {draft}"
            )
        return read_draft(str(folder))

    def _first_stage(self, folder: Path) -> None:
        """The paper's stage 1: shared and private expert together, on the base; the shared is kept."""
        say(f"{self.size}: the paper's stage 1, on the base")
        base = load_target(str(self.suite / "base"))
        answers, heldout = base_draft_answers(self.suite, self.corpus, base)
        draft = read_draft(str(self.suite / draft_folder("eagle"))).build(base, torch.float32)
        config = dataclasses.replace(
            DRAFT,
            method="scratch+expert",
            width=str(shared_width(draft)),
            init="random",
            lr=DRAFT_LR / draft.hidden_size,
            precision="fp32",
            **PAPER,
        )
        trained = train(base, draft, answers, heldout, config, k=K)
        save_fresh(folder, draft, base, trained.record)


def _training(
    trained: Trained, shared: StoredDraft, rate: float, paid: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a cell that training decides."""
    record = trained.record
    stored = {
        name: tensor.numel() * shared.tensors[home_of(name)].dtype.itemsize
        for name, tensor in trained.tensors.items()
    }
    return {
        **paid,
        "trained_parameters": record.trained_parameters,
        "stored_mb": sum(stored.values()) / 1e6,
        "rate": rate,
        "scoring_flops": paid["scoring_flops"] * len(record.heldout_tau),
        "target_flops": record.target_flops,
        "draft_flops": record.draft_flops,
        "training_seconds": record.seconds,
        "trained_together": record.trained_together,
        "trained_together_peak_mb": record.peak_mb,
        "optimizer_steps": record.steps,
        "best_step": record.best_step,
        "heldout_tau": tuple(tau for _, tau in record.heldout_tau),
    }


def matched_rank(draft: Draft, width: int) -> int:
    """The LoRA rank whose parameters come closest to those of an expert of `width` neurons."""
    wanted = sum(3 * width * ffn.gate_proj.in_features for ffn in widenable(draft).values())
    layers = LowRank(ADAPTERS["lora"]).layers(draft, read_method("lora"))
    shapes = [draft.get_parameter(f"{name}.weight").shape for name in layers]
    per_rank = sum(sum(shape) for shape in shapes)
    return max(1, min(round(wanted / per_rank), min(min(shape) for shape in shapes)))


def _follows(row: str) -> bool:
    """Whether a row is a variation of expert+fc, whose learning rate it takes."""
    return row in IDEAS and "expert" in str(ALL[row].settings["method"])


def _tau(traces: Sequence[StepTrace]) -> float:
    return pooled_tau([t for t in traces if t.accepted])


def _data(size: str, data: str | None) -> Path | None:
    folder = data_folder(data) if SIZES[size].real else None
    if SIZES[size].real and folder is None:
        raise UserError(
            f"size {size} reads real data: name its folder with --data or in REDRAFT_DATA"
        )
    return folder
