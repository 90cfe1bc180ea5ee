"""Is the output with a draft the output without one? Token for token, near-ties audited.

Rounding can decide between two tokens whose logits are nearly equal: passes of another shape add
up in another order. So answers that differ are audited token by token, with the draft and without.
The target reads each answer in one uncached pass. A token that this pass does not choose has a
margin: how many roundings of the two tokens' own logits would make it the chosen one. Two things
are failures:

    a token with the draft whose margin is beyond the slack, or an answer that merely ends early;
    more near-ties with the draft than plain decoding has against the same pass, beyond chance.

The slack is 1.5 times the largest margin that plain decoding has against itself on these prompts,
within the bounds of ROUNDINGS. The count finds faults that stay within rounding, such as a stale
cache row in bf16. Excused answers are counted, never hidden.

Shapes: T answer tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.records import Lossless, Prompt
from ..decoding.acceptance_modes import Decoding
from ..decoding.logits_pipeline import LogitsPipeline
from ..decoding.noise import gumbel, seeds_tensor
from ..decoding.sampling import scores
from ..models.target import Target

HALF, WIDE = (4.0, 32.0), (64.0, 512.0)
ROUNDINGS = {
    torch.int8: (8.0, 32.0),
    torch.bfloat16: HALF,
    torch.float16: HALF,
    torch.float32: WIDE,
    torch.float64: WIDE,
}
"""Least and largest slack of a near-tie, in units of eps times the larger of the two logits. In half
precision the last rounding is most of the difference between two passes; in wider dtypes it is the
sums before it. In int8 are states that an engine rounds to 8 bits of the largest in a block, so that the smaller ones lose
more. Measured: docs/lossless.md."""
BEYOND_OWN = 1.5
"""The slack, as a multiple of the largest margin of plain decoding's own."""
GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Margins are told apart so finely, as multiples of the least slack."""


@dataclass(frozen=True)
class Audit:
    """One answer: its tokens, and the margins of those that one uncached pass would not choose, in
    roundings of the two tokens' logits (infinite: beyond the largest slack)."""

    tokens: int
    margins: tuple[float, ...]

    def ties(self, slack: float) -> int:
        return sum(margin <= slack for margin in self.margins)

    def wrong(self, slack: float) -> int:
        return len(self.margins) - self.ties(slack)


def compare(
    target: Target,
    prompts: Sequence[Prompt],
    plain: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
    decoding: Decoding | None = None,
    seeds: Sequence[int] | None = None,
    rounding: torch.dtype | None = None,
) -> Lossless:
    """Compare answers (greedy, or seeded) with those of plain decoding, prompt by prompt.

    `rounding` is the dtype whose roundings their passes may differ by (the target's), int8 for an engine that rounds its
    states so.
    """
    unit = rounding or target.dtype
    decoding, seeds = decoding or Decoding(), seeds or [0] * len(prompts)
    rows = list(zip(prompts, plain, other, seeds, strict=True))
    differing = [row for row in rows if list(row[1]) != list(row[2])]
    if not differing:
        return Lossless(len(rows), len(rows), 0)
    own = [audit(target, prompt, text, decoding, seed, unit) for prompt, text, _, seed in rows]
    slack = slack_of(own, unit)
    own = [found for found, row in zip(own, rows, strict=True) if list(row[1]) != list(row[2])]
    drafted = [
        audit(target, prompt, text, decoding, seed, unit) for prompt, _, text, seed in differing
    ]
    excused = sum(
        not found.wrong(slack) and not _ends_early(row[1], row[2])
        for found, row in zip(drafted, differing, strict=True)
    )
    return Lossless(
        len(rows),
        len(rows) - len(differing),
        excused,
        ties=sum(found.ties(slack) for found in drafted),
        tokens=sum(found.tokens for found in drafted),
        own_ties=sum(len(found.margins) for found in own),
        own_tokens=sum(found.tokens for found in own),
        slack=slack * _eps(unit),
    )


def slack_of(own: Sequence[Audit], dtype: torch.dtype) -> float:
    """The slack of a near-tie, from audits of plain decoding's answers."""
    least, most = ROUNDINGS[dtype]
    seen = [margin for found in own for margin in found.margins if margin <= most]
    return min(max(least, BEYOND_OWN * max(seen, default=0.0)), most)


def _ends_early(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one of two answers is the beginning of the other: no tie explains that."""
    shared = min(len(one), len(other))
    return list(one[:shared]) == list(other[:shared])


@torch.inference_mode()
def audit(
    target: Target,
    prompt: Prompt,
    answer: Sequence[int],
    decoding: Decoding | None = None,
    seed: int = 0,
    rounding: torch.dtype | None = None,
) -> Audit:
    """Hold every token of an answer against one uncached pass over it."""
    decoding = decoding or Decoding()
    count, logits_1TV = len(answer), _uncached(target, prompt, answer)
    seeds_1 = seeds_tensor([seed], target.device)
    at_1T = torch.arange(count, device=target.device)[None]
    chosen_T = decoding.rules.choose(
        decoding.scores(LogitsPipeline(decoding.sampling), logits_1TV), at_1T, seeds_1
    )[0].tolist()
    margins = tuple(
        _margin(logits_1TV[0, at], token, chosen, at, decoding, seed, rounding or target.dtype)
        for at, (token, chosen) in enumerate(zip(answer, chosen_T, strict=True))
        if token != chosen
    )
    return Audit(count, margins)


@torch.inference_mode()
def near_ties(
    target: Target, prompt: Prompt, answer: Sequence[int], slack: float
) -> tuple[int, ...]:
    """Positions of a greedy answer whose token is no more than `slack` roundings above another one."""
    logits_TV = _uncached(target, prompt, answer)[0]
    eps, wide_TV = torch.finfo(logits_TV.dtype).eps, logits_TV.double()
    written_T1 = torch.tensor(answer, device=target.device)[:, None]
    own_T = wide_TV.gather(-1, written_T1)[:, 0]
    other_T = wide_TV.scatter(-1, written_T1, float("-inf")).max(-1).values
    unit_T = eps * torch.maximum(own_T.abs(), other_T.abs()).clamp(min=1.0)
    return tuple((own_T - other_T <= slack * unit_T).nonzero().flatten().tolist())


def _uncached(target: Target, prompt: Prompt, answer: Sequence[int]) -> Tensor:
    """The logits that each token of an answer was chosen by, [1, T, V], in one pass."""
    row_1T = torch.tensor([[*prompt.tokens, *answer]], device=target.device)
    positions = torch.arange(len(answer), device=target.device) + len(prompt.tokens) - 1
    return target.read(row_1T, (), keep=positions).logits_BTV


def _margin(
    logits_V: Tensor,
    token: int,
    chosen: int,
    at: int,
    decoding: Decoding,
    seed: int,
    rounding: torch.dtype,
) -> float:
    """The slack that makes `token` the choice in place of `chosen` at answer position `at`."""
    least, most = ROUNDINGS[rounding]
    wide_V = logits_V.double()
    largest = float(wide_V[[token, chosen]].abs().max().clamp(min=1.0))
    unit = _eps(rounding) * largest
    if decoding.mode == "greedy":
        margin = float(wide_V[chosen] - wide_V[token]) / unit
        return margin if margin <= most else math.inf
    unit /= decoding.sampling.temperature
    ranked_V = wide_V / decoding.sampling.temperature
    if decoding.mode == "seeded":
        place = torch.tensor([[at]], device=logits_V.device)
        seeds_1 = seeds_tensor([seed], logits_V.device)
        ranked_V = ranked_V + gumbel(seeds_1, place, len(logits_V))[0, 0].to(ranked_V)
    for share in GRID:
        slack = share * least * unit
        certain, possible = (_kept(wide_V, decoding, by) for by in (-slack, slack))
        if possible[token] & (ranked_V[token] >= ranked_V[certain].max() - slack):
            return share * least
    return math.inf


def _eps(dtype: torch.dtype) -> float:
    return 2.0**-7 if dtype == torch.int8 else torch.finfo(dtype).eps


def _kept(logits_V: Tensor, decoding: Decoding, slack: float) -> Tensor:
    """The tokens that the cuts leave, bool [V], were the logits over temperature off by `slack`."""
    s = decoding.sampling
    kept = torch.ones_like(logits_V, dtype=torch.bool)
    if 0 < s.top_k < len(logits_V):
        scaled_V = logits_V / s.temperature
        least = scaled_V.topk(s.top_k).values[-1] - slack
        kept = scaled_V >= least.clamp(max=scaled_V.max())
    top_p = min(max(s.top_p + slack, torch.finfo(torch.float32).tiny), 1.0)
    moved = replace(s, top_k=0, top_p=top_p, min_p=min(s.min_p * max(1 - slack, 0.0), 1.0))
    return kept & torch.isfinite(scores(logits_V.masked_fill(~kept, float("-inf")), moved))
