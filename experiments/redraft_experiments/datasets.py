"""Readers of real chats and texts from a folder of gzipped JSON lines.

The folder is named by an argument or by the environment variable REDRAFT_DATA. A row holds either
`messages` (a list of `role` and `content`) or `text`, and an `id`. Chats are divided into the
splits of `synthetic.py` by a stable hash of their first question, so that a question asked twice
never crosses a split. Mathematics has a test file of its own, which is its `eval` split.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redraft.core.errors import UserError

from .synthetic import Message, Sample, check_split, split_of
from .synthetic_harm import Pair

VARIABLE = "REDRAFT_DATA"
CHAT_FILES = {
    "math": ("math_gsm8k_train.jsonl.gz",),
    "dialogue": ("dialogue_sgd.jsonl.gz",),
    "chat": (
        "chat_arena_1k.jsonl.gz",
        "chat_gpteacher_roleplay.jsonl.gz",
        "chat_self_instruct.jsonl.gz",
    ),
    "medical": ("medical_medquad.jsonl.gz",),
    "code": ("code_gpteacher_codegen.jsonl.gz", "code_mbpp.jsonl.gz"),
}
EVAL_FILES = {"math": ("math_gsm8k_test.jsonl.gz",)}
TEXT_FILES = {
    "stories": ("text_tinystories.jsonl.gz",),
    "novels": ("text_novels_a.jsonl.gz", "text_novels_b.jsonl.gz"),
}
PREFERENCE_FILE = "safety_hh_harmless_pref.jsonl.gz"
LOOK_ALIKE_FILE = "safety_xstest.jsonl.gz"
STOCK_REFUSAL = "I'm sorry, but I can't help with that."
CHAT_DOMAINS = tuple(CHAT_FILES)
TEXT_DOMAINS = tuple(TEXT_FILES)
_TURN = re.compile(r"(?:^|\n\n)(?:Human|Assistant):")
LONGEST_ANSWER = {"medical": 1200}

SHARES = {"base": 15, "tune": 35, "adapt": 35, "heldout": 5, "eval": 10}
SHARES_WITH_TEST_FILE = {"base": 15, "tune": 35, "adapt": 35, "heldout": 5}


def data_folder(path: str | None = None) -> Path | None:
    """The folder given by `path`, else by the environment variable, else None."""
    named = path if path is not None else os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        source = "the given path" if path is not None else VARIABLE
        raise UserError(f"{source} names {named!r}, which is not a folder: create or correct it")
    return folder


def chats(folder: Path, domain: str, *, split: str) -> list[Sample]:
    """All chats of a domain that belong to a split, in the order of the files."""
    check_split(split)
    _check_domain(domain, CHAT_DOMAINS)
    if domain not in EVAL_FILES:
        found = _samples(folder, domain, CHAT_FILES[domain])
        return [sample for sample in found if split_of(question(sample), SHARES) == split]
    kept_back = list(_samples(folder, domain, EVAL_FILES[domain]))
    if split == "eval":
        return kept_back
    taken = {question(sample) for sample in kept_back}
    return [
        sample
        for sample in _samples(folder, domain, CHAT_FILES[domain])
        if question(sample) not in taken
        and split_of(question(sample), SHARES_WITH_TEST_FILE) == split
    ]


def texts(folder: Path, domain: str) -> list[str]:
    """All running texts of a domain, in the order of the files."""
    _check_domain(domain, TEXT_DOMAINS)
    rows = _rows(folder, TEXT_FILES[domain])
    return [row["text"] for row in rows if row.get("text")]


def novel_tokens(data: str | None, tokenizer: Any) -> Iterator[int]:
    """The tokens of all novels, one after the other. Raises UserError where there is no folder of data."""
    folder = data_folder(data)
    if folder is None:
        raise UserError(f"name a folder of real data: --data FOLDER, or ${VARIABLE}")
    for text in texts(folder, "novels"):
        yield from tokenizer(text, add_special_tokens=False)["input_ids"]


def real_harm_pairs(folder: Path, *, split: str) -> list[Pair]:
    """Requests with a better and a worse answer that belong to a split.

    Harmful ones come with the two answers that people compared; harmless look-alikes with an answer
    that helps, against a stock refusal. They are mixed in a stable order.
    """
    check_split(split)
    pairs = [_compared(row) for row in _rows(folder, (PREFERENCE_FILE,))]
    pairs += [
        Pair(row["id"], False, (row["messages"][0],), row["messages"][1]["content"], STOCK_REFUSAL)
        for row in _rows(folder, (LOOK_ALIKE_FILE,))
        if (row["label"], row["final_label"]) == ("safe", "1_full_compliance")
    ]
    kept = [pair for pair in pairs if pair.asked and pair.better and pair.worse]
    found = [pair for pair in kept if split_of(_plain(pair.asked), SHARES) == split]
    random.Random(split).shuffle(found)
    return found


def _compared(row: dict[str, Any]) -> Pair:
    """A row of compared answers, its prompt written as `Human:` and `Assistant:` turns."""
    turns = [turn.strip() for turn in _TURN.split(row["prompt"]) if turn.strip()]
    roles = ("user", "assistant")
    asked = tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))
    whole = asked if len(asked) % 2 else ()
    return Pair(row["id"], True, whole, row["chosen"].strip(), row["rejected"].strip())


def _check_domain(domain: str, known: tuple[str, ...]) -> None:
    if domain not in known:
        raise UserError(f"unknown domain {domain!r}: choose one of {', '.join(known)}")


def question(sample: Sample) -> str:
    """What decides the split: the first question without case and spacing."""
    return _plain(sample.messages)


def _plain(messages: tuple[Message, ...]) -> str:
    return " ".join(messages[0]["content"].split()).casefold()


def _rows(folder: Path, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for name in names:
        file = folder / name
        if not file.is_file():
            raise UserError(
                f"{file} is missing: put it there, or point {VARIABLE} to the folder that has it"
            )
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def _samples(folder: Path, domain: str, names: tuple[str, ...]) -> Iterator[Sample]:
    for row in _rows(folder, names):
        messages = _trimmed(row.get("messages", []))
        if messages and _short_enough(messages, LONGEST_ANSWER.get(domain)):
            yield Sample(row["id"], domain, messages)


def _trimmed(turns: list[dict[str, Any]]) -> tuple[Message, ...]:
    """The turns up to the last answer; nothing unless user and assistant take turns."""
    messages = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    roles = [message["role"] for message in messages]
    alternating = roles == ["user", "assistant"] * (len(roles) // 2)
    return tuple(messages) if alternating and all(m["content"] for m in messages) else ()


def _short_enough(messages: tuple[Message, ...], limit: int | None) -> bool:
    answers = (message["content"] for message in messages if message["role"] == "assistant")
    return limit is None or all(len(answer) <= limit for answer in answers)
