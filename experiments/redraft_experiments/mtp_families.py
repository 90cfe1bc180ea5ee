"""`redraft bench mtp-families`: a toy model trained together with an MTP head, and what fine-tuning leaves of the head.

The joint loss is DeepSeek-V3's (arXiv 2412.19437, 2.2), one step deep: the model's own and 0.3 of the head's, which reaches
the model, its embedding and its output head too.

    tokenizer, prompts/    as those of a toy suite
    SEED/alone             a base trained without the head's loss
    SEED/base              a base trained with it, and its head
    SEED/apart             the base fine-tuned without the head's loss; the head is dropped
    SEED/held              fine-tuned with it, the head frozen
    SEED/along             fine-tuned with it, and the head that came out
    SEED/mtp               `redraft mtp` on `apart`: the base's head grafted and adapted
    SEED/from-layer        a new head on the same answers, from the last layer of `apart`
    SEED/along-mtp         `redraft mtp` on `along`: its own head adapted
    SEED/counts.json       what was measured

Seeds share prompts and tokenizer. Every part is a stage of a run folder: building again continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer
from torch import Tensor, nn

from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.checkpoints.own_head import stitch, take_head
from redraft.config import resolve
from redraft.core.errors import UserError, nearest
from redraft.core.files import remove
from redraft.core.folders import read_json
from redraft.core.records import versions
from redraft.core.report_record import AdaptReport
from redraft.decoding.sampling import Sampling
from redraft.drafts.mtp.network import MtpDraft
from redraft.metrics.acceptance import prompt_counts
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.adapt import adapt
from redraft.pipeline.own_head import HEAD, RUN, give_head
from redraft.pipeline.run_folder import RunFolder

from . import recovery
from .corpus import SIZES, Corpus, Size
from .language_model import (
    IGNORE,
    chat_ids,
    config_of,
    fit,
    fresh,
    load_tokenizer,
    packed,
    save_model,
    supervised,
    validation_loss,
)
from .members import TUNED
from .recovery import K
from .suite import base_examples, suite_prompts, write_prompts, write_tokenizer

WEIGHT = 0.3
"""Of the head's loss next to the model's own."""
PROMPTS = 48
"""Measured, of the fine-tune's domain and of the base's three together."""
STEPS = 0.5
"""Steps of training, as a share of the toy suite's: a seed then takes about six minutes of one core."""
LIMIT = 160
SETTINGS = {
    "train.batch_tokens": 512,
    "train.precision": "fp32",
    "measure.k": K,
    "measure.eval_limit": 8,
    "measure.heldout": 24,
    "general.aside": 24,
    "export.certificate": "off",
}
ALONE, BASE = "alone", "base"
APART, HELD, ALONG = "apart", "held", "along"
MTP, FROM_LAYER, ALONG_MTP = "mtp", "from-layer", "along-mtp"
DROPPED, FROZEN, ADAPTED = "dropped", "frozen", "adapted"
ROWS = {
    ALONE: "base, trained without the head's loss",
    BASE: "base, trained with its head",
    DROPPED: "fine-tune, head dropped",
    FROZEN: "the base's head, kept or grafted",
    ADAPTED: "grafted and adapted (`redraft mtp`)",
    FROM_LAYER: "new, from the last layer, on the same answers",
    HELD: "fine-tune with the head's loss, head frozen",
    ALONG: "fine-tune with the head's loss, head trained along",
    ALONG_MTP: "trained along, then adapted (`redraft mtp`)",
}
Counts = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class FamilyCell:
    """A head on a model, of one seed: (accepted, steps) of each prompt at K, greedy, by replay, of the fine-tune's domain and of
    the base's; none where there is no head. Losses are the model's, in nats a token: `own_loss` on answers of the fine-tune's
    domain, `base_loss` on chats of the base's, both held out.

    `trained_parameters`, `answer_tokens` and `seconds` are those of adapting.
    """

    size: str
    seed: int
    row: str
    k: int
    own: Counts
    base: Counts
    own_loss: float
    base_loss: float
    versions: dict[str, str]
    trained_parameters: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0

    @staticmethod
    def from_json(row: dict[str, Any]) -> FamilyCell:
        steps = {name: tuple((a, s) for a, s in row[name]) for name in ("own", "base")}
        return FamilyCell(**{**row, **steps})


def steps_of(cells: Sequence[FamilyCell], row: str, traffic: str) -> recovery.Steps | None:
    """(accepted, steps) of a row, seed by seed; None where there is no head."""
    some = [cell for cell in cells if cell.row == row]
    steps = [getattr(cell, traffic) for cell in sorted(some, key=lambda cell: cell.seed)]
    return steps if all(steps) else None


def print_cells(cells: Sequence[FamilyCell]) -> None:
    """A line for each row: tau on both kinds of prompts, and the model's losses, over the seeds that are there."""
    typer.echo(f"{'':52}{'tau, own':>20}{'tau, base':>20}{'loss, own':>11}{'base':>7}")
    for row, says in ROWS.items():
        some = [cell for cell in cells if cell.row == row]
        taus = []
        for traffic in ("own", "base"):
            steps = steps_of(cells, row, traffic)
            tau = recovery.tau(steps) if steps else None
            taus.append(f"{tau.value:.2f} [{tau.low:.2f}, {tau.high:.2f}]" if tau else "1.00")
        own, base = (
            sum(getattr(cell, name) for cell in some) / len(some)
            for name in ("own_loss", "base_loss")
        )
        typer.echo(f"{says:52}{taus[0]:>20}{taus[1]:>20}{own:11.3f}{base:7.3f}")


class Joint(nn.Module):
    """A model and its head with one loss, as `fit` wants it."""

    def __init__(self, target: Target, head: MtpDraft):
        super().__init__()
        self.model, self.head = target.model, head
        # Bound without a gradient; here the head's loss reaches the embedding too.
        object.__setattr__(head, "shared_embedding", target.embedding_VH)

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        states = self.model.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        own = _loss(self.model.lm_head(states[:, :-1]), labels[:, 1:])
        (ahead,) = self.head.rollout(input_ids, states, 0, 1)
        return SimpleNamespace(loss=own + WEIGHT * _loss(self.head.logits(ahead), labels[:, 2:]))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def bench_mtp_families(out: Path, size: str, seeds: Sequence[int]) -> list[FamilyCell]:
    """Build what is missing in `out`; a cell for each seed and row. Raises UserError for a size that needs real data."""
    if size not in SIZES or SIZES[size].real:
        known = [name for name, row in SIZES.items() if not row.real]
        raise UserError(f"--size {size}: {nearest(size, known)}")
    corpus = Corpus(SIZES[size], None, 0)
    with RunFolder.open(out) as run:
        about = {"size": asdict(corpus.size), "steps": STEPS}
        data = run.stage("prompts", about, ["prompts"], lambda: write_prompts(out, corpus))
        data = run.stage(
            "tokenizer", {"prompts": data}, ["tokenizer"], lambda: write_tokenizer(out, corpus)
        )
    return [cell for seed in seeds for cell in _Family(out, corpus, size, seed).build(data)]


@dataclass(frozen=True)
class _Family:
    """A base and its fine-tunes of one seed."""

    data: Path
    corpus: Corpus
    size: str
    seed: int

    @property
    def out(self) -> Path:
        return self.data / str(self.seed)

    def build(self, data: str) -> list[FamilyCell]:
        with RunFolder.open(self.out) as run:
            alone = run.stage(ALONE, {"data": data}, [ALONE], partial(self._base, joint=False))
            base = run.stage(BASE, {"data": data}, _parts(BASE), partial(self._base, joint=True))
            made = [alone, base]
            for name in (APART, HELD, ALONG):
                outputs = _parts(name) if name == ALONG else [name]
                made.append(run.stage(name, {"base": base}, outputs, partial(self._tune, name)))
        same = str(self.out / MTP / RUN)
        reports = {
            MTP: self._given(MTP, APART, base=BASE),
            FROM_LAYER: self._given(FROM_LAYER, APART, same=same),
            ALONG_MTP: self._given(ALONG_MTP, ALONG),
        }
        with RunFolder.open(self.out) as run:
            heads = [self._head(f"{name}/{RUN}/draft").hash() for name in reports]
            inputs = {"made": made, "heads": heads, "prompts": PROMPTS}
            run.stage("measure", inputs, ["counts.json"], partial(self._measure, run))
        return self._cells(reports)

    def _base(self, joint: bool) -> None:
        s, tokenizer = self.corpus.size, load_tokenizer(self.data / "tokenizer")
        model = new_qwen(s, self.seed)
        target = Target(model, tokenizer, [BASE], freeze=False)
        head = MtpDraft.for_target(target)
        head.reinitialise(self.seed)
        head.bind(target)
        fit(
            Joint(target, head) if joint else model,
            base_examples(self.corpus, tokenizer),
            steps=int(s.base_steps * STEPS),
            batch=s.base_batch,
            lr=s.base_lr,
            seed=self.seed,
            label="base" if joint else "base, alone",
            precision="fp32",
        )
        self._save(BASE if joint else ALONE, model, tokenizer, head if joint else None)

    def _tune(self, name: str) -> None:
        """On a domain that the base has met seldom."""
        s, tokenizer = self.corpus.size, load_tokenizer(self.data / "tokenizer")
        model = load_target(str(self.out / BASE)).model.requires_grad_(True)
        target = Target(model, tokenizer, [BASE], freeze=False)
        head: Any = take_head(str(self.out / BASE)).build(target)
        head.float().requires_grad_(name == ALONG)
        fit(
            model if name == APART else Joint(target, head),
            [supervised(tokenizer, chat) for chat in self.corpus.tune_chats(TUNED)],
            steps=int(s.tune_steps * STEPS),
            batch=s.tune_batch,
            lr=s.tune_lr,
            seed=self.seed,
            label=name,
            precision="fp32",
        )
        self._save(name, model, tokenizer, head if name == ALONG else None)

    def _save(self, name: str, model: Any, tokenizer: Any, head: MtpDraft | None) -> None:
        """A model as training tools leave it; with a head, as makers publish it."""
        if head is None:
            save_model(self.out / name, model, tokenizer)
            return
        whole, trunk, alone = (self.out / part for part in _parts(name))
        save_model(trunk, model, tokenizer)
        stored(head.requires_grad_(False), load_target(str(trunk))).save(alone)
        remove(whole)
        stitch(str(trunk), read_draft(str(alone)), whole)

    def _given(
        self, name: str, target: str, base: str | None = None, same: str | None = None
    ) -> AdaptReport:
        """`redraft mtp` into `name`: with a base's head, the target's own, or with `same` a new one."""
        folder = str(self.out / target)
        return give_head(
            folder,
            str(self.out / base) if base else None,
            self.out / name,
            partial(self._adapt, folder, same=same),
            partial(load_target, folder) if same else None,
        )[0]

    def _adapt(self, target: str, draft: str, to: Path, same: str | None = None) -> AdaptReport:
        """A head to a target; on the answers of the run `same`, every tensor of it."""
        more = {"train.method": "full", "general.guard": "off"} if same else {}
        longest = {
            f"{stage}_new_tokens": self.corpus.size.answer_tokens
            for stage in ("regenerate.max", "measure.eval")
        }
        prompts = self.data / "prompts"
        return adapt(
            load_target(target),
            draft,
            None if same else str(prompts / f"{TUNED}-adapt.jsonl"),
            answers=f"{same}/answers/adapt.jsonl" if same else None,
            out=to,
            limit=LIMIT,
            eval_prompts=str(prompts / f"{TUNED}-eval.jsonl"),
            config=resolve([("bench mtp-families", {**SETTINGS, **longest, **more})]),
        ).report

    def _measure(self, run: RunFolder) -> None:
        """Every model's losses, and its heads on its own answers."""
        heads: dict[str, dict[str, str]] = {
            ALONE: {},
            BASE: {BASE: f"{BASE}-{HEAD}"},
            APART: {
                FROZEN: f"{MTP}/{HEAD}",
                ADAPTED: f"{MTP}/{RUN}/draft",
                FROM_LAYER: f"{FROM_LAYER}/{RUN}/draft",
            },
            HELD: {HELD: f"{BASE}-{HEAD}"},
            ALONG: {ALONG: f"{ALONG}-{HEAD}", ALONG_MTP: f"{ALONG_MTP}/{RUN}/draft"},
        }
        assert self._head(f"{MTP}/{HEAD}").hash() == self._head(f"{BASE}-{HEAD}").hash()
        found: dict[str, Any] = {"losses": {}, "own": {}, "base": {}}
        for name, rows in heads.items():
            target = load_target(str(self.out / name))
            found["losses"][name] = self._losses(target)
            for traffic, domains in (("own", (TUNED,)), ("base", self.corpus.general)):
                if rows:
                    count = PROMPTS // len(domains)
                    asked = suite_prompts(self.data, target, domains, "eval", count)
                    longest = self.corpus.size.answer_tokens
                    answers = answer_all(target, asked, longest, K, Sampling(), batch_size=64)
                for row, folder in rows.items():
                    draft = self._head(folder).build(target)
                    found[traffic][row] = prompt_counts(replay(target, draft, answers, K))[0]
        run.write_json("counts.json", found)

    def _head(self, folder: str) -> StoredDraft:
        return read_draft(str(self.out / folder))

    def _losses(self, target: Target) -> tuple[float, float]:
        own = self.corpus.chats(TUNED, 128, "heldout")
        chats = [c for d in self.corpus.general for c in self.corpus.chats(d, 64, "heldout")]
        rows = [chat_ids(target.tokenizer, chat) for chat in chats]
        return (
            validation_loss(target.model, [supervised(target.tokenizer, chat) for chat in own]),
            validation_loss(target.model, packed(rows, self.corpus.size.window)),
        )

    def _cells(self, reports: dict[str, AdaptReport]) -> list[FamilyCell]:
        found = read_json(self.out / "counts.json")
        cells = []
        for row in ROWS:
            model = ALONG if row == ALONG_MTP else row if row in found["losses"] else APART
            report = reports.get(MTP if row == ADAPTED else row)
            train = report.train if report else None
            own, base = (
                tuple((float(a), float(s)) for a, s in found[on].get(row, ()))
                for on in ("own", "base")
            )
            losses = found["losses"][model]
            cells.append(
                FamilyCell(
                    *(self.size, self.seed, row, K, own, base, losses[0], losses[1], versions()),
                    trained_parameters=train.trained_parameters if train else 0,
                    answer_tokens=train.unique_answer_tokens if train else 0,
                    seconds=train.seconds if train else 0.0,
                )
            )
        return cells


def _parts(name: str) -> list[str]:
    """The folders of a model with its head, of the model alone, and of the head."""
    return [name, f"{name}-trunk", f"{name}-{HEAD}"]


def new_qwen(s: Size, seed: int) -> Any:
    """A Qwen3.5 of the suite's shape with fresh weights; full attention in every layer."""
    from transformers import Qwen3_5ForCausalLM
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **config_of(s.shape),
        architectures=["Qwen3_5ForCausalLM"],
        layer_types=["full_attention"] * s.shape.layers,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        mtp_num_hidden_layers=1,
    )
    return fresh(Qwen3_5ForCausalLM, config, seed)
