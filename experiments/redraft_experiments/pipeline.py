"""`redraft bench pipeline`: speed and memory of the stages, each against its bare minimum.

    regeneration    the batched loop, against the target's forward passes inside it
    training        against the target's forward plus a bare forward and backward of the same draft
                    modules on the same tokens
    replay          against the target's forward and the draft's rollout on the same batches
    live loop       one prompt at a time, against the models' forward passes inside it
    joint training of six     (a toy suite only) six widths of an expert on one stream against one, on the target
                    unchanged and padded with zeros to the cost that real models have

It runs on a toy suite of `bench suite` or on any model: a folder, such as `bench model` makes, or a GGUF file. Printed,
never asserted: speed depends on the machine and on what else runs there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.config import TrainConfig
from redraft.core.console import say
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt, versions
from redraft.decoding.sampling import Sampling
from redraft.drafts.base import Draft
from redraft.drafts.new import new_draft
from redraft.metrics.live import live
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import BATCH_TOKENS, replay
from redraft.metrics.speed import forwards_timed
from redraft.models.batching import Batch, collate, plan_epochs, plan_once
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.training.train import train, train_adapters

from . import datasets, synthetic
from .decode import padded
from .suite import load_member, suite_prompts

PROMPTS, TOKENS, K = 64, 96, 4
REPEATS = 3
WIDTHS = (4, 8, 16, 32, 64, 96)
PADDED = 100_000_000
DRAFT_VOCAB = 8192
"""Draft vocabulary of a pretrained model's draft, a published size."""


@dataclass(frozen=True)
class Subject:
    """What is measured. `build` makes the draft to train and to replay, in a dtype."""

    target: Target
    prompts: list[Prompt]
    build: Callable[[Sequence[Answer], torch.dtype], Draft]
    config: TrainConfig
    copies: int
    """How often the answers are repeated, for enough steps."""
    repeats: int
    lives: int
    """Prompts that the live loop decodes."""


def bench_pipeline(
    suite: Path | None = None, model: str | None = None, dtype: str = "auto"
) -> dict[str, Any]:
    """Measure on a toy suite's SFT member, or on a pretrained model in a `dtype`. Raises UserError for neither and for both."""
    if (suite is None) == (model is None):
        raise UserError(
            "name one of --suite FOLDER (bench suite) and --model FOLDER (bench model, or your own)"
        )
    if suite is None:
        return _measure(_pretrained(load_target(str(model), dtype=dtype)))
    if not (suite / "suite.json").is_file():
        raise UserError(f"{suite} holds no suite; build one: redraft bench suite --out {suite}")
    stored = read_draft(str(suite / "draft"))
    subject = _member(suite, stored)
    found = _measure(subject)
    answers = found.pop("answers")
    trained_together = (
        ("six_adapters_over_one", subject.target, answers * 4),
        ("six_adapters_over_one_padded_to_1e8", padded(subject.target, PADDED), answers),
    )
    return found | {name: _together_over_one(t, stored, some) for name, t, some in trained_together}


def _member(suite: Path, stored: StoredDraft) -> Subject:
    target = load_member(suite, "sft")
    return Subject(
        target,
        suite_prompts(suite, target, ("math",), "eval", PROMPTS),
        lambda _, dtype: stored.build(target, dtype),
        TrainConfig(method="full", batch_tokens=2048, rollout=K, epochs=2.0, precision="fp32"),
        copies=4,
        repeats=REPEATS,
        lives=PROMPTS,
    )


def _pretrained(target: Target) -> Subject:
    """A model and math questions: those of the data folder, where one is named, else templated.

    A model without a chat template gets the bare text.
    """
    folder = datasets.data_folder()
    if folder is None:
        chats = synthetic.samples("math", PROMPTS, seed=0, split="eval")
    else:
        chats = datasets.chats(folder, "math", split="eval")[:PROMPTS]

    def asked(chat: synthetic.Sample) -> Sequence[int]:
        if target.template_text:
            return target.render(list(chat.messages[:-1]))
        ids: list[int] = target.tokenizer(chat.messages[0]["content"])["input_ids"]
        return ids

    prompts = [Prompt(c.id, tuple(asked(c))) for c in chats]

    def build(answers: Sequence[Answer], dtype: torch.dtype) -> Draft:
        size = min(DRAFT_VOCAB, target.vocab_size)
        draft = new_draft(target, answers, draft_vocab_size=size)
        draft.reinitialise(0)
        return draft.to(dtype)

    config = TrainConfig(method="scratch", rollout=K, epochs=3.0, evaluations=1)
    return Subject(target, prompts, build, config, copies=1, repeats=1, lives=PROMPTS // 8)


def _measure(s: Subject) -> dict[str, Any]:
    target, draft_of = s.target, s.build
    say(f"{len(s.prompts)} prompts x {TOKENS} tokens at most, K={K}, {target.dtype}")
    with _forwards(target) as inside:
        generation, answers = _timed(
            lambda: answer_all(target, s.prompts, TOKENS, K, Sampling()), s.repeats, inside
        )
    pool = [answer for answer in answers if answer.length >= 2] * s.copies
    bare = _bare_tokens_per_second(target, draft_of(answers, torch.float32), pool, s.config)
    trainee = draft_of(answers, torch.float32)
    record = train(target, trainee, pool, pool[:4], s.config, k=K).record
    draft = trainee.to(target.dtype).eval().requires_grad_(False)
    bare_replays, _ = _timed(lambda: _bare_replay(target, draft, answers), s.repeats)
    replays, _ = _timed(lambda: replay(target, draft, answers, K), s.repeats)
    with forwards_timed(target, draft) as spent:
        some = s.prompts[:: len(s.prompts) // s.lives]
        lives, (_, lived) = _timed(lambda: live(target, draft, some, K, TOKENS), 1)
    generated = sum(len(a.tokens) for a in answers)
    read = sum(len(a.prompt) + len(a.tokens) for a in answers)
    answered = sum(a.length for a in answers) / _median(replays)
    decoded = sum(a.length for a in lived)
    stages = {
        "regeneration": (generated / _median(generation), generated / _median(inside)),
        "training": (record.tokens_per_second, bare),
        "replay": (read / _median(replays), read / _median(bare_replays)),
        "live loop": (decoded / lives[0], decoded / sum(spent)),
    }
    return {
        "stages": {
            name: {"tokens_per_second": round(ours), "bare": round(least), "share": ours / least}
            for name, (ours, least) in stages.items()
        },
        "replay_over_live": round(answered / (decoded / lives[0]), 1),
        "heldout_tau": record.best_tau(),
        "training_tflop": (record.target_flops + record.draft_flops) / 1e12,
        "training_seconds": round(record.seconds),
        "answer_tokens": record.unique_answer_tokens,
        "training_precision": record.precision,
        "peak_memory_mb": round(record.peak_mb),
        "predicted_peak_mb": round(record.predicted_peak_mb),
        "prompts": len(s.prompts),
        "repeats": s.repeats,
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype),
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "draft_parameters": record.trained_parameters,
        "vocabulary": target.vocab_size,
        "versions": versions(),
        "answers": answers,
    }


def _bare_tokens_per_second(
    target: Target, draft: Draft, answers: list[Answer], config: TrainConfig
) -> float:
    """Target forward plus forward and backward of every draft module, with nothing around them."""
    lengths = [len(a.prompt) + a.length for a in answers]
    plan = plan_epochs(lengths, config.batch_tokens, 1.0, config.seed)
    batches = [collate([answers[i] for i in indices], target.device) for indices in plan]
    draft.requires_grad_(True)
    _bare_step(target, draft, batches[0], config.rollout)
    started = time.perf_counter()
    for batch in batches:
        _bare_step(target, draft, batch, config.rollout)
    return sum(lengths) / (time.perf_counter() - started)


def _bare_step(target: Target, draft: Draft, batch: Batch, steps: int) -> None:
    with torch.no_grad():
        features = target.read(batch.tokens_BT, draft.aux_layers, keep=1).features_BTF
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


def _together_over_one(target: Target, shared: StoredDraft, answers: list[Answer]) -> float:
    """Seconds of training six widths of an expert together, over those of one alone."""
    config = TrainConfig(
        method="expert",
        width=str(WIDTHS[-1]),
        batch_tokens=2048,
        rollout=K,
        epochs=1.0,
        evaluations=1,
        precision="fp32",
    )
    seconds = []
    for widths in ((WIDTHS[-1],), WIDTHS):
        configs = [dataclasses.replace(config, width=str(width)) for width in widths]
        draft = shared.build(target, torch.float32)
        began = time.perf_counter()
        train_adapters(target, draft, answers, answers[:2], configs, k=K)
        seconds.append(time.perf_counter() - began)
    return round(seconds[1] / seconds[0], 2)


@torch.inference_mode()
def _bare_replay(target: Target, draft: Draft, answers: list[Answer]) -> None:
    """Target forward, rollout and most likely draft tokens of the same batches."""
    for indices in plan_once([len(a.prompt) + len(a.tokens) for a in answers], BATCH_TOKENS):
        batch = collate([answers[i] for i in indices], target.device, lookahead=True)
        features = target.read(batch.tokens_BT, draft.aux_layers, keep=1).features_BTF
        for states in draft.rollout(batch.tokens_BT, features, batch.first, K):
            draft.logits(states).argmax(-1)


@contextmanager
def _forwards(target: Target) -> Iterator[list[float]]:
    """Collects the seconds of the target's own forward passes, one entry per pass."""
    spent: list[float] = []
    began: list[float] = []
    hooks = [
        target.model.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())),
        target.model.register_forward_hook(
            lambda *_: spent.append(time.perf_counter() - began.pop())
        ),
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _timed(
    work: Callable[[], Any], repeats: int, inside: list[float] | None = None
) -> tuple[list[float], Any]:
    """Seconds of each repeat, after a warm-up where there are several, and the last result.

    `inside` collects the seconds of parts of the work, and is left with their sum in each repeat.
    """
    if repeats > 1:
        work()
    seconds, parts = [], []
    for _ in range(repeats):
        if inside is not None:
            inside.clear()
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
        parts.append(sum(inside or ()))
    if inside is not None:
        inside[:] = parts
    return seconds, result


def _median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]
