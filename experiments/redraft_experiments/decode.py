"""`redraft bench decode`: speculative decoding raced against what else decodes, on the same prompts.

    generate   Transformers' generate           lookup     the same with prompt lookup
    plain      our plain loop                   assisted   the same with a small assistant LM
    K=...      our speculative loop

Small models make a draft step look dear, so a target may be padded to the size of a real one: its
feed-forward layers get neurons whose down projection is zero, which cost their time and add nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from redraft.checkpoints.load import load_draft
from redraft.core.console import say
from redraft.core.errors import UserError
from redraft.core.records import Lossless, Prompt, StepCost, Throughput, to_json, versions
from redraft.decoding.sampling import Sampling
from redraft.drafts.base import Draft
from redraft.metrics.acceptance import per_position, pooled_tau
from redraft.metrics.cost import measure_cost, speedup
from redraft.metrics.lossless import compare
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import replay
from redraft.metrics.speed import (
    Runner,
    drafted,
    forwards_timed,
    plain,
    race,
    transformers_generate,
)
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.run_folder import RunFolder
from redraft.prompts.prompts import read_prompts

LOOKUP_TOKENS = 4
ASSISTANT_TOKENS = 4
FIRST_PLAIN, FIRST_DRAFTED = "first token, plain", "first token, drafted"
"""Raced next to the others to tell what reading the prompts takes."""


@dataclass(frozen=True)
class DecodeCell:
    """Decoders raced on the same prompts, `batch` at a time, greedy.

    `parameters` are the target's; `padded` says that most of them are zeros that cost time and change
    nothing. `rows` are the contestants, over whole answers. By K: `tau`; `predicted`, the speed-up
    tau / (K c + v); and `after_first`, the measured one from the first token on (a prompt is read
    once either way, and the formula knows nothing of it). `outside` is the share of time outside the models' forward passes at
    the fastest K. `identical` compares every contestant with the plain loop.
    """

    target: str
    parameters: int
    padded: bool
    batch: int
    dtype: str
    device: str
    max_new_tokens: int
    cost: StepCost
    rows: tuple[Throughput, ...]
    tau: dict[str, float]
    predicted: dict[str, float]
    after_first: dict[str, float]
    outside: float
    identical: dict[str, Lossless]
    threads: int
    versions: dict[str, str]

    def rate(self, name: str) -> float:
        """Tokens per second of a contestant."""
        return next(row.tokens_per_second for row in self.rows if row.name == name)

    @staticmethod
    def from_json(row: dict[str, Any]) -> DecodeCell:
        row = dict(row)
        row["cost"] = StepCost(**{**row["cost"], "verify": tuple(row["cost"]["verify"])})
        row["rows"] = tuple(Throughput(**entry) for entry in row["rows"])
        row["identical"] = {name: Lossless(**found) for name, found in row["identical"].items()}
        return DecodeCell(**row)


def bench_decode(
    out: Path,
    target: str,
    draft: str,
    prompts: str,
    *,
    assistant: str | None = None,
    parameters: int = 0,
    batches: Sequence[int] = (1, 4, 16),
    ks: Sequence[int] = (1, 2, 3, 4, 6),
    limit: int = 16,
    max_new_tokens: int = 64,
    repeats: int = 3,
    dtype: str = "auto",
) -> list[DecodeCell]:
    """One cell per batch size, each a stage of the folder `out`; with `parameters` also for the
    target padded to that size. Raises UserError for fewer prompts than the largest batch."""
    loaded = load_target(target, dtype=dtype)
    proposer = load_draft(draft, loaded)
    found = read_prompts(prompts, loaded, limit).prompts
    if len(found) < max(batches):
        raise UserError(
            f"{len(found)} prompts do not fill a batch of {max(batches)}; raise --limit or lower "
            "--batches"
        )
    small = load_target(assistant, dtype=dtype).model if assistant else None
    inputs = {
        "target": loaded.fingerprint(),
        "draft": str(draft),
        "prompts": [list(p.tokens) for p in found],
        "assistant": assistant,
        "settings": [list(ks), max_new_tokens, repeats],
    }
    names = []
    with RunFolder.open(out) as run:
        for size in (0, parameters) if parameters else (0,):
            raced = padded(loaded, size) if size else loaded
            for batch in batches:
                name = f"{'padded' if size else 'as-it-is'}-batch-{batch}.json"
                names.append(name)

                def work(raced: Target = raced, batch: int = batch, name: str = name) -> None:
                    groups = [found[i : i + batch] for i in range(0, len(found), batch)]
                    cell = _cell(raced, proposer, groups, small, ks, max_new_tokens, repeats)
                    run.write_json(name, to_json(cell))

                run.stage(name.removesuffix(".json"), {**inputs, "size": size}, [name], work)
        return [DecodeCell.from_json(_read(out / name)) for name in names]


def _read(path: Path) -> dict[str, Any]:
    from redraft.core.folders import read_json

    return read_json(path)


def _cell(
    target: Target,
    draft: Draft,
    groups: Sequence[Sequence[Prompt]],
    assistant: Any,
    ks: Sequence[int],
    max_new_tokens: int,
    repeats: int,
) -> DecodeCell:
    batch, prompts = len(groups[0]), [prompt for group in groups for prompt in group]
    size = sum(p.numel() for p in target.model.parameters())
    say(f"{size:,} parameters, {batch} at a time, {len(prompts)} prompts")
    contestants: dict[str, Runner] = {
        "generate": transformers_generate(target, max_new_tokens),
        "plain": plain(target, max_new_tokens),
    }
    if batch == 1:  # Transformers assists one row at a time only
        lookup = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        contestants["lookup"] = transformers_generate(target, max_new_tokens, **lookup)
        if assistant is not None:
            assistant.generation_config.num_assistant_tokens = ASSISTANT_TOKENS
            contestants["assisted"] = transformers_generate(
                target, max_new_tokens, assistant_model=assistant
            )
    contestants |= {f"K={k}": drafted(target, draft, k, max_new_tokens) for k in ks}
    first = {FIRST_PLAIN: plain(target, 1), FIRST_DRAFTED: drafted(target, draft, 1, 1)}
    raced, answers = race({**contestants, **first}, groups, repeats)
    rows = {name: raced[name] for name in contestants}
    said = answer_all(target, prompts, max_new_tokens, max(ks), Sampling(), batch_size=batch)
    traces = {k: [t for t in replay(target, draft, said, k) if t.steps] for k in ks}
    middle = sorted(prompts, key=lambda p: len(p.tokens))[len(prompts) // 2]
    context = [*middle.tokens, *said[prompts.index(middle)].answer[: max_new_tokens // 2]]
    cost = measure_cost(target, draft, context, most=max(ks), rows=batch)
    rates = {k: per_position(traces[k], k) for k in ks}
    fastest = max(ks, key=lambda k: rows[f"K={k}"].tokens_per_second)
    return DecodeCell(
        target=target.name,
        parameters=size,
        padded=isinstance(target, PaddedTarget),
        batch=batch,
        dtype=str(target.dtype).removeprefix("torch."),
        device=target.device.type,
        max_new_tokens=max_new_tokens,
        cost=cost,
        rows=tuple(rows.values()),
        tau={f"K={k}": pooled_tau(traces[k]) for k in ks},
        predicted={f"K={k}": speedup(cost, rates[k], k) for k in ks},
        after_first={f"K={k}": _after_first(raced, f"K={k}") for k in ks},
        outside=_outside(target, draft, groups, fastest, max_new_tokens),
        identical={
            name: compare(target, prompts, answers["plain"], answers[name]) for name in contestants
        },
        threads=torch.get_num_threads(),
        versions=versions(),
    )


def _after_first(raced: dict[str, Throughput], name: str) -> float:
    """Speed-up over the plain loop once the first token is there."""

    def seconds(whole: str, first: str) -> float:
        return sum(
            sign * raced[n].tokens / raced[n].tokens_per_second
            for n, sign in ((whole, 1), (first, -1))
        )

    return seconds("plain", FIRST_PLAIN) / seconds(name, FIRST_DRAFTED)


def _outside(
    target: Target, draft: Draft, groups: Sequence[Sequence[Prompt]], k: int, longest: int
) -> float:
    """The share of time that our loop spends outside the models' forward passes."""
    run = drafted(target, draft, k, longest)
    with forwards_timed(target, draft) as spent:
        began = time.perf_counter()
        for group in groups:
            run(group)
        whole = time.perf_counter() - began
    return 1 - sum(spent) / whole


class PaddedTarget(Target):
    """A target made larger without changing what it computes."""


def padded(target: Target, parameters: int) -> Target:
    """A copy with about `parameters` parameters, the new ones neurons whose output counts as zero.

    For gated feed-forward layers (gate, up and down projection without biases). Raises UserError
    for others, and for a size that the target has already.
    """
    from transformers import AutoModelForCausalLM

    config = type(target.model.config).from_dict(target.model.config.to_dict())
    have = sum(p.numel() for p in target.model.parameters())
    names = ("gate_proj", "up_proj", "down_proj")
    layers = [m for m in target.model.modules() if all(hasattr(m, name) for name in names)]
    if len(layers) != config.num_hidden_layers:
        raise UserError(
            f"{target.name} cannot be padded: that takes a gated feed-forward part in each layer"
        )
    neurons = (parameters - have) // (3 * config.hidden_size * len(layers))
    if neurons < 1:
        raise UserError(f"{target.name} has {have:,} parameters already, {parameters:,} are asked")
    width = config.intermediate_size
    config.intermediate_size = width + neurons
    model = AutoModelForCausalLM.from_config(config, dtype=target.dtype).to(target.device)
    own = target.model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.zero_()
                parameter[:, :width] = own[name]
            elif name.endswith(("gate_proj.weight", "up_proj.weight")):
                parameter[:width] = own[name]
            else:
                parameter.copy_(own[name])
    model.generation_config = target.model.generation_config
    return PaddedTarget(model, target.tokenizer, target.sources, target.template)


BY_K = ("tau", "after first", "predicted")


def print_cells(cells: Sequence[DecodeCell], out: Console | None = None) -> None:
    """A table per cell."""
    out = out or Console(highlight=False)
    for cell in cells:
        cost = cell.cost
        title = f"{cell.parameters / 1e6:.1f} M parameters{' (padded with zeros)' * cell.padded}"
        table = Table(title=f"{title}, {cell.batch} at a time, {cell.rows[0].prompts} prompts")
        for heading in ("", "tokens/s", "over plain", "over generate", *BY_K, "same"):
            table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
        for row in cell.rows:
            table.add_row(*cells_of(cell, row))
        out.print(table)
        out.print(
            f"c {cost.c:.3f}, v "
            + " ".join(f"{cost.v(k):.2f}" for k in range(1, len(cost.verify)))
            + f" for K = 1..{len(cost.verify) - 1}; {cell.outside:.1%} of the time outside the models"
        )


def cells_of(cell: DecodeCell, row: Throughput) -> tuple[str, ...]:
    """One contestant's figures, as text."""
    outputs = cell.identical[row.name]
    same = f"{outputs.identical}/{outputs.prompts}"
    return (
        row.name,
        f"{row.tokens_per_second:.0f} [{row.low:.0f}, {row.high:.0f}]",
        f"{row.tokens_per_second / cell.rate('plain'):.2f}x",
        f"{row.tokens_per_second / cell.rate('generate'):.2f}x",
        f"{cell.tau[row.name]:.2f}" if row.name in cell.tau else "",
        f"{cell.after_first[row.name]:.2f}x" if row.name in cell.after_first else "",
        f"{cell.predicted[row.name]:.2f}x" if row.name in cell.predicted else "",
        same + (f" +{outputs.excused} near-ties" if outputs.excused else ""),
    )
