"""What an adapter does, beyond its row of the table: the class that a row's `code` names.

`AdapterKind` is complete for an adapter that trains shared tensors in place: its row is all there is. A
closed-form adapter overrides `fit`. One that brings tensors of its own is an `AddedTensors`, which
lists what has to be written. See docs/add-an-adapter.md.

An object of these classes is made once per row and keeps no state.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ..drafts.base import Draft
from ..models.batching import Batch
from ..models.target import Target
from .table import ADAPTERS, VOCABULARY, AdapterRow, Method

Tensors = Mapping[str, Tensor]
"""Tensors by stored name."""


@dataclass(frozen=True)
class Setup:
    """The settings that adapters read when they are attached.

    `width` is a number of neurons, a share of the shared ones, or None for 'auto'. `calibrate` runs
    the draft on a few batches.
    """

    width: int | float | None = 1.0
    rank: int = 16
    init: str = "active"
    seed: int = 0
    calibrate: Callable[[], None] | None = None


@dataclass(frozen=True)
class FitBatch:
    """A batch that the target has read: its features there, and the loss of the unchanged draft at the
    time of the call, with the number of labels."""

    batch: Batch
    features_BTF: Tensor
    loss: Callable[[], tuple[Tensor, int]]

    @property
    def size(self) -> int:
        """Tokens, padding included."""
        return self.batch.tokens_BT.numel()


@dataclass(frozen=True)
class Fitted:
    """The tensors that changed (CPU, by stored name), and the tokens read for it: by the target and
    its base, and by the draft, a backward pass counting as two readings."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    target_tokens: int = 0
    draft_tokens: int = 0
    seconds: float = 0.0


class AdapterKind:
    """An adapter that trains shared tensors in place, those of its row's name patterns."""

    def __init__(self, row: AdapterRow):
        self.row = row
        self.name = row.name

    # -- before training --

    def carries(self, draft: Draft) -> bool:
        """Whether a draft has what this adapter goes with."""
        return not self.row.in_place or bool(self.written(draft))

    def check(self, draft: Draft, method: Method, setup: Setup) -> None:
        """Raise UserError, saying what to change, for a draft and settings that do not allow it."""

    def attach(self, draft: Draft, method: Method, setup: Setup) -> None:
        """Add to `draft`, in place, what training needs. The draft must compute what it did before."""

    def fit(
        self, draft: Draft, target: Target, base: Target, batches: Callable[[], list[FitBatch]]
    ) -> Fitted:
        """Fit in closed form, in place. Called for `closed_form` rows."""
        raise NotImplementedError

    # -- which tensors --

    def adds(self, name: str) -> bool:
        """Whether a tensor of this stored name is one that this adapter brings."""
        return False

    def trains(self, name: str) -> bool:
        """Whether it trains a tensor of this stored name: one that it brings, or a shared one."""
        return any(fnmatch(name, pattern) for pattern in self.row.in_place)

    def written(self, draft: Draft) -> list[str]:
        """The draft's shared parameters that it changes, by name."""
        return [name for name in draft.trainable_names() if self.trains(name)]

    def starts_at_zero(self, name: str) -> bool:
        """Whether a tensor that it trains is zero at first, and so never decayed."""
        return False

    # -- stored --

    def peft_config(self, tensors: Tensors) -> dict[str, Any] | None:
        """What PEFT's adapter_config.json says of these tensors; None where they are no low-rank update."""
        return None

    def home(self, name: str) -> str:
        """The shared tensor that one of the adapter's goes with."""
        return name

    def card(self, shared: Tensors, tensors: Tensors) -> dict[str, object]:
        """Entries of an adapter's card, whatever the adapter is."""
        return {}

    def restore(self, draft: Draft, tensors: Tensors) -> None:
        """Write stored tensors into a draft, attaching first what holds them."""
        parameters = parameters_of(draft)
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)

    def merge(self, merged: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        """The draft's tensors that change as the adapter's are folded in, in their dtypes."""
        return {name: tensor.to(merged[name]) for name, tensor in tensors.items()}

    def extract(self, merged: Tensors, shared: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        """The adapter's tensors in a merged draft, and the draft's as they were before `merge`.

        Tensors that were replaced need nothing here: they are found by comparison.
        """
        return {}, {}


class AddedTensors(AdapterKind, ABC):
    """An adapter that brings tensors of its own into the draft. What is abstract has to be written."""

    @abstractmethod
    def adds(self, name: str) -> bool: ...

    def trains(self, name: str) -> bool:
        return self.adds(name)

    @abstractmethod
    def attach(self, draft: Draft, method: Method, setup: Setup) -> None: ...

    @abstractmethod
    def home(self, name: str) -> str: ...

    @abstractmethod
    def restore(self, draft: Draft, tensors: Tensors) -> None:
        """Attach what holds the tensors where it is not there, then `super().restore(...)`."""
        super().restore(draft, tensors)

    @abstractmethod
    def merge(self, merged: Tensors, tensors: Tensors) -> dict[str, Tensor]: ...

    @abstractmethod
    def extract(self, merged: Tensors, shared: Tensors) -> tuple[dict[str, Tensor], Tensors]: ...


# -- from rows to kinds ------------------------------------------------------------------------


@functools.cache
def load(row: AdapterRow) -> AdapterKind:
    """The object that does a row's work. Raises TypeError, naming the row, when something is missing."""
    module, _, name = row.code.rpartition(":")
    try:
        home = importlib.import_module(module if "." in module else f"{__package__}.{module}")
        kind: AdapterKind = getattr(home, name)(row)
    except (ImportError, AttributeError, TypeError) as problem:
        raise TypeError(f"adapter '{row.name}' ({row.code}): {problem}") from problem
    if row.closed_form and type(kind).fit is AdapterKind.fit:
        raise TypeError(f"adapter '{row.name}' ({row.code}) is closed_form and has no fit")
    return kind


def every_kind() -> list[AdapterKind]:
    """All adapters, in the order in which they are attached; they are merged in the reverse."""
    return [load(row) for row in (*ADAPTERS.values(), VOCABULARY)]


def kinds_of(method: Method) -> list[AdapterKind]:
    return [load(row) for row in method.rows]


def adapter_of(name: str, kinds: Sequence[AdapterKind] | None = None) -> AdapterKind | None:
    """Which of `kinds` (default: all) a tensor belongs to, as one that it brings or trains in place."""
    kinds = every_kind() if kinds is None else kinds
    added = next((kind for kind in every_kind() if kind.adds(name)), None)
    if added is not None:
        return added if added in kinds else None
    return next((kind for kind in kinds if kind.trains(name)), None)


def by_adapter(tensors: Tensors) -> list[tuple[AdapterKind, dict[str, Tensor]]]:
    """An adapter's tensors by the kind they belong to, in the order of merging."""
    owner = {name: adapter_of(name) for name in tensors}
    groups = [(k, {n: t for n, t in tensors.items() if owner[n] is k}) for k in every_kind()]
    return [(kind, mine) for kind, mine in reversed(groups) if mine]


def parameters_of(draft: Draft) -> dict[str, nn.Parameter]:
    """A draft's parameters by stored name, adapters' included."""
    return {stored_name(name): parameter for name, parameter in draft.named_parameters()}


def stored_name(name: str) -> str:
    """The name under which a parameter of an adapted draft is stored, without PEFT's wrapping."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")
