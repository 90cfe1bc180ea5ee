"""Text from a target and its draft, streamed while it is decoded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import typer

from ..core.console import say
from ..core.errors import UserError
from ..core.visible import visible
from .bundles import OutputFlags, SamplingFlags, TargetFlags, k_from, print_json

COLOURS = {"first": "", "accepted": "green", "recovered": "red", "bonus": "cyan"}
WORDS = {
    "accepted": "drafted and accepted",
    "recovered": "the target's, where it rejected the draft",
    "bonus": "the target's, after all drafted tokens were accepted",
}


def generate(
    models: TargetFlags,
    draft: str,
    prompt: str,
    sampling: SamplingFlags,
    output: OutputFlags,
    max_new_tokens: int = 256,
    k: str = "auto",
    acceptance: str = "",
    draft_token: str = "",
    seed: int = 0,
    show_drafts: bool = False,
) -> None:
    """Answer a prompt with the draft's help; the text is the target's own.

    Sampling is seeded unless --acceptance is sampled: the seed alone decides the text.

    Example: redraft generate --target ./my-model --draft run/draft --prompt "What is 7 x 8?"
    --show-drafts
    """
    chosen = k_from(k)
    from ..checkpoints.load import load_draft
    from ..core.records import Prompt
    from ..decoding.acceptance_modes import Decoding
    from ..metrics.cost import auto_k

    mode = acceptance or ("seeded" if sampling.temperature else "greedy")
    decoding = Decoding(mode, sampling.sampling(), draft_token)
    loaded = models.load()
    proposer = load_draft(draft, loaded)
    try:
        tokens = loaded.render([{"role": "user", "content": prompt}])
    except ValueError as problem:
        raise UserError(str(problem)) from None
    if chosen is None:
        choice = auto_k(loaded, proposer, [Prompt("prompt", tuple(tokens))], decoding)
        chosen = choice.k
        say(choice.explain())
    began = time.monotonic()
    decoded = _Decoded()
    for text, kind in _decode(
        loaded, proposer, tokens, chosen, max_new_tokens, decoding, seed, decoded
    ):
        if not output.as_json:
            colour = (COLOURS[kind] if show_drafts else "") or None
            typer.secho(visible(text), fg=colour, nl=False)
    seconds = time.monotonic() - began
    steps = len(decoded.accepted)
    tau = 1 + sum(decoded.accepted) / steps if steps else None
    if output.as_json:
        print_json(
            {
                "text": "".join(text for text, _ in decoded.pieces),
                **asdict(decoded),
                "k": chosen,
                "acceptance": decoding.mode,
                "draft_token": decoding.draft_token,
                "seed": seed,
                "tau": tau,
                "seconds": seconds,
            }
        )
        return
    typer.echo()
    if show_drafts:
        say("  ".join(f"{COLOURS[kind]}: {meaning}" for kind, meaning in WORDS.items()))
    rate = len(decoded.tokens) / seconds
    shown = "no step" if tau is None else f"tau {tau:.2f}"
    say(f"{len(decoded.tokens)} tokens in {steps} steps, {shown}, {rate:.0f} tokens/s")


@dataclass
class _Decoded:
    """What was decoded: ids, accepted tokens by step, pieces of text with the kind of their last token."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)


def _decode(
    target: Any,
    draft: Any,
    prompt: list[int],
    k: int,
    max_new_tokens: int,
    decoding: Any,
    seed: int,
    decoded: _Decoded,
) -> Iterator[tuple[str, str]]:
    """Pieces of text as they come, each with the kind of token that completed it; recorded in `decoded`."""
    from ..decoding.speculative import speculate, stop_at

    shown = 0
    stop = stop_at(target, [prompt], max_new_tokens)
    for step in speculate(target, draft, [prompt], k, decoding, stop, seeds=[seed]):
        if step.drafted:
            decoded.accepted += step.accepted
        ended = step.lengths[0]
        left = len(step.tokens[0]) if ended is None else ended - len(decoded.tokens)
        for token, kind in zip(step.tokens[0][:left], step.kinds(0), strict=False):
            decoded.tokens.append(token)
            text = target.tokenizer.decode(decoded.tokens, skip_special_tokens=True)
            last = len(decoded.tokens) == ended
            if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
                continue  # half a character: its other bytes come with the next token
            decoded.pieces.append((text[shown:], kind))
            yield decoded.pieces[-1]
            shown = len(text)
