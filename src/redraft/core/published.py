"""What a draft that may be published says of where it was made: names, and no path of this machine."""

from __future__ import annotations

import os
from pathlib import PureWindowsPath
from typing import Any

CACHED = "models--"
"""How the Hub's cache begins the folder of `owner/name`."""


def without_paths(value: Any) -> Any:
    """A JSON value in which every local path is the name of its folder, a cached one its Hub id."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):  # a target with an adapter is named model+adapter
        return "+".join(map(_name, value.split("+")))
    return value


def _name(text: str) -> str:
    path = PureWindowsPath(text)  # splits at either separator
    local = text.startswith(("/", "~", ".", "\\")) or path.drive
    # `Path.exists` would raise for a text that is too long to be a path.
    if not local and not ("/" in text and os.path.exists(text)):  # noqa: PTH110
        return text
    cached = [part for part in path.parts if part.startswith(CACHED)]
    return cached[-1].removeprefix(CACHED).replace("--", "/", 1) if cached else path.name or text
