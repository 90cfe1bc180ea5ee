"""`redraft bench quantised`: a fine-tune that is served with fewer bits: does its draft have to see them?

    OUT/models/NAME    the fine-tune, merged, as bf16 and in each form
    OUT/answers/NAME   what it says there: trained on, stopped by, measured on
    OUT/drafts/NAME    the draft adapted to `bf16`; NAME-own: to a form, on its answers and states; NAME-states: on its
                       answers and the states of bf16
    OUT/counts         (accepted, steps) of each measured answer, by what is measured, then by draft

All compute in bf16: of a form the numbers that its bits mean. Every part is a stage of a run folder: building again
continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from redraft.checkpoints.load import read_draft
from redraft.config import RegenerateConfig, TrainConfig, key_of
from redraft.core.errors import check_known
from redraft.core.folders import read_json
from redraft.generation.answer_file import read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics import intervals
from redraft.metrics.acceptance import prompt_counts
from redraft.metrics.replay import replay_each
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.run_folder import RunFolder
from redraft.pipeline.stages import as_adapter, merge_draft
from redraft.prompts.prompts import read_prompts
from redraft.training.train import train

from .kinds.quantised import FORMS
from .language_model import save_model
from .real_drafts import K
from .real_members import MEMBERS
from .real_suite import load_real, prompts_of

PLAIN = "bf16"
UNADAPTED, OWN, STATES = "unadapted", "own", "states"
POOL, ASIDE, MEASURED = 240, 32, 64
"""Prompts adapted on, kept to stop training, measured on."""
TEMPERATURE = 0.7
LONGEST = 96
"""Tokens of an answer that is measured on."""
ANSWERS = RegenerateConfig(temperature=TEMPERATURE, greedy_share=0.5, max_new_tokens=128)
GREEDY, SAMPLED = "greedy", "sampled"
TRAIN = TrainConfig(
    epochs=2.0, batch_tokens=2048, rollout=K, evaluations=6, patience=6, precision="bf16"
)


@dataclass(frozen=True)
class QuantisedCell:
    """A draft on a form's answers, greedy and at temperature 0.7: tau with its interval, and the change against the
    unadapted draft on the same answers.

    `draft` is `unadapted`, `bf16` (adapted to the model before it lost bits), `states` (adapted on the form's answers
    with the states of bf16) or `own`. `over_plain` is what these two have more than `bf16`, with its interval.
    """

    form: str
    draft: str
    measured: str
    k: int
    prompts: int
    tau: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    bytes: int
    tokens: int = 0
    over_plain: tuple[float, float, float] | None = None


def bench_quantised(
    suite: Path, out: Path, member: str, forms: Sequence[str], python: str | None = None
) -> list[QuantisedCell]:
    """Build what is missing in `out` from the suite of `redraft bench real`; a cell for each form, draft and measure.

    `python` is one with llama.cpp, for its forms. Raises UserError for an unknown member or form.
    """
    check_known("fine-tune", [member], MEMBERS)
    check_known("form", forms, FORMS)
    with RunFolder.open(out) as run:
        bench = _Bench(suite, run, member, python)
        cells = []
        for form in (PLAIN, *forms):
            cells += bench.cells(form)
    return cells


class _Bench:
    def __init__(self, suite: Path, run: RunFolder, member: str, python: str | None):
        self.suite, self.run, self.member, self.python = suite, run, member, python
        self.shared = read_draft(str(suite / "draft"))
        self.loaded: tuple[str, Target] | None = None

    def cells(self, form: str) -> list[QuantisedCell]:
        made = self.run.stage(
            f"model {form}",
            {"member": self.member, "form": form},
            [f"models/{form}"],
            partial(self._make, form),
        )
        answered = self.run.stage(
            f"answers {form}",
            {"model": made, "pool": [POOL, ASIDE, MEASURED], **key_of(ANSWERS)},
            [f"answers/{form}"],
            partial(self._answer, form),
        )
        ways = {PLAIN: PLAIN} if form == PLAIN else {STATES: PLAIN, OWN: form}
        drafts = {
            way: self.run.stage(
                f"draft {form} {way}",
                {"answers": answered, "states": states, **key_of(TRAIN)},
                [f"drafts/{form}-{way}"],
                partial(self._adapt, form, states, way),
            )
            for way, states in ways.items()
        }
        self.run.stage(
            f"measure {form}",
            {"drafts": drafts, "answers": answered},
            [f"counts/{form}.json"],
            partial(self._measure, form, list(ways)),
        )
        return self._read(form)

    def _make(self, form: str) -> None:
        out = self.run.path / "models"
        if form == PLAIN:
            target = load_real(self.suite, self.member)
            model = target.model
            whole = model.merge_and_unload() if MEMBERS[self.member].rank else model
            save_model(out / PLAIN, whole, target.tokenizer)
        else:
            FORMS[form].make(out / PLAIN, out / form, self.python)

    def _target(self, form: str) -> Target:
        if self.loaded is None or self.loaded[0] != form:
            self.loaded = form, load_target(str(self.run.path / "models" / form), dtype="bfloat16")
        return self.loaded[1]

    def _answer(self, form: str) -> None:
        target, domain = self._target(form), MEMBERS[self.member].domain
        asked, evaluated = (
            list(read_prompts(str(prompts_of(self.suite, domain, split)), target).prompts)
            for split in ("adapt", "eval")
        )
        folder = self.run.path / "answers" / form
        folder.mkdir(parents=True, exist_ok=True)
        greedy = RegenerateConfig(temperature=0.0, max_new_tokens=LONGEST)
        sampled = RegenerateConfig(temperature=TEMPERATURE, max_new_tokens=LONGEST)
        for name, prompts, config, lookahead in (
            ("adapt", asked[:POOL], ANSWERS, 0),
            ("heldout", asked[-ASIDE:], greedy, K),
            (GREEDY, evaluated[:MEASURED], greedy, K),
            (SAMPLED, evaluated[:MEASURED], sampled, K),
        ):
            regenerate(target, prompts, folder / f"{name}.jsonl", config, lookahead=lookahead)

    def _answers(self, form: str, name: str) -> list[Any]:
        found = read_answers(self.run.path / "answers" / form / f"{name}.jsonl")
        return sorted((a for a in found if a.length >= 2), key=lambda a: a.id)

    def _adapt(self, form: str, states: str, way: str) -> None:
        target, answers = self._target(states), self._answers(form, "adapt")
        draft = self.shared.build(target, torch.float32)
        trained = train(target, draft, answers, self._answers(form, "heldout"), TRAIN, k=K)
        merged = merge_draft(self.shared, as_adapter(target, self.shared, trained, answers, TRAIN))
        merged.save(self.run.path / "drafts" / f"{form}-{way}")

    def _measure(self, form: str, ways: Sequence[str]) -> None:
        target, folder = self._target(form), self.run.path / "drafts"
        stored = {UNADAPTED: self.shared, PLAIN: read_draft(str(folder / f"{PLAIN}-{PLAIN}"))}
        stored |= {way: read_draft(str(folder / f"{form}-{way}")) for way in ways}
        drafts = [draft.build(target) for draft in stored.values()]
        counts: dict[str, Any] = {}
        for name in (GREEDY, SAMPLED):
            replayed = replay_each(target, drafts, self._answers(form, name), K)
            counts[name] = {
                draft: prompt_counts([t for t in traces if t.steps])[0]
                for draft, traces in zip(stored, replayed, strict=True)
            }
        self.run.write_json(f"counts/{form}.json", counts)

    def _read(self, form: str) -> list[QuantisedCell]:
        models = (self.run.path / "models" / form).iterdir()
        size = sum(f.stat().st_size for f in models if f.suffix in (".gguf", ".safetensors"))
        tokens = sum(answer.length for answer in self._answers(form, "adapt"))
        cells = []
        for measured, drafts in read_json(self.run.path / "counts" / f"{form}.json").items():
            counts = {
                name: [[(float(a), float(s)) for a, s in each]] for name, each in drafts.items()
            }
            for name, one in counts.items():
                tau = intervals.tau(one, K)
                change = intervals.difference(one, counts[UNADAPTED], K)
                more = intervals.difference(one, counts[PLAIN], K)
                cells.append(
                    QuantisedCell(
                        form,
                        name,
                        measured,
                        K,
                        len(one[0]),
                        *(tau.value, *tau.ends),
                        *(change.value, *change.ends),
                        size,
                        0 if name == UNADAPTED else tokens,
                        (more.value, *more.ends) if name in (OWN, STATES) else None,
                    )
                )
        return cells


def print_cells(cells: Sequence[QuantisedCell]) -> None:
    """A line for each form and draft: tau and the change against the unadapted draft, greedy and at temperature 0.7."""
    typer.echo(f"{'':10}{'draft':10}{GREEDY:>34}{SAMPLED:>34}")
    for form, draft in dict.fromkeys((cell.form, cell.draft) for cell in cells):
        found = {c.measured: c for c in cells if (c.form, c.draft) == (form, draft)}
        shown = (
            f"{c.tau:.3f} {c.change:+.3f} [{c.change_low:+.3f}, {c.change_high:+.3f}]"
            for c in (found[name] for name in (GREEDY, SAMPLED))
        )
        typer.echo(f"{form:10}{draft:10}" + "".join(f"{text:>34}" for text in shown))
