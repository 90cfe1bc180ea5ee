"""In which encoding a text file is: UTF-8, unless its first bytes show UTF-16 or UTF-32."""

from __future__ import annotations

import codecs

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
ZEROS = {"x0x0": "utf-16-le", "0x0x": "utf-16-be", "x000": "utf-32-le", "000x": "utf-32-be"}
"""Where the zero bytes of two ASCII characters lie, in a file without a byte order mark."""


def encoding_of(head: bytes) -> str:
    """The codec for a text that begins with `head` (4 bytes are enough); it drops a byte order mark."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    return ZEROS.get("".join("x" if byte else "0" for byte in head[:4]), "utf-8-sig")
