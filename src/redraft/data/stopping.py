"""Whether the target stops where its chat template ends a turn."""

from __future__ import annotations

from ..target import Target

ANSWER = "redraft-was-here"
"""A text that no template has in it."""


def end_of_turn_note(target: Target) -> str | None:
    """A warning when no special token that the chat template writes after an answer is a stop token.

    None too where the template writes none, or refuses a single turn.
    """
    if not target.has_template:
        return None
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER}]
    try:
        rendered = target.render_text(turn, answered=True)
    except ValueError:
        return None  # a template for other conversations
    _, answered, end = rendered.rpartition(ANSWER)
    special = special_ids(target)
    ids = target.tokenizer.encode(end, add_special_tokens=False) if answered else []
    ends = [token for token in ids if token in special]
    if not ends or set(ends) & set(target.stop_ids):
        return None
    return (
        f"the chat template ends an assistant's turn with {names(target, ends[:1])} (id {ends[0]}), which is "
        f"no stop token (stop tokens: {names(target, target.stop_ids) or 'none'}), so answers run on to "
        f"max_new_tokens; add {ends[0]} to eos_token_id in generation_config.json"
    )


def special_ids(target: Target) -> set[int]:
    return {*target.tokenizer.get_added_vocab().values(), *target.tokenizer.all_special_ids}


def names(target: Target, ids: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, target.tokenizer.convert_ids_to_tokens(list(ids))))
