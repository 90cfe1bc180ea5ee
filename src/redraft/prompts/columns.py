"""What the columns of a prompts file are called: question, context, answer, and what is neither.

The names are those of LLaMA-Factory, axolotl, TRL, and of data sets in wide use.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

CONVERSATIONS = ("messages", "conversations", "conversation", "chosen_messages", "turns")
QUESTIONS = ("prompt", "instruction", "question", "query", "problem", "inputs", "user", "input")
"""The first that has content is asked. `user` is a question only next to an `assistant`."""
CONTEXTS = ("input", "context", "passage")
"""What is asked about: it follows the question, after an empty line."""
ANSWERS = (
    "chosen",
    "completion",
    "response",
    "output",
    "solution",
    "answer",
    "answers",
    "targets",
    "assistant",
)
SYSTEMS = ("system", "system_prompt", "system_message")
VARIABLES = "chat_template_kwargs"
"""Variables for the chat template, such as enable_thinking (the name of TRL and vLLM)."""
TOOLS = ("tools", "functions")
MEDIA = re.compile(r"(?i)(images?|videos?|audios?|pixel_values|img)(_(paths?|urls?|files?|bytes))?")
"""Columns, and keys of a turn, whose content no text can stand for."""
PLACEHOLDER = re.compile(r"(?<!`)<\|?(image|video|audio)(_pad)?\|?>(?!.*</\1>)", re.DOTALL)
"""Where such content belongs in a text; a pair of tags (HTML) or code is none."""
METADATA = re.compile(
    r"""(?ix) (.*[_.-])? (
    id s? | uuid | idx | index | key | hash | hashed_ip | ip | checksum | md5 | sha\d* |
    source s? | dataset | origin | provenance | subset | split | config | corpus | file (name)? | path |
    url s? | link s? | license | author | annotator | worker | generator | generated_by | model s? | version |
    revision | categor(y|ies) | q? type s? | kind | tag s? | topic s? | subject | domain s? | task s? | level |
    difficulty | lang | language s? | locale | country | title | name s? | status |
    created(_at)? | updated(_at)? | timestamp s? | date s? | time s? | year | header |
    score s? | rating s? | rank | label s? | vote s? | winner | quality | reward s? | toxic(ity)? | moderation |
    meta | metadata | info | extra | extra_info | stats | cluster | service s? | entry_point | annotation s? | turn_identifier
    )"""
)
LONGEST_METADATA = 200
"""Characters; a longer text under such a name may be one that is asked about."""
OF_THE_ANSWER = re.compile(
    r"""(?ix) (.*[_.-])? (
    rejected(_messages)? | chosen | completion s? | response s? | output s? | solution s? | answer s? | target s? |
    assistant | gpt | reference s? | reasoning(_content)? | thinking | thought s? | rationale s? |
    explanation s? | cot | chain_of_thought | generation s? | ground_truth | gold | expected |
    reward_model | test s? | test_cases | verification(_info)?
    )"""
)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def unread(row: Mapping[str, Any], used: Collection[str], texts: Collection[str]) -> Iterator[str]:
    """The columns with text that is not used, repeats nothing that is, and may belong to the question."""
    for name, value in row.items():
        if name in used or OF_THE_ANSWER.fullmatch(name):
            continue
        least = LONGEST_METADATA + 1 if METADATA.fullmatch(name) else 1
        if any(len(text) >= least and not _repeats(text, texts) for text in _texts_in(value)):
            yield name


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        inner: Iterable[Any] = (v for key, v in value.items() if key not in ("role", "from"))
    else:
        inner = value if isinstance(value, list | tuple) else ()
    yield from (text for one in inner for text in _texts_in(one))
    if is_text(value):
        yield value.strip()


def _repeats(text: str, texts: Collection[str]) -> bool:
    return any(text == known.strip() or (len(text) > 20 and text in known) for known in texts)
