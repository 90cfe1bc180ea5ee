"""`redraft bench pipeline`: speed and memory of the stages, each against its bare minimum.

    replay against the live loop        the same draft, prompts and answers, batch 1 live
    training against its bare modules   the target's forward plus a bare forward and backward of
                                        the same draft modules on the same tokens
    regeneration                        tokens per second of the batched loop
    a gang of six against one           six widths of an expert on one stream; on the target as it is,
                                        and padded with zeros to the cost that real models have

Printed, never asserted: speed depends on the machine and on what else runs there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch, collate, plan_epochs
from ..config import TrainConfig
from ..console import say
from ..decode.sampling import Sampling
from ..drafts.base import Draft
from ..errors import UserError
from ..formats.load import StoredDraft, read_draft
from ..measuring.live import live
from ..measuring.measure import answer_all
from ..measuring.replay import replay
from ..records import Answer, versions
from ..target import Target
from ..training.train import train, train_gang
from .decode import padded
from .family import family_prompts, load_member

PROMPTS, TOKENS, K = 64, 96, 4
REPEATS = 3
GANG = (4, 8, 16, 32, 64, 96)
PADDED = 100_000_000


def bench_pipeline(family: Path) -> dict[str, Any]:
    """Measure on a family's SFT member; medians of `REPEATS`, with the range."""
    if not (family / "family.json").is_file():
        raise UserError(f"{family} holds no family; build one: redraft bench family --out {family}")
    target = load_member(family, "sft")
    shared = read_draft(str(family / "draft"))
    draft = shared.build(target, target.dtype)
    prompts = family_prompts(family, target, ("math",), "eval", PROMPTS)
    generation, answers = _timed(lambda: answer_all(target, prompts, TOKENS, K, Sampling()))
    say(f"{PROMPTS} prompts x {TOKENS} tokens at most, K={K}, {target.dtype}")
    replays, _ = _timed(lambda: replay(target, draft, answers, K))
    lives, _ = _timed(lambda: live(target, draft, prompts, K, TOKENS), repeats=1)
    config = TrainConfig(method="full", batch_tokens=2048, rollout=K, epochs=2.0, precision="fp32")
    pool = [answer for answer in answers if answer.length >= 2] * 4
    bare = _bare_tokens_per_second(target, shared.build(target, torch.float32), pool, config)
    trainee = shared.build(target, torch.float32)
    record = train(target, trainee, pool, answers[:2], config, k=K).record
    gang = {
        name: _gang_over_one(one, shared, pool[:count])
        for name, one, count in (
            ("as_it_is", target, len(pool)),
            ("padded", padded(target, PADDED), PROMPTS),
        )
    }
    return {
        "replay_seconds": _spread(replays),
        "live_seconds": _spread(lives),
        "live_over_replay": round(lives[0] / sorted(replays)[len(replays) // 2], 1),
        "training_tokens_per_second": round(record.tokens_per_second),
        "bare_modules_tokens_per_second": round(bare),
        "training_share_of_bare": round(record.tokens_per_second / bare, 2),
        "regeneration_tokens_per_second": round(
            sum(len(a.tokens) for a in answers) / sorted(generation)[len(generation) // 2]
        ),
        "gang_of_six_over_one": gang["as_it_is"],
        "gang_of_six_over_one_padded_to_1e8": gang["padded"],
        "peak_memory_mb": round(record.peak_mb),
        "predicted_peak_mb": round(record.predicted_peak_mb),
        "prompts": PROMPTS,
        "repeats": REPEATS,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _bare_tokens_per_second(
    target: Target, draft: Draft, answers: list[Answer], config: TrainConfig
) -> float:
    """Target forward plus forward and backward of every draft module, with nothing around them."""
    lengths = [len(a.prompt) + a.length for a in answers]
    plan = plan_epochs(lengths, config.batch_tokens, 1.0, config.seed)
    batches = [collate([answers[i] for i in indices], target.device) for indices in plan]
    draft.requires_grad_(True)
    for batch in batches[:2]:
        _bare_step(target, draft, batch, config.rollout)
    started = time.perf_counter()
    for batch in batches:
        _bare_step(target, draft, batch, config.rollout)
    return sum(lengths) / (time.perf_counter() - started)


def _bare_step(target: Target, draft: Draft, batch: Batch, steps: int) -> None:
    with torch.no_grad():
        features = target.read(batch.tokens_BT, draft.taps).features_BTF
    total: Tensor | None = None
    row, label, offset = batch.labels()
    for step, states in enumerate(draft.rollout(batch.tokens_BT, features, batch.first, steps)):
        begin = int((offset < 1 + step).sum())
        chosen = states[row[begin:], label[begin:] - 2 - step - batch.first]
        mean = draft.logits(chosen).mean()
        total = mean if total is None else total + mean
    if total is not None:
        total.backward()  # type: ignore[no-untyped-call]
    draft.zero_grad()


def _gang_over_one(target: Target, shared: StoredDraft, answers: list[Answer]) -> float:
    """Seconds of training six widths of an expert together, over those of one alone."""
    config = TrainConfig(
        method="expert",
        width=str(GANG[-1]),
        batch_tokens=2048,
        rollout=K,
        epochs=1.0,
        evaluations=1,
        precision="fp32",
    )
    seconds = []
    for widths in ((GANG[-1],), GANG):
        configs = [dataclasses.replace(config, width=str(width)) for width in widths]
        draft = shared.build(target, torch.float32)
        began = time.perf_counter()
        train_gang(target, draft, answers, answers[:2], configs, k=K)
        seconds.append(time.perf_counter() - began)
    return round(seconds[1] / seconds[0], 2)


def _timed(work: Callable[[], Any], repeats: int = REPEATS) -> tuple[list[float], Any]:
    if repeats > 1:
        work()  # warm-up
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return seconds, result


def _spread(seconds: list[float]) -> list[float]:
    """Least, median and most."""
    ranked = sorted(seconds)
    return [round(x, 3) for x in (ranked[0], ranked[len(ranked) // 2], ranked[-1])]
