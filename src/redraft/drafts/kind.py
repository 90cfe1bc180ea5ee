"""What a kind of draft is to redraft: one row, which carries everything that is special about it.

The table of rows is `kinds.py`. Whatever treats drafts loops over it or asks a row, and names no kind.
A row without one of its parts fails where it is made, at import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..models.target import Target
from .base import Draft

Config = Mapping[str, Any]
"""A config.json."""
Tensors = Mapping[str, Tensor]
Files = tuple[dict[str, Any], dict[str, Tensor]]
"""The config.json and tensors of a folder."""
Named = tuple[Any, dict[str, Tensor]]
"""A draft's shape, and its tensors under redraft's names."""
Shapes = dict[str, tuple[int, ...]]
Rule = Callable[[Config, Tensors], Iterator[tuple[str, str]]]
"""A fact about an engine's loader: findings as level and sentence (see `checkpoints/engine_rules.py`)."""
REQUIRED: Any = object()


class Shape(Protocol):
    """The config of a draft, a frozen dataclass, as far as every kind has it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table. Raises TypeError for one with a missing part, by its name."""

    name: str

    def __post_init__(self) -> None:
        missing = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is REQUIRED]
        if missing:
            raise TypeError(f"{type(self).__name__} '{self.name}' has no {', '.join(missing)}")


@dataclass(frozen=True, kw_only=True)
class Layout(Row):
    """How a kind is stored. One that is read has `recognise` and `parse`, one that is written `lay_out`.

    A written one is a `--format`; a kind's first is its default.
    """

    recognise: Callable[[Config, Tensors, Path], bool] | None = None
    """Whether a folder is in it; raises UserError for a relative that redraft does not read."""
    parse: Callable[[Config, Tensors, Path], Named] | None = None
    """Shape and tensors of a folder; raises UserError naming what is missing, extra, or of another function."""
    describe: Callable[[Config, Tensors, Path], str] | None = None
    """The folder in words, where the layout's name does not say enough; recorded with the draft."""
    lay_out: Callable[[Any, dict[str, Tensor], str], Files] | None = None
    """The folder of a draft for the target of that name; raises UserError for one that it cannot hold."""
    engines: tuple[str, ...] = ()
    """The engines that read it."""
    serve: str = ""
    """How they are started, for the model card."""

    def __post_init__(self) -> None:
        super().__post_init__()
        halves = {"recognise": self.recognise, "parse": self.parse}
        missing = [name for name, half in halves.items() if half is None]
        if len(missing) == 1 or (missing and self.lay_out is None):
            raise TypeError(f"Layout '{self.name}' has no {', '.join(missing)}")
        if self.lay_out is not None and not self.serve:
            raise TypeError(f"Layout '{self.name}' has no serve")


@dataclass(frozen=True, kw_only=True)
class Inside:
    """How a target's own checkpoint holds a draft of a kind: by config.json and the names of its tensors."""

    find: Callable[[Config, Collection[str]], tuple[str, list[str]] | None]
    """The family of the draft that is there, and the names of its tensors."""
    declared: Callable[[Config], tuple[str, str, int | None] | None]
    """The family that config.json declares ("": one that is not known), the key that counts its layers, and how many (None: it
    does not say)."""
    not_computed: Callable[[Config, Collection[str]], str | None]
    """Why redraft does not compute a draft with these tensors; None where it does."""
    declaring: Callable[[Config, Any], Config]
    """config.json that declares a draft of that shape."""
    from_target: Callable[[Target], Draft]
    """An untrained one made of the target's own layers."""
    rename: Callable[[Config, Any, Tensors, Collection[str]], dict[str, Tensor]]
    """A draft's tensors by the names that they have in a checkpoint of these names."""


def _no_readings(config: Any, tensors: Tensors, target: Target) -> Iterator[tuple[str, Named]]:
    yield from ()


@dataclass(frozen=True, kw_only=True)
class DraftKind(Row):
    """A kind of draft. What has a default is for kinds that differ from the usual one."""

    network: type[Draft] = REQUIRED
    new: Callable[..., Draft] = REQUIRED
    """An unbound draft of the usual shape for a target: (target, width=, and its `choices`)."""
    choices: tuple[str, ...] = ()
    """What else a new one can be given, of draft_vocab (target ids of its rows) and aux_layers."""

    stored_as: str = REQUIRED
    """Which drafts are read, and whose files."""
    layouts: tuple[Layout, ...] = REQUIRED
    """Tried in this order when a folder is read."""
    build: Callable[[Any, Tensors, torch.dtype], Draft] = REQUIRED
    """The network of a shape, computing in a dtype from tensors as stored."""
    tensors: Callable[[Any], tuple[Shapes, Shapes]] = REQUIRED
    """Required and optional tensors of a shape, by redraft's names."""
    companions: Callable[[Path], dict[str, bytes]] | None = None
    """Files of a folder next to config.json and tensors, copied through."""
    check_vocabulary: Callable[[Path, Target], None] | None = None
    """Raises UserError where a folder's own tokenizer is not the target's."""
    with_rows_of: Callable[[Any, Tensors, Target], Named] | None = None
    """The draft with the target's number of vocabulary rows; None: `bind` takes other numbers."""
    pad_vocabulary: Callable[[Any, Tensors, int], Named] | None = None
    """The draft with that many rows, which engines want; None: it has the target's already."""
    check_servable: Callable[[Any], None] | None = None
    """Raises UserError for a shape that no engine has."""
    second_reading: Callable[[Draft, Path], float] = REQUIRED
    """The worst relative difference of logits between a draft and a folder that is read apart."""

    function: str = REQUIRED
    """What it computes, in a line."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """What a field of the shape means for the function when it is set."""
    reads: Callable[[Any, int | None], str] = REQUIRED
    """What it reads of a target: of a shape (None: unreadable) and the target's layers (None: no target)."""
    vocabulary: Callable[[Any, Tensors], str] = REQUIRED
    """Its vocabulary, in words."""
    config_variants: Callable[[Any, Tensors, Target], Iterator[tuple[str, Named]]] = _no_readings
    """The draft as other readings of its files have it, each with what is then wrong with them."""

    engines: Mapping[str, tuple[Rule, ...]] = REQUIRED
    """What `inspect` judges by, engine by engine."""
    canonical: Callable[[str], str] = str
    """A stored tensor's name as the rules have it."""
    judged: Callable[[Config, Tensors], tuple[Config, list[str]]] = lambda raw, _: (raw, [])
    """config.json as the rules are to see it, and what keeps all of them from judging."""
    as_served: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """The shape as an engine computes it, for engines that compute another function than the usual one."""
    inside: Inside | None = None
    """How checkpoints of targets hold one; None: they hold none."""
    methods: Mapping[str, str] = field(default_factory=dict)
    """The method's name in engines that redraft runs; an engine that is not there has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network.kind != self.name:
            raise TypeError(f"DraftKind '{self.name}' has a network of kind '{self.network.kind}'")
        if not any(layout.lay_out for layout in self.layouts):
            raise TypeError(f"DraftKind '{self.name}' has no layout that is written")

    @property
    def formats(self) -> list[str]:
        """The names of layouts that are written, the default first."""
        return [layout.name for layout in self.layouts if layout.lay_out is not None]
