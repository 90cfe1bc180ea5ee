"""A conversation, turn by turn: what is asked first, and what after the target has answered.

The target answers each user turn in its own words, so a later turn is asked on top of the target's
earlier answers, not of those in the file. A reply that calls a tool is kept as the file has it: the
tool's result, which follows, belongs to that call. So is a reply with weight 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..core.records import Answer, Prompt
from ..models.target import Target
from .messages import Message

Later = tuple[tuple[Message | None, ...], ...]
SHORTEST_ANSWER = 32
"""A prompt must leave this many positions of the context for its answer."""


def first_turn(
    name: str,
    messages: Sequence[Message],
    tools: tuple[Message, ...] | None,
    target: Target,
    turns: str,
    variables: dict[str, Any] | None = None,
) -> Prompt:
    """The prompt that a conversation begins with; its later turns are in the prompt.

    `turns` is 'all', or 'last' for one prompt with all turns before the last reply as they stand.
    `variables` are for the chat template. Raises ValueError when nothing is asked, the template refuses, or
    the context is too short.
    """
    edges = [at for at in range(1, len(messages)) if _answered_at(messages, at)]
    if turns == "last":
        edges = [at for at in edges if at + 1 == len(messages) and _is(messages[at], "assistant")]
    edges.append(len(messages))
    asked = tuple(messages[: edges[0]])
    if _is(asked[-1], "assistant"):
        raise ValueError("the conversation does not end in a user turn or one answer to it")
    later = tuple(
        _with_reply(messages[begin:end]) for begin, end in zip(edges, edges[1:], strict=False)
    )
    reply = later[0][0] if later else None
    later = _going_on(later)
    how: dict[str, Any] = {"tools": tools, "variables": variables}
    tokens = render_prompt(target, asked, how)
    reference = reply and reference_of(target, asked, reply, tokens, how)
    return Prompt(name, tokens, reference or None, asked if later else (), later, tools, variables)


def _answered_at(messages: Sequence[Message], at: int) -> bool:
    """Whether the target answers before message `at`: it is a reply that no tool's result follows and
    that has weight, or a user's turn after another that has no reply in the file."""
    if _is(messages[at], "assistant"):
        return messages[at].get("weight") != 0 and (
            at + 1 == len(messages) or not _is(messages[at + 1], "tool")
        )
    return _is(messages[at], "user") and _is(messages[at - 1], "user")


def _with_reply(messages: Sequence[Message]) -> tuple[Message | None, ...]:
    """What follows a place where the target answers, with the reply in the file (None) first."""
    return tuple(messages) if _is(messages[0], "assistant") else (None, *messages)


def _going_on(later: Later) -> Later:
    """What is still to be asked; a last reply alone, which no question follows, is no turn."""
    return later if any(len(turn) > 1 for turn in later) else ()


def _is(message: Message, role: str) -> bool:
    return bool(message["role"] == role)


def next_turn(prompt: Prompt, answer: Answer | None, target: Target) -> Prompt | None:
    """What is asked after `answer` was given (None: the reply in the file); None at the end.

    A turn that follows an answer cut by its length is not asked. Raises ValueError as `first_turn`.
    """
    if not prompt.later or (answer and answer.finish != "stop"):
        return None
    (reply, *others), later = prompt.later[0], prompt.later[1:]
    if answer is not None:
        said = [token for token in answer.answer if token not in target.stop_ids]
        text = target.tokenizer.decode(said, skip_special_tokens=True)
        reply = {"role": "assistant", "content": text}
    if reply is None or not others:
        return None
    history = (*prompt.history, reply, *(message for message in others if message))
    follows = later[0][0] if later else None
    how = {"tools": prompt.tools, "variables": prompt.variables}
    tokens = render_prompt(target, history, how)
    reference = follows and reference_of(target, history, follows, tokens, how)
    name, _, number = prompt.id.rpartition("#")
    name = f"{name}#{int(number) + 1}" if name and number.isdigit() else f"{prompt.id}#2"
    return dataclasses.replace(
        prompt,
        id=name,
        tokens=tokens,
        reference=reference or None,
        history=history if _going_on(later) else (),
        later=_going_on(later),
    )


def render_prompt(
    target: Target, messages: Sequence[Message], how: dict[str, Any]
) -> Sequence[int]:
    """Token ids of what is asked; `how` are arguments of `Target.render`. Raises ValueError when too little
    of the context is left."""
    return check_context(tuple(target.render(messages, **how)), target.max_positions)


def check_context(
    tokens: Sequence[int], context: int, whose: str = "the target's context"
) -> Sequence[int]:
    """The tokens of a prompt. Raises ValueError for none, and when too little of the context is left."""
    if not tokens:
        raise ValueError("the chat template writes nothing for the row")
    if len(tokens) + SHORTEST_ANSWER > context:
        raise ValueError(f"the prompt is {len(tokens)} tokens long, {whose} is {context}")
    return tokens


def reference_of(
    target: Target,
    asked: Sequence[Message],
    reply: Message,
    tokens: Sequence[int],
    how: dict[str, Any],
) -> tuple[int, ...] | None:
    """The reply's tokens after `tokens`; None where the template renders the two together otherwise."""
    whole = target.render([*asked, reply], answered=True, **how)
    return tuple(whole[len(tokens) :]) if tuple(whole[: len(tokens)]) == tokens else None
