"""Scoring a pool: one forward pass per model and sample, batch by batch.

Answers are scored on the answer's tokens. Prompts, before anything is generated, are scored on their
own tokens but the first four, which say more about the template than about the sample.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..config import MeasureConfig, SelectConfig
from ..core import ranks
from ..core.console import Progress
from ..core.errors import UserError
from ..core.records import Answer, Prompt
from ..drafts.base import Draft
from ..losses.functions import Teacher, forward_kl
from ..metrics.replay import BATCH_LOGITS, BATCH_TOKENS, replay
from ..models.batching import collate, plan_once
from ..models.target import Target
from .scores import (
    cosine_shift,
    flatness,
    mahalanobis_shift,
    mean_shift,
    random_score,
    rejection,
)

M = TypeVar("M")
SKIPPED = 4
"""Positions at a sequence's start that are not scored."""


@dataclass(frozen=True)
class Scorers:
    """The models that scores may ask. Which ones a score needs is in `NEEDS`."""

    target: Target | None = None
    base: Target | None = None
    draft: Draft | None = None
    k: int = MeasureConfig.k


@dataclass(frozen=True)
class Scores:
    """A score per sample, and what they cost: tokens read and FLOPs (models' forwards, counted on the
    first batch) and seconds."""

    values: list[float]
    tokens: int
    flops: float
    seconds: float


NEEDS: dict[str, tuple[str, ...]] = {
    "random": (),
    "flatness": ("target",),
    "shift": ("target", "base"),
    "mahalanobis": ("target", "base"),
    "draft_loss": ("target", "draft"),
    "rejection": ("target", "draft"),
}


ROLES = {
    "target": "the target",
    "base": "the model that the target was tuned from",
    "draft": "the draft in use",
}


def check_scorers(config: SelectConfig, models: Scorers) -> None:
    """Raise UserError when a score lacks a model, or has one that it cannot use."""
    for name in NEEDS[config.select]:
        if getattr(models, name) is None:
            can = [s for s, needs in NEEDS.items() if all(getattr(models, n) for n in needs)]
            raise UserError(
                f"--select {config.select} asks {ROLES[name]}: name it with --{name}, or select by "
                f"{' or '.join(can)}"
            )
    target, base = models.target, models.base
    if target and base and config.select in ("shift", "mahalanobis"):
        same = target.hidden_size == base.hidden_size
        if not same or target.tokenizer_hash() != base.tokenizer_hash():
            raise UserError(
                f"--select {config.select} compares states on the same tokens; {base.name} has "
                + (
                    "another tokenizer than the target"
                    if same
                    else f"hidden size {base.hidden_size}, the target {target.hidden_size}"
                )
                + "; name the model it was tuned from, or select by draft_loss, rejection or flatness"
            )
    if config.select == "rejection" and config.by == "prompts":
        raise UserError(
            "--select rejection counts the target's own tokens that a draft misses, and a prompt has "
            "none; use draft_loss or flatness with --by prompts, or --by answers"
        )


def as_samples(prompts: Sequence[Prompt]) -> list[Answer]:
    """Prompts in the form in which answers are scored: all but the first tokens are looked at."""
    return [
        Answer(p.id, p.tokens[:SKIPPED], p.tokens[SKIPPED:], len(p.tokens[SKIPPED:]), "length")
        for p in prompts
    ]


def score(samples: Sequence[Answer], config: SelectConfig, models: Scorers) -> Scores:
    """The score of every sample, in their order. Raises UserError as `check_scorers`."""
    check_scorers(config, models)
    began = time.monotonic()
    if config.select == "random":
        values = [random_score(sample.id, config.seed) for sample in samples]
        return Scores(values, 0, 0.0, time.monotonic() - began)
    found, flops = _looked_at(samples, LOOKS[config.select], models)
    if config.select == "mahalanobis":
        found = list(mahalanobis_shift(np.stack(found)))
    tokens = sum(len(s.prompt) + s.length for s in samples)
    return Scores([float(v) for v in found], tokens, flops * tokens, time.monotonic() - began)


@torch.inference_mode()
def _looked_at(samples: Sequence[Answer], look: Look, models: Scorers) -> tuple[list[Any], float]:
    """What `look` finds in each sample, batch by batch, and its FLOPs per token."""
    target = _there(models.target)
    lengths = [len(s.prompt) + s.length for s in samples]
    most = min(BATCH_TOKENS, max(BATCH_LOGITS // target.vocab_size, 1))
    share = ranks.mine(plan_once(lengths, most))
    found: dict[int, Any] = {}
    per_token = 0.0
    with Progress("scoring", len(samples), "samples") as progress, ranks.alone():
        for indices in share:
            some = [samples[i] for i in indices]
            if found:
                seen = look(some, models)
            else:
                with FlopCounterMode(display=False) as counter:
                    seen = look(some, models)
                flops = ranks.of_all(counter.get_total_flops())
                per_token = flops / sum(lengths[i] for i in indices)
            found.update(zip(indices, seen, strict=True))
            progress.advance(len(indices))
    found, per_token = ranks.merged(found), ranks.everyone(per_token)[0]
    return [found[i] for i in range(len(samples))], per_token


def _flatness(samples: Sequence[Answer], models: Scorers) -> list[float]:
    target = _there(models.target)
    batch = collate(samples, target.device)
    logits_BTV = target.read(batch.tokens_BT, ()).logits_BTV
    return [flatness(logits_BTV[b, begin - 1 : end - 1]) for b, begin, end in _scored(samples)]


def _shifts(
    samples: Sequence[Answer],
    models: Scorers,
    of: Callable[[Tensor, Tensor], Any],
) -> list[Any]:
    """`of` the last states of the target and its base, those that make the logits."""
    both = []
    for model in (_there(models.target), _there(models.base)):
        batch = collate(samples, model.device)
        states = model.read(batch.tokens_BT, (model.num_layers,), keep=1).features_BTF
        both.append(states.to(_there(models.target).device))
    return [of(both[0][b, begin:end], both[1][b, begin:end]) for b, begin, end in _scored(samples)]


def _draft_losses(samples: Sequence[Answer], models: Scorers) -> list[float]:
    """Forward KL per token of the draft's first step, as training begins with."""
    target, draft = _there(models.target), _there(models.draft)
    batch = collate(samples, target.device)
    reading = target.read(batch.tokens_BT, draft.aux_layers)
    (states_BSH,) = draft.rollout(batch.tokens_BT, reading.features_BTF, batch.first, 1)
    losses = []
    for b, begin, end in _scored(samples):
        labels = slice(begin + 1, end)  # the first token of an answer comes from the prefill
        count = max(end - begin - 1, 0)
        start = begin - 1 - batch.first
        teacher = Teacher.from_logits(
            reading.logits_BTV[b, begin : end - 1], draft.draft_vocab, batch.tokens_BT[b, labels]
        )
        logits_ND = draft.logits(states_BSH[b, start : start + count])
        losses.append(float(forward_kl(teacher, logits_ND)) / count if count else 0.0)
    return losses


def _rejections(samples: Sequence[Answer], models: Scorers) -> list[float]:
    """By replay, with the answer's own last K-1 tokens as the lookahead that its last step needs."""
    target, draft, k = _there(models.target), _there(models.draft), models.k
    shorter = [dataclasses.replace(s, length=s.length - k + 1) for s in samples]
    long = [s for s in shorter if s.length >= 2]
    traces = {t.id: t for t in replay(target, draft, long, k)} if long else {}
    return [
        rejection(traces[s.id].gained, traces[s.id].steps, k) if s.id in traces else 0.0
        for s in samples
    ]


Look = Callable[[Sequence[Answer], Scorers], list[Any]]
LOOKS: dict[str, Look] = {
    "flatness": _flatness,
    "shift": functools.partial(_shifts, of=cosine_shift),
    "mahalanobis": functools.partial(_shifts, of=mean_shift),
    "draft_loss": _draft_losses,
    "rejection": _rejections,
}


def _scored(samples: Sequence[Answer]) -> Iterator[tuple[int, int, int]]:
    """For each row of a batch the first scored position, never among the first four, and the end."""
    for row, sample in enumerate(samples):
        end = len(sample.prompt) + sample.length
        yield row, min(max(len(sample.prompt), SKIPPED), end), end


def _there(model: M | None) -> M:
    if model is None:
        raise AssertionError("check_scorers looked")
    return model
