"""Chat templates: reading one from a file, the variables that it may be given, and the time that it writes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from ..core.encodings import encoding_of
from ..core.errors import UserError

DIRECTIVES = [f"%{sign}" for sign in "aAwdbBmyYHIpMSfzZjUWcxX"] + [
    f"%-{sign}" for sign in "dmHIMSj"
]
"""What a time is written with."""
FIXED_TIME = """\
{%- macro strftime_now(format) -%}
{%- set written = namespace(text=format) -%}
{%- for sign, value in rendered_at.items() -%}
{%- set written.text = written.text | replace(sign, value) -%}
{%- endfor -%}
{{- written.text -}}
{%- endmacro -%}
{{- "" }}"""
"""Put before a chat template that writes the time: it gets `rendered_at` in place of the clock's."""


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raise ValueError for a template variable that is an argument of the rendering itself."""
    from transformers import PreTrainedTokenizerBase

    reserved = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if wrong := sorted({*reserved, "messages", "rendered_at"} & variables.keys()):
        raise ValueError(f"the template variable {wrong[0]} is an argument of the rendering itself")


def read_template(path: str | None) -> str | None:
    """The text of a chat template's file, where one is named.

    Raises UserError for a file that is no text, no Jinja, or JSON (a tokenizer_config.json).
    """
    if path is None:
        return None
    where = f"--chat-template {path}"
    if not Path(path).is_file():
        found = "is a folder; name the file in it" if Path(path).is_dir() else "no such file"
        raise UserError(f"{where}: {found}")
    content = Path(path).read_bytes()
    try:
        text = content.decode(encoding_of(content)).replace("\r\n", "\n")
    except UnicodeDecodeError as problem:
        raise UserError(
            f"{where}: byte {problem.start + 1} is not {problem.encoding}; save the file as UTF-8"
        ) from None
    if not text.strip() or "\0" in text:
        raise UserError(f"{where}: expected a Jinja template, found {_kind_of(text)}")
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        _compile(where, text)
        return text
    raise UserError(
        f"{where}: expected a Jinja template, found JSON; save its chat_template value as a file of its own"
    )


def _kind_of(text: str) -> str:
    return "a binary file" if text.strip() else "an empty file"


def _compile(where: str, text: str) -> None:
    """Raise UserError for a text that is no Jinja template as Transformers reads it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as problem:
        raise unreadable(where, problem) from None


def unreadable(what: str, problem: TemplateSyntaxError) -> UserError:
    return UserError(f"{what} is no Jinja template: line {problem.lineno}: {problem.message}")
