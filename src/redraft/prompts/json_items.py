"""The values of a JSON list or of a file of JSON objects, one at a time, as the bytes they are.

Each value is parsed by itself, so that a bad one costs its row and memory does not grow with the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

BLOCK = 1 << 16
QUOTED = re.compile(rb'(?:[^"\\]+|\\.)*', re.DOTALL)
NESTED = re.compile(rb'["\[\]{}]')
BETWEEN = re.compile(rb'["\[\]{},]')
SPACE = b" \t\r\n"


def items(stream: IO[bytes], in_list: bool) -> Iterator[bytes]:
    """The values from here to the end of the list (`in_list`, behind its bracket) or of the file.

    Raises EOFError for a list without end, ValueError where another list or object follows it.
    """
    buffer = bytearray()
    begin = at = depth = 0
    quoted = False
    while True:
        found = (
            QUOTED.match(buffer, at)
            if quoted
            else (NESTED if depth else BETWEEN).search(buffer, at)
        )
        at = found.end() if found else len(buffer)
        if found is None or (quoted and buffer[at : at + 1] != b'"'):
            at -= begin
            del buffer[:begin]
            begin = 0
            if not (block := stream.read(BLOCK)):
                break
            buffer += block
            continue
        if quoted:
            quoted = False
            at += 1
            continue
        sign = found.group()
        quoted = sign == b'"'
        depth += (sign in b"[{") - (sign in b"]}")
        if depth < 0 or (depth == 0 and sign in b"]},"):
            end = at if depth == 0 and sign != b"," else at - 1
            if item := bytes(buffer[begin:end]).strip(SPACE):
                yield item
            begin = at
            if depth < 0 and in_list:
                rest = bytes(buffer[begin:]) + stream.read(BLOCK)
                if b"[" in rest or b"{" in rest:
                    raise ValueError("more follows the first list of the file, which is not read")
                return
            depth = max(depth, 0)
    if in_list:
        raise EOFError("the list has no end")
    if item := bytes(buffer).strip(SPACE):
        yield item
