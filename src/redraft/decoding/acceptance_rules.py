"""The acceptance rules. Pure: tokens, probabilities and uniform numbers in, counts and a
distribution out; no model, no cache, no device.

Chosen. The target's token at every position is a function of the prefix (greedy: the most likely;
seeded: most likely after noise keyed by the position). Accept drafted tokens as long as each is that
token. The text is the target's own, token for token.

Sampled. The target's token is random. Accept a token drafted from q with probability
min(1, p/q), and at the first rejection draw from the residual max(p - q, 0), normalised (Leviathan
et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). q is the distribution the token was really
drawn from: a draft that takes its most likely token has a point mass, which turns the rule into
"accept with p(x), else draw from p without x". The text has the target's distribution.

Shapes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accept_chosen(drafted_BK: Tensor, chosen_BJ: Tensor) -> Tensor:
    """How many drafted tokens each row accepts, 0..K: [B].

    `chosen_BJ` [B, K+1] are the target's tokens given the prefix and the drafted tokens before; the
    step emits drafted[:n] + [chosen[n]].
    """
    assert chosen_BJ.shape[1] == drafted_BK.shape[1] + 1, "verification sees one position more"
    return _leading(drafted_BK == chosen_BJ[:, :-1])


def accept_sampled(
    p_BJV: Tensor, q_BKV: Tensor, drafted_BK: Tensor, uniform_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row accepts [B], and the distribution [B, V] of the next token.

    `p_BJV` [B, K+1, V] is the target's distribution at each position, `q_BKV` what each drafted
    token was drawn from, `uniform_BK` independent numbers in [0, 1).
    """
    K = drafted_BK.shape[1]
    assert p_BJV.shape[1] == K + 1, "verification sees one position more than was drafted"
    at = drafted_BK[..., None]
    p_BK = p_BJV[:, :K].gather(-1, at).squeeze(-1)
    q_BK = q_BKV.gather(-1, at).squeeze(-1)
    n_B = _leading(uniform_BK * q_BK < p_BK)
    rows = torch.arange(len(n_B), device=n_B.device)
    p_BV = p_BJV[rows, n_B]
    q_BV = q_BKV[rows, n_B.clamp(max=K - 1)]
    residual_BV = (p_BV - q_BV).clamp(min=0)
    mass_B = residual_BV.sum(-1)
    # All accepted: the next token is the target's own. A residual without mass means p = q, where a
    # rejection has probability 0 and only rounding brings one about.
    own = (n_B == K) | (mass_B <= 0)
    next_BV = torch.where(own[:, None], p_BV, residual_BV / mass_B.where(mass_B > 0, 1)[:, None])
    return n_B, next_BV


def _leading(hits_BK: Tensor) -> Tensor:
    """How many leading entries of each row are true."""
    return hits_BK.long().cumprod(-1).sum(-1)
