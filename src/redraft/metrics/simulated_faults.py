"""Faults of serving that replay can simulate: what a draft accepts where an engine computes it wrongly.

Engines do not refuse a shifted layer, another head or a missing tensor; they accept fewer tokens. Each row
makes the draft that such an engine computes, so that its counts are known before anybody serves it. A
fault that a draft cannot have (a map that it does not hold) gives nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.load import StoredDraft
from ..core.console import Progress
from ..core.records import Answer
from ..drafts.base import Draft
from ..models.target import Target, default_aux_layers
from .replay import accepted_runs

AT_ONCE = 4
"""Drafts in memory at a time; they share the tensors that their fault leaves alone."""
BLOCK = 32
"""Numbers that share a scale in the blocks of GGUF files."""
Made = Iterator[tuple[str, Draft]]
"""Drafts with a fault, each with what the fault hit ('' where there is one way only)."""


@dataclass(frozen=True)
class Fault:
    """A row. `cause` is the message for a server that counts like this; `make` gives the drafts."""

    name: str
    cause: str
    make: Callable[[StoredDraft, Draft, Target], Made]


@dataclass(frozen=True)
class Signature:
    """What a fault accepts: for each answer the tokens of a step that begins at each position."""

    name: str
    cause: str
    runs: list[tuple[int, ...]]


def signatures(
    stored: StoredDraft,
    target: Target,
    answers: Sequence[Answer],
    k: int,
    others: Mapping[str, StoredDraft] = MappingProxyType({}),
) -> list[Signature]:
    """The signature of every fault that this draft can have, on the target's own greedy `answers`; and of `others`, drafts
    that may be served in its place, by what they are.

    Raises UserError where draft and target do not fit, and as `replay` does.
    """
    draft, found = stored.build(target), []
    with Progress("simulated faults", len(FAULTS), "faults") as progress:

        def all_made() -> Iterator[tuple[str, str, Draft]]:
            for fault in FAULTS:
                for detail, made in fault.make(stored, draft, target):
                    yield f"{fault.name} {detail}".strip(), fault.cause.format(detail), made
                progress.advance(1)
            for name, other in others.items():
                yield name, f"the server drafts with another draft, {name}", other.build(target)

        for _, alike in groupby(all_made(), key=lambda entry: entry[2].aux_layers):
            while chunk := list(islice(alike, AT_ONCE)):
                runs = accepted_runs(target, [made for *_, made in chunk], answers, k)
                found += [
                    Signature(name, cause, of_draft)
                    for (name, cause, _), of_draft in zip(chunk, runs, strict=True)
                ]
    return found


# -- what the rows make ----------------------------------------------------------------------------


def _shifted(by: int, stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """The states of neighbouring layers."""
    yield from _reading(tuple(layer + by for layer in draft.aux_layers), draft, target)


def _default_layers(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """The layers that engines read where nothing is configured, for a draft that names its own."""
    if getattr(stored.config, "aux_layers", None) and target.num_layers >= 7:
        yield from _reading(default_aux_layers(target.num_layers), draft, target)


def _reading(layers: tuple[int, ...], draft: Draft, target: Target) -> Made:
    fits = layers and layers[0] >= 0 and layers[-1] < target.num_layers
    if fits and len(layers) == len(draft.aux_layers) and layers != draft.aux_layers:
        made = draft.copy_sharing(())
        made.aux_layers = layers
        yield "", made


def _late(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """The target's states of one position before."""
    if draft.feature_size:
        made: Any = draft.copy_sharing(())
        rollout = made.rollout

        def one_late(tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int) -> Any:
            return rollout(tokens_BT, features_BTF.roll(1, dims=1), first, steps)

        made.rollout = one_late
        yield "", made


def _target_head(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """The head of the target, over its whole vocabulary."""
    head = getattr(draft, "lm_head", None)
    if head is not None and target.head is not None and target.hidden_size == draft.hidden_size:
        made: Any = draft.copy_sharing(())
        made.lm_head, made.draft_vocab = target.head, None
        yield "", made


def _target_embedding(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """The embedding of the target, for a draft that has its own."""
    own = getattr(draft, "embed_tokens", None)
    if own is not None and target.hidden_size == draft.hidden_size:
        made: Any = draft.copy_sharing(())
        made.embed_tokens, made.shared_embedding = None, target.embedding_VH.detach()
        yield "", made


def _absolute_map(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """The offsets of d2t taken as token ids."""
    if draft.draft_vocab is not None:
        rows = torch.arange(len(draft.draft_vocab), device=draft.draft_vocab.device)
        yield from _mapped(draft, draft.draft_vocab - rows)


def _no_map(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """Rows of the draft's head taken as token ids."""
    if draft.draft_vocab is not None:
        ids = torch.arange(len(draft.draft_vocab), device=draft.draft_vocab.device)
        yield from _mapped(draft, ids)


def _mapped(draft: Draft, ids_D: Tensor) -> Made:
    made = draft.copy_sharing(())
    made.draft_vocab = ids_D
    yield "", made


def _flag(name: str, stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """A flag of the shape read as its opposite, where the tensors allow it."""
    for value in (False, True):
        yield from _configured(stored, target, {name: value})


def _silu(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """The usual activation in place of another one."""
    yield from _configured(stored, target, {"hidden_act": "silu"})


def _usual_rope(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """Rotary frequencies of the usual base, unscaled."""
    usual = {"rope_type": "default", "rope_theta": 10000.0}
    yield from _configured(stored, target, {"rope_parameters": usual})


def _configured(stored: StoredDraft, target: Target, changes: dict[str, Any]) -> Made:
    """The draft under another config, if that is another one and needs no tensor that is not there."""
    stored = stored.fitted(target)
    fields = {field.name for field in dataclasses.fields(stored.config)}
    if not set(changes) <= fields:
        return
    config = dataclasses.replace(stored.config, **changes)
    required, optional = stored.row.tensors(config)
    if config == stored.config or not set(required) <= set(stored.tensors):
        return
    tensors = {n: t for n, t in stored.tensors.items() if n in required or n in optional}
    yield "", dataclasses.replace(stored, config=config, tensors=tensors).build(target)


def _no_cache(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """Every pair attends to itself alone."""
    if hasattr(draft, "window"):
        made: Any = draft.copy_sharing(())
        made.window = 1
        yield "", made


def _missing(stored: StoredDraft, draft: Draft, target: Target) -> Made:
    """Each tensor at the value that it has before files are read: norms one, matrices zero."""
    if not draft.feeds_back:
        return  # engines load whole language models by loaders that refuse a missing tensor
    for name in draft.trainable_names():
        made = draft.copy_sharing([name])
        tensor = made.get_parameter(name)
        tensor.data.fill_(1.0 if tensor.dim() == 1 and not name.endswith("bias") else 0.0)
        yield name, made


def _rounded(
    rounding: Callable[[Tensor], Tensor], stored: StoredDraft, draft: Draft, target: Target
) -> Made:
    """Every matrix rounded and back."""
    names = [n for n in draft.trainable_names() if draft.get_parameter(n).dim() > 1]
    made = draft.copy_sharing(names)
    for name in names:
        weight = made.get_parameter(name)
        weight.data.copy_(rounding(weight.data.float()))
    yield "", made


def eight_bit(weight: Tensor) -> Tensor:
    """A float32 matrix in blocks of 8 bits (Q8_0) and back; one that has no whole blocks unchanged."""
    blocks = _blocks(weight)
    if blocks is None:
        return weight
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    times = (blocks * (1 / scale)).nan_to_num(0.0)
    whole = (times.abs() + 0.5).floor() * times.sign()  # halves away from zero, as in C
    return (whole * scale.half().float()).view_as(weight)


def four_bit(weight: Tensor) -> Tensor:
    """A float32 matrix in blocks of 4 bits (Q4_0) and back; one that has no whole blocks unchanged."""
    blocks = _blocks(weight)
    if blocks is None:
        return weight
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    times = (blocks * (1 / scale)).nan_to_num(0.0)
    whole = (times + 8.5).floor().clamp(0, 15) - 8
    return (whole * scale.half().float()).view_as(weight)


def _blocks(weight: Tensor) -> Tensor | None:
    return weight.reshape(-1, BLOCK) if weight.shape[-1] % BLOCK == 0 else None


def _through(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype).float()


def _of_flag(name: str) -> Fault:
    return Fault(
        f"{name} read wrongly",
        f"the engine ignores {name} of the draft's config.json, or takes it for set where it is not",
        functools.partial(_flag, name),
    )


FAULTS: tuple[Fault, ...] = (
    Fault(
        "aux layers +1",
        "the engine feeds the draft the target's states one layer too late: aux layer ids read in the "
        "other numbering (hs[k] against the output of layer k)",
        functools.partial(_shifted, 1),
    ),
    Fault(
        "aux layers -1",
        "the engine feeds the draft the target's states one layer too early: aux layer ids read in the "
        "other numbering (hs[k] against the output of layer k)",
        functools.partial(_shifted, -1),
    ),
    Fault(
        "default aux layers",
        "the engine ignores the draft's aux layer ids and reads the default ones",
        _default_layers,
    ),
    Fault(
        "states one token late",
        "the engine pairs each token with the target's states of the position before",
        _late,
    ),
    Fault(
        "head of the target",
        "the engine replaces the draft's own head by the target's",
        _target_head,
    ),
    Fault(
        "embedding of the target",
        "the engine replaces the draft's own embedding by the target's",
        _target_embedding,
    ),
    Fault(
        "d2t as absolute ids",
        "the engine reads d2t as token ids where it holds offsets (or adds no row to it)",
        _absolute_map,
    ),
    Fault(
        "d2t ignored",
        "the engine takes rows of the draft's head for token ids: d2t is missing or not read",
        _no_map,
    ),
    _of_flag("norm_before_residual"),
    _of_flag("norm_before_fc"),
    _of_flag("norm_output"),
    _of_flag("fc_norm"),
    _of_flag("fc_bias"),
    _of_flag("qkv_bias"),
    _of_flag("o_bias"),
    _of_flag("head_norms"),
    Fault(
        "another activation", "the engine ignores hidden_act of the draft and computes silu", _silu
    ),
    Fault(
        "another rotary base",
        "the engine ignores the draft's rotary settings and takes base 10,000 without scaling",
        _usual_rope,
    ),
    Fault(
        "draft cache lost",
        "the draft sees no token before the present one: its cache is read before it is written, or lost",
        _no_cache,
    ),
    Fault(
        "missing tensor",
        "the engine never loaded {} of the draft and serves the value it began with",
        _missing,
    ),
    Fault(
        "draft in float16",
        "the draft's weights are served in float16",
        functools.partial(_rounded, functools.partial(_through, torch.float16)),
    ),
    Fault(
        "draft in bfloat16",
        "the draft's weights are served in bfloat16",
        functools.partial(_rounded, functools.partial(_through, torch.bfloat16)),
    ),
    Fault(
        "draft quantised to 8 bits",
        "the draft is served quantised, about 8 bits a weight (as Q8_0)",
        functools.partial(_rounded, eight_bit),
    ),
    Fault(
        "draft quantised to 4 bits",
        "the draft is served quantised, about 4 bits a weight (as Q4_0)",
        functools.partial(_rounded, four_bit),
    ),
)
