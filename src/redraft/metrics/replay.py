"""Replay: the acceptance of a draft on answers that the target has already given.

The draft is run on the true tokens (its rollout), which is what decoding computes as long as the
drafted tokens are accepted; at the first difference a step ends. So one saved set of answers
scores any draft, K and acceptance mode without a decoding loop. Given that the target wrote y_j,

    a draft that takes one token (its most likely, or the one its noise picks) had it accepted exactly
    when that token is y_j, at any temperature;
    a draft that samples from q had y_j accepted with probability min(1, q(y_j) / p(y_j)).

The second is walked with random numbers (`replay`), or in expectation by dynamic programming over
where steps begin (`expect`).

Shapes: B batch, T tokens, S chain starts, K steps of a chain, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..core import ranks
from ..core.errors import UserError
from ..core.records import Answer, ExpectedSteps, StepTrace
from ..decoding.acceptance_modes import Decoding
from ..decoding.noise import ACCEPT, seeds_tensor, uniform
from ..decoding.sampling import Sampling, probabilities, scores
from ..decoding.speculative import widened
from ..drafts.base import Draft
from ..models.batching import Batch, collate, plan_once
from ..models.kept_states import KeptStates
from ..models.target import Reading, Target
from .acceptance import pooled_tau

T = TypeVar("T")
BATCH_TOKENS = 8192
BATCH_LOGITS = 1 << 27
"""Batches hold fewer tokens where the vocabulary is large: at most this many logits."""


def replay(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    k: int,
    *,
    decoding: Decoding | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[StepTrace]:
    """The verification steps that live decoding with this draft would take, in `answers`' order.

    Exactly those of the live loop, but for draft tokens that are sampled: then one walk of equal
    probability. Raises UserError when an answer lacks the lookahead (see `check_lookahead`), or was not
    sampled as `decoding` says (see `decoding_of`).
    """
    (traces,) = replay_each(
        target, [draft], answers, k, decoding=decoding, batch_tokens=batch_tokens
    )
    return traces


def replay_each(
    target: Target,
    drafts: Sequence[Draft],
    answers: Sequence[Answer],
    k: int,
    *,
    decoding: Decoding | None = None,
    batch_tokens: int = BATCH_TOKENS,
    kept: KeptStates | None = None,
) -> list[list[StepTrace]]:
    """`replay` of several drafts that read the same features, with one reading of the target."""
    traces: list[dict[int, StepTrace]] = [{} for _ in drafts]
    for which, index, answer, runs, first in _runs(
        target, drafts, answers, k, decoding, batch_tokens, kept
    ):
        traces[which][index] = walk(answer, runs, first)
    return [_of_all(found, answers) for found in traces]


def accepted_runs(
    target: Target,
    drafts: Sequence[Draft],
    answers: Sequence[Answer],
    k: int,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[tuple[int, ...]]]:
    """For each draft and greedy answer: the tokens that a step would accept, wherever it begins.

    Entry i is of a step that begins at position i + 1 of the answer (see `positions.py`). With fewer
    drafted tokens a step accepts the lesser of the two, so one replay holds every smaller K. Raises
    UserError as `replay` does.
    """
    found: list[dict[int, tuple[int, ...]]] = [{} for _ in drafts]
    for which, index, answer, runs, first in _runs(
        target, drafts, answers, k, Decoding(), batch_tokens
    ):
        begin = len(answer.prompt) - 1 - first
        found[which][index] = tuple(runs[begin : begin + answer.length - 1])
    return [_of_all(of_draft, answers) for of_draft in found]


def taus(
    target: Target,
    drafts: Sequence[Draft],
    answers: Sequence[Answer],
    k: int,
    kept: KeptStates | None = None,
) -> list[float]:
    """The pooled tau of several drafts that read the same features; answers without a step do not count.

    `kept` holds the answers' features (see `kept_features`) for repeated replays of the same answers.
    """
    found = replay_each(target, drafts, answers, k, kept=kept)
    return [pooled_tau([t for t in traces if t.accepted]) for traces in found]


def expect(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    k: int,
    *,
    decoding: Decoding | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[ExpectedSteps]:
    """The same in expectation over the draft's random tokens, in `answers`' order."""
    found: dict[int, ExpectedSteps] = {}
    for _, index, answer, chance_SK, first in _chances(
        target, [draft], answers, k, decoding, batch_tokens
    ):
        found[index] = expected_walk(answer, chance_SK.tolist(), first)
    return _of_all(found, answers)


def decoding_of(answers: Sequence[Answer], mode: str = "", draft_token: str = "") -> Decoding:
    """How answers were decoded, with the mode and draft token that they are to be scored for.

    Empty, the mode is greedy at temperature 0 and sampled above, and the draft token
    deterministic, as engines have it. Raises UserError for answers that were not sampled alike.
    """
    ways = {Sampling.of(a) for a in answers}
    if len(ways) != 1:
        raise UserError(
            f"the answers were sampled in {len(ways)} ways ({', '.join(map(str, sorted(map(str, ways))))}); "
            "measure those of one way at a time"
        )
    sampling = ways.pop()
    if not mode:
        mode = "sampled" if sampling.temperature else "greedy"
    return Decoding(mode, sampling, draft_token or "deterministic")


def kept_features(
    target: Target, answers: Sequence[Answer], aux_layers: tuple[int, ...]
) -> KeptStates:
    """The features for replays of these answers, lookahead tokens included. The target computes each once."""

    def read(indices: Sequence[int]) -> list[Tensor]:
        rows = [answers[i] for i in indices]
        batch = collate(rows, target.device, lookahead=True)
        with target.giving(rows):
            features_BTF = target.read(batch.tokens_BT, aux_layers, keep=1).features_BTF
        return batch.rows_of(features_BTF)

    lengths = {i: len(a.prompt) + len(a.tokens) for i, a in enumerate(answers)}
    return KeptStates(read, lengths)


def check_lookahead(answers: Sequence[Answer], k: int) -> None:
    """Raise UserError unless each answer holds K-1 tokens past its end, so that no step is cut."""
    for answer in answers:
        if len(answer.tokens) < answer.length + k - 1:
            raise UserError(
                f"answer {answer.id} holds {len(answer.tokens) - answer.length} tokens past its "
                f"end, replay at K={k} needs {k - 1}; regenerate it with --lookahead {k}"
            )


def walk(answer: Answer, runs: Sequence[int], first: int) -> StepTrace:
    """Follow the steps of one answer: each begins where the one before it ended."""
    accepted: list[int] = []
    emitted = 1
    while emitted < answer.length:
        start = len(answer.prompt) + emitted - 2
        accepted.append(runs[start - first])
        emitted += accepted[-1] + 1
    return StepTrace(answer.id, tuple(accepted), answer.length)


def expected_walk(answer: Answer, chances: Sequence[Sequence[float]], first: int) -> ExpectedSteps:
    """Steps by accepted tokens, when a step begins at each place with the probability that one does."""
    k = len(chances[0]) if chances else 0
    counts = [0.0] * (k + 1)
    begins = [0.0] * (answer.length + k + 1)
    begins[1] = 1.0
    for emitted in range(1, answer.length):
        reached = begins[emitted]
        for n, chance in enumerate([*chances[len(answer.prompt) + emitted - 2 - first], 0.0]):
            ends = reached * (1 - chance)
            counts[n] += ends
            begins[min(emitted + n + 1, len(begins) - 1)] += ends
            reached *= chance
    return ExpectedSteps(answer.id, tuple(counts), answer.length)


def _of_all(found: dict[int, T], answers: Sequence[Answer]) -> list[T]:
    """What all ranks found, in the answers' order."""
    found = ranks.merged(found)
    return [found[i] for i in range(len(answers))]


def _runs(
    target: Target,
    drafts: Sequence[Draft],
    answers: Sequence[Answer],
    k: int,
    decoding: Decoding | None,
    batch_tokens: int,
    kept: KeptStates | None = None,
) -> Iterator[tuple[int, int, Answer, list[int], int]]:
    """For each draft and answer: their indices, the answer, the tokens accepted from each of its chain
    starts, and the first one."""
    for which, index, answer, chance_SK, first in _chances(
        target, drafts, answers, k, decoding, batch_tokens, kept
    ):
        S = len(chance_SK)
        at_S = torch.arange(S) + first + 2 - len(answer.prompt)
        at_SK = at_S[:, None] + torch.arange(k)
        numbers = uniform(seeds_tensor([answer.seed or 0], at_SK.device), at_SK.view(1, -1), ACCEPT)
        runs_S = (numbers.view(S, k) < chance_SK).long().cumprod(-1).sum(-1)
        yield which, index, answer, runs_S.tolist(), first


@torch.inference_mode()
def _chances(
    target: Target,
    drafts: Sequence[Draft],
    answers: Sequence[Answer],
    k: int,
    decoding: Decoding | None,
    batch_tokens: int,
    kept: KeptStates | None = None,
) -> Iterator[tuple[int, int, Answer, Tensor, int]]:
    """For each draft and answer: their indices, the answer, the chances [S, K] of its chain starts,
    and the first one."""
    check_lookahead(answers, k)
    decoding = decoding or decoding_of(answers)
    _check_decoding(answers, decoding)
    lengths = [len(a.prompt) + a.length + k - 1 for a in answers]
    most = min(batch_tokens, max(BATCH_LOGITS // target.vocab_size, 1))
    for indices in ranks.mine(plan_once(lengths, most)):
        rows = [answers[i] for i in indices]
        batch = collate(rows, target.device, lookahead=True)
        seeds_B = seeds_tensor([a.seed or 0 for a in rows], target.device)
        if kept is not None:
            features_BTF = kept.of(indices, target.device)
            reading = Reading(features_BTF, features_BTF[..., :0])
        else:
            keep = 0 if decoding.draft_token == "sampled" else 1
            with target.giving(rows):
                reading = target.read(batch.tokens_BT, drafts[0].aux_layers, keep=keep)
        for which, draft in enumerate(drafts):
            chance_BSK = chances(reading, draft, batch, k, decoding, seeds_B).cpu()
            for index, answer, chance_SK in zip(indices, rows, chance_BSK, strict=True):
                yield which, index, answer, chance_SK, batch.first


def chances(
    reading: Reading, draft: Draft, batch: Batch, k: int, decoding: Decoding, seeds_B: Tensor
) -> Tensor:
    """How likely each drafted token is accepted, given those before it: float64 [B, S, K].

    Row S of it belongs to the chain start `batch.first` + S. The chance is 0 where no step can reach: before a row's answer,
    past its end, and after a token that is never accepted. The draft computes no logits there.
    """
    tokens, first = batch.tokens_BT, batch.first
    B, T = tokens.shape
    found = torch.zeros(B, max(T - 2 - first, 0), k, dtype=torch.float64, device=tokens.device)
    start_S = torch.arange(found.shape[1], device=tokens.device) + first
    reached_BS = start_S >= batch.starts_B[:, None] - 1
    for step, states_BSH in enumerate(draft.rollout(tokens, reading.features_BTF, first, k)):
        said_S = start_S[: states_BSH.shape[1]] + step + 2  # where the predicted token is
        reached_BS = reached_BS[:, : len(said_S)] & (said_S < batch.ends_B[:, None])
        row_N, at_N = reached_BS.nonzero(as_tuple=True)
        if not len(row_N):
            break
        said_N = said_S[at_N]
        token_N = tokens[row_N, said_N]
        logits_ND = draft.logits(states_BSH[row_N, at_N])
        if decoding.deterministic:
            chance_N = (draft.to_target_ids(logits_ND.argmax(-1)) == token_N).double()
        else:
            scores_NV = scores(widened(draft, logits_ND), decoding.sampling)
            if decoding.draft_token == "coupled":
                at_N1 = (said_N - batch.starts_B[row_N])[:, None]
                chosen_N1 = decoding.rules.choose(scores_NV[:, None], at_N1, seeds_B[row_N])
                chance_N = (chosen_N1[:, 0] == token_N).double()
            else:
                q_N = _of(scores_NV.softmax(-1), token_N)
                own_NV = probabilities(reading.logits_BTV[row_N, said_N - 1], decoding.sampling)
                chance_N = (q_N / _of(own_NV, token_N)).nan_to_num(0.0).clamp(max=1.0)
        found[row_N, at_N, step] = chance_N
        reached_BS = reached_BS & (found[:, : len(said_S), step] > 0)
    return found


def _of(p_NV: Tensor, token_N: Tensor) -> Tensor:
    return p_NV.gather(-1, token_N[:, None])[:, 0].double()


def _check_decoding(answers: Sequence[Answer], decoding: Decoding) -> None:
    made = decoding_of(answers, decoding.mode if decoding.sampling.temperature else "greedy")
    if made.sampling != decoding.sampling:
        raise UserError(
            f"the answers were sampled with {made.sampling}, to be scored for {decoding.sampling}; "
            "regenerate them that way"
        )
    unkeyed = [a.id for a in answers if a.seed is None]
    if decoding.draft_token != "deterministic" and unkeyed and decoding.sampling.temperature:
        raise UserError(
            f"answer {unkeyed[0]} does not say which noise it was sampled with, and "
            f"{decoding.draft_token} draft tokens need that; regenerate it"
        )
