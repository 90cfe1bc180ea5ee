"""A draft that knows the target, nearly: it asks the target itself, and adds noise.

Real drafts that were never trained accept next to nothing; this one gives every accepted length, for
any target and at any temperature, without training. Its state is the logits themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from redraft.drafts.base import Draft
from redraft.models.target import Target

MATRIX = 4096
"""Vocabularies up to this have the noise after every token drawn at once."""


class CheatingDraft(Draft):
    """Logits of the target after the text, with `noise` that depends on the last token."""

    kind: ClassVar[str] = "cheat"

    def __init__(self, target: Target, noise: float = 0.1, vocabulary: Tensor | None = None):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1, device=target.device), requires_grad=False)
        self.target = [target]  # not a module of ours
        self.aux_layers = (1,)
        self.feature_size = target.hidden_size
        self.vocab_size = target.vocab_size
        self.draft_vocab = vocabulary
        self.noise = noise
        generator = torch.Generator().manual_seed(11)
        size = target.vocab_size if target.vocab_size <= MATRIX else 0
        self.noise_VV = noise * torch.randn(size, size, generator=generator, dtype=torch.float64)

    @functools.cache  # noqa: B019 - a draft lives as long as its test
    def noise_after(self, token: int) -> Tensor:
        """The noise [V] on the logits after a token."""
        if len(self.noise_VV):
            return self.noise_VV[token]
        generator = torch.Generator().manual_seed(11 + token)
        return self.noise * torch.randn(self.vocab_size, generator=generator, dtype=torch.float64)

    def new_cache(self, first_B: Tensor) -> Any:
        return {"true": [[token] for token in first_B.tolist()], "drafted": [[] for _ in first_B]}

    def extend(
        self,
        cache: Any,
        tokens_BT: Tensor,
        features_BTF: Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        assert features_BTF.shape[:2] == tokens_BT.shape
        counts = counts or [tokens_BT.shape[1]] * len(tokens_BT)
        for row, tokens, count in zip(cache["true"], tokens_BT.tolist(), counts, strict=True):
            row += tokens[:count]
        cache["drafted"] = [[] for _ in cache["true"]]
        return self._read(cache)

    def step(self, cache: Any, token_B1: Tensor, state_B1H: Tensor) -> Tensor:
        for row, tokens in zip(cache["drafted"], token_B1.tolist(), strict=True):
            row += tokens
        return self._read(cache)

    def keep_rows(self, cache: Any, rows: Sequence[int]) -> None:
        for name in ("true", "drafted"):
            cache[name] = [cache[name][row] for row in rows]

    def logits(self, states: Tensor) -> Tensor:
        return states if self.draft_vocab is None else states[..., self.draft_vocab]

    def _read(self, cache: Any) -> Tensor:
        rows = [[*a, *b] for a, b in zip(cache["true"], cache["drafted"], strict=True)]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        logits_BTV = self.target[0].read(tokens, ()).logits_BTV
        ends = torch.tensor([len(row) - 1 for row in rows])
        noise = torch.stack([self.noise_after(row[-1]) for row in rows])
        return (logits_BTV[torch.arange(len(rows)), ends] + noise.to(logits_BTV))[:, None]

    def rollout(
        self, tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int
    ) -> Iterator[Tensor]:
        raise NotImplementedError

    def bind(self, target: Target) -> None:
        raise NotImplementedError

    def trainable_names(self) -> list[str]:
        raise NotImplementedError

    def reinitialise(self, seed: int) -> None:
        raise NotImplementedError

    def stored_state(self) -> dict[str, Tensor]:
        raise NotImplementedError
