"""`measure`: prompts and a draft in, one `Acceptance` out, by replay or live."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..config import MeasureConfig, RegenerateConfig
from ..core import ranks
from ..core.console import Progress
from ..core.errors import UserError
from ..core.records import Acceptance, Answer, Prompt, StepTrace, versions
from ..decoding.acceptance_modes import Decoding
from ..decoding.batched import generate_answers, plan_generation
from ..decoding.sampling import Sampling
from ..drafts.base import Draft
from ..models.kv_cache import is_recurrent
from ..models.target import Target
from .acceptance import Steps, summarise
from .live import live
from .replay import decoding_of, expect, replay

GENERATE_BATCH, GENERATE_TOKENS = RegenerateConfig.batch_size, RegenerateConfig.batch_tokens
"""The bounds of a batch where no settings of regeneration are at hand."""
SCORES: dict[str, Callable[..., Any]] = {"replay": replay, "expected": expect}
WAYS = (*SCORES, "live")
"""The ways to measure: two that score saved answers, and the loop itself."""


@dataclass(frozen=True)
class Measured:
    """A measurement with the steps and answers behind it."""

    acceptance: Acceptance
    traces: list[Steps]
    answers: list[Answer]


def measure(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    *,
    k: int = MeasureConfig.k,
    max_new_tokens: int = 128,
    mode: str = "replay",
    temperature: float = 0.0,
    decoding: Decoding | None = None,
    seed: int = 0,
    batch_size: int = GENERATE_BATCH,
    batch_tokens: int = GENERATE_TOKENS,
) -> Measured:
    """Measure a draft on prompts (token ids).

    `replay` lets the target answer first (batched) and replays the answers, `expected` scores them
    in expectation over the draft's random tokens, `live` decodes with the draft. `decoding` is the
    acceptance mode with its sampling; without it greedy at temperature 0, and above what engines
    do: sampled, with deterministic draft tokens. Raises UserError for an unknown mode.
    """
    if mode not in WAYS:
        raise UserError(f"mode must be one of {', '.join(WAYS)}; got '{mode}'")
    if decoding is None:
        warm = Decoding("sampled", Sampling(temperature), "deterministic")
        decoding = warm if temperature else Decoding()
    started = time.monotonic()
    if mode == "live":
        with Progress("live decoding", len(prompts), "prompts") as progress:
            traces, answers = live(
                target, draft, prompts, k, max_new_tokens, progress, decoding=decoding, seed=seed
            )
        return _measured(target, draft, traces, answers, k, mode, decoding, started)
    answers = answer_all(
        *(target, prompts, max_new_tokens, k, decoding.sampling, seed, batch_size, batch_tokens)
    )
    return measure_answers(target, draft, answers, k=k, mode=mode, decoding=decoding, since=started)


def measure_answers(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    *,
    k: int,
    mode: str = "replay",
    decoding: Decoding | None = None,
    since: float | None = None,
) -> Measured:
    """Replay answers that are already there (`mode` replay or expected)."""
    started = time.monotonic() if since is None else since
    decoding = decoding or decoding_of(answers)
    traces = SCORES[mode](target, draft, answers, k, decoding=decoding)
    return _measured(target, draft, traces, list(answers), k, mode, decoding, started)


def _measured(
    target: Target,
    draft: Draft,
    traces: Sequence[Steps],
    answers: list[Answer],
    k: int,
    mode: str,
    decoding: Decoding,
    started: float,
) -> Measured:
    acceptance = summarise(
        traces,
        answers,
        k=k,
        mode=mode,
        seconds=time.monotonic() - started,
        decoding=decoding,
        provenance=provenance(target, draft, decoding),
    )
    return Measured(acceptance, list(traces), answers)


def own_steps(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    k: int,
    max_new_tokens: int,
    decoding: Decoding | None = None,
) -> tuple[list[StepTrace], list[Answer]]:
    """The steps of redraft's own loop and its answers; by replay where no token can be taken back from the target."""
    decoding = decoding or Decoding()
    if not is_recurrent(target.model):
        return live(target, draft, prompts, k, max_new_tokens, decoding=decoding)
    answers = answer_all(target, prompts, max_new_tokens, k, decoding.sampling)
    return replay(target, draft, answers, k, decoding=decoding), answers


def answer_all(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    lookahead: int,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = GENERATE_BATCH,
    batch_tokens: int = GENERATE_TOKENS,
) -> list[Answer]:
    """The target's answers to all prompts, in the prompts' order, each with an lookahead to replay."""
    plan = plan_generation(prompts, batch_size, batch_tokens, max_new_tokens + lookahead)
    plan = list(ranks.mine(plan))
    by_index: dict[int, Answer] = {}
    with Progress("answering", len(prompts), "prompts") as progress:
        batches = generate_answers(
            target,
            prompts,
            plan,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            lookahead=lookahead,
            seed=seed,
        )
        for indices, answers in zip(plan, batches, strict=True):
            by_index.update(zip(indices, answers, strict=True))
            progress.advance(len(indices))
    by_index = ranks.merged(by_index)
    return [by_index[i] for i in range(len(prompts))]


def provenance(target: Target, draft: Draft, decoding: Decoding) -> dict[str, Any]:
    """What decides a measurement besides the prompts."""
    return {
        "sampling": asdict(decoding.sampling),
        "target": target.name,
        "draft_kind": draft.kind,
        "aux_layers": list(draft.aux_layers),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "tokenizer_hash": target.tokenizer_hash(),
        "template_hash": target.template_hash(),
        "versions": versions(),
    }
