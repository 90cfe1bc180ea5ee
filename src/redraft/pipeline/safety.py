"""`--safety-prompts`: the stages that show what the adapted draft changes on safety prompts.

    answers/off-safety.jsonl      the target's greedy answers, as for any file off the domain
    answers/safety-sampled.jsonl  its sampled ones, `safety.samples` per prompt
    safety/greedy.jsonl, seeded.jsonl, sampled.jsonl   those with the exported draft
    safety/safety.json            the comparison

Answers are on disk batch by batch: what is interrupted goes on after the last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.load import load_draft
from ..config import RegenerateConfig
from ..core import ranks
from ..core.console import say
from ..core.errors import UserError
from ..core.files import append_lines
from ..core.folders import read_json
from ..core.records import Answer, Prompt, Safety, to_json
from ..drafts.base import Draft
from ..generation.answer_file import continued, iter_answers
from ..metrics.safety import ARMS, Answers, judge, repeated, with_draft
from ..models.target import Target
from ..prompts.prompts import PromptSet, read_prompts
from .job import Job
from .stages import answer

OFF, SAMPLED = "off-safety", "safety-sampled"
"""The answers files: greedy, which tau is measured on as for any file off the domain; sampled."""
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
    job: Job, safety: SafetyPrompts, adapted_on: Sequence[Prompt], exported: str, greedy: str
) -> Safety:
    """Answer the safety prompts with and without the exported draft, and compare.

    `adapted_on` are the prompts that the draft could have been adapted on. `exported` and `greedy` are the
    stage keys of the draft and of answers/off-safety.jsonl.
    """
    prompts, s, c = list(safety.asked.prompts), job.config.safety, job.config.measure
    again = repeated(prompts, s.samples)
    sampled = answer(job, SAMPLED, again, _sampling(job), job.k)
    asked = {prompt.tokens for prompt in prompts}
    trained_on = len(asked & {p.tokens for p in adapted_on if p.tokens in asked})
    jobs = {
        "greedy": (prompts, c.eval_new_tokens),
        "seeded": (again[:: s.samples], s.max_new_tokens),
        "sampled": (again, s.max_new_tokens),
    }

    def work() -> None:
        draft = load_draft(str(job.run.path / "draft"), job.target)
        found = {arm: _drafted(job, draft, arm, *jobs[arm]) for arm in ARMS}
        record = judge(
            job.target,
            prompts,
            safety.harmful,
            Answers(
                _in_order(job.answers(OFF), prompts),
                _in_order(job.answers(SAMPLED), again),
                **found,
            ),
            source=safety.asked.source,
            k=job.k,
            temperature=s.temperature,
            max_new_tokens=s.max_new_tokens,
            greedy_new_tokens=c.eval_new_tokens,
            trained_on=trained_on,
        )
        job.run.write_json("safety/safety.json", to_json(record))

    inputs = {
        "exported": exported,
        "plain": [greedy, sampled],
        "harmful": safety.harmful,
        "source": safety.asked.source,
        "trained_on": trained_on,
        "k": job.k,
        **asdict(s),
    }
    job.run.stage("measure safety", inputs, ["safety"], work)
    record = Safety.from_json(read_json(job.run.path / "safety/safety.json"))
    say(f"safety prompts: {record.conclusion}")
    return record


def _sampling(job: Job) -> RegenerateConfig:
    """How the target samples its own answers: in this process, without cuts."""
    s = job.config.safety
    return dataclasses.replace(
        job.config.regenerate,
        answers="regenerate",
        endpoints="",
        temperature=s.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_new_tokens=s.max_new_tokens,
        seed=s.seed,
    )


def _drafted(
    job: Job, draft: Draft, arm: str, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Answer]:
    """The answers with the draft, those that an interrupted run left included."""
    file, c = job.run.path / "safety" / f"{arm}.jsonl", job.config
    done = ranks.first(lambda: continued(file))
    left = [prompt for prompt in prompts if prompt.id not in done]
    if left:
        for answers in with_draft(
            *(job.target, draft, left, arm),
            k=job.k,
            max_new_tokens=max_new_tokens,
            temperature=c.safety.temperature,
            seed=c.safety.seed,
            batch_size=c.regenerate.batch_size,
            batch_tokens=c.regenerate.batch_tokens,
        ):
            append_lines(file, [answer.to_line() for answer in answers])
        ranks.wait()
    return _in_order(file, prompts)


def _in_order(file: Path, prompts: Sequence[Prompt]) -> list[Answer]:
    by_id = {answer.id: answer for answer in iter_answers(file)}
    return [by_id[prompt.id] for prompt in prompts]
