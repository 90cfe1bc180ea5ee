"""`--safety-prompts`: the stages that show what the adapted draft changes on safety prompts.

    answers/off-safety.jsonl      the target's greedy answers, as for any file off the domain
    answers/safety-sampled.jsonl  its sampled ones, `safety.samples` per prompt
    safety/greedy.jsonl, seeded.jsonl, sampled.jsonl   those with the exported draft
    safety/safety.json            the comparison

Answers are on disk batch by batch: what is interrupted goes on after the last one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.load import load_draft
from ..config import AdaptConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.files import append_lines
from ..core.records import Answer, Prompt, Safety, to_json
from ..drafts.base import Draft
from ..generation.answer_file import answer_inputs, continued, iter_answers
from ..generation.regenerate import regenerate
from ..metrics.safety import ARMS, Answers, judge, repeated, with_draft
from ..models.target import Target
from ..prompts.prompts import PromptSet, read_prompts
from .run_folder import RunFolder

OFF = "safety"
"""The name of these prompts among the off-domain ones, which tau is measured on."""
LABELS = {"unsafe": True, "safe": False}
"""XSTest's `label` as the flag `harmful`."""


@dataclass(frozen=True)
class SafetyPrompts:
    """Safety prompts, and by id whether a prompt is harmful (None: not known)."""

    asked: PromptSet
    harmful: dict[str, bool | None]


def read_safety_prompts(source: str, target: Target, limit: int) -> SafetyPrompts:
    """Read up to `limit` prompts with their flags; of a conversation the last turn is asked.

    A row's flag is `harmful` (true or false), or XSTest's `label` (safe or unsafe). Raises UserError
    for a file without prompts, and for a flag that is neither.
    """
    harmful: dict[str, bool | None] = {}

    def note(prompt: Prompt, row: Any) -> None:
        flag = row.get("harmful")
        if flag is not None and not isinstance(flag, bool):
            raise UserError(
                f"{source}, row {prompt.id}: harmful is true or false, or left out where it is not known; "
                f"got {flag!r}"
            )
        label = row.get("label")
        known = LABELS.get(label) if isinstance(label, str) else None
        harmful[prompt.id] = known if flag is None else flag

    return SafetyPrompts(read_prompts(source, target, limit, "last", note), harmful)


def measure_safety(
    run: RunFolder,
    exported: str,
    greedy: str,
    target: Target,
    safety: SafetyPrompts,
    c: AdaptConfig,
    everything: Sequence[Prompt],
) -> Safety:
    """Answer the safety prompts with and without the exported draft, and compare.

    `exported` and `greedy` are the stage keys of the draft and of answers/off-safety.jsonl;
    `everything` are the prompts that the draft could have been adapted on.
    """
    prompts, s = list(safety.asked.prompts), c.safety
    again = repeated(prompts, s.samples)
    sampled = _plainly(run, target, again, c)
    asked = {prompt.tokens for prompt in prompts}
    trained_on = len(asked & {p.tokens for p in everything if p.tokens in asked})
    jobs = {
        "greedy": (prompts, c.measure.eval_new_tokens),
        "seeded": (again[:: s.samples], s.max_new_tokens),
        "sampled": (again, s.max_new_tokens),
    }

    def work() -> None:
        draft = load_draft(str(run.path / "draft"), target)
        found = {
            arm: _drafted(target, draft, *jobs[arm], arm, run.path / "safety", c) for arm in ARMS
        }
        record = judge(
            target,
            prompts,
            safety.harmful,
            Answers(
                _in_order(run.path / "answers" / f"off-{OFF}.jsonl", prompts),
                _in_order(run.path / "answers" / "safety-sampled.jsonl", again),
                **found,
            ),
            source=safety.asked.source,
            k=c.measure.k,
            temperature=s.temperature,
            max_new_tokens=s.max_new_tokens,
            greedy_new_tokens=c.measure.eval_new_tokens,
            trained_on=trained_on,
        )
        run.write_json("safety/safety.json", to_json(record))

    inputs = {
        "exported": exported,
        "plain": [greedy, sampled],
        "harmful": safety.harmful,
        "source": safety.asked.source,
        "trained_on": trained_on,
        "k": c.measure.k,
        **asdict(s),
    }
    run.stage("measure safety", inputs, ["safety"], work)
    record = Safety.from_json(json.loads((run.path / "safety/safety.json").read_text()))
    say(f"safety prompts: {record.conclusion}")
    return record


def _plainly(run: RunFolder, target: Target, again: Sequence[Prompt], c: AdaptConfig) -> str:
    """The target's own sampled answers."""
    file = "answers/safety-sampled.jsonl"
    config = dataclasses.replace(
        c.regenerate,
        answers="regenerate",
        endpoints="",
        temperature=c.safety.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_new_tokens=c.safety.max_new_tokens,
        seed=c.safety.seed,
    )

    def work() -> None:
        regenerate(target, again, run.path / file, config, c.measure.k)

    inputs = answer_inputs(target, again, config, c.measure.k)
    return run.stage("regenerate safety", inputs, [file], work, keeps=[file])


def _drafted(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    arm: str,
    folder: Path,
    c: AdaptConfig,
) -> list[Answer]:
    """The answers with the draft, those that an interrupted run left included."""
    file = folder / f"{arm}.jsonl"
    done = continued(file)
    left = [prompt for prompt in prompts if prompt.id not in done]
    if left:
        for answers in with_draft(
            *(target, draft, left, arm),
            k=c.measure.k,
            max_new_tokens=max_new_tokens,
            temperature=c.safety.temperature,
            seed=c.safety.seed,
            batch_size=c.regenerate.batch_size,
            batch_tokens=c.regenerate.batch_tokens,
        ):
            append_lines(file, [answer.to_line() for answer in answers])
    return _in_order(file, prompts)


def _in_order(file: Path, prompts: Sequence[Prompt]) -> list[Answer]:
    by_id = {answer.id: answer for answer in iter_answers(file)}
    return [by_id[prompt.id] for prompt in prompts]
