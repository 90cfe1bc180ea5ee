"""Speculative decoding with a chain of K drafted tokens, for a batch of prompts.

One step: the draft proposes K tokens, the target reads them in one pass, the acceptance mode decides
how many are accepted and which token follows, both caches drop the rest, and the draft reads the
accepted tokens again from the target's true features. Every row accepts its own number of tokens,
keeps its own length, and leaves the batch when it is done.

Shapes: B rows, T tokens, K drafted tokens, J = K + 1 verified positions, V vocabulary, H draft hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.console import say
from ..core.errors import UserError
from ..drafts.base import Draft
from ..models.cache_checks import why_alone
from ..models.kv_cache import RowCache
from ..models.target import Target
from .acceptance_modes import Decoding
from .context_length import check_prompts
from .logits_pipeline import LogitsPipeline
from .noise import seeds_tensor
from .sampling import NEVER

Stop = Callable[[int, list[int], int], int | None]
"""(request, tokens so far, how many of them are new) -> the answer's length once it has ended."""


@dataclass(frozen=True)
class Decoded:
    """An answer (stop token included), the tokens accepted in each step, and what ran past the end.

    Steps are counted in full, also the last one, whose tokens may run past the stop; `lookahead`
    holds those.
    """

    tokens: list[int]
    accepted: list[int]
    lookahead: list[int]


@dataclass(frozen=True)
class Step:
    """What one target pass brought to the rows in the batch.

    `requests` are the rows' indices among the prompts; `tokens` are emitted, the first `accepted`
    of them drafted. `lengths` says where answers ended with this step, None where they go on. The
    prefill's own step has `drafted` 0. `logits_BJV` are the target's, `processed_BJV` the same behind
    the logits processors; tokens belong to the first len(tokens) positions.
    """

    requests: list[int]
    accepted: list[int]
    tokens: list[list[int]]
    lengths: list[int | None]
    drafted: int
    logits_BJV: Tensor
    processed_BJV: Tensor

    def kinds(self, b: int) -> list[str]:
        """Where a row's tokens come from: first, accepted, recovered (after a rejection), bonus."""
        if not self.drafted:
            return ["first"]
        n = self.accepted[b]
        return ["accepted"] * n + ["bonus" if n == self.drafted else "recovered"]


def decode_speculative(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    k: int,
    max_new_tokens: int,
    decoding: Decoding | None = None,
    seeds: Sequence[int] | None = None,
    reserve: int = 0,
) -> list[Decoded]:
    """Decode prompts (token ids) together: what `decode_plain` gives, in fewer target passes.

    In mode sampled the distribution is what is equal, in the others the tokens. `seeds` are one per
    prompt (0 each). Answers end at a stop token, after `max_new_tokens`, or `reserve` tokens before
    the context does (K of them: then no step is cut short).
    """
    stop = stop_at(target, prompts, max_new_tokens, reserve)
    emitted: list[list[int]] = [[] for _ in prompts]
    accepted: list[list[int]] = [[] for _ in prompts]
    found: dict[int, Decoded] = {}
    for step in speculate(target, draft, prompts, k, decoding or Decoding(), stop, seeds=seeds):
        for b, request in enumerate(step.requests):
            row = emitted[request]
            row += step.tokens[b]
            if step.drafted:
                accepted[request].append(step.accepted[b])
            if (length := step.lengths[b]) is not None:
                found[request] = Decoded(row[:length], accepted[request], row[length:])
    return [found[request] for request in range(len(prompts))]


def stop_at(
    target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int, reserve: int = 0
) -> Stop:
    """Answers end as `decode_speculative` says, with one token at least."""
    stop_ids = set(target.stop_ids)
    context = target.max_positions - reserve
    limits = [min(max_new_tokens, max(context - len(prompt), 1)) for prompt in prompts]

    def stop(request: int, tokens: list[int], new: int) -> int | None:
        begin = len(tokens) - new
        for position in range(begin, min(len(tokens), limits[request])):
            if tokens[position] in stop_ids:
                return position + 1
        return limits[request] if len(tokens) >= limits[request] else None

    return stop


def speculate(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    k: int,
    decoding: Decoding,
    stop: Stop,
    *,
    logits_pipeline: LogitsPipeline | None = None,
    draft_pipeline: LogitsPipeline | None = None,
    seeds: Sequence[int] | None = None,
    padding: Sequence[Sequence[int]] | None = None,
) -> Iterator[Step]:
    """The steps of speculative decoding, as they come; rows end where `stop` says.

    `logits_pipeline` holds logits processors (see `logits_pipeline.py`), `draft_pipeline` those that the draft's logits go
    through. `padding` are tokens before each prompt that processors see and the target does not.
    A target that cannot read rows of different lengths together decodes them one by one, and that
    is said. Raises UserError for an empty prompt, one that fills the context, and a draft that is
    not where the target is.
    """
    check_prompts(target, prompts)
    _check_devices(target, draft)
    logits_pipeline = logits_pipeline or LogitsPipeline(decoding.sampling)
    draft_pipeline = draft_pipeline or logits_pipeline.of_draft(False, decoding.deterministic)
    context = _Context(target, draft, decoding, logits_pipeline, draft_pipeline, k)
    seeds, padding = seeds or [0] * len(prompts), padding or [[]] * len(prompts)
    rows = [
        _Row(i, list(prompt), seed, list(before))
        for i, (prompt, seed, before) in enumerate(zip(prompts, seeds, padding, strict=True))
    ]
    batches = [rows]
    if len(rows) > 1 and (reason := why_alone(target)):
        say(f"{target.name}: {reason}; decoding one prompt at a time")
        batches = [[row] for row in rows]
    for batch in batches:
        yield from _decode(context, batch, stop)


@dataclass
class _Row:
    """A prompt being answered."""

    request: int
    prompt: list[int]
    seed: int
    padding: list[int]
    emitted: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.emitted)


@dataclass(frozen=True)
class _Context:
    """What stays the same through all steps."""

    target: Target
    draft: Draft
    decoding: Decoding
    logits_pipeline: LogitsPipeline
    draft_pipeline: LogitsPipeline
    k: int


@torch.inference_mode()
def _decode(c: _Context, rows: list[_Row], stop: Stop) -> Iterator[Step]:
    device = c.target.device
    first_B = torch.tensor([row.prompt[0] for row in rows], device=device)
    cache, draft_cache = RowCache(c.target, len(rows)), c.draft.new_cache(first_B)
    step, state_B1H = _prefill(c, rows, cache, draft_cache, stop)
    while True:
        yield step
        live = [b for b, length in enumerate(step.lengths) if length is None]
        if not live:
            return
        if len(live) < len(rows):
            cache.keep_rows(live)
            c.draft.keep_rows(draft_cache, live)
            rows, state_B1H = [rows[b] for b in live], state_B1H[live]
        # No step may run past the context: the last ones draft fewer tokens.
        k = min(c.k, *(c.target.max_positions - row.length for row in rows))
        seeds_B = seeds_tensor([row.seed for row in rows], device)
        at_B = torch.tensor([len(row.emitted) for row in rows], device=device)
        drafted_BK, q_BKV = _propose(c, rows, draft_cache, state_B1H, k, at_B, seeds_B)
        last_B1 = torch.tensor([row.emitted[-1:] for row in rows], device=device)
        reading = cache.read(torch.cat([last_B1, drafted_BK], 1), c.draft.aux_layers)
        drafted = drafted_BK.tolist()
        processed_BJV = c.logits_pipeline.processed(
            reading.logits_BTV, _prefixes(rows, drafted), [row.request for row in rows]
        )
        n_B, next_B = c.decoding.rules.verify(
            c.decoding.scores(c.logits_pipeline, processed_BJV), drafted_BK, q_BKV, at_B, seeds_B
        )
        accepted = n_B.tolist()
        emitted = [[*d[:n], t] for d, n, t in zip(drafted, accepted, next_B.tolist(), strict=True)]
        cache.roll_back([k - n for n in accepted])
        step = _step(rows, accepted, emitted, k, reading.logits_BTV, processed_BJV, stop)
        if None not in step.lengths:
            yield step
            return
        most = max(accepted) + 1
        state_B1H = c.draft.extend(
            draft_cache,
            torch.tensor([_padded(tokens, most) for tokens in emitted], device=device),
            reading.features_BTF[:, :most],
            [len(tokens) for tokens in emitted],
        )


def _step(
    rows: list[_Row],
    accepted: list[int],
    emitted: list[list[int]],
    k: int,
    logits_BJV: Tensor,
    processed_BJV: Tensor,
    stop: Stop,
) -> Step:
    """Note what was emitted, and where an answer ends."""
    for row, tokens in zip(rows, emitted, strict=True):
        row.emitted += tokens
    return Step(
        [row.request for row in rows],
        accepted,
        emitted,
        [stop(row.request, row.emitted, len(new)) for row, new in zip(rows, emitted, strict=True)],
        k,
        logits_BJV,
        processed_BJV,
    )


def _prefill(
    c: _Context, rows: list[_Row], cache: RowCache, draft_cache: Any, stop: Stop
) -> tuple[Step, Tensor]:
    """Read the prompts and choose the first token of each answer, which no draft can propose."""
    device = c.target.device
    counts = [len(row.prompt) for row in rows]
    longest = max(counts)
    tokens_BT = torch.tensor([_padded(row.prompt, longest) for row in rows], device=device)
    ends, which_B = torch.unique(torch.tensor(counts, device=device) - 1, return_inverse=True)
    reading = cache.read(tokens_BT, c.draft.aux_layers, counts, ends)
    logits_B1V = reading.logits_BTV[torch.arange(len(rows), device=device), which_B][:, None]
    requests = [row.request for row in rows]
    processed_B1V = c.logits_pipeline.processed(
        logits_B1V, _prefixes(rows, [[]] * len(rows)), requests
    )
    seeds_B = seeds_tensor([row.seed for row in rows], device)
    first_B1 = c.decoding.rules.choose(
        c.decoding.scores(c.logits_pipeline, processed_B1V),
        torch.zeros_like(seeds_B)[:, None],
        seeds_B,
    )
    first = first_B1.tolist()
    following = [
        _padded([*row.prompt[1:], *token], longest) for row, token in zip(rows, first, strict=True)
    ]
    state_B1H = c.draft.extend(
        draft_cache, torch.tensor(following, device=device), reading.features_BTF, counts
    )
    step = _step(rows, [0] * len(rows), first, 0, logits_B1V, processed_B1V, stop)
    return step, state_B1H


def _propose(
    c: _Context,
    rows: list[_Row],
    draft_cache: Any,
    state_B1H: Tensor,
    k: int,
    at_B: Tensor,
    seeds_B: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """K drafted tokens per row [B, K], and what they were drawn from [B, K, V] (None: most likely)."""
    drafted: list[Tensor] = []
    drawn_from: list[Tensor] = []
    plainly = c.decoding.deterministic and not c.draft_pipeline.processors
    for step in range(k):
        logits_BD = c.draft.logits(state_B1H)[:, 0]
        if plainly:
            token_B = c.draft.to_target_ids(logits_BD.argmax(-1))
        else:
            before = torch.stack(drafted, 1).tolist() if drafted else [[]] * len(rows)
            prefixes = _prefixes(rows, before, step)
            wide_B1V = widened(c.draft, logits_BD)[:, None]
            requests = [row.request for row in rows]
            processed_B1V = c.draft_pipeline.processed(wide_B1V, prefixes, requests)
            if c.decoding.deterministic:
                token_B = processed_B1V[:, 0].argmax(-1)
            else:
                scores_BV = c.draft_pipeline.scores(processed_B1V)[:, 0]
                token_B = c.decoding.rules.propose(scores_BV, at_B + step, seeds_B)
                drawn_from.append(scores_BV.softmax(-1))
        drafted.append(token_B)
        if step + 1 < k:
            state_B1H = c.draft.step(draft_cache, token_B[:, None], state_B1H)
    return torch.stack(drafted, 1), torch.stack(drawn_from, 1) if drawn_from else None


def widened(draft: Draft, logits_D: Tensor) -> Tensor:
    """The draft's logits [..., D] over the target's vocabulary: what it cannot say is impossible."""
    if draft.draft_vocab is None:
        return logits_D
    wide_V = logits_D.new_full((*logits_D.shape[:-1], draft.vocab_size), NEVER)
    return wide_V.index_copy_(-1, draft.draft_vocab, logits_D)


def _prefixes(
    rows: list[_Row], drafted: Sequence[Sequence[int]], shift: int = 0
) -> Callable[[int, int], list[int]]:
    """The token ids before a row's position: `shift` + position of its drafted tokens included."""

    def prefix(b: int, position: int) -> list[int]:
        row = rows[b]
        return [*row.padding, *row.prompt, *row.emitted, *drafted[b][: shift + position]]

    return prefix


def _padded(tokens: Sequence[int], length: int) -> list[int]:
    return [*tokens, *[0] * (length - len(tokens))]


def _check_devices(target: Target, draft: Draft) -> None:
    device = next(draft.parameters()).device
    if device != target.device:
        raise UserError(
            f"the draft is on {device} and the target on {target.device}; move the draft with "
            f"draft.to('{target.device}')"
        )
