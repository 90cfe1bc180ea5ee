"""`measure`: prompts and a draft in, one `Acceptance` out, by replay or live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..console import Progress
from ..decode.batched import generate_answers, plan_generation
from ..decode.sampling import Sampling
from ..drafts.base import Draft
from ..errors import UserError
from ..records import Acceptance, Answer, Prompt, StepTrace, versions
from ..target import Target
from .acceptance import summarise
from .live import live
from .replay import replay

GENERATE_BATCH = 64


@dataclass(frozen=True)
class Measured:
    """A measurement with the steps and answers behind it."""

    acceptance: Acceptance
    traces: list[StepTrace]
    answers: list[Answer]


def measure(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    *,
    k: int = 4,
    max_new_tokens: int = 128,
    mode: str = "replay",
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = GENERATE_BATCH,
) -> Measured:
    """Measure a draft on prompts (token ids).

    `replay` lets the target answer first (batched) and replays the answers; `live` decodes with
    the draft. Both take the same steps on the same answers. Raises UserError for an unknown mode.
    """
    started = time.monotonic()
    if mode == "replay":
        answers = answer_all(
            target, prompts, max_new_tokens, k, Sampling(temperature), seed, batch_size
        )
        return measure_answers(target, draft, answers, k=k, temperature=temperature, since=started)
    if mode != "live":
        raise UserError(f"mode must be replay or live; got '{mode}'")
    if temperature > 0:
        raise UserError(
            "--mode live is greedy; at a temperature use --mode replay, which is exact for "
            "deterministic draft tokens"
        )
    with Progress("live decoding", len(prompts), "prompts") as progress:
        traces, answers = live(target, draft, prompts, k, max_new_tokens, progress)
    seconds = time.monotonic() - started
    acceptance = summarise(
        traces, answers, k=k, mode="live", seconds=seconds, provenance=provenance(target, draft)
    )
    return Measured(acceptance, traces, answers)


def measure_answers(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    *,
    k: int,
    temperature: float = 0.0,
    since: float | None = None,
) -> Measured:
    """Replay answers that are already there."""
    started = time.monotonic() if since is None else since
    traces = replay(target, draft, answers, k)
    acceptance = summarise(
        traces,
        answers,
        k=k,
        mode="replay",
        seconds=time.monotonic() - started,
        temperature=temperature,
        provenance=provenance(target, draft),
    )
    return Measured(acceptance, traces, list(answers))


def answer_all(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    overrun: int,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = GENERATE_BATCH,
) -> list[Answer]:
    """The target's answers to all prompts, in the prompts' order, each with an overrun to replay."""
    plan = plan_generation(prompts, batch_size)
    by_index: dict[int, Answer] = {}
    with Progress("answering", len(prompts), "prompts") as progress:
        batches = generate_answers(
            target,
            prompts,
            plan,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            overrun=overrun,
            seed=seed,
        )
        for indices, answers in zip(plan, batches, strict=True):
            by_index.update(zip(indices, answers, strict=True))
            progress.advance(len(indices))
    return [by_index[i] for i in range(len(prompts))]


def provenance(target: Target, draft: Draft) -> dict[str, Any]:
    """What decides a measurement besides the prompts."""
    return {
        "target": target.name,
        "draft_kind": draft.kind,
        "taps": list(draft.taps),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "tokenizer_hash": target.tokenizer_hash(),
        "template_hash": target.template_hash(),
        "versions": versions(),
    }
