"""Flags that several of these commands share; their help is that of redraft's own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from redraft.cli.bundles import TargetFlags, print_json
from redraft.cli.flag_table import FLAGS

__all__ = ["load", "print_json"]


def _option(name: str, flag: str) -> Any:
    return typer.Option(flag, help=FLAGS[name].help, min=FLAGS[name].low)


TargetFlag = Annotated[str, _option("target", "--target")]
AdapterFlag = Annotated[str | None, _option("target_adapter", "--target-adapter")]
TemplateFlag = Annotated[str | None, _option("chat_template", "--chat-template")]
TemplateArgFlag = Annotated[list[str] | None, _option("template_arg", "--template-arg")]
DtypeFlag = Annotated[str, _option("dtype", "--dtype")]
DraftFlag = Annotated[str, _option("draft", "--draft")]
PromptsFlag = Annotated[str, _option("prompts", "--prompts")]
TemperatureFlag = Annotated[float, _option("temperature", "--temperature")]
JsonFlag = Annotated[bool, _option("as_json", "--json")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help=FLAGS["quiet"].help)]


def load(
    source: str,
    adapter: str | None,
    template: str | None,
    dtype: str,
    template_arg: list[str] | None = None,
) -> Any:
    """The target that the flags describe."""
    return TargetFlags(source, adapter, template, template_arg, dtype).load()
