"""The layouts redraft writes: one row per `--format`.

Each row turns a stored draft into the config.json and tensors of its engine. Names and shapes are
checked before anything is written, because engines load a draft with a missing tensor without
complaint and serve it at low acceptance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from ..core.errors import UserError, nearest
from ..drafts.eagle import EagleConfig
from ..drafts.eagle3 import Eagle3Config
from ..drafts.kinds import Shape
from ..drafts.token_lm import TokenLMConfig
from . import eagle, eagle3, speculators, token_lm
from .layer import check_tensors

Files = tuple[dict[str, Any], dict[str, Tensor]]
SERVED_K = 4
"""Draft tokens per step that a speculators folder asks vLLM for."""


@dataclass(frozen=True)
class Export:
    """A format: the kind of draft it holds, the engines that read it, and how it is laid out
    (from shape, tensors and the target's name)."""

    kind: str
    engines: tuple[str, ...]
    lay_out: Callable[[Shape, dict[str, Tensor], str], Files]


def _eagle3(config: Shape, tensors: dict[str, Tensor], _: str) -> Files:
    return eagle3.config_json(cast(Eagle3Config, config)), dict(tensors)


def _speculators(config: Shape, tensors: dict[str, Tensor], target: str) -> Files:
    return speculators.write(cast(Eagle3Config, config), tensors, target, SERVED_K)


def _vllm_eagle(config: Shape, tensors: dict[str, Tensor], _: str) -> Files:
    return eagle.for_vllm(cast(EagleConfig, config), tensors)


def _sglang_eagle(config: Shape, tensors: dict[str, Tensor], _: str) -> Files:
    return eagle.for_sglang(cast(EagleConfig, config), tensors)


def _hf(config: Shape, tensors: dict[str, Tensor], _: str) -> Files:
    return token_lm.lay_out(cast(TokenLMConfig, config), tensors)


EXPORTS: dict[str, Export] = {
    "eagle3": Export("eagle3", ("vllm", "sglang", "llama.cpp"), _eagle3),
    "speculators": Export("eagle3", ("vllm",), _speculators),
    "vllm-eagle": Export("eagle", ("vllm",), _vllm_eagle),
    "sglang-eagle": Export("eagle", ("sglang",), _sglang_eagle),
    "hf": Export("token_lm", ("vllm", "sglang", "transformers"), _hf),
}
EXPECTED: dict[str, Any] = {
    "eagle3": eagle3.expected_shapes,
    "eagle": eagle.expected_shapes,
    "token_lm": token_lm.expected_shapes,
}


def default_format(kind: str) -> str:
    """The first format of a kind: the one that vLLM reads."""
    return next(name for name, row in EXPORTS.items() if row.kind == kind)


def lay_out(
    format: str, kind: str, config: Shape, tensors: dict[str, Tensor], target: str
) -> Files:
    """config.json and tensors of a draft in `format`, for the target of that name.

    Raises UserError for an unknown format, one of another kind, and tensors that do not match.
    """
    if format not in EXPORTS:
        raise UserError(f"unknown export format '{format}'; {nearest(format, EXPORTS)}")
    row = EXPORTS[format]
    if row.kind != kind:
        fitting = ", ".join(name for name, other in EXPORTS.items() if other.kind == kind)
        raise UserError(
            f"format {format} holds {row.kind} drafts, this one is of kind {kind}; it can be "
            f"exported as {fitting}"
        )
    required, optional = EXPECTED[kind](config)
    check_tensors(tensors, required, optional, "cannot export")
    return row.lay_out(config, tensors, target)
