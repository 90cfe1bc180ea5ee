"""`redraft bench selection`: which samples are worth training on, on a pool of known mixture.

The pool of a target holds prompts on which its draft has lost acceptance (30 %), prompts on which it
has not (50 %), and near-duplicates of both (20 %). A pool of one kind would make `random` win by
construction. One cell is one way to select, one budget, one schedule and one seed; only what is
missing is run. Scores do not depend on the training seed and are computed once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from redraft.adapters.merge import merge
from redraft.checkpoints.load import StoredDraft, load_draft, read_draft
from redraft.config import RegenerateConfig, SelectConfig, TrainConfig
from redraft.core.console import say
from redraft.core.errors import check_known
from redraft.core.files import write_text
from redraft.core.records import Answer, Prompt, to_json, versions
from redraft.drafts.base import Draft
from redraft.generation.answer_file import read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics.replay import replay
from redraft.models.batching import plan_epochs
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.stages import train_adapter
from redraft.prompts.prompts import read_prompts
from redraft.selection.scoring import Scorers, as_samples
from redraft.selection.select import Selection, select

from . import recovery
from .corpus import SIZES, Corpus
from .datasets import data_folder
from .suite import load_member, read_manifest, write_chats
from .synthetic import Sample

K = 4
SHARES = {"drifted": 0.3, "stable": 0.5, "copy": 0.2}
"""What the pool is made of."""
BUDGETS = ("0.02", "0.1", "0.5")
SCHEDULES = ("steps", "epochs")
"""Equal optimiser steps for all cells, or equal passes over what was kept."""
EPOCHS = 4.0


@dataclass(frozen=True)
class Way:
    """A way to fill the budget. `longest` and `temperature` are those of the answers."""

    says: str
    select: str = "random"
    by: str = "answers"
    duplicates: float = 0.0
    coverage: int = 0
    longest: float = 1.0
    temperature: float = 0.0


UNADAPTED = "unadapted"
"""The base's draft, unchanged: one cell, of budget 0."""
WAYS: dict[str, Way] = {
    "random": Way("a uniform draw"),
    "random, no copies": Way("a uniform draw, near-duplicates last", duplicates=0.8),
    "draft_loss": Way("KL of the draft's first step", "draft_loss"),
    "rejection": Way("K + 1 less the sample's tau", "rejection"),
    "flatness": Way("the target's flatness (SFDD)", "flatness"),
    "shift": Way("cosine shift of the states", "shift"),
    "mahalanobis": Way("Mahalanobis shift of the states", "mahalanobis"),
    "rejection, no copies": Way("the same, near-duplicates last", "rejection", duplicates=0.8),
    "rejection, covered": Way(
        "no copies, and 16 clusters take turns", "rejection", duplicates=0.8, coverage=16
    ),
    "draft_loss of prompts": Way("before answers are generated", "draft_loss", by="prompts"),
    "shift of prompts": Way("before answers are generated", "shift", by="prompts"),
    "mahalanobis of prompts": Way("before answers are generated", "mahalanobis", by="prompts"),
    "flatness of prompts": Way("before answers are generated", "flatness", by="prompts"),
    "half as long": Way("random, answers cut at half the length", longest=0.5),
    "a quarter as long": Way("random, answers cut at a quarter of it", longest=0.25),
    "sampled at 0.7": Way("random, answers at temperature 0.7", temperature=0.7),
    "sampled at 1": Way("random, answers at temperature 1", temperature=1.0),
}


@dataclass(frozen=True)
class Scale:
    """`steps` of training in the schedule of equal steps."""

    pool: int
    steps: int
    longest: int
    batch_tokens: int
    evaluated: int
    heldout: int


SCALES = {
    "tiny": Scale(40, 4, 24, 512, 8, 8),
    "pico": Scale(600, 150, 96, 512, 64, 24),
    "nano": Scale(600, 150, 128, 512, 64, 24),
}


@dataclass(frozen=True)
class SelectionCell:
    """One selection trained on. `drifted` and `stable` are (accepted, steps) of each evaluated prompt
    of that kind, greedy, K = 4. `found` is the share of the pool's drifted prompts that were kept,
    copies not counted; `copies` the share of what was kept that has its like in what was kept."""

    size: str
    member: str
    way: str
    budget: str
    schedule: str
    seed: int
    drifted: tuple[tuple[int, int], ...]
    stable: tuple[tuple[int, int], ...]
    versions: dict[str, str]
    kept: int = 0
    kept_tokens: int = 0
    found: float = 0.0
    copies: float = 0.0
    generated_tokens: int = 0
    scored_tokens: int = 0
    scoring_flops: float = 0.0
    scoring_seconds: float = 0.0
    optimizer_steps: int = 0
    training_seconds: float = 0.0

    @staticmethod
    def from_json(row: dict[str, Any]) -> SelectionCell:
        pairs = {
            name: tuple((int(a), int(n)) for a, n in row[name]) for name in ("drifted", "stable")
        }
        return SelectionCell(**{**row, **pairs})


def bench_selection(
    suite: Path,
    out: Path,
    *,
    member: str,
    ways: Sequence[str],
    budgets: Sequence[str] = BUDGETS,
    schedules: Sequence[str] = SCHEDULES,
    seeds: Sequence[int] = (1, 2, 3),
    data: str | None = None,
) -> list[SelectionCell]:
    """Run the cells that are missing in `out`, and return all that were asked for.

    Raises UserError for unknown ways, schedules and members.
    """
    check_known("way", ways, WAYS)
    check_known("schedule", schedules, SCHEDULES)
    manifest = read_manifest(suite, [member], SCALES)
    bench = _Bench(suite, out, manifest, member, data)
    cells = [bench.unadapted()]
    for way in ways:
        for budget in budgets:
            for schedule in schedules:
                cells += [bench.cell(way, budget, schedule, seed) for seed in seeds]
    return cells


class _Bench:
    """The cells of one target. Pool, answers and scores are made when first needed and kept."""

    def __init__(
        self, suite: Path, out: Path, manifest: dict[str, Any], member: str, data: str | None
    ):
        self.suite, self.member = suite, member
        self.size: str = manifest["size"]
        self.out: Path = out / self.size / member
        self.scale = SCALES[self.size]
        folder = data_folder(data) if SIZES[self.size].real else None
        self.corpus = Corpus(SIZES[self.size], folder, manifest["seed"])
        self.domain: str = manifest["members"][member]["domain"]
        self.stable = [d for d in manifest["general_domains"] if d != self.domain][:2]
        self.target: Target = load_member(suite, member)
        self.shared: StoredDraft = read_draft(str(suite / "draft"))

    def cell(self, way: str, budget: str, schedule: str, seed: int) -> SelectionCell:
        path = self.out / "cells" / f"{way}.{budget}.{schedule}.s{seed}.json"
        if not path.is_file():
            write_text(path, json.dumps(to_json(self._run(way, budget, schedule, seed))) + "\n")
        return SelectionCell.from_json(json.loads(path.read_text(encoding="utf-8")))

    def unadapted(self) -> SelectionCell:
        path = self.out / "cells" / f"{UNADAPTED}.json"
        if not path.is_file():
            cell = self._cell(
                UNADAPTED, "0", "", 0, load_draft(str(self.suite / "draft"), self.target)
            )
            write_text(path, json.dumps(to_json(cell)) + "\n")
        return SelectionCell.from_json(json.loads(path.read_text(encoding="utf-8")))

    def _cell(
        self, way: str, budget: str, schedule: str, seed: int, draft: Draft, **more: Any
    ) -> SelectionCell:
        """A cell with what the draft does on prompts of both kinds."""
        steps = {
            kind: tuple(
                (int(t.gained), int(t.steps))
                for t in replay(self.target, draft, self._asked(kind, "eval"), K)
            )
            for kind in ("drifted", "stable")
        }
        cell = SelectionCell(
            self.size,
            self.member,
            way,
            budget,
            schedule,
            seed,
            steps["drifted"],
            steps["stable"],
            versions(),
            **more,
        )
        say(
            f"{self.member}, {way}, {budget} of the pool, equal {schedule or 'nothing'}, seed {seed}: "
            f"tau {_tau(cell.drifted):.2f} where it drifted, {_tau(cell.stable):.2f} elsewhere"
        )
        return cell

    def _run(self, way: str, budget: str, schedule: str, seed: int) -> SelectionCell:
        w, answers = WAYS[way], self._answers(WAYS[way])
        chosen = self._chosen(way, answers, budget, seed)
        kept = {s.id for s in chosen.kept}
        used = [a for a in answers if a.id in kept and a.length >= 2]
        config = self._training(used, schedule, seed)
        heldout = [*self._asked("drifted", "heldout"), *self._asked("stable", "heldout")]
        part = train_adapter(self.target, self.shared, used, heldout, config, K)
        merged = self.shared.with_tensors(merge(self.shared.tensors, part.tensors), {})
        draft = merged.build(self.target).eval()
        record = part.card["train"]
        by_prompt = w.by == "prompts" or w.select == "random"
        return self._cell(
            way,
            budget,
            schedule,
            seed,
            draft,
            kept=len(used),
            kept_tokens=sum(a.length for a in used),
            found=_found(kept, answers),
            copies=_copies(kept),
            generated_tokens=sum(a.length for a in (used if by_prompt else answers)),
            scored_tokens=chosen.tokens,
            scoring_flops=chosen.flops,
            scoring_seconds=chosen.seconds,
            optimizer_steps=record["steps"],
            training_seconds=record["seconds"],
        )

    def _training(self, used: Sequence[Answer], schedule: str, seed: int) -> TrainConfig:
        config = TrainConfig(
            epochs=EPOCHS,
            batch_tokens=self.scale.batch_tokens,
            evaluations=3,
            patience=99,
            seed=seed,
        )
        if schedule == "steps":
            config = with_steps(config, used, self.scale.steps)
        return config

    def _chosen(self, way: str, answers: Sequence[Answer], budget: str, seed: int) -> Selection:
        """The samples of a budget; the order by score is made once and read back."""
        w = WAYS[way]
        config = SelectConfig(w.select, w.by, budget, w.duplicates, w.coverage, seed)
        if w.select == "random":
            return select(answers, config)
        path = self.out / "scores" / f"{way}.json"
        if not path.is_file():
            pool = as_samples(self._pool()) if w.by == "prompts" else answers
            base = load_target(str(self.suite / "base"))
            draft = load_draft(str(self.suite / "draft"), self.target)
            models = Scorers(self.target, base, draft, K)
            whole = select(pool, dataclasses.replace(config, budget=budget), models)
            write_text(path, json.dumps(asdict(whole)) + "\n")
        stored = json.loads(path.read_text(encoding="utf-8"))
        return _within(stored, budget)

    def _pool(self) -> Sequence[Prompt]:
        return read_prompts(str(self._pool_file()), self.target, turns="last").prompts

    def _pool_file(self) -> Path:
        path = self.out / "prompts" / "pool.jsonl"
        if not path.is_file():
            count = {kind: round(share * self.scale.pool) for kind, share in SHARES.items()}
            rows = {
                "drifted": self._rows("drifted", "adapt", count["drifted"]),
                "stable": self._rows("stable", "adapt", count["stable"]),
            }
            both = [*rows["drifted"], *rows["stable"]]
            every = max(1, len(both) // count["copy"])
            copies = [_copy(row) for row in both[::every][: count["copy"]]]
            write_chats(path, self.domain, [*both, *copies])
        return path

    def _rows(self, kind: str, split: str, count: int) -> list[Sample]:
        """Chats of the tuned domain, or of two others in turn, named for their kind."""
        domains = [self.domain] if kind == "drifted" else self.stable
        share = math.ceil(count / len(domains))
        rows = [row for d in domains for row in self.corpus.chats(d, share, split)[:share]]
        return [dataclasses.replace(row, id=f"{kind}/{i}") for i, row in enumerate(rows[:count])]

    def _answers(self, way: Way) -> list[Answer]:
        """The target's answers to the whole pool."""
        longest = round(self.scale.longest * way.longest)
        config = RegenerateConfig(temperature=way.temperature, max_new_tokens=longest)
        path = self.out / "answers" / f"pool-{longest}-{way.temperature:g}.jsonl"
        prompts = self._pool()
        if not path.is_file() or len(read_answers(path)) < len(prompts):
            regenerate(self.target, prompts, path, config)
        return read_answers(path)

    def _asked(self, kind: str, split: str) -> list[Answer]:
        """Greedy answers, with their lookahead, to prompts of a kind that no pool holds."""
        count = self.scale.evaluated if split == "eval" else self.scale.heldout
        file = self.out / "prompts" / f"{kind}-{split}.jsonl"
        path = self.out / "answers" / f"{kind}-{split}.jsonl"
        if not file.is_file():
            write_chats(file, kind, self._rows(kind, split, count))
        if not path.is_file():
            prompts = read_prompts(str(file), self.target, turns="last").prompts
            config = RegenerateConfig(max_new_tokens=self.scale.longest)
            regenerate(self.target, prompts, path, config, lookahead=K)
        return [a for a in read_answers(path) if a.length >= 2]


def with_steps(config: TrainConfig, used: Sequence[Answer], steps: int) -> TrainConfig:
    """The settings with as many passes over the answers as make so many optimiser steps."""
    lengths = [len(a.prompt) + a.length for a in used]
    in_one = len(plan_epochs(lengths, config.batch_tokens, 1.0, config.seed))
    return dataclasses.replace(config, epochs=steps / in_one)


def _within(stored: dict[str, Any], budget: str) -> Selection:
    """A stored selection with another share of its order kept."""
    from redraft.config import read_budget
    from redraft.selection.select import Scored, within_budget

    rows = [Scored(**row) for row in stored["samples"]]
    kept = set(within_budget([row.tokens for row in rows], read_budget(budget)))
    samples = [dataclasses.replace(row, kept=rank in kept) for rank, row in enumerate(rows)]
    return Selection(samples, stored["tokens"], stored["flops"], stored["seconds"])


def _copy(row: Sample) -> Sample:
    """A near-duplicate: the same question, asked politely."""
    *before, last, reply = row.messages
    asked = {**last, "content": f"Please answer this. {last['content']}"}
    return dataclasses.replace(row, id=f"copy/{row.id}", messages=(*before, asked, reply))


def _found(kept: set[str], answers: Sequence[Answer]) -> float:
    drifted = [a.id for a in answers if a.id.startswith("drifted/")]
    originals = {name.removeprefix("copy/") for name in kept}
    return sum(name in originals for name in drifted) / len(drifted)


def _copies(kept: set[str]) -> float:
    return sum(name.startswith("copy/") and name[5:] in kept for name in kept) / len(kept)


def _tau(steps: Sequence[tuple[int, int]]) -> float:
    return 1 + sum(a for a, _ in steps) / sum(n for _, n in steps)


def read_selection_cells(folder: Path) -> list[SelectionCell]:
    """All cells below a folder, in the order of their names."""
    return [
        SelectionCell.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.rglob("cells/*.json"))
    ]


def mixed(cell: SelectionCell) -> tuple[tuple[int, int], ...]:
    """The evaluated prompts in the pool's proportion: all of the stable ones, and drifted ones to
    the ratio of their shares."""
    count = round(len(cell.stable) * SHARES["drifted"] / SHARES["stable"])
    return (*cell.stable, *cell.drifted[:count])


def print_selection(cells: Sequence[SelectionCell], out: Console | None = None) -> None:
    """One line per way, budget and schedule, over the seeds that are there."""
    out = out or Console(highlight=False)
    table = Table(title="tau at K = 4, greedy [95 %], over seeds and prompts")
    for heading in ("way", "budget", "equal", "drifted", "stable", "mixed", "found", "copies", "s"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    groups: dict[tuple[str, str, str], list[SelectionCell]] = {}
    for cell in cells:
        groups.setdefault((cell.way, cell.budget, cell.schedule), []).append(cell)
    for (way, budget, schedule), some in groups.items():
        taus = [
            recovery.tau([of(c) for c in some])
            for of in (lambda c: c.drifted, lambda c: c.stable, mixed)
        ]
        last = some[-1]
        table.add_row(
            way,
            budget,
            schedule,
            *(f"{t.value:.2f} [{t.low:.2f}, {t.high:.2f}]" for t in taus),
            f"{sum(c.found for c in some) / len(some):.0%}",
            f"{sum(c.copies for c in some) / len(some):.0%}",
            f"{last.scoring_seconds + last.training_seconds:.0f}",
        )
    out.print(table)
