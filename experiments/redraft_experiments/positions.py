"""`redraft bench positions`: recovery by position in the answer and by temperature, and remedies.

A toy suite's fine-tune answers in some sixty tokens, whatever it is asked: of several word problems in one
turn it solves one. To have long answers that are real, the fine-tune is tuned further, here, on
several problems in one turn, each solved in order (`problems`; 1 leaves it unchanged). The suite's
draft was made for none of this, as a published one is not.

One cell is one draft of one training seed, with the steps it takes on the same prompts at each
temperature, by replay; the draft takes its most likely token, as vLLM does at any temperature. Rows that
adapt train the same adapter on the same number of generated tokens, in as many optimiser steps;
they differ in which answers those are. Only what is missing is run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from redraft.adapters.merge import merge
from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.config import RegenerateConfig, TrainConfig
from redraft.core.console import say
from redraft.core.errors import check_known
from redraft.core.files import write_text, writing
from redraft.core.records import Answer, to_json, versions
from redraft.drafts.base import Draft
from redraft.generation.answer_file import read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics.positions import Counts, binned_steps
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.stages import train_adapter
from redraft.prompts.prompts import read_prompts

from . import recovery
from .corpus import DRAFT_LR, SIZES, Corpus, Size
from .datasets import data_folder
from .language_model import fit, supervised
from .selection import with_steps
from .suite import load_member, read_manifest, write_chats
from .synthetic import Sample

K = 4
TEMPERATURES = (0.0, 0.7, 1.0)
BIN = 32
"""Width of the bins of position, in tokens."""
LEAST_STEPS = 300
"""A bin is shown where the from-scratch draft takes at least so many steps in it, over all prompts."""
PART_LR = 3.2
"""Learning rate of the adapter, times the hidden size: what the methods bench chose."""
UNADAPTED, FROM_SCRATCH = "unadapted", "from-scratch"
WARM_FROM_SCRATCH = "from-scratch half at 0.7"
"""The fairer 1 of recovery above temperature 0."""


@dataclass(frozen=True)
class Recipe:
    """Which answers an adapter is trained on.

    `cut` is where an answer ends, as a share of the usual length; the longest `1 / among` of the
    answers are taken; half of the tokens are sampled at `warm`, where that is set. `from-scratch` trains
    from nothing on the whole pool, instead of an adapter on a row's share of it.
    """

    says: str
    cut: float | None = None
    among: int = 1
    warm: float = 0.0
    from_scratch: bool = False


RECIPES = {
    "cut": Recipe("greedy answers cut at a quarter of the usual length", cut=0.25),
    "whole": Recipe("greedy answers to their end"),
    "longest": Recipe("the longest of twice as many whole greedy answers", among=2),
    "half at 0.7": Recipe("whole answers, half greedy and half at temperature 0.7", warm=0.7),
    "half at 1": Recipe("whole answers, half greedy and half at temperature 1", warm=1.0),
    WARM_FROM_SCRATCH: Recipe(
        "from nothing, the whole pool, half of it at temperature 0.7", warm=0.7, from_scratch=True
    ),
}
REFERENCE = Recipe("from nothing, the whole pool, greedy", from_scratch=True)


@dataclass(frozen=True)
class Scale:
    """How much data and training. `usual` and `longest` are tokens of an answer, per problem.

    `samples` is a row's number of whole answers; `pool` the from-scratch draft's. `prompts` are all there
    are to train on: enough that answers cut short fill the same budget of tokens.
    """

    samples: int
    pool: int
    prompts: int
    pool_epochs: float
    usual: int
    longest: int
    steps: int
    epochs: float
    tuning: int
    tune_steps: int
    evaluated: int
    heldout: int


SCALES = {
    "tiny": Scale(8, 24, 40, 1, 24, 24, 4, 1, 16, 4, 6, 4),
    "nano": Scale(128, 320, 520, 3, 60, 72, 240, 4, 1200, 300, 64, 16),
}


@dataclass(frozen=True)
class PositionCell:
    """One draft. `accepted` has, by temperature, the accepted tokens of each step of each prompt, one
    digit a step. `kept_tokens` are answer tokens trained on, `generated_tokens` those that had to be
    generated for that."""

    size: str
    member: str
    problems: int
    row: str
    seed: int
    k: int
    accepted: dict[str, tuple[str, ...]]
    answer_tokens: dict[str, int]
    cut_answers: dict[str, int]
    versions: dict[str, str]
    samples: int = 0
    kept_tokens: int = 0
    generated_tokens: int = 0
    optimizer_steps: int = 0
    passes: float = 0.0
    trained_parameters: int = 0
    training_seconds: float = 0.0

    @staticmethod
    def from_json(row: dict[str, Any]) -> PositionCell:
        accepted = {name: tuple(steps) for name, steps in row["accepted"].items()}
        return PositionCell(**{**row, "accepted": accepted})

    def steps(self, temperature: str, low: int, high: int) -> tuple[Counts, ...]:
        """(accepted, steps) of each prompt, of the steps that begin at positions [low, high)."""
        return tuple(
            binned_steps([int(n) for n in digits], (low, high))[0]
            for digits in self.accepted[temperature]
        )


def bench_positions(
    suite: Path,
    out: Path,
    *,
    member: str = "sft",
    problems: int = 4,
    rows: Sequence[str] = tuple(RECIPES),
    seeds: Sequence[int] = (1, 2, 3),
    data: str | None = None,
) -> list[PositionCell]:
    """Run the cells that are missing in `out`; returns reuse, and each seed's from-scratch draft and rows.

    Raises UserError for unknown rows and members, and for a toy suite whose size has no scale.
    """
    check_known("row", rows, RECIPES)
    manifest = read_manifest(suite, [member], SCALES)
    bench = _Bench(suite, out, manifest, member, problems, data)
    cells = [bench.cell(UNADAPTED, 0)]
    for seed in seeds:
        cells += [bench.cell(row, seed) for row in (FROM_SCRATCH, *rows)]
    return cells


class _Bench:
    """The cells of one target. It, its prompts and its answers are made when first needed and kept."""

    def __init__(
        self,
        suite: Path,
        out: Path,
        manifest: dict[str, Any],
        member: str,
        problems: int,
        data: str | None,
    ):
        self.suite, self.member, self.problems = suite, member, problems
        self.size: str = manifest["size"]
        self.scale = SCALES[self.size]
        self.out = out / self.size / f"{member}-{problems}"
        size = SIZES[self.size]
        self.corpus = Corpus(size, data_folder(data) if size.real else None, manifest["seed"])
        self.domain: str = manifest["members"][member].get("domain", manifest["tuned_domain"])
        self.shared: StoredDraft = read_draft(str(suite / "draft"))
        self.loaded: Target | None = None

    def cell(self, row: str, seed: int) -> PositionCell:
        path = self.out / "cells" / f"{row}.s{seed}.json"
        if not path.is_file():
            write_text(path, json.dumps(to_json(self._run(row, seed))) + "\n")
        return PositionCell.from_json(json.loads(path.read_text(encoding="utf-8")))

    def _run(self, row: str, seed: int) -> PositionCell:
        say(f"{self.member}, {self.problems} problems, seed {seed}: {row}")
        trained: dict[str, Any] = {}
        made = self.shared
        if row != UNADAPTED:
            made, trained = self._trained(row, seed)
        draft = made.build(self._target(), torch.float32).eval()
        asked = {f"{t:g}": self._asked("eval", self.scale.evaluated, t) for t in TEMPERATURES}
        return PositionCell(
            size=self.size,
            member=self.member,
            problems=self.problems,
            row=row,
            seed=seed,
            k=K,
            accepted={name: self._steps(draft, answers) for name, answers in asked.items()},
            answer_tokens={n: sum(a.length for a in some) for n, some in asked.items()},
            cut_answers={n: sum(a.finish != "stop" for a in some) for n, some in asked.items()},
            versions=versions(),
            **trained,
        )

    def _steps(self, draft: Draft, answers: Sequence[Answer]) -> tuple[str, ...]:
        traces = replay(self._target(), draft, answers, K)
        return tuple("".join(map(str, trace.accepted)) for trace in traces)

    def _trained(self, row: str, seed: int) -> tuple[StoredDraft, dict[str, Any]]:
        """The draft that a row makes, and the fields of its cell that training decides."""
        used, generated = self._chosen(row)
        config = self._training(row, used, seed)
        heldout = self._asked("heldout", self.scale.heldout, 0.0)
        part = train_adapter(self._target(), self.shared, used, heldout, config, K)
        fields = {
            "samples": len(used),
            "kept_tokens": _tokens(used),
            "generated_tokens": generated,
            "optimizer_steps": part.card["train"]["steps"],
            "passes": config.epochs,
            "trained_parameters": part.card["train"]["trained_parameters"],
            "training_seconds": part.card["train"]["seconds"],
        }
        return self.shared.with_tensors(merge(self.shared.tensors, part.tensors), {}), fields

    def _chosen(self, row: str) -> tuple[list[Answer], int]:
        """The answers that a row is trained on, and how many tokens were generated to have them."""
        recipe = RECIPES.get(row, REFERENCE)
        samples = self.scale.pool if recipe.from_scratch else self.scale.samples
        whole = self._pool(0.0, 0, self.scale.pool)
        budget = _tokens(whole[:samples])
        if recipe.cut:
            end = max(2, round(recipe.cut * self.scale.usual * self.problems))
            whole += self._pool(0.0, self.scale.pool, self.scale.prompts)
            whole = [_ended(answer, end) for answer in whole]
        if recipe.among > 1:
            asked = whole[: recipe.among * samples]
            longest = sorted(asked, key=lambda answer: -answer.length)
            return _within(longest, budget), _tokens(asked)
        if recipe.warm:
            half = samples // 2
            used = _within(whole[:half], budget // 2)
            warm = self._pool(recipe.warm, half, 2 * samples)
            used += _within(warm, budget - _tokens(used))
        else:
            used = _within(whole, budget)
        return used, _tokens(used)

    def _training(self, row: str, used: Sequence[Answer], seed: int) -> TrainConfig:
        """Batches as large as make the steps in about `epochs` passes; a last one may be partial."""
        s, hidden = self.scale, self._target().hidden_size
        from_scratch = RECIPES.get(row, REFERENCE).from_scratch
        read = sum(len(a.prompt) + a.length for a in used)
        steps, passes = s.steps, s.epochs
        if from_scratch:
            passes = s.pool_epochs
            steps = round(s.steps / s.epochs * passes * s.pool / s.samples)
        longest = max(len(a.prompt) + a.length for a in used)
        config = TrainConfig(
            method="scratch" if from_scratch else "expert+fc+norms",
            loss="ce",
            lr=(DRAFT_LR if from_scratch else PART_LR) / hidden,
            batch_tokens=max(longest, round(1.15 * read * passes / steps)),
            rollout=K,
            evaluations=4,
            patience=99,
            precision="fp32",
            seed=seed,
        )
        return with_steps(config, used, steps)

    # -- target and data -------------------------------------------------------------------------

    def _target(self) -> Target:
        if self.loaded is None:
            folder = self.out / "target"
            if self.problems == 1:
                self.loaded = load_member(self.suite, self.member)
            else:
                if not (folder / "config.json").is_file():
                    self._tune(folder, SIZES[self.size])
                self.loaded = load_target(str(folder))
        return self.loaded

    def _tune(self, folder: Path, size: Size) -> None:
        """The member, tuned further on several problems a turn, at half of its learning rate."""
        say(f"{self.member}: tuning it further on {self.problems} problems a turn")
        member = load_member(self.suite, self.member)
        model: Any = member.model
        model.requires_grad_(True)
        chats = self._chats("tune", self.scale.tuning)
        fit(
            model,
            [supervised(member.tokenizer, chat) for chat in chats],
            steps=self.scale.tune_steps,
            batch=size.tune_batch // 2,
            lr=size.tune_lr / 2,
            seed=self.corpus.seed + 1,
            label=f"{self.member}-{self.problems}",
        )
        with writing(folder):
            model.save_pretrained(folder)
            member.tokenizer.save_pretrained(folder)

    def _chats(self, split: str, count: int) -> list[Sample]:
        return joined(self.corpus.chats(self.domain, count * self.problems, split), self.problems)

    def _pool(self, temperature: float, first: int, last: int) -> list[Answer]:
        """Answers to train on, to the pool's prompts [first, last)."""
        return self._answered("pool", "adapt", self.scale.prompts, temperature, 0, first, last)

    def _asked(self, split: str, count: int, temperature: float) -> list[Answer]:
        """Answers to measure on or to stop by, with their lookahead."""
        return self._answered(split, split, count, temperature, K, 0, count)

    def _answered(
        self,
        name: str,
        split: str,
        count: int,
        temperature: float,
        lookahead: int,
        first: int,
        last: int,
    ) -> list[Answer]:
        file = self.out / "prompts" / f"{name}.jsonl"
        if not file.is_file():
            write_chats(file, self.domain, self._chats(split, count))
        asked = read_prompts(str(file), self._target(), count, "last").prompts[first:last]
        config = RegenerateConfig(
            temperature=temperature,
            max_new_tokens=self.scale.longest * self.problems,
            batch_size=48,
        )
        path = self.out / "answers" / f"{name}-{temperature:g}-{first}.jsonl"
        said = {a.id: a for a in read_answers(path)} if path.is_file() else {}
        if len(said) < len(asked):
            said = {a.id: a for a in regenerate(self._target(), asked, path, config, lookahead)}
        return [said[p.id] for p in asked if said[p.id].length >= 2]


def joined(chats: Sequence[Sample], count: int) -> list[Sample]:
    """Chats of one turn made of `count` each: the questions in one turn, the answers in one reply."""
    found = []
    for begin in range(0, len(chats) - count + 1, count):
        some = chats[begin : begin + count]
        turns = ["\n".join(chat.messages[i]["content"] for chat in some) for i in (0, -1)]
        roles = ("user", "assistant")
        messages = tuple({"role": r, "content": t} for r, t in zip(roles, turns, strict=True))
        found.append(dataclasses.replace(some[0], messages=messages))
    return found


def _tokens(answers: Iterable[Answer]) -> int:
    return sum(answer.length for answer in answers)


def _ended(answer: Answer, end: int) -> Answer:
    """What the answer would be if it were cut by its length after `end` tokens."""
    if answer.length <= end:
        return answer
    return dataclasses.replace(answer, tokens=answer.tokens[:end], length=end, finish="length")


def _within(answers: Sequence[Answer], budget: int) -> list[Answer]:
    """The first answers, up to the one with which they reach so many tokens."""
    used: list[Answer] = []
    while len(used) < len(answers) and _tokens(used) < budget:
        used.append(answers[len(used)])
    return used


# -- figures -----------------------------------------------------------------------------------------


def read_position_cells(folder: Path) -> list[PositionCell]:
    """All cells below a folder, in the order of their names."""
    return [
        PositionCell.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.rglob("cells/*.json"))
    ]


@dataclass(frozen=True)
class Rows:
    """The cells of one target, by row, each row's in the order of its seeds."""

    cells: dict[str, list[PositionCell]]

    @staticmethod
    def of(cells: Sequence[PositionCell]) -> Rows:
        found: dict[str, list[PositionCell]] = {}
        for row in (UNADAPTED, FROM_SCRATCH, *RECIPES):
            some = sorted((c for c in cells if c.row == row), key=lambda cell: cell.seed)
            if some:
                found[row] = some
        return Rows(found)

    def adapted(self) -> list[str]:
        return [row for row in self.cells if row in RECIPES]

    def bins(self, temperature: str, width: int = BIN) -> list[tuple[int, int]]:
        """The bins from 0 on in which the from-scratch draft takes steps enough."""
        found: list[tuple[int, int]] = []
        while True:
            low = len(found) * width
            taken = self.taken(FROM_SCRATCH, temperature, (low, low + width))
            if taken < LEAST_STEPS:
                return found
            found.append((low, low + width))

    def taken(self, row: str, temperature: str, between: tuple[int, int]) -> float:
        """Steps that begin between two positions, the mean over seeds."""
        steps = self.steps(row, temperature, between)
        return sum(n for some in steps for _, n in some) / len(steps)

    def steps(self, row: str, temperature: str, between: tuple[int, int]) -> recovery.Steps:
        return [cell.steps(temperature, *between) for cell in self.cells[row]]

    def ends(
        self, row: str, temperature: str, between: tuple[int, int], one: str = FROM_SCRATCH
    ) -> recovery.Ends:
        """What the recovery of a row in a bin is made of; `one` is the draft that is its 1."""
        steps = [self.steps(name, temperature, between) for name in (row, UNADAPTED, one)]
        return steps[0], steps[1], steps[2]


def print_positions(cells: Sequence[PositionCell], out: Console | None = None) -> None:
    """One line per row and temperature: recovery in each bin (tau for reuse and from-scratch)."""
    out = out or Console(highlight=False)
    rows = Rows.of(cells)
    for temperature in (f"{t:g}" for t in TEMPERATURES):
        bins = rows.bins(temperature)
        table = Table(title=f"temperature {temperature}: recovery [95 %] by position in the answer")
        table.add_column("row")
        for low, high in bins:
            table.add_column(f"{low}-{high}", justify="right")
        for row in rows.cells:
            table.add_row(row, *(bin_text(rows, row, temperature, b) for b in bins))
        out.print(table)


def bin_text(rows: Rows, row: str, temperature: str, between: tuple[int, int]) -> str:
    """Recovery of a row in a bin; its tau for the two ends, and where there is no gap to recover."""
    found = None
    if row in RECIPES:
        found = recovery.recovery(*rows.ends(row, temperature, between))
    shown = found or recovery.tau(rows.steps(row, temperature, between))
    return f"{'' if found else 'tau '}{shown.value:.2f} [{shown.low:.2f}, {shown.high:.2f}]"
