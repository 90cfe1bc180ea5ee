"""Bundles of flags that several commands share, and what becomes of them.

Each field is a name in `flag_table.FLAGS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from ..core.console import set_quiet
from ..core.errors import UserError


@dataclass(frozen=True)
class TargetFlags:
    """A target and how it is loaded."""

    target: str
    target_adapter: str | None = None
    chat_template: str | None = None
    template_arg: list[str] | None = None
    dtype: str = "auto"
    device_map: str | None = None
    max_memory: str | None = None

    def load(self, **more: Any) -> Any:
        """The target. Raises UserError for what is none."""
        from ..models.loading import load_target

        given = template_args_from(self.template_arg)  # first: a slip should not cost loading
        return load_target(
            self.target,
            adapter=self.target_adapter,
            chat_template=self.chat_template,
            template_args=given,
            dtype=self.dtype,
            device_map=self.device_map,
            max_memory=self.max_memory,
            **more,
        )

    def load_plain(self, source: str | None) -> Any:
        """Another model in this dtype, such as the base; None for None."""
        if not source:
            return None
        return TargetFlags(
            source, dtype=self.dtype, device_map=self.device_map, max_memory=self.max_memory
        ).load()


@dataclass(frozen=True)
class MaybeTargetFlags:
    """As `TargetFlags`, for commands that can do without a target."""

    target: str | None = None
    target_adapter: str | None = None
    chat_template: str | None = None
    template_arg: list[str] | None = None
    dtype: str = "auto"
    device_map: str | None = None
    max_memory: str | None = None

    def load_plain(self, source: str | None) -> Any:
        """Another model in this dtype, such as the base; None for None."""
        return TargetFlags(
            "", dtype=self.dtype, device_map=self.device_map, max_memory=self.max_memory
        ).load_plain(source)

    def named(self) -> TargetFlags | None:
        """The flags of a target that was named."""
        if self.target is None:
            return None
        return TargetFlags(**{each.name: getattr(self, each.name) for each in fields(TargetFlags)})


@dataclass(frozen=True)
class FeatureFlags:
    """Stored features in place of the target's layers."""

    features: list[str] | None = None
    feature_aux_layers: str | None = None
    allow_pickle: bool = False

    def load(self, models: TargetFlags) -> Any:
        """The target: without its layers where there are stored features, else whole."""
        if not self.features:
            return models.load()
        return load_stored(models, self.features, self.feature_aux_layers, self.allow_pickle)


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are drawn."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def sampling(self) -> Any:
        from ..decoding.sampling import Sampling

        return Sampling.of(self)


@dataclass(frozen=True)
class OutputFlags:
    """What is printed, and how."""

    as_json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        set_quiet(self.quiet)

    def finish(self, text: str, content: dict[str, Any]) -> None:
        """The result, as text or as one JSON object."""
        self.show(content, lambda: typer.echo(text))

    def show(self, content: dict[str, Any], printed: Callable[[], None]) -> None:
        """The result, printed or as one JSON object."""
        if self.as_json:
            print_json(content)
        else:
            printed()


def refuse_with_endpoint(flags: Mapping[str, object]) -> None:
    """Raise UserError for flags, by name, that need the weights: a server cannot use them."""
    named = [f"--{flag}" for flag, value in flags.items() if value is not None]
    if named:
        raise UserError(
            f"--endpoint asks a server, which cannot use {', '.join(named)}: leave these "
            "out, or leave out --endpoint"
        )


def load_stored(
    models: TargetFlags, folders: list[str], aux_layers: str | None, allow_pickle: bool
) -> Any:
    """The target without its layers, with stored features in their place."""
    from ..features.layouts import open_features
    from ..features.stored_target import load_stored_target

    named = aux_layers_from(aux_layers)
    rows = [open_features(Path(folder), named, unpickle=allow_pickle) for folder in folders]
    return load_stored_target(
        models.target,
        rows,
        adapter=models.target_adapter,
        chat_template=models.chat_template,
        template_args=template_args_from(models.template_arg),
        dtype=models.dtype,
    )


def aux_layers_from(text: str | None) -> tuple[int, ...] | None:
    """The numbers that --aux-layers names; none for ''."""
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(",") if text)
    except ValueError:
        raise UserError(
            f"--aux-layers takes layer numbers, for example 2,4,5; got '{text}'"
        ) from None


def template_args_from(given: list[str] | None) -> dict[str, Any]:
    """The variables of `--template-arg key=value`; a value that is JSON (false, 3) is taken as JSON."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(
                f"--template-arg takes NAME=VALUE, for example enable_thinking=false; got '{text}'"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def k_from(text: str) -> int | None:
    """The number that --k names; None for auto."""
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= 16:
        raise UserError(f"--k takes a whole number from 1 to 16, or auto; got '{text}'")
    return int(text)


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content))
