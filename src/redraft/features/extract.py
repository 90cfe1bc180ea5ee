"""Writing features: the target reads every answer once, and what its layers say goes to disk.

Group by group: nothing is held but the group being written, a shard of the store or a batch of another
layout. What is there already is not read again.

Shapes: B batch, T tokens, S tokens of a row, L aux layers, H target hidden size, P positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..core import ranks
from ..core.console import Progress, say
from ..core.errors import UserError, nearest
from ..core.files import writing
from ..core.lock import held
from ..core.records import Answer
from ..models.batching import collate
from ..models.final_norm import find_final_norm, states_entering
from ..models.target import Target
from .layouts import WRITERS
from .rows import FeatureRows
from .writer import FeatureAbout, FeatureWriter, answers_hash

WITNESSED = 4
"""Positions whose logits are kept for readers to check theirs by."""
SPARE = 0.02
"""Share of a disk that is left free."""
GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Where features go and how: `shard_mb` and `batch_tokens` bound what is held at once."""

    out: Path
    layout: str = "redraft"
    max_gb: float = float("inf")
    shard_mb: float = 128.0
    batch_tokens: int = 4096


@dataclass(frozen=True)
class Written:
    """What became of it; sizes in bytes."""

    samples: int
    tokens: int
    predicted: int
    size: int


def write_features(
    target: Target, answers: Sequence[Answer], aux_layers: Sequence[int], plan: Plan
) -> Written:
    """Store hs[] of `aux_layers` and the last state of each answer's tokens, prompt and lookahead included.

    Continues what an interrupted run left. Raises UserError, before the target reads anything, for
    a folder of something else, and where the predicted size is more than `max_gb` or the disk has.
    """
    norm = find_final_norm(target)
    about = _about(target, answers, aux_layers, plan, plan.layout != "specforge")

    def read(rows: Sequence[int]) -> dict[int, Tensor]:
        some = [answers[row] for row in rows]
        batch = collate(some, target.device, lookahead=True)
        states_BTLH = read_states(target, norm, batch.tokens_BT, aux_layers, about.pre_norm).cpu()
        lengths = batch.ends_B.tolist()
        return {
            r: states_BTLH[b, :n].clone()
            for b, (r, n) in enumerate(zip(rows, lengths, strict=True))
        }

    return _fill(about, answers, plan, read, lambda: _witness(target, answers))


def convert_features(
    target: Target,
    source: FeatureRows,
    answers: Sequence[Answer] | None,
    plan: Plan,
    normed: Callable[[Tensor], Tensor],
) -> Written:
    """Write stored features in another layout, without the target's layers.

    `answers` are the rows wanted, all by default (see `FeatureRows.answers`). `normed` gives hs[n] of the
    state before the final norm, for a layout that wants it. Raises UserError for a layout that wants the
    state before the norm where the source holds the one after: a norm cannot be undone.
    """
    pre_norm = source.pre_norm and plan.layout != "specforge"
    if plan.layout == "speculators" and not source.pre_norm:
        raise UserError(
            f"{source.folder} holds last states after the final norm and the speculators layout those "
            "before it, and a norm cannot be undone; write them from the target (without --from)"
        )
    chosen = list(source.answers() if answers is None else answers)
    places = range(len(chosen)) if answers is None else _places(source, chosen)
    about = _about(target, chosen, source.aux_layers, plan, pre_norm)

    def read(rows: Sequence[int]) -> dict[int, Tensor]:
        found = {}
        for row in rows:
            length = len(chosen[row].prompt) + len(chosen[row].tokens)
            found[row] = source.states(places[row], length)
        return found if source.pre_norm == pre_norm else _normed(found, normed)

    return _fill(about, chosen, plan, read, dict)


def capture_features(
    target: Target,
    capture: Callable[[Sequence[Sequence[int]]], list[Tensor]],
    answers: Sequence[Answer],
    aux_layers: Sequence[int],
    plan: Plan,
    normed: Callable[[Tensor], Tensor],
) -> Written:
    """The same from an engine: `capture` gives the states [S, L+1, H] of rows of token ids, the last
    before the final norm. Nothing is asked of the target but what it is."""
    about = _about(target, answers, aux_layers, plan, plan.layout != "specforge")

    def read(rows: Sequence[int]) -> dict[int, Tensor]:
        tokens = [(*answers[row].prompt, *answers[row].tokens) for row in rows]
        found = dict(zip(rows, capture(tokens), strict=True))
        return found if about.pre_norm else _normed(found, normed)

    return _fill(about, answers, plan, read, dict)


@torch.no_grad()
def read_states(
    target: Target, norm: nn.Module, tokens_BT: Tensor, aux_layers: Sequence[int], pre_norm: bool
) -> Tensor:
    """[B, T, L+1, H]: hs[] of `aux_layers`, then the state that enters the final norm or, without
    `pre_norm`, hs[n]."""
    wanted = [*aux_layers] if pre_norm else [*aux_layers, target.num_layers]
    with states_entering(norm) as caught:
        features_BTF = target.read(tokens_BT, wanted, keep=1).features_BTF
    aux_BTLH = (
        features_BTF.view(*tokens_BT.shape, len(wanted), -1) if wanted else caught[-1][:, :, :0]
    )
    if not pre_norm:
        return aux_BTLH
    last_BT1H = caught[-1][:, :, None]
    return torch.cat([aux_BTLH, last_BT1H], 2) if wanted else last_BT1H


def compare_features(target: Target, rows: FeatureRows, count: int = 4) -> dict[str, float]:
    """How far stored states are from what the target computes here: ||stored - own|| / ||own||, at worst of
    `count` rows spread over the store, by aux layer. The last state is called 'last'."""
    norm = find_final_norm(target)
    worst = dict.fromkeys([*(f"hs[{aux_layer}]" for aux_layer in rows.aux_layers), "last"], 0.0)
    spread = np.linspace(0, len(rows.tokens) - 1, min(count, len(rows.tokens))).astype(int)
    for row in spread.tolist():
        tokens_1T = torch.from_numpy(rows.tokens[row])[None].long().to(target.device)
        own_SLH = (
            read_states(target, norm, tokens_1T, rows.aux_layers, rows.pre_norm)[0].float().cpu()
        )
        stored_SLH = rows.states(row).float()
        apart_L = (stored_SLH - own_SLH).norm(dim=(0, 2)) / own_SLH.norm(dim=(0, 2))
        for name, apart in zip(worst, apart_L.tolist(), strict=True):
            worst[name] = max(worst[name], apart)
    return worst


def _normed(states: dict[int, Tensor], normed: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """The same with hs[n] for the state before the final norm."""
    return {
        row: torch.cat([one[:, :-1], normed(one[:, -1]).to(one)[:, None]], 1)
        for row, one in states.items()
    }


def _fill(
    about: FeatureAbout,
    answers: Sequence[Answer],
    plan: Plan,
    read: Callable[[Sequence[int]], dict[int, Tensor]],
    witness: Callable[[], dict[str, Tensor]],
) -> Written:
    with writing(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    with held(plan.out):
        writer = WRITERS[plan.layout](plan.out, about, answers)
        size = writer.size()
        _check_space(writer, size, plan)
        ranks.wait()  # before rank 0 makes the folder this job's
        writer.begin()
        left = ranks.first(lambda: [g for g in range(len(writer.groups)) if not writer.has(g)])
        tokens = sum(writer.lengths)
        say(
            f"features of {len(answers)} answers, {tokens:,} tokens, about {size / GB:,.3f} GB in {plan.out}"
        )
        if len(left) < len(writer.groups):
            say(f"{len(writer.groups) - len(left)} of {len(writer.groups)} parts are there already")
        todo = sum(writer.lengths[row] for g in left for batch in writer.groups[g] for row in batch)
        with Progress("features", todo, "tokens") as progress:
            for begin in range(0, len(left), ranks.shares()):
                written = None
                for group in ranks.mine(left[begin : begin + ranks.shares()]):
                    states: dict[int, Tensor] = {}
                    for batch in writer.groups[group]:
                        states |= read(batch)
                        progress.advance(ranks.shares() * sum(writer.lengths[row] for row in batch))
                    with ranks.alone():  # files of its own
                        written = writer.write(group, states)
                for line in filter(None, ranks.of_each_share(written)):
                    writer.note(line)
        ranks.wait()
        writer.finish(witness)
        ranks.wait()
        return Written(len(answers), tokens, size, writer.present())


def _check_space(writer: FeatureWriter, size: int, plan: Plan) -> None:
    if size > plan.max_gb * GB:
        raise UserError(
            f"these features take about {size / GB:,.3f} GB, more than --max-gb {plan.max_gb:g}; store fewer "
            "answers (redraft select), or train without --features, which needs no disk"
        )
    disk = shutil.disk_usage(plan.out)
    need, free = size - writer.present(), disk.free - SPARE * disk.total
    if need > free:
        raise UserError(
            f"these features need about {need / GB:,.3f} GB more, and the disk of {plan.out} has "
            f"{max(free, 0) / GB:,.3f} GB to spare; free space, name another disk with --out, or train "
            "without --features, which needs none"
        )


def _about(
    target: Target, answers: Sequence[Answer], aux_layers: Sequence[int], plan: Plan, pre_norm: bool
) -> FeatureAbout:
    if plan.layout not in WRITERS:
        raise UserError(f"unknown layout '{plan.layout}'; {nearest(plan.layout, WRITERS)}")
    if not answers:
        raise UserError("there are no answers whose features could be stored")
    return FeatureAbout(
        target=target.name,
        target_hash=target.weights_hash(),
        tokenizer_hash=target.tokenizer_hash(),
        layers=target.num_layers,
        hidden_size=target.hidden_size,
        dtype=str(target.dtype).removeprefix("torch."),
        aux_layers=tuple(aux_layers),
        pre_norm=pre_norm,
        answers_hash=answers_hash(answers),
        shard_mb=plan.shard_mb,
        batch_tokens=plan.batch_tokens,
    )


def _witness(target: Target, answers: Sequence[Answer]) -> dict[str, Tensor]:
    """The target's own logits [P, V] at the end of the first answer."""
    tokens_T = torch.tensor([*answers[0].prompt, *answers[0].tokens], device=target.device)
    count = min(WITNESSED, len(tokens_T))
    with torch.no_grad():
        logits_PV = target.read(tokens_T[None], (), keep=count).logits_BTV[0].float()
    positions = torch.arange(len(tokens_T) - count, len(tokens_T))
    return {"row": torch.tensor(0), "positions": positions, "logits": logits_PV}


def _places(source: FeatureRows, answers: list[Answer]) -> list[int]:
    """Where each answer lies among the rows; those that are not there are left out of `answers`."""
    kept, places = [], []
    for answer in answers:
        row, length = source.index.find(np.array([*answer.prompt, *answer.tokens]))
        if length >= len(answer.prompt) + answer.length:
            tokens = answer.tokens[
                : length - len(answer.prompt)
            ]  # what was kept past its end may not be
            kept.append(dataclasses.replace(answer, tokens=tokens))
            places.append(row)
    if not kept:
        raise UserError(
            f"none of the {len(answers)} answers is among the {len(source.tokens)} rows of {source.folder}: "
            "were other answers captured, or with another chat template?"
        )
    if len(kept) < len(answers):
        say(
            f"{len(answers) - len(kept)} of {len(answers)} answers are not in {source.folder}; left out"
        )
    answers[:] = kept
    return places
