"""Training private parts: one loop with explicit arguments, for one part or a gang of them.

The target runs inside the loop and its features are streamed; beside stored ones (`stored_target.py`)
they are read instead. Each draft is rolled
out over several steps on the true tokens and its own states, and each step's distribution is
pulled towards the target's. Batches, learning rates and evaluations are decided by step numbers,
never by the clock, so that a resumed run ends where an uninterrupted one does.

A gang is several private parts of one shared draft on one stream of batches: the target reads each
batch once, and every member takes its own step on it. Its members end as they would alone in the
same precision.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.adapter import declare, fused_parameters, prepare, put
from ..adapters.table import Method, read_method
from ..adapters.vocabulary_remap import HEAD, Retargeted, retarget, row_mask
from ..config import TrainConfig, read_width
from ..core.console import Progress, say
from ..core.errors import UserError
from ..core.failpoints import point
from ..core.folders import state_hash
from ..core.records import Answer, TrainRecord
from ..drafts.base import Draft
from ..metrics.acceptance import pooled_tau
from ..metrics.replay import check_overrun, replay_each
from ..models.batching import collate, plan_epochs
from ..models.target import Target
from .adapter_run import DivergedError, Member
from .checkpoint import load_checkpoint, save_checkpoint
from .closed_form import fit_starts
from .flops import count_flops, counted
from .memory import check_room, peak_memory, predict_peak, restart_peak
from .optimizer import make_optimizer
from .precision import choose_precision
from .preconditions import check_fits
from .teacher_batch import Lesson, read_lesson, rollout_loss
from .widths import resolve_width, shared_width

CALIBRATION_BATCHES = 4
STREAM = ("epochs", "batch_tokens", "evaluations", "precision", "seed")
"""Settings that members of a gang have in common."""


@dataclass(frozen=True)
class Trained:
    """The private tensors at the best held-out tau (float32, CPU), and the record of the run."""

    tensors: dict[str, Tensor]
    record: TrainRecord


def train(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    config: TrainConfig,
    *,
    k: int,
    base: Target | None = None,
    checkpoints: Path | None = None,
) -> Trained:
    """Train `config.method`'s private part of `draft` (float32, bound to `target`) in place.

    `heldout` answers, with K-1 tokens of overrun, decide when to stop and which step is best.
    `base` is the model that the target was tuned from; only relay and refresh look at it.
    Raises UserError when the loss stops being finite; the last checkpoint is kept.
    """
    (trained,) = _train(target, [draft], answers, heldout, [config], k, base, checkpoints)
    return trained


def train_gang(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    configs: Sequence[TrainConfig],
    *,
    k: int,
    base: Target | None = None,
    checkpoints: Path | None = None,
) -> list[Trained]:
    """Train several private parts of one draft, which is left as it is, on one stream of batches.

    Raises UserError for configurations that differ in how the stream is made (see STREAM).
    """
    for name in STREAM:
        values = {getattr(config, name) for config in configs}
        if len(values) > 1:
            raise UserError(
                f"a gang trains on one stream of batches, so {name} must be the same for all; got "
                f"{', '.join(map(str, sorted(values)))}"
            )
    drafts = []
    for config in configs:
        method = read_method(config.method)
        altered = method.starts or config.vocab != "keep"
        own = [n for n in draft.trainable_names() if altered or method.trains_in_place(n)]
        own += ["embed_tokens.weight"] if method.starts else []
        drafts.append(draft.copy_sharing(own))
    return _train(target, drafts, answers, heldout, configs, k, base, checkpoints)


def _train(
    target: Target,
    drafts: Sequence[Draft],
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    configs: Sequence[TrainConfig],
    k: int,
    base: Target | None,
    checkpoints: Path | None,
) -> list[Trained]:
    answers = [answer for answer in answers if answer.length >= 2]
    heldout = [answer for answer in heldout if answer.length >= 2]
    if not answers or not heldout:
        raise UserError(
            f"{len(answers)} answers to train on and {len(heldout)} held out: both are needed, with "
            "two tokens or more (the first comes from the prefill); does the target answer at all?"
        )
    check_overrun(heldout, k)
    c = configs[0]
    lengths = [len(a.prompt) + a.length for a in answers]
    plan = plan_epochs(lengths, c.batch_tokens, c.epochs or 1.0, c.seed)
    stream = _Stream(target, drafts[0].taps, answers, plan, hold=len(drafts) > 1)
    keys = [
        _key(config, plan, target, base, draft, answers, heldout, k)
        for draft, config in zip(drafts, configs, strict=True)
    ]
    for draft, config in zip(drafts, configs, strict=True):
        check_fits(draft, config, target, base)
    restart_peak(target.device)
    members = [_member(stream, d, config, base) for d, config in zip(drafts, configs, strict=True)]
    folders = [_folder(checkpoints, i, len(members)) for i in range(len(members))]
    for member, folder, key in zip(members, folders, keys, strict=True):
        if folder and member.optimizer:
            found = load_checkpoint(folder, member.trainable, member.optimizer, key)
            member.state = found or member.state
    precision = _precision(stream, members)
    del stream.first_lessons
    predicted = _predicted(target, members, answers, plan)
    check_room(target, predicted, c.batch_tokens, max(lengths))
    _announce(members, plan, precision, predicted)

    def evaluate(some: Sequence[Member]) -> None:
        _evaluate(target, some, heldout, k)
        for member, folder, key in zip(members, folders, keys, strict=True):
            if folder and member in some and member.optimizer:
                save_checkpoint(folder, member.state, member.trainable, member.optimizer, key)

    if fresh := [member for member in members if not member.state.heldout_tau]:
        evaluate(fresh)  # what training has to beat
    every = math.ceil(len(plan) / c.evaluations)
    at = min(member.state.step for member in members)
    with Progress("training", len(plan), "steps") as progress:
        progress.advance(at)
        while active := [m for m in members if not m.done()]:
            at = min(member.state.step for member in active)
            lesson = stream.lesson(at)
            active = [member for member in active if member.state.step == at]
            for member in active:
                _learn(member, lesson, precision, len(members))
            if (at + 1) % every == 0 or at + 1 == len(plan):
                evaluate(active)
            point("training: after a step")
            progress.advance(1, _note(members))
    return [_finished(stream, member, len(members), precision, predicted) for member in members]


def _learn(member: Member, lesson: Lesson, precision: str, gang: int) -> None:
    """A step. A member of a gang that diverges ends where it was best; alone, that is an error."""
    try:
        member.learn(lesson, precision)
    except DivergedError as problem:
        if gang == 1:
            raise
        member.diverged = True
        say(f"{member.config.method}: {problem}; the others go on")


class _Stream:
    """Batches in their order, and what the target says of each."""

    def __init__(
        self,
        target: Target,
        taps: tuple[int, ...],
        answers: Sequence[Answer],
        plan: list[list[int]],
        hold: bool,
    ):
        self.target, self.taps, self.answers, self.plan = target, taps, answers, plan
        self.hold = hold

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Operations of the target's layers, counted on the first batch."""
        batch = collate([self.answers[i] for i in self.plan[0]], self.target.device)
        read = counted(lambda: read_lesson(self.target, batch, self.taps))
        return read / batch.tokens_BT.numel()

    @functools.cached_property
    def first_lessons(self) -> list[Lesson]:
        """What members look at before they train, read once for all."""
        return [self.lesson(at) for at in range(min(CALIBRATION_BATCHES, len(self.plan)))]

    def lesson(self, at: int) -> Lesson:
        began = time.monotonic()
        indices = self.plan[at % len(self.plan)]
        batch = collate([self.answers[i] for i in indices], self.target.device)
        lesson = read_lesson(self.target, batch, self.taps, hold=self.hold)
        return dataclasses.replace(lesson, seconds=time.monotonic() - began)

    def length(self, steps: int) -> int:
        """Real tokens of the first steps."""
        return sum(
            len(self.answers[i].prompt) + self.answers[i].length
            for batch in self.plan[:steps]
            for i in batch
        )


def _member(stream: _Stream, draft: Draft, config: TrainConfig, base: Target | None) -> Member:
    """A draft with its private part attached, at its start."""
    method = read_method(config.method)
    lessons = stream.first_lessons

    @torch.no_grad()
    def calibrate() -> None:
        steps = config.rollout if draft.feeds_back else 1
        for lesson in lessons:
            batch = lesson.batch
            for _ in draft.rollout(batch.tokens_BT, lesson.features_BTF, batch.first, steps):
                pass

    first = draft.draft_vocab if config.vocab == "retarget" else None
    trainable = prepare(
        draft,
        method,
        width=_width(draft, config) if method.expert else 1,
        rank=config.rank,
        init=config.init,
        seed=config.seed,
        calibrate=calibrate,
    )
    retargeted = hook = None
    if first is not None:
        retargeted, hook = _retarget(stream, draft, method, len(first), trainable)
    fitted = fit_starts(stream.target, base, draft, method, config, stream.answers, stream.plan)
    trained = {name for name, _ in trainable}
    member = Member(
        draft,
        method,
        config,
        trainable,
        make_optimizer(trainable, method, config, draft) if trainable else None,
        {name: tensor for name, tensor in fitted.tensors.items() if name not in trained},
        len(stream.plan) if trainable and config.epochs else 0,
        first,
        retargeted,
        hook,
        fitted,
    )
    member.flops = count_flops(lessons[0], draft, config)
    return member


def _width(draft: Draft, config: TrainConfig) -> int:
    width = read_width(config.width)
    if width is None:
        raise UserError(
            "train.width auto compares several experts beside one draft; name a width here, for "
            "example 64"
        )
    return resolve_width(width, shared_width(draft))


def _retarget(
    stream: _Stream,
    draft: Draft,
    method: Method,
    size: int,
    trainable: list[tuple[str, nn.Parameter]],
) -> tuple[Retargeted, RemovableHandle | None]:
    """Exchange tokens; new rows join `trainable`, and a hook holds the head's other rows in place."""
    found = retarget(draft, stream.target, stream.answers)
    say(
        f"vocabulary: {len(found.added)} of {size} tokens exchanged; the answers' share outside it "
        f"{found.missed_before:.1%} -> {found.missed_after:.1%}"
    )
    if not found.changed:
        return found, None
    if method.owns(HEAD):  # the head is another tensor now, and all of it trains
        trainable[:] = declare(draft, method)
        return found, None
    head = draft.get_parameter(HEAD)
    head.requires_grad_(True)
    trainable.append((HEAD, head))
    return found, row_mask(draft, found.added)


def _finished(
    stream: _Stream, member: Member, gang: int, precision: str, predicted: float
) -> Trained:
    """The best tensors, put back into the draft, and the record.

    Seconds are those of its start, its steps, the readings of the batches it stepped on, and its
    share of the evaluations.
    """
    state, draft, flops = member.state, member.draft, member.flops
    put(draft, state.best)
    read = stream.length(state.step)
    if member.hook is not None:
        member.hook.remove()
    record = TrainRecord(
        method=member.config.method,
        trained_parameters=member.trained_parameters(),
        draft_parameters=fused_parameters(draft),
        steps=state.step,
        planned_steps=member.planned,
        supervised_tokens=state.supervised_tokens,
        unique_answer_tokens=sum(a.length for a in stream.answers),
        final_loss=state.last_loss if math.isfinite(state.last_loss) else 0.0,
        heldout_tau=tuple(state.heldout_tau),
        best_step=state.best_step,
        seconds=state.seconds + state.evaluation_seconds + member.fitted.seconds,
        tokens_per_second=read / max(state.seconds, 1e-9),
        precision=precision,
        predicted_peak_mb=predicted,
        peak_mb=peak_memory(stream.target.device),
        stopped_early=state.step < member.planned,
        gang=gang,
        miss_rate=(member.retargeted.missed_before, member.retargeted.missed_after)
        if member.retargeted
        else None,
        target_flops=stream.flops_per_token * (read + member.fitted.target_tokens)
        + flops.head * read,
        draft_flops=flops.step * read + flops.rollout * member.fitted.draft_tokens,
    )
    return Trained(state.best, record)


def _predicted(
    target: Target, members: Sequence[Member], answers: Sequence[Answer], plan: list[list[int]]
) -> float:
    """The peak in MB that the largest batch of the plan makes."""
    longest = [max(len(answers[i].prompt) + answers[i].length for i in batch) for batch in plan]
    at = max(range(len(plan)), key=lambda i: longest[i] * len(plan[i]))
    tokens = longest[at] * len(plan[at])
    first = max(min(len(answers[i].prompt) for i in plan[at]) - 1, 0)
    return predict_peak(target, members, tokens, longest[at], first)


def _announce(
    members: Sequence[Member], plan: list[list[int]], precision: str, predicted: float
) -> None:
    for member in members:
        say(f"training {member.trained_parameters():,} parameters ({member.config.method})")
        if member.state.step:
            say(f"continuing at step {member.state.step} of {len(plan)}")
    steps = max(member.planned for member in members)
    say(f"{steps} steps, {precision}, about {predicted:,.0f} MB at the peak")


def _precision(stream: _Stream, members: Sequence[Member]) -> str:
    """Decided once, by the first member that trains: a resumed run computes as it began."""
    training = [member for member in members if member.planned]
    if not training:
        return "fp32"
    first = training[0]
    precision = first.state.precision or first.config.precision
    if precision == "auto":

        def step(at: int) -> None:
            lesson = stream.lesson(at)
            rollout_loss(lesson, first.draft, first.config)[0].backward()  # type: ignore[no-untyped-call]
            for parameter in first.parameters:
                parameter.grad = None

        precision = choose_precision(stream.target.device, step)
    for member in training:
        member.state.precision = precision
    return precision


def _evaluate(target: Target, members: Sequence[Member], heldout: Sequence[Answer], k: int) -> None:
    """Held-out tau of each member; of its averaged weights too, of which the better counts."""

    def taus(some: Sequence[Member]) -> list[float]:
        found = replay_each(target, [m.draft for m in some], heldout, k)
        return [pooled_tau([t for t in traces if t.accepted]) for traces in found]

    began = time.monotonic()
    found = taus(members)
    for member in members:
        member.state.evaluation_seconds += (time.monotonic() - began) / len(members)
    for member, tau in zip(members, found, strict=True):
        if member.state.average:
            with member.averaged():
                (averaged,) = taus([member])
                if averaged > tau:
                    member.note_tau(averaged)
                    continue
        member.note_tau(tau)


def _note(members: Sequence[Member]) -> str:
    training = [member for member in members if member.planned]
    best = max(training, key=lambda m: m.state.heldout_tau[-1][1] if m.state.heldout_tau else 0.0)
    state = best.state
    note = f"loss {state.last_loss:.3f}"
    if not state.heldout_tau:
        return note
    return f"{note}  held-out tau {state.heldout_tau[-1][1]:.3f}"


def _folder(checkpoints: Path | None, i: int, members: int) -> Path | None:
    if checkpoints is None or members == 1:
        return checkpoints
    return checkpoints / f"member-{i}"


def _key(
    config: TrainConfig,
    plan: list[list[int]],
    target: Target,
    base: Target | None,
    draft: Draft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    k: int,
) -> str:
    """Identifies everything that a run's tensors depend on; a checkpoint of another is not continued."""
    about: list[Any] = [
        asdict(config),
        plan,
        target.fingerprint(),
        base.fingerprint() if base and read_method(config.method).starts else None,
        draft.taps,
        state_hash({**draft.stored_state(), "features": torch.tensor(draft.feature_size)}),
    ]
    digest = hashlib.sha256(json.dumps(about)[:-1].encode())
    for some in (answers, heldout):  # one at a time: the whole text would be as large as the file
        digest.update(b", [")
        for at, answer in enumerate(some):
            row = json.dumps([answer.id, list(answer.tokens)])
            digest.update(f"{', ' if at else ''}{row}".encode())
        digest.update(b"]")
    digest.update(f", {json.dumps(k)}]".encode())
    return digest.hexdigest()[:16]
