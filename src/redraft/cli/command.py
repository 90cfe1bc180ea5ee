"""Commands whose flags come from one schema: the names of their parameters.

A parameter of a command function is one of four things:

    a name in FLAGS          the flag of that name (`flag_table.py`); the function gives type and default
    a bundle of flags        a dataclass whose fields are names in FLAGS, such as `TargetFlags`
    `config: Resolved`       the settings of the stages that the command names; each may be a flag too
    a `typer.Context`        of a group that is a command itself, which tells whether one of its own was named

Every command also takes `--config FILE` and `--set KEY=VALUE`. Their keys are settings (`train.lr`) and
the command's own flags (`target`, `max-new-tokens`); a flag on the command line goes first.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..config import STAGES, parse_set, read_yaml, recipe_path, resolve, stage_fields
from ..core.errors import UserError, nearest
from .addresses import at_hand
from .flag_table import FLAGS, OUTPUT, SETTING_GROUPS, Flag
from .together import together

KINDS = {"int": int, "float": float, "str": str}


class GroupedCommand(TyperCommand):
    """A command whose help lists its flags by group, without the old names of flags."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_flags(self, ctx, formatter)


class Group(TyperGroup):
    """A group of commands whose list shows each one's first sentence whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(limit=400)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class FlaggedGroup(Group):
    """A group that is a command itself, with flags as in `GroupedCommand`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_flags(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def _write_flags(command: Any, ctx: Any, formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        argument = parameter.param_type_name == "argument"
        group = "Arguments" if argument else getattr(parameter, "rich_help_panel", None)
        head = record[0]
        for old in parameter.opts[1:]:
            if old.startswith("--"):  # a name of before; -q is shown
                head = head.replace(f", {old}", "")
        groups.setdefault(group or OUTPUT, []).append((head, record[1]))
    for group, rows in sorted(groups.items(), key=lambda item: item[0] == OUTPUT):
        with formatter.section(group):
            formatter.write_dl(rows)


def add_command(
    app: typer.Typer,
    function: Callable[..., None],
    *,
    name: str | None = None,
    hidden: bool = False,
    shares: bool = False,
    **schema: Any,
) -> None:
    """Register a command function with the flags that `with_flags` gives it by `schema`.

    One that `shares` its work out may be run by several processes at once (see `together.py`).
    """
    command = _together(with_flags(function, **schema), name or function.__name__, shares)
    app.command(name or function.__name__, cls=GroupedCommand, hidden=hidden)(command)


def _together(command: Callable[..., None], name: str, shares: bool) -> Callable[..., None]:
    @functools.wraps(command)
    def run(**given: Any) -> None:
        with together(name, shares):
            command(**given)

    return run


def with_flags(
    function: Callable[..., None],
    *,
    settings: tuple[str, ...] = (),
    flags_of: tuple[str, ...] | None = None,
    help: Mapping[str, str] | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Callable[..., None]:
    """A command function (see above) as Typer reads it.

    `settings` are stages whose settings the command uses; those in `flags_of` (stages, or single
    settings by dotted key; default: the same stages) are flags. `help` replaces the help of single flags
    where this command means something special. `flags` are more than those in FLAGS. Raises KeyError
    for a parameter that is no flag.
    """
    signature = inspect.signature(function, eval_str=True)
    known, text = {**FLAGS, **(flags or {})}, help or {}
    bundles: dict[str, Any] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        kind: Any = parameter.annotation
        if dataclasses.is_dataclass(kind) and name != "config":
            bundles[name] = kind
            for one in inspect.signature(bundles[name], eval_str=True).parameters.values():
                parameters[one.name] = _flag(one, known[one.name], text)
        elif kind is typer.Context:
            parameters[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        elif name != "config":
            parameters[name] = _flag(parameter, known[name], text)
    chosen = set(settings if flags_of is None else flags_of)
    by_name = {
        key.replace(".", "__"): key for key in stage_fields() if {key, key.split(".")[0]} & chosen
    }
    parameters |= {name: _setting_flag(name, key) for name, key in by_name.items()}
    parameters |= {parameter.name: parameter for parameter in (_CONFIG, _ASSIGNMENTS)}

    @functools.wraps(function)
    def wrapper(**given: Any) -> None:
        file, assigned = given.pop("config_file"), given.pop("assignments")
        set_flags = {key: joined(given.pop(name)) for name, key in by_name.items()}
        resolved = resolve(_layers(file, assigned, set_flags, settings, function.__name__))
        with at_hand(given) as local:
            for name, bundle in bundles.items():
                names = [field.name for field in dataclasses.fields(bundle)]
                local[name] = bundle(**{one: local.pop(one) for one in names})
            if "config" in signature.parameters:
                local["config"] = resolved
            function(**local)

    wrapper.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    wrapper.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return wrapper


def _flag(parameter: inspect.Parameter, flag: Flag, help: Mapping[str, str]) -> inspect.Parameter:
    """A parameter as Typer has it, with the names, bounds, help and group of its flag."""
    text = help.get(parameter.name, flag.help)
    if flag.argument:
        info: Any = typer.Argument(help=text)
    else:
        names = (flag.name or "--" + parameter.name.replace("_", "-"), *flag.old)
        info = typer.Option(
            *names,
            help=text,
            min=flag.low,
            max=flag.high,
            rich_help_panel=flag.group,
        )
    return parameter.replace(
        kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[parameter.annotation, info]
    )


def _setting_flag(name: str, key: str) -> inspect.Parameter:
    """The flag of a setting; not given, it is None."""
    field = stage_fields()[key][1]
    many = field.metadata.get("many")
    choices = field.metadata.get("choices")
    text = f"{field.metadata['help']} [default: {field.default}]"
    text += f" (one of: {', '.join(choices)})" if choices else ""
    text += "; repeatable" if many else ""
    group = SETTING_GROUPS[key.split(".")[0]]
    flag = typer.Option(flag_of(key), help=text, show_default=False, rich_help_panel=group)
    kind: Any = list[str] if many else KINDS[str(field.type)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
    )


def flag_of(key: str) -> str:
    """The flag of a setting that is named by its dotted key."""
    field = stage_fields()[key][1]
    return "--" + str(field.metadata.get("flag", field.name)).replace("_", "-")


def joined(given: Any) -> Any:
    """A repeatable flag as the setting's text; no flag at all as None."""
    return ",".join(given) or None if isinstance(given, list) else given


def _file_defaults(context: typer.Context, value: str | None) -> str | None:
    """Take the flags in a `--config` file as defaults of this command's. Others' are passed over."""
    if value is not None:
        path = recipe_path(value)
        for key, given in read_yaml(path).items():
            if key not in STAGES:
                _default(context, str(path), key, given, "file")
    return value


def _set_defaults(context: typer.Context, value: list[str] | None) -> list[str] | None:
    """Take `--set FLAG=VALUE` as a default of this command's flag."""
    for key, given in parse_set(value or []).items():
        if "." not in key:
            _default(context, "--set", key, given, "set")
    return value


def _default(context: typer.Context, origin: str, key: str, given: Any, way: str) -> None:
    own = {flag.lstrip("-"): p.name for p in context.command.params for flag in p.opts}
    everyone = {
        (flag.name or f"--{name}").lstrip("-").replace("_", "-") for name, flag in FLAGS.items()
    }
    name = key.replace("_", "-")
    if name not in own and (way == "set" or name not in everyone):
        raise UserError(
            f"{origin}: unknown key '{key}'; {nearest(name, sorted(own))}; settings have a dot, as train.lr"
        )
    if name in own:
        before = context.default_map or {}
        new = {own[name]: given}
        context.default_map = {**before, **new} if way == "set" else {**new, **before}


def _layers(
    file: str | None,
    assigned: list[str] | None,
    flags: Mapping[str, Any],
    used: tuple[str, ...],
    command: str,
) -> list[tuple[str, Mapping[str, Any]]]:
    """The settings that were given, later layers winning."""
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        path = recipe_path(file)
        stages = {key: value for key, value in read_yaml(path).items() if key in STAGES}
        layers.append((str(path), stages))
    named = {key: value for key, value in parse_set(assigned or []).items() if "." in key}
    for key in named:
        if key.split(".")[0] in STAGES and key.split(".")[0] not in used:
            raise UserError(
                f"--set {key}: redraft {command} does not use it; it uses the settings of "
                f"{', '.join(used) or 'no stage'}"
            )
    given = {key: value for key, value in flags.items() if value is not None}
    return [*layers, ("--set", named), ("flag", given)]


def _common(name: str, kind: Any, flag: str, help: str, callback: Callable[..., Any]) -> Any:
    info = typer.Option(flag, help=help, rich_help_panel=OUTPUT, is_eager=True, callback=callback)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


_CONFIG = _common(
    "config_file",
    str,
    "--config",
    "recipe name or YAML file of settings and flags",
    _file_defaults,
)
_ASSIGNMENTS = _common(
    "assignments",
    list[str],
    "--set",
    "one setting or flag, e.g. train.lr=1e-3; repeatable",
    _set_defaults,
)
