"""The acceptance modes: how the target's token is chosen and how drafted tokens are judged.

    greedy    the most likely token; drafts are accepted as long as they are it
    seeded    most likely after Gumbel noise keyed by (seed, position): one text per seed, whatever
              the draft and K (drafter-invariant decoding, arXiv 2408.07978)
    sampled   a random token; drafts are accepted by speculative sampling

A drafted token is `deterministic` (the draft's most likely), `sampled` (drawn from the draft's
distribution, for mode sampled) or `coupled` (drawn with the noise that the target will use at that
position, for mode seeded; accepted more often).

Shapes: B rows, P positions, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import UserError, nearest
from .acceptance_rules import accept_chosen, accept_sampled
from .logits_pipeline import LogitsPipeline
from .noise import ACCEPT, DRAFT, REPLACE, TOKEN, gumbel, uniform
from .sampling import Sampling, draw


class Mode(ABC):
    """One way to choose tokens. `seeds_B` are the rows' seeds, positions count answer tokens from 0."""

    name: ClassVar[str]
    draft_tokens: ClassVar[tuple[str, ...]]
    """How drafts may pick a token under this mode; the default comes first."""

    @abstractmethod
    def choose(self, scores_BPV: Tensor, at_BP: Tensor, seeds_B: Tensor) -> Tensor:
        """The target's tokens [B, P], when nothing is drafted."""

    def propose(self, scores_BV: Tensor, at_B: Tensor, seeds_B: Tensor) -> Tensor:
        """A draft's tokens [B] from its scores, where they are not simply the most likely."""
        raise NotImplementedError(f"mode {self.name} drafts deterministically only")

    def verify(
        self,
        scores_BJV: Tensor,
        drafted_BK: Tensor,
        q_BKV: Tensor | None,
        at_B: Tensor,
        seeds_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """How many drafted tokens are accepted [B], and the token that follows them [B].

        `scores_BJV` [B, K+1, V] are the target's, `at_B` the position of the first drafted token,
        `q_BKV` what the drafted tokens were drawn from, None for the most likely.
        """
        chosen_BJ = self.choose(scores_BJV, _onwards(at_B, scores_BJV.shape[1]), seeds_B)
        n_B = accept_chosen(drafted_BK, chosen_BJ)
        return n_B, chosen_BJ.gather(1, n_B[:, None]).squeeze(1)


class Greedy(Mode):
    name = "greedy"
    draft_tokens = ("deterministic",)

    def choose(self, scores_BPV: Tensor, at_BP: Tensor, seeds_B: Tensor) -> Tensor:
        return scores_BPV.argmax(-1)


class Seeded(Mode):
    name = "seeded"
    draft_tokens = ("coupled", "deterministic")

    def choose(self, scores_BPV: Tensor, at_BP: Tensor, seeds_B: Tensor) -> Tensor:
        return (scores_BPV + gumbel(seeds_B, at_BP, scores_BPV.shape[-1], TOKEN)).argmax(-1)

    def propose(self, scores_BV: Tensor, at_B: Tensor, seeds_B: Tensor) -> Tensor:
        return self.choose(scores_BV[:, None], at_B[:, None], seeds_B)[:, 0]


class Sampled(Mode):
    name = "sampled"
    draft_tokens = ("sampled", "deterministic")

    def choose(self, scores_BPV: Tensor, at_BP: Tensor, seeds_B: Tensor) -> Tensor:
        return draw(scores_BPV.softmax(-1), uniform(seeds_B, at_BP, TOKEN))

    def propose(self, scores_BV: Tensor, at_B: Tensor, seeds_B: Tensor) -> Tensor:
        return draw(scores_BV.softmax(-1), uniform(seeds_B, at_B[:, None], DRAFT)[:, 0])

    def verify(
        self,
        scores_BJV: Tensor,
        drafted_BK: Tensor,
        q_BKV: Tensor | None,
        at_B: Tensor,
        seeds_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        p_BJV = scores_BJV.softmax(-1)
        if q_BKV is None:
            q_BKV = torch.zeros_like(p_BJV[:, :-1]).scatter_(-1, drafted_BK[..., None], 1.0)
        at_BJ = _onwards(at_B, p_BJV.shape[1])
        n_B, next_BV = accept_sampled(
            p_BJV, q_BKV.to(p_BJV), drafted_BK, uniform(seeds_B, at_BJ[:, :-1], ACCEPT)
        )
        return n_B, draw(next_BV, uniform(seeds_B, at_BJ.gather(1, n_B[:, None]), REPLACE)[:, 0])


MODES: dict[str, Mode] = {mode.name: mode for mode in (Greedy(), Seeded(), Sampled())}


@dataclass(frozen=True)
class Decoding:
    """How text is decoded: the mode, the sampling, and how a draft picks its tokens.

    Raises UserError for an unknown mode, a temperature that the mode ignores, and a way of drafting
    that it cannot judge.
    """

    mode: str = "greedy"
    sampling: Sampling = field(default_factory=Sampling)
    draft_token: str = ""  # empty: the mode's own default

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"no acceptance mode '{self.mode}'; {nearest(self.mode, MODES)}")
        if self.mode == "greedy" and self.sampling != Sampling():
            raise UserError(
                f"acceptance mode greedy takes the most likely token and ignores {self.sampling}; "
                "choose seeded or sampled, or leave the sampling out"
            )
        if self.sampling.temperature == 0:  # a point mass, which no cut changes
            object.__setattr__(self, "sampling", Sampling())
        known = self.rules.draft_tokens
        if not self.draft_token:
            object.__setattr__(self, "draft_token", known[0])
        if self.draft_token not in known:
            raise UserError(
                f"acceptance mode {self.mode} cannot judge draft tokens picked '{self.draft_token}'; "
                f"it takes {' or '.join(known)}"
            )

    @property
    def rules(self) -> Mode:
        return MODES[self.mode]

    def scores(self, logits_pipeline: LogitsPipeline, processed_BPV: Tensor) -> Tensor:
        """The target's scores as the mode wants them: greedy asks for the largest logit alone."""
        return processed_BPV if self.mode == "greedy" else logits_pipeline.scores(processed_BPV)

    @property
    def deterministic(self) -> bool:
        """Whether a draft takes its most likely token."""
        return self.draft_token == "deterministic"


def _onwards(at_B: Tensor, count: int) -> Tensor:
    """Positions [B, count] from each row's `at` on."""
    return at_B[:, None] + torch.arange(count, device=at_B.device)
