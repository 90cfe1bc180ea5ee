"""Whether prompts leave space for an answer in the context."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import UserError
from ..models.target import Target


def check_prompts(target: Target, prompts: Sequence[Sequence[int]]) -> None:
    """Raise UserError for prompts that leave nothing to decode."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {i + 1} of {len(prompts)} is empty: there is nothing to continue; leave it "
                "out, or begin it with the tokenizer's first token"
            )
        if len(prompt) >= target.max_positions:
            raise UserError(
                f"prompt {i + 1} of {len(prompts)} has {len(prompt)} tokens and fills the context "
                f"of {target.max_positions}{target.context_note}; shorten it"
            )
