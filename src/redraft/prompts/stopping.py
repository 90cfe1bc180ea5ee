"""Whether the target stops: where its chat template ends a turn, and in the answers that it gave."""

from __future__ import annotations

import re

from ..models.target import Target

ANSWER = "redraft-was-here"
"""A text that no template has in it."""
ENOUGH = 8
"""Fewer answers than this may all be long by chance."""
MARK = re.compile(r"</?[^\s<>]+>|\[/?[A-Z_]+\]")
"""What looks like a special token."""


def end_of_turn_note(target: Target) -> str | None:
    """A warning when nothing that the chat template writes after an answer is a stop token.

    None too where the template writes none, or refuses a single turn.
    """
    if not target.template_text:
        return None
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER}]
    try:
        rendered = target.render_text(turn, answered=True)
    except ValueError:
        return None  # a template for other conversations
    _, answered, end = rendered.rpartition(ANSWER)
    if not answered:
        return None
    special = special_ids(target)
    ids = target.tokenizer.encode(end, add_special_tokens=False)
    ends = [token for token in ids if token in special]
    if set(ends) & set(target.stop_ids):
        return None
    if ends:
        what = f"{names(target, ends[:1])} (id {ends[0]}),"
        remedy = f"add {ends[0]} to eos_token_id in generation_config.json"
    elif mark := MARK.search(end):
        what = f"{mark[0]}, which this tokenizer splits into ordinary tokens and"
        remedy = "put the tokenizer that knows it into the target's folder, or pass another --chat-template"
    else:
        return None
    return (
        f"the chat template ends an assistant's turn with {what} which is no stop token (stop tokens: "
        f"{names(target, target.stop_ids) or 'none'}), so answers run on to max_new_tokens; {remedy}"
    )


def unfinished_note(finished: int, total: int, target: Target) -> str | None:
    """A warning where none of `total` answers ended with a stop token; None where so many did, or the
    answers are too few to tell."""
    if finished or total < ENOUGH:
        return None
    return (
        f"warning: none of {total} answers ended by itself; all were cut at the length limit. The stop tokens "
        f"are {names(target, target.stop_ids) or 'none'}. If the target ends its answers with another token, "
        "add that one to eos_token_id of generation_config.json; otherwise raise the length limit"
    )


def special_ids(target: Target) -> set[int]:
    return {*target.tokenizer.get_added_vocab().values(), *target.tokenizer.all_special_ids}


def names(target: Target, ids: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, target.tokenizer.convert_ids_to_tokens(list(ids))))
