"""The slow, readable reference implementation of speculative decoding: one prompt, no cache, no batch, one token at a time.

It defines what `speculative.py` computes, and the tests hold the two equal. Every distribution is taken
from a whole pass over the prefix, and the rules are written out on plain numbers. What is shared is
the noise of a position and the logits pipeline from logits to probabilities, which define the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..drafts.base import Draft
from ..models.target import Target
from .acceptance_modes import Decoding
from .noise import (
    ACCEPT,
    DRAFT,
    REPLACE,
    TOKEN,
    gumbel,
    seeds_tensor,
    uniform,
)
from .sampling import probabilities
from .speculative import Decoded


class Reference:
    """One prompt being decoded. `k` drafted tokens per step."""

    def __init__(self, target: Target, draft: Draft, k: int, decoding: Decoding, seed: int):
        self.target, self.draft, self.k, self.decoding = target, draft, k, decoding
        self.seeds = seeds_tensor([seed], torch.device("cpu"))

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """The answer to `prompt`, as `decode_speculative` describes it."""
        text = list(prompt)
        accepted: list[int] = []
        longest = min(max_new_tokens, self.target.max_positions - len(prompt))
        text.append(self._own_token(self._target(text), 0))
        while not self._ends(text[len(prompt) :], longest):
            n, tokens = self._step(text, len(text) - len(prompt))
            accepted.append(n)
            text += tokens
        answer = text[len(prompt) :]
        stop = set(self.target.stop_ids)
        ends = [i + 1 for i, token in enumerate(answer[:longest]) if token in stop]
        length = min([*ends, longest])
        return Decoded(answer[:length], accepted, answer[length:])

    def _step(self, text: list[int], at: int) -> tuple[int, list[int]]:
        """One step after `text`, whose next token is the answer's number `at`."""
        k = min(self.k, self.target.max_positions - len(text))
        drafted: list[int] = []
        drawn_from: list[list[float]] = []
        for i in range(k):
            token, q = self._draft_token(text, drafted, at + i)
            drafted.append(token)
            drawn_from.append(q)
        for i, token in enumerate(drafted):
            p = self._target(text + drafted[:i])
            if self.decoding.mode == "sampled":
                q = drawn_from[i]
                if self._uniform(at + i, ACCEPT) < min(1.0, p[token] / q[token]):
                    continue
                residual = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
                return i, [*drafted[:i], self._inverse(residual, self._uniform(at + i, REPLACE))]
            own = self._own_token(p, at + i)
            if own != token:
                return i, [*drafted[:i], own]
        p = self._target(text + drafted)
        stream = REPLACE if self.decoding.mode == "sampled" else TOKEN
        return k, [*drafted, self._own_token(p, at + k, stream)]

    def _draft_token(self, text: list[int], drafted: list[int], at: int) -> tuple[int, list[float]]:
        """A drafted token and the distribution over the vocabulary that it was drawn from."""
        V = self.target.vocab_size
        in_vocab = self._draft_logits(text, drafted)
        logits = torch.full((V,), float("-inf"), dtype=torch.float64)
        own = torch.arange(len(in_vocab), device=self.target.device)
        logits[self.draft.to_target_ids(own).cpu()] = in_vocab
        if self.decoding.deterministic:
            token = int(logits.argmax())
            return token, [float(v == token) for v in range(V)]
        q: list[float] = probabilities(logits, self.decoding.sampling).tolist()
        if self.decoding.mode == "seeded":
            return self._own_token(q, at), q
        return self._inverse(q, self._uniform(at, DRAFT)), q

    def _draft_logits(self, text: list[int], drafted: list[int]) -> torch.Tensor:
        """The draft's logits after `drafted`, its chain started again on the whole text."""
        device = self.target.device
        features = self.target.read(
            torch.tensor([text[:-1]], device=device), self.draft.aux_layers
        ).features_BTF
        cache = self.draft.new_cache(torch.tensor(text[:1], device=device))
        state = self.draft.extend(cache, torch.tensor([text[1:]], device=device), features)
        for token in drafted:
            state = self.draft.step(cache, torch.tensor([[token]], device=device), state)
        return self.draft.logits(state)[0, 0].double().cpu()

    def _target(self, text: list[int]) -> list[float]:
        """The target's distribution of the token after `text`."""
        tokens = torch.tensor([text], device=self.target.device)
        logits = self.target.read(tokens, ()).logits_BTV[0, -1]
        p: list[float] = probabilities(logits, self.decoding.sampling).tolist()
        return p

    def _own_token(self, p: list[float], at: int, stream: int = TOKEN) -> int:
        """The token that the mode takes from a distribution at one position."""
        if self.decoding.mode == "sampled":
            return self._inverse(p, self._uniform(at, stream))
        noise = [0.0] * len(p)
        if self.decoding.mode == "seeded":
            noise = gumbel(self.seeds, torch.tensor([[at]]), len(p), TOKEN)[0, 0].tolist()
        likely = [math.log(x) if x > 0 else -math.inf for x in p]
        scored = [a + b for a, b in zip(likely, noise, strict=True)]
        return scored.index(max(scored))

    def _uniform(self, at: int, stream: int) -> float:
        return float(uniform(self.seeds, torch.tensor([[at]]), stream))

    @staticmethod
    def _inverse(weights: list[float], u: float) -> int:
        """The first token at which the running sum passes u times the whole."""
        aim, running = u * sum(weights), 0.0
        for token, weight in enumerate(weights):
            running += weight
            if running > aim:
                return token
        return max(token for token, weight in enumerate(weights) if weight > 0)

    def _ends(self, answer: list[int], longest: int) -> bool:
        stop = set(self.target.stop_ids)
        return len(answer) >= longest or any(token in stop for token in answer)
