"""How settings are put together: defaults, a file, `--set` and flags, later ones winning.

A resolved value knows where it came from. All mistakes are reported at once, before a model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import UserError, nearest
from .settings import STAGES, AdaptConfig


@dataclass(frozen=True)
class Resolved:
    """A configuration together with the origin of each value, by dotted key."""

    config: AdaptConfig
    origins: dict[str, str]


def stage_fields() -> dict[str, tuple[str, dataclasses.Field[Any]]]:
    """Every setting by dotted key: `train.lr` -> ("train", the dataclass field)."""
    found: dict[str, tuple[str, dataclasses.Field[Any]]] = {}
    for stage, stage_class in STAGES.items():
        for setting in dataclasses.fields(stage_class):
            found[f"{stage}.{setting.name}"] = (stage, setting)
    return found


def resolve(layers: list[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """Lay settings over the defaults, later layers winning.

    `layers` are (origin, {key: value}); a key is dotted (`train.lr`), nested mappings are fine.
    Raises UserError listing every unknown key (with the nearest known one) and bad value at once.
    """
    known = stage_fields()
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    mistakes: list[str] = []
    for origin, layer in layers:
        for key, value in _flatten(layer):
            if key not in known:
                mistakes.append(f"{origin}: unknown key '{key}'; {_near(key, known)}")
                continue
            try:
                values[key] = check_value(known[key][1], value)
                origins[key] = origin
            except ValueError as problem:
                mistakes.append(f"{origin}: {key} {problem}")
    if mistakes:
        raise UserError("configuration not usable:\n  " + "\n  ".join(mistakes))
    stages = {
        stage: stage_class(
            **{k.split(".", 1)[1]: v for k, v in values.items() if k.startswith(f"{stage}.")}
        )
        for stage, stage_class in STAGES.items()
    }
    return Resolved(AdaptConfig(**stages), origins)


def check_value(setting: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the field's type, within its bounds. Raises ValueError saying what was expected."""
    kind: type = {"int": int, "float": float, "str": str}[str(setting.type)]
    if isinstance(value, bool) or value is None:
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    try:
        typed = kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected {kind.__name__}, got {value!r}") from None
    if kind is int and float(value) != typed:
        raise ValueError(f"expected a whole number, got {value!r}")
    typed = setting.metadata.get("old", {}).get(typed, typed)
    choices = setting.metadata.get("choices")
    if choices and typed not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}; got '{typed}'")
    if "check" in setting.metadata:
        setting.metadata["check"](typed)
    low, high = setting.metadata.get("low"), setting.metadata.get("high")
    if (low is not None and typed < low) or (high is not None and typed > high) or typed != typed:
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"must be {bounds}; got {typed}")
    return typed


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file or recipe: a mapping of stages to settings."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as problem:
        raise UserError(f"cannot read the configuration file {path}: {problem.strerror}") from None
    except yaml.YAMLError as problem:
        raise UserError(f"{path} is not valid YAML: {problem}") from None
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: expected a mapping of stages to settings, got {type(loaded).__name__}"
        )
    return loaded


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`--set train.lr=1e-3` arguments as {key: value}."""
    pairs: dict[str, Any] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--set takes key=value, for example --set train.lr=1e-3; got '{text}'")
        pairs[key.strip()] = value.strip()
    return pairs


def recipes_folder() -> Path:
    """Where the named recipes live: inside an installed package, or at the root of a checkout."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """A recipe by name, or any YAML file by path."""
    named = recipes_folder() / f"{name}.yaml"
    if named.is_file():
        return named
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"no recipe or file named '{name}'; {nearest(name, recipe_names())}")


def _flatten(layer: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in layer.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _near(key: str, known: Mapping[str, Any]) -> str:
    """Prefer a known key with the same last word: `adapt.lr` should suggest `train.lr`."""
    last = key.rsplit(".", 1)[-1]
    same = [name for name in known if name.endswith("." + last)]
    return f"did you mean '{same[0]}'?" if same else nearest(key, known)
