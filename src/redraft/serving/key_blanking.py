"""The one place that blanks an API key in text of a server, which may repeat it in any notation."""

from __future__ import annotations

import base64
import functools
import html
import re

SECRET = 8
"""A key this long is a secret and no common word; the base64 of a shorter one is not looked for."""


def blanked(text: str, key: str | None) -> str:
    """`text` without the key: unchanged, escaped (JSON, URL, HTML), or in base64."""
    return _notations(key).sub("***", text) if key else text


@functools.lru_cache(maxsize=8)
def _notations(key: str) -> re.Pattern[str]:
    ways = ["".join(map(_character, key))]
    if len(key) >= SECRET:
        ways += [_base64(key, before) for before in range(3)]
    return re.compile("|".join(ways))


def _character(c: str) -> str:
    """A pattern for one character, which may be escaped more than once."""
    code, back = f"{ord(c):02x}", r"\\{1,8}"
    named = html.escape(c)
    ways = [
        r"\\{0,8}" + re.escape(c),
        f"{back}(?i:u00{code}|x{code})",
        f"%(?:25){{0,4}}(?i:{code})",
        f"&(?:amp;){{0,4}}(?:#0*{ord(c)}|#(?i:x0*{code}){'|' + named[1:-1] if named != c else ''});",
    ]
    return f"(?:{'|'.join(ways)})"


def _base64(key: str, before: int) -> str:
    """A pattern for the characters that the key alone decides, with so many bytes before it."""
    encoded = base64.b64encode(b"\0" * before + key.encode()).decode()
    sure = encoded[-(-before * 8 // 6) : (before + len(key)) * 8 // 6]
    return re.escape(sure).replace(r"\+", "[+-]").replace("/", "[/_]")
