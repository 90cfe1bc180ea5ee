"""`redraft plan`: memory, tokens and time of an adaptation, from config.json alone.

The target and the draft are built without numbers (PyTorch's `meta` tensors), so a model of any size takes a second. Parameters are
counted, the draft's operations and what its backward pass keeps are those of its own code; the target's are two per parameter and
token that takes part, and its attention.

    training          the target's layers once for each answer, and for each pass the target's head and 3 x the draft's rollout
                      and head, or less where less trains; divided by the rate of products. Several devices are of one
                      machine, whose memory keeps the states of all answers (see `training/stream.py`)
    answers           a step of 64 rows reads the weights that take part once: the longer of reading and computing

Padding, prefill, and what the answers that are measured cost, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import prepare
from ..adapters.kind import Setup
from ..config import TrainConfig
from ..core.errors import UserError, as_sentence
from ..core.records import versions
from ..drafts.base import Draft
from ..drafts.kinds import kind_names
from ..drafts.new import new_draft
from ..features.writer import token_bytes
from ..models.loading import DTYPES, read_config
from ..models.target import Target
from ..training.flops import counted, products_of_trained
from ..training.memory import columns, predict_growth
from ..training.stream import SHARE_KEPT
from ..training.teacher_batch import layers_read
from .devices import Device

ROWS = 64
"""Answers written together."""
LIBRARIES = {"cuda": 1.0e9, "cpu": 0.6e9}
"""Bytes that PyTorch and its libraries take themselves, about."""
EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
OF_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True)
class Sizes:
    """What is asked: `prompts` of so many tokens, answers of so many, which are trained on; `draft_vocab` None is the target's."""

    prompts: int = 500
    prompt_tokens: int = 128
    answer_tokens: int = 192
    kind: str | None = None
    draft_vocab: int | None = None


@dataclass(frozen=True)
class Plan:
    """Bytes, tokens, operations and seconds. `active` are the target's parameters that take part in a token.

    `train_bytes` are those of training next to the target, `stored_bytes` of training on stored features, where the target's
    layers are not there; `feature_bytes` are those features on disk. `kept_bytes` are the target's states of all answers, kept in
    the machine's memory for later passes: next to `train_bytes` with a GPU, among them without. Seconds are on `devices` of the
    kind `device`, which train as so many processes on shares of each batch.
    """

    target: str
    dtype: str
    parameters: int
    active: int
    target_bytes: float
    draft: str
    draft_parameters: int
    trained_parameters: int
    sizes: Sizes
    answer_tokens: int
    train_tokens: int
    train_bytes: float
    stored_bytes: float
    feature_bytes: float
    kept_bytes: float
    target_flops: float
    draft_flops: float
    device: str
    devices: int
    measured: bool
    memory: float
    answer_seconds: float
    train_seconds: float
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def fits(self) -> bool:
        """Whether training next to the target fits into one device."""
        return self.train_bytes <= self.memory


@dataclass(frozen=True)
class Planned:
    """Training as `predict_growth` looks at it."""

    draft: Draft
    config: TrainConfig
    parameters: list[nn.Parameter]


def target_of_shapes(source: str, dtype: str = "auto") -> Target:
    """The target that a config.json describes (a folder or Hub id), without numbers and without a tokenizer.

    Raises UserError for what is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {dtype}: unknown; known: auto, {', '.join(DTYPES)}")
    stored = getattr(config, "dtype", None) or torch.bfloat16
    chosen = stored if dtype == "auto" else getattr(torch, dtype)
    with as_sentence(f"target {source}: no model can be laid out"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
    return Target(model, None, [source])


def plan(
    target: Target, sizes: Sizes, config: TrainConfig, device: Device, devices: int = 1
) -> Plan:
    """The plan of adapting a draft of `sizes.kind` to a target without numbers (see `target_of_shapes`).

    Raises UserError for a kind or a method that needs numbers to be laid out.
    """
    draft, trained = _laid_out(target, sizes, config)
    length = sizes.prompt_tokens + sizes.answer_tokens
    rows = max(config.batch_tokens // length, 1)
    planned = Planned(draft, config, trained)
    per_process = -(-rows // devices) * length
    growth = 1e6 * predict_growth(target, [planned], per_process, length, sizes.prompt_tokens - 1)
    on_cpu = device.measured and not torch.cuda.is_available()
    libraries = LIBRARIES["cpu" if on_cpu else "cuda"]
    total = target.parameter_count
    active, weights = _active(target), _bytes(target.model)
    draft_bytes = 4.0 * sum(p.numel() for p in draft.parameters())
    around = _bytes(nn.ModuleList([target.model.get_input_embeddings(), target.head]))
    epochs = config.epochs or 0.0
    seen = round(sizes.prompts * length * epochs)
    taken = weights + draft_bytes + growth + libraries
    states = _states(target, draft, sizes) if epochs > 1 else 0.0
    most = min(SHARE_KEPT * (device.memory - weights), device.memory - taken)
    if on_cpu and states > most:
        states = 0.0  # as training drops them
    read = sizes.prompts * length if states else seen
    kept = [layer for layer in draft.aux_layers if layer != target.num_layers]
    labels = (sizes.answer_tokens - 1) / length  # an answer's first token comes from the prefill
    steps = config.rollout if draft.feeds_back else 1
    of_target = 2.0 * (active - _embedding(target)) + _attention(target, length)
    of_head = 2.0 * target.hidden_size * columns(target, draft) * labels
    of_draft = _draft_step(draft, rows, sizes, steps)
    flops = of_target * read + of_head * seen, of_draft * seen
    answers = sizes.prompts * sizes.answer_tokens
    step = max(
        active * target.dtype.itemsize / device.bandwidth, 2.0 * ROWS * active / device.flops
    )
    return Plan(
        target=target.name,
        dtype=str(target.dtype).removeprefix("torch."),
        parameters=total,
        active=active,
        target_bytes=weights,
        draft=draft.kind,
        draft_parameters=sum(p.numel() for p in draft.parameters()),
        trained_parameters=sum(p.numel() for p in trained),
        sizes=sizes,
        answer_tokens=answers,
        train_tokens=seen,
        train_bytes=taken + (states if on_cpu else 0.0),
        stored_bytes=around + draft_bytes + growth + libraries,
        kept_bytes=states,
        feature_bytes=float(
            sizes.prompts * length * token_bytes(kept, target.hidden_size, target.dtype)
        ),
        target_flops=flops[0],
        draft_flops=flops[1],
        device=device.name,
        devices=devices,
        measured=device.measured,
        memory=device.memory,
        answer_seconds=answers / ROWS * step / devices,
        train_seconds=sum(flops) / device.flops / devices,
    )


def _states(target: Target, draft: Draft, sizes: Sizes) -> float:
    """Bytes of the target's states of all answers, as training keeps them."""
    tokens = sizes.prompts * (sizes.prompt_tokens + sizes.answer_tokens)
    layers = len(layers_read(target, draft.aux_layers))
    return float(tokens * layers * target.hidden_size * target.dtype.itemsize)


def lines_of(found: Plan) -> list[str]:
    """The plan as text."""
    s, gb = found.sizes, 1e9
    where = found.device if found.devices == 1 else f"{found.devices} x {found.device}"
    active = (
        f", of which {found.active / 1e9:,.2f} billion take part in a token"
        if found.active < found.parameters
        else ""
    )
    lines = [
        f"target      {found.parameters / 1e9:,.2f} billion parameters{active}; {found.target_bytes / gb:,.1f} GB in {found.dtype}",
        f"draft       {found.draft}, {found.draft_parameters / 1e6:,.1f} million parameters, {found.trained_parameters / 1e6:,.1f} of them trained",
        f"answers     {s.prompts:,} of {s.answer_tokens} tokens: {found.answer_tokens:,} tokens, {_time(found.answer_seconds)} in an engine, {ROWS} at a time",
        f"training    {found.train_tokens:,} tokens, {(found.target_flops + found.draft_flops) / 1e15:,.3f} PFLOP ({_share(found)} of them the target's): {_time(found.train_seconds)}",
        f"memory      {found.train_bytes / gb:,.1f} GB with the target, {found.stored_bytes / gb:,.1f} GB on stored features, which take {found.feature_bytes / gb:,.2f} GB of disk",
    ]
    if found.kept_bytes:
        lines.append(
            f"kept        the target's states of all answers, {found.kept_bytes / gb:,.2f} GB of the machine's memory, so that it reads each once"
        )
    of = f"{found.memory / gb:,.0f} GB of {'memory that is free' if found.measured else 'memory'}"
    if found.fits:
        lines.append(f"fits        on {where}, {of}")
    elif found.stored_bytes <= found.memory:
        lines.append(
            f"fits        not with the target on one {found.device} ({of}): spread its layers (--device-map auto), or train on features that an "
            "engine captures (redraft features --capture)"
        )
    else:
        lines.append(
            f"fits        not on one {found.device} ({of}), not even on stored features: lower train.batch_tokens, take a smaller draft "
            "vocabulary or a smaller adapter"
        )
    rates = "tried here just now" if found.measured else "assumed shares of the data sheet's"
    lines.append(f"rates       {rates}; memory is a lower bound, seconds are estimates")
    return lines


def _share(found: Plan) -> str:
    return f"{found.target_flops / (found.target_flops + found.draft_flops):.0%}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _laid_out(
    target: Target, sizes: Sizes, config: TrainConfig
) -> tuple[Draft, list[nn.Parameter]]:
    """A draft without numbers with its adapter, and what trains."""
    size = sizes.draft_vocab
    if size is not None and not 0 < size <= target.vocab_size:
        raise UserError(
            f"--draft-vocab {size}: expected 1 to {target.vocab_size}, the target's tokens"
        )
    setup = Setup(config.width_value, config.rank, "random", config.seed)
    try:
        with torch.device("meta"):
            draft = new_draft(target, [], kind=sizes.kind, draft_vocab_size=size)
            trained = prepare(draft, config.method_value, setup)
    except (RuntimeError, UserError) as problem:
        cause = problem.__cause__ if isinstance(problem, UserError) else problem
        if not isinstance(cause, RuntimeError):  # not that numbers are missing
            raise
        raise UserError(
            f"a draft of kind {sizes.kind or kind_names()[0]} with --method {config.method} cannot be laid out without numbers "
            f"({cause}); plan another --kind, or --method body, full or lora"
        ) from None
    draft.to("meta")
    return draft, [parameter for _, parameter in trained]


def _draft_step(draft: Draft, rows: int, sizes: Sizes, steps: int) -> float:
    """The draft's operations per token of a training step, as `flops.py` counts them."""
    length = sizes.prompt_tokens + sizes.answer_tokens
    tokens = torch.zeros(rows, length, dtype=torch.long, device="meta")
    features = torch.zeros(rows, length, draft.feature_size, device="meta")
    labels = sum(max(sizes.answer_tokens - 1 - step, 0) for step in range(steps))
    last: list[Any] = []

    def roll_out() -> None:
        for states in draft.rollout(tokens, features, sizes.prompt_tokens - 1, steps):
            last[:] = [states[:1, :1]]

    total = trained = 0.0
    for work, times in ((roll_out, 1), (lambda: draft.logits(last[0]), rows * labels)):
        with torch.no_grad(), products_of_trained(draft) as products:
            total += times * counted(work)
        trained += times * sum(products)
    return (2 * total + trained) / (rows * length)


def _active(target: Target) -> int:
    """Parameters that take part in a token: of routed experts as many as are chosen."""
    config = target.model.config.get_text_config()
    chosen = next((getattr(config, n) for n in EXPERTS if getattr(config, n, None)), None)
    there = next((getattr(config, n) for n in OF_EXPERTS if getattr(config, n, None)), None)
    share = min(chosen / there, 1.0) if chosen and there else 1.0
    routed = sum(
        p.numel()
        for name, p in target.model.named_parameters()
        if ".experts." in name and "shared" not in name
    )
    total = sum(p.numel() for p in target.model.parameters())
    return int(total - routed * (1 - share))


def _embedding(target: Target) -> int:
    """Parameters that no product of a layer uses: the embedding, and the head, which few positions need."""
    found: dict[int, int] = {id(w): w.numel() for w in (target.embedding_VH, target.head.weight)}
    return int(sum(found.values()))


def _attention(target: Target, length: int) -> float:
    """Operations of attention per token of a row of so many, its mean over positions; layers with a state count as well."""
    config = target.model.config.get_text_config()
    heads: int = config.num_attention_heads
    wide: int = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4.0 * target.num_layers * wide * length / 2


def _bytes(module: Any) -> float:
    return float(sum(p.numel() * p.itemsize for p in module.parameters()))
