"""Text from a target and its draft, streamed as it is decoded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer

from ..core.console import say, set_quiet
from ..core.errors import UserError
from ..core.visible import visible
from .flags import (
    AcceptanceFlag,
    AdapterFlag,
    DraftFlag,
    DraftTokenFlag,
    DtypeFlag,
    JsonFlag,
    KFlag,
    MinPFlag,
    QuietFlag,
    TargetFlag,
    TemperatureFlag,
    TemplateArgFlag,
    TemplateFlag,
    TopKFlag,
    TopPFlag,
    decoding_from,
    k_from,
    load,
    print_json,
)

COLOURS = {"first": "", "accepted": "green", "recovered": "red", "bonus": "cyan"}
WORDS = {
    "accepted": "drafted and accepted",
    "recovered": "the target's, where it rejected the draft",
    "bonus": "the target's, after all drafted tokens were accepted",
}


def generate(
    target: TargetFlag,
    draft: DraftFlag,
    prompt: Annotated[str, typer.Option("--prompt", help="what the user says")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="longest answer, in tokens")
    ] = 256,
    k: KFlag = "auto",
    temperature: TemperatureFlag = 0.0,
    top_k: TopKFlag = 0,
    top_p: TopPFlag = 1.0,
    min_p: MinPFlag = 0.0,
    acceptance: AcceptanceFlag = "",
    draft_token: DraftTokenFlag = "",
    seed: Annotated[int, typer.Option("--seed", help="same seed, same words, any draft")] = 0,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="colour tokens by where they come from")
    ] = False,
    target_adapter: AdapterFlag = None,
    chat_template: TemplateFlag = None,
    template_arg: TemplateArgFlag = None,
    dtype: DtypeFlag = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Answer a prompt with the draft's help; the words are the target's own.

    Sampling is seeded unless --acceptance says sampled: the seed alone decides the words.

    Example: redraft generate --target ./my-model --draft run/draft --prompt "What is 7 x 8?"
    --show-drafts
    """
    set_quiet(quiet)
    decoding = decoding_from(
        acceptance or ("seeded" if temperature else "greedy"),
        draft_token,
        temperature,
        top_k,
        top_p,
        min_p,
    )
    chosen = k_from(k)
    from ..checkpoints.load import load_draft
    from ..core.records import Prompt
    from ..metrics.cost import auto_k

    loaded = load(target, target_adapter, chat_template, dtype, template_arg)
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
    said = _Said()
    for text, kind in _decode(
        loaded, proposer, tokens, chosen, max_new_tokens, decoding, seed, said
    ):
        if not as_json:
            colour = (COLOURS[kind] if show_drafts else "") or None
            typer.secho(visible(text), fg=colour, nl=False)
    seconds = time.monotonic() - began
    steps = len(said.accepted)
    tau = 1 + sum(said.accepted) / steps if steps else None
    if as_json:
        print_json(
            {
                "text": "".join(text for text, _ in said.pieces),
                **asdict(said),
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
    rate = len(said.tokens) / seconds
    shown = "no step" if tau is None else f"tau {tau:.2f}"
    say(f"{len(said.tokens)} tokens in {steps} steps, {shown}, {rate:.0f} tokens/s")


@dataclass
class _Said:
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
    said: _Said,
) -> Iterator[tuple[str, str]]:
    """Pieces of text as they come, each with the kind of token that completed it; notes all in `said`."""
    from ..decoding.speculative import speculate, stop_at

    shown = 0
    stop = stop_at(target, [prompt], max_new_tokens)
    for step in speculate(target, draft, [prompt], k, decoding, stop, seeds=[seed]):
        if step.drafted:
            said.accepted += step.accepted
        ended = step.lengths[0]
        room = len(step.tokens[0]) if ended is None else ended - len(said.tokens)
        for token, kind in zip(step.tokens[0][:room], step.kinds(0), strict=False):
            said.tokens.append(token)
            text = target.tokenizer.decode(said.tokens, skip_special_tokens=True)
            last = len(said.tokens) == ended
            if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
                continue  # half a character: its other bytes come with the next token
            said.pieces.append((text[shown:], kind))
            yield said.pieces[-1]
            shown = len(text)
