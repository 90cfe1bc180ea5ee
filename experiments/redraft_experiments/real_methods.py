"""`redraft bench real-methods`: the race on real models: ways to get a draft for a fine-tune, on the same answers.

    OUT/MEMBER/made-up.jsonl   general questions that the fine-tune makes up
    OUT/MEMBER/answers/        the fine-tune's answers, from vLLM: trained on, stopped by, measured on
    OUT/MEMBER/features/       its states on all of them, so that it reads them once
    OUT/MEMBER/more-answers/   those to more prompts, and more-features/, once a row asks for them
    OUT/MEMBER/cells/          one JSON file per row and seed
    OUT/MEMBER/drafts/         the trained drafts as engines read them

With `--draft` another draft of the base is adapted, an MTP head: its cells and drafts lie in cells-mtp/ and drafts-mtp/.
Only what is missing is done. Every row trains as many tokens a step and as many passes; the step with the best
held-out tau is kept. It is measured as exported, in the draft's own dtype, and on the way from the unadapted
draft's tensors to the trained ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.config import RegenerateConfig, TrainConfig
from redraft.core.console import say
from redraft.core.errors import UserError, check_known
from redraft.core.files import write_text
from redraft.core.records import Answer, Prompt, StepTrace, to_json, versions
from redraft.features.extract import Plan, write_features
from redraft.features.store import FeatureStore
from redraft.features.stored_target import StoredTarget, load_stored_target
from redraft.generation.answer_file import read_answers
from redraft.generation.general_prompts import made_up_questions
from redraft.metrics.replay import replay_each
from redraft.models.target import Target, default_aux_layers
from redraft.pipeline.run_folder import RunFolder
from redraft.pipeline.stages import as_adapter, merge_draft
from redraft.prompts.prompts import read_prompts
from redraft.training.guard import SHARES, between
from redraft.training.train import train

from .real_cells import EAGLE3, MEASURED, WHOLE, Counts, RealCell, cells_folder, named_for
from .real_drafts import K
from .real_members import MEMBERS, write_questions
from .real_rows import GREEDY, LOSS_ROWS, MADE_UP, MIXED, MORE, PEOPLE, ROWS, SAMPLED, RealRow
from .real_suite import Ask, answer_with_engine, folders_of, load_real, prompts_of
from .rivals.speculators_run import Finetune, finetune
from .synthetic import Sample

POOL, ASIDE, EVALUATED, CHAT, GENERAL = 240, 32, 64, 48, 120
"""Prompts adapted on, kept to stop training, measured on (own traffic, chat), and general ones of each origin."""
LONGEST = {"adapt": 128, "measured": 96}
TEMPERATURE = 0.7
TRAIN: dict[str, Any] = {
    "epochs": 4.0,
    "batch_tokens": 2048,
    "rollout": K,
    "evaluations": 6,
    "patience": 6,
    "precision": "bf16",
}


def bench_real_methods(
    suite: Path,
    out: Path,
    *,
    members: Sequence[str],
    rows: Sequence[str],
    seeds: Sequence[int],
    python: str | None = None,
    draft: Path | None = None,
) -> list[RealCell]:
    """Run the cells that are missing in `out`, and return all that were asked for; `rows` empty: all of the draft's kind.

    Raises UserError for unknown rows and members, and for a suite that lacks a member or its draft.
    """
    check_known("fine-tune", members, MEMBERS)
    parts = [] if draft else ["draft"]
    for part in (*parts, *(f"members/{member}" for member in members)):
        if not (suite / part).is_dir():
            raise UserError(
                f"{suite} has no {part}; build it with redraft bench real --out {suite}"
            )
    shared = read_draft(str(draft or suite / "draft"))
    table = ROWS if shared.kind == EAGLE3 else LOSS_ROWS
    check_known("row", rows, table)
    cells = []
    for member in members:
        with RunFolder.open(out / member) as run:
            race = _Race(suite, run, member, python, shared, table)
            cells += [race.cell(row, seed) for seed in seeds for row in rows or table]
    return cells


class _Race:
    """One fine-tune's cells. Answers and features are made when a cell is missing, and kept on disk."""

    def __init__(
        self,
        suite: Path,
        run: RunFolder,
        member: str,
        python: str | None,
        shared: StoredDraft,
        rows: Mapping[str, RealRow],
    ):
        self.suite, self.run, self.member, self.python = suite, run, member, python
        self.shared, self.rows = shared, rows
        self.target: StoredTarget | None = None
        self.more = False

    def cell(self, name: str, seed: int) -> RealCell:
        path = cells_folder(self.run.path, self.shared.kind) / f"{name}.s{seed}.json"
        if not path.is_file():
            self._prepare(self.rows[name].part > 1)
            say(f"{self.member}: {name}, seed {seed}")
            cell = self._made(name, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(to_json(cell)) + "\n")
        return RealCell.from_json(json.loads(path.read_text(encoding="utf-8")))

    # -- answers and features --------------------------------------------------------------------

    def _prepare(self, more: bool) -> None:
        """Load the target with its states on its answers, and on those to more prompts."""
        if self.target is not None and self.more >= more:
            return
        self.more = self.more or more
        row, whole = MEMBERS[self.member], load_real(self.suite, self.member)
        about = {"target": whole.fingerprint()}
        self.run.stage(
            "made up", {**about, "count": GENERAL}, ["made-up.jsonl"], lambda: self._make_up(whole)
        )
        stores = [self._answered("", whole, self._asks(whole, row.domain))]
        if self.more:
            stores.append(self._answered("more-", whole, [self._ask_more(whole, row.domain)]))
        folder, adapter = folders_of(self.suite, self.member)
        self.target = load_stored_target(folder, stores, adapter=adapter)

    def _answered(self, prefix: str, whole: Target, asks: Sequence[Ask]) -> FeatureStore:
        """The states on the answers, which lie in the folder `prefix`answers."""
        answers, features = f"{prefix}answers", f"{prefix}features"
        files = [f"{answers}/{ask.out.name}" for ask in asks]
        inputs = {ask.out.name: [asdict(ask.config), [p.id for p in ask.prompts]] for ask in asks}
        (self.run.path / answers).mkdir(exist_ok=True)
        key = self.run.stage(
            answers,
            {"target": whole.fingerprint(), **inputs},
            files,
            lambda: answer_with_engine(
                whole, folders_of(self.suite, self.member), asks, self.python
            ),
            keeps=files,
        )
        out = self.run.path / features
        self.run.stage(
            features, {"answers": key}, [features], lambda: self._read(whole, asks, out), [features]
        )
        return FeatureStore(out)

    def _make_up(self, target: Target) -> None:
        questions = [
            Sample(f"made-up-{i}", MADE_UP, ({"role": "user", "content": text},))
            for i, text in enumerate(made_up_questions(target, GENERAL))
        ]
        write_questions(self.run.path / "made-up.jsonl", questions)

    def _asks(self, target: Target, domain: str) -> list[Ask]:
        """Every file of answers. All prompts of a domain's file are disjoint, those of two files by their split."""

        own, evaluated, chat, chat_evaluated = (
            _prompts(prompts_of(self.suite, what, split), target)
            for what in (domain, "chat")
            for split in ("adapt", "eval")
        )
        made_up = _prompts(self.run.path / "made-up.jsonl", target)
        greedy, sampled, mixed = _asked()
        measured = {GREEDY: greedy, SAMPLED: sampled}
        measured = {
            name: dataclasses.replace(config, max_new_tokens=LONGEST["measured"])
            for name, config in measured.items()
        }
        answers = self.run.path / "answers"
        return [
            Ask(some, answers / f"{name}.jsonl", config, lookahead)
            for name, some, config, lookahead in (
                ("adapt-greedy", own[:POOL], greedy, 0),
                ("adapt-sampled", own[:POOL], sampled, 0),
                ("general-people", chat[: 2 * GENERAL], mixed, 0),
                ("general-made-up", made_up, mixed, 0),
                ("heldout-greedy", own[-ASIDE:], measured[GREEDY], K),
                ("heldout-sampled", own[-ASIDE:], measured[SAMPLED], K),
                ("heldout-people", chat[-ASIDE:], measured[GREEDY], K),
                ("eval-greedy", evaluated[:EVALUATED], measured[GREEDY], K),
                ("eval-sampled", evaluated[:EVALUATED], measured[SAMPLED], K),
                ("eval-chat", chat_evaluated[:CHAT], measured[GREEDY], K),
                ("eval-chat-sampled", chat_evaluated[:CHAT], measured[SAMPLED], K),
            )
        ]

    def _ask_more(self, target: Target, domain: str) -> Ask:
        """The prompts that come after those of every row, every second one answered greedily."""
        own = _prompts(prompts_of(self.suite, domain, "adapt"), target)[:-ASIDE]
        last = round(MORE * POOL)
        if len(own) < last:
            raise UserError(
                f"{prompts_of(self.suite, domain, 'adapt')} has {len(own)} prompts to adapt on ({ASIDE} are kept aside); rows on "
                f"more answers need {last}"
            )
        return Ask(own[POOL:last], self.run.path / "more-answers" / "adapt.jsonl", _asked()[2], 0)

    def _read(self, whole: Target, asks: Sequence[Ask], out: Path) -> None:
        files = sorted(ask.out for ask in asks)
        answers = [answer for file in files for answer in read_answers(file)]
        write_features(
            whole, answers, default_aux_layers(whole.num_layers), Plan(out, batch_tokens=8192)
        )

    def _answers(self, name: str) -> list[Answer]:
        return _long_enough(self.run.path / "answers" / f"{name}.jsonl")

    def _trained_on(self, row: RealRow) -> tuple[list[Answer], list[Answer]]:
        """A row's answers to the prompts adapted on, and those to general ones."""
        greedy, sampled = self._answers("adapt-greedy"), self._answers("adapt-sampled")
        own = {
            GREEDY: greedy,
            SAMPLED: sampled,
            MIXED: [*greedy[::2], *(a for a in sampled if a.id in {b.id for b in greedy[1::2]})],
        }[row.answers]
        if row.part < 1:
            own = sorted(own, key=lambda a: a.id)[: round(row.part * len(own))]
        if row.part > 1:
            more = _long_enough(self.run.path / "more-answers" / "adapt.jsonl")
            own = [*own, *more[: round(row.part * POOL) - POOL]]
        if not row.general:
            return own, []
        origin = {PEOPLE: "general-people", MADE_UP: "general-made-up"}[row.general]
        return own, self._answers(origin)[: round(row.share * len(own))]

    # -- training and measuring ------------------------------------------------------------------

    def _made(self, name: str, seed: int) -> RealCell:
        row, target = self.rows[name], self._loaded()
        if row.settings is None:
            return self._cell(name, seed, {WHOLE: self.shared})
        own, general = self._trained_on(row)
        answers = [*own, *general]
        heldout = self._answers("heldout-greedy" if row.answers == GREEDY else "heldout-sampled")
        config = TrainConfig(**{**TRAIN, "seed": seed, **row.settings})
        drafts: dict[float, StoredDraft]
        if row.rival:
            how = Finetune(int(config.epochs), config.batch_tokens, seed)
            out = self.run.path / row.rival / f"s{seed}"
            made, record = finetune(self.shared, target, answers, heldout, out, how)
            drafts = {WHOLE: made}
        else:
            drafts, record = self._trained(target, answers, heldout, config, row.on_the_way)
        drafts[WHOLE].save(
            named_for(self.run.path / "drafts", self.shared.kind) / f"{name}.s{seed}"
        )
        lengths = [sum(answer.length for answer in some) for some in (own, general)]
        spent = {name: s for name, s in self.run.seconds().items() if name.endswith("answers")}
        files = [file for name in spent for file in (self.run.path / name).glob("*.jsonl")]
        answered = sum(answer.length for file in files for answer in _long_enough(file))
        return dataclasses.replace(
            self._cell(name, seed, drafts),
            answer_tokens=lengths[0],
            general_tokens=lengths[1],
            answer_seconds=sum(spent.values()) * sum(lengths) / answered,
            train=record,
        )

    def _trained(
        self,
        target: StoredTarget,
        answers: Sequence[Answer],
        heldout: Sequence[Answer],
        config: TrainConfig,
        on_the_way: bool,
    ) -> tuple[dict[float, StoredDraft], dict[str, Any]]:
        """The merged drafts by their share of the way, and the record of the training."""
        draft = self.shared.build(target, torch.float32)
        trained = train(target, draft, answers, heldout, config, k=K)
        start, end = (
            merge_draft(self.shared, as_adapter(target, self.shared, one, answers, config))
            for one in (dataclasses.replace(trained, tensors=trained.start), trained)
        )
        drafts = {WHOLE: end}
        if on_the_way and not config.method_value.fresh:  # else it started elsewhere
            drafts |= {share: _between(start, end, share) for share in SHARES[1:-1]}
        return drafts, to_json(trained.record)

    def _cell(self, name: str, seed: int, drafts: Mapping[float, StoredDraft]) -> RealCell:
        target = self._loaded()
        built = [draft.build(target) for draft in drafts.values()]
        counts: dict[str, dict[str, Counts]] = {str(share): {} for share in drafts}
        for measured in MEASURED:
            answers = self._answers(f"eval-{measured}")
            for share, traces in zip(counts, replay_each(target, built, answers, K), strict=True):
                counts[share][measured] = _counts(traces)
        return RealCell(
            self.member, name, seed, counts, versions=versions(), draft=self.shared.kind
        )

    def _loaded(self) -> StoredTarget:
        if self.target is None:
            raise AssertionError("answers and features are made before a cell is")
        return self.target


def _prompts(file: Path, target: Target) -> list[Prompt]:
    return list(read_prompts(str(file), target, None, "last").prompts)


def _long_enough(file: Path) -> list[Answer]:
    """The answers that have a token to draft, by id."""
    return sorted((a for a in read_answers(file) if a.length >= 2), key=lambda a: a.id)


def _asked() -> tuple[RegenerateConfig, RegenerateConfig, RegenerateConfig]:
    """How prompts to adapt on are answered: greedily, at a temperature, and every second one of each."""
    greedy = RegenerateConfig(max_new_tokens=LONGEST["adapt"], concurrency=64, timeout=1800.0)
    sampled = dataclasses.replace(greedy, temperature=TEMPERATURE)
    return greedy, sampled, dataclasses.replace(sampled, greedy_share=0.5)


def _counts(traces: Sequence[StepTrace]) -> Counts:
    return tuple((int(t.gained), int(t.steps)) for t in traces if t.accepted)


def _between(start: StoredDraft, end: StoredDraft, share: float) -> StoredDraft:
    """The draft whose tensors lie so far on the way."""
    tensors = between(_wide(start), _wide(end), share)
    return end.with_tensors({n: t.to(end.tensors[n].dtype) for n, t in tensors.items()}, {})


def _wide(draft: StoredDraft) -> dict[str, Tensor]:
    return {n: t.float() if t.is_floating_point() else t for n, t in draft.tensors.items()}
