"""The acceptance rules, exactly: the distribution of whole texts by enumeration, no sampling.

A world of V tokens has a target p(. | text) and a draft q(. | text), tables with zeros and ties. The
rule under test is a black box: the chance that it accepts a token is found by bisection over its
uniform number, and what it draws from afterwards is read off. From these the distribution of every
text of L tokens follows, over all drafts, and has to be the target's to 1e-9.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redraft.decoding.acceptance_rules import accept_chosen, accept_sampled
from redraft.decoding.sampling import Sampling, draw, probabilities, scores

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Text = tuple[int, ...]
BISECTIONS = 50


@dataclass
class World:
    """Target and draft distributions of the next token, by text, made when first asked for."""

    size: int
    seed: int
    sampling: Sampling = Sampling(1.0)  # noqa: RUF009
    deterministic: bool = False

    def p(self, text: Text) -> Tensor:
        return probabilities(self._logits(text, 0), self.sampling)

    def q(self, text: Text) -> Tensor:
        """What the draft's token is drawn from: a point mass where it takes its most likely."""
        sampling = Sampling() if self.deterministic else self.sampling
        return probabilities(self._logits(text, 1), sampling)

    def _logits(self, text: Text, which: int) -> Tensor:
        generator = torch.Generator().manual_seed(_key(text, which, self.seed))
        # Whole numbers make ties; some tokens are impossible.
        logits = torch.randint(-2, 3, (self.size,), generator=generator).double()
        impossible = torch.rand(self.size, generator=generator) < 0.25
        impossible[int(torch.randint(self.size, (1,), generator=generator))] = False
        return logits.masked_fill(impossible, float("-inf"))


def _key(text: Text, which: int, seed: int) -> int:
    key = seed * 2 + which
    for token in text:
        key = (key * 1009 + token + 1) % (1 << 31)
    return key


def texts(world: World, rule: Rule, k: int, length: int) -> dict[Text, float]:
    """The exact distribution of the first `length` tokens of decoding with this rule."""
    found: dict[Text, float] = defaultdict(float)

    def go(text: Text, chance: float) -> None:
        for emitted, probability in step(world, rule, k, text).items():
            longer = (*text, *emitted)
            if len(longer) >= length:
                found[longer[:length]] += chance * probability
            else:
                go(longer, chance * probability)

    go((), 1.0)
    return found


def step(world: World, rule: Rule, k: int, text: Text) -> dict[Text, float]:
    """What one step emits, over all K drafted tokens: exact."""
    drafts, chances = [], []
    for drafted in itertools.product(range(world.size), repeat=k):
        chance = 1.0
        for i, token in enumerate(drafted):
            chance *= float(world.q((*text, *drafted[:i]))[token])
        if chance > 0:
            drafts.append(drafted)
            chances.append(chance)
    p = torch.stack([torch.stack([world.p((*text, *d[:i])) for i in range(k + 1)]) for d in drafts])
    q = torch.stack([torch.stack([world.q((*text, *d[:i])) for i in range(k)]) for d in drafts])
    tokens = torch.tensor(drafts)
    accept = acceptance(rule, p, q, tokens)
    emitted: dict[Text, float] = defaultdict(float)
    reached = torch.tensor(chances, dtype=torch.float64)
    for n in range(k + 1):
        stops = reached * (1 - accept[:, n] if n < k else 1.0)
        uniforms = torch.zeros(len(drafts), k, dtype=torch.float64)
        if n < k:
            uniforms[:, n] = 1 - 1e-12
        count, following = rule(p, q, tokens, uniforms)
        for row, drafted in enumerate(drafts):
            if stops[row] > 1e-13:
                assert int(count[row]) == n
                for token, chance in enumerate(following[row].tolist()):
                    emitted[(*drafted[:n], token)] += float(stops[row]) * chance
        if n < k:
            reached = reached * accept[:, n]
    return {tokens: chance for tokens, chance in emitted.items() if chance > 0}


def acceptance(rule: Rule, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """The chance that each drafted token is accepted, those before it being so: [drafts, K]."""
    rows, k = tokens.shape
    found = torch.zeros(rows, k, dtype=torch.float64)
    for at in range(k):
        low, high = torch.zeros(rows).double(), torch.ones(rows).double()
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            uniforms = torch.zeros(rows, k, dtype=torch.float64)
            uniforms[:, at] = middle
            taken = rule(p, q, tokens, uniforms)[0] > at
            low, high = torch.where(taken, middle, low), torch.where(taken, high, middle)
        found[:, at] = low
    return found


def own(world: World, length: int) -> dict[Text, float]:
    """The target's distribution of texts."""
    found: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        found = {
            (*text, token): chance * float(p)
            for text, chance in found.items()
            for token, p in enumerate(world.p(text))
            if p > 0
        }
    return found


def distance(world: World, rule: Rule, k: int, length: int) -> float:
    """Total variation between the rule's texts and the target's."""
    mine, theirs = texts(world, rule, k, length), own(world, length)
    assert sum(theirs.values()) == pytest.approx(1.0)
    return sum(abs(mine.get(t, 0.0) - theirs.get(t, 0.0)) for t in {*mine, *theirs}) / 2


SIZES = [(3, 3, 5), (4, 2, 4), (5, 2, 4), (8, 1, 3), (8, 2, 3)]  # vocabulary, K, text length
SAMPLINGS = [Sampling(1.0), Sampling(0.6), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.7)]


@pytest.mark.parametrize(("size", "k", "length"), SIZES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_texts_have_the_targets_distribution(
    size: int, k: int, length: int, deterministic: bool
) -> None:
    for seed, sampling in enumerate(SAMPLINGS):
        world = World(size, seed, sampling, deterministic)
        assert distance(world, accept_sampled, k, length) < 1e-9, sampling


def test_temperature_0_is_the_greedy_text() -> None:
    for deterministic in (False, True):
        world = World(5, 3, Sampling(0.0), deterministic)
        found = texts(world, accept_sampled, 2, 4)
        text: Text = ()
        for _ in range(4):
            text = (*text, int(world.p(text).argmax()))
        assert dict(found) == {text: pytest.approx(1.0)}


# -- wrong rules, each of which the enumeration has to catch --------------------------------------


def residual_cut_again(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    n, following = accept_sampled(p, q, tokens, u)
    return n, probabilities(following.log(), Sampling(1.0, top_p=0.7))


def no_residual(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    n, _ = accept_sampled(p, q, tokens, u)
    return n, p[torch.arange(len(n)), n]


def bonus_from_the_position_before(
    p: Tensor, q: Tensor, tokens: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    n, following = accept_sampled(p, q, tokens, u)
    last = n == tokens.shape[1]
    return n, torch.where(last[:, None], p[:, -2], following)


def accepts_with_p(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return accept_sampled(p, torch.where(q > 0, 1.0, 0.0).double(), tokens, u)


def accepts_ties_greedily(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    n, following = accept_sampled(p, q, tokens, torch.zeros_like(u))
    return n, following


def residual_not_clamped(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    n, _ = accept_sampled(p, q, tokens, u)
    rows = torch.arange(len(n))
    here = p[rows, n] - q[rows, n.clamp(max=tokens.shape[1] - 1)]
    here = torch.where((n == tokens.shape[1])[:, None], p[rows, n], here.abs())
    return n, here / here.sum(-1, keepdim=True)


WRONG: list[Rule] = [
    residual_cut_again,
    no_residual,
    bonus_from_the_position_before,
    accepts_with_p,
    accepts_ties_greedily,
    residual_not_clamped,
]


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.__name__)
def test_wrong_rules_are_caught(rule: Rule) -> None:
    sampling = Sampling(1.0, top_p=0.7) if rule is residual_cut_again else Sampling(1.0)
    assert any(distance(World(4, seed, sampling), rule, 2, 4) > 1e-3 for seed in range(4))


def test_the_q_ratio_with_a_deterministic_draft_is_caught() -> None:
    """The draft takes its most likely token; a rule that is told its softmax instead is wrong."""

    world = World(4, 1, deterministic=True)

    def ratio(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        soft = torch.where(
            q > 0, 0.5, 0.5 / (q.shape[-1] - 1)
        ).double()  # any softmax that is not q
        return accept_sampled(p, soft, tokens, u)

    assert distance(world, accept_sampled, 2, 4) < 1e-9
    assert distance(world, ratio, 2, 4) > 1e-3


def test_raw_softmax_at_temperature_0_is_caught() -> None:
    class Raw(World):
        def p(self, text: Text) -> Tensor:
            return self._logits(text, 0).softmax(-1)

    greedy, raw = World(4, 1, Sampling(0.0)), Raw(4, 1, Sampling(0.0))
    mine, theirs = texts(raw, accept_sampled, 2, 3), own(greedy, 3)
    assert sum(abs(mine.get(t, 0.0) - theirs.get(t, 0.0)) for t in {*mine, *theirs}) / 2 > 0.1


# -- properties over random distributions -----------------------------------------------------------


def _distribution(draw_: st.DrawFn, size: int) -> list[float]:
    values = draw_(st.lists(st.integers(0, 4), min_size=size, max_size=size).filter(any))
    return [value / sum(values) for value in values]


@st.composite
def one_position(draw_: st.DrawFn) -> tuple[list[float], list[float]]:
    size = draw_(st.integers(2, 8))
    return _distribution(draw_, size), _distribution(draw_, size)


@settings(max_examples=300, deadline=None)
@given(one_position())
def test_one_position_is_exact_for_any_pair(pair: tuple[list[float], list[float]]) -> None:
    """Zeros and ties included: sum over drafted x of q(x) [a(x) 1_x + (1 - a(x)) residual] = p."""
    p, q = (torch.tensor(values, dtype=torch.float64) for values in pair)
    in_vocab = [x for x in range(len(q)) if q[x] > 0]
    rows = len(in_vocab)
    tokens = torch.tensor(in_vocab)[:, None]
    p_BJV = torch.stack([p, torch.full_like(p, 1 / len(p))]).expand(rows, 2, -1)
    q_BKV = q.expand(rows, 1, -1)
    accept = acceptance(accept_sampled, p_BJV, q_BKV, tokens)[:, 0]
    _, residual = accept_sampled(p_BJV, q_BKV, tokens, torch.full((rows, 1), 1 - 1e-12).double())
    emitted = torch.zeros_like(p)
    for row, token in enumerate(in_vocab):
        emitted[token] += q[token] * accept[row]
        if accept[row] < 1 - 1e-9:
            emitted += q[token] * (1 - accept[row]) * residual[row]
    assert torch.allclose(emitted, p, atol=1e-9)
    expected = float(torch.minimum(p, q).sum())
    assert float((q[in_vocab] * accept).sum()) == pytest.approx(expected, abs=1e-9)  # 1 - TV


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_chosen_accepts_the_common_prefix(data: st.DataObject) -> None:
    rows, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    table = st.lists(st.integers(0, 2), min_size=rows * (k + 1), max_size=rows * (k + 1))
    drafted = torch.tensor(data.draw(table)).view(rows, k + 1)[:, :k]
    chosen = torch.tensor(data.draw(table)).view(rows, k + 1)
    for row, n in enumerate(accept_chosen(drafted, chosen).tolist()):
        assert drafted[row, :n].tolist() == chosen[row, :n].tolist()
        assert n == k or drafted[row, n] != chosen[row, n]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=9),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.integers(0, 9),
    st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_door_keeps_some_token_and_never_a_weaker_one(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    wide = torch.tensor(logits, dtype=torch.float64)
    p = probabilities(wide, sampling)
    assert float(p.sum()) == pytest.approx(1.0)
    kept = torch.isfinite(scores(wide, sampling))
    assert bool(kept[int(wide.argmax())])
    if bool((~kept).any()):
        assert float(wide[kept].min()) >= float(wide[~kept].max())
    token = int(draw(p[None], torch.tensor([0.999999], dtype=torch.float64)))
    assert bool(kept[token])


def test_the_door_follows_transformers() -> None:
    from transformers.generation import logits_process as hf

    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(50, 40, generator=generator, dtype=torch.float64)

    def theirs(warpers: Sequence[Callable[..., Tensor]]) -> Tensor:
        wide = logits
        for warper in warpers:
            wide = warper(torch.zeros(50, 1, dtype=torch.long), wide)
        return wide.softmax(-1)

    for sampling, warpers in [
        (Sampling(0.7), [hf.TemperatureLogitsWarper(0.7)]),
        (Sampling(1.0, top_k=5), [hf.TopKLogitsWarper(5)]),
        (Sampling(1.0, top_p=0.8), [hf.TopPLogitsWarper(0.8)]),
        (Sampling(1.0, min_p=0.1), [hf.MinPLogitsWarper(0.1)]),
        (
            Sampling(1.4, top_k=12, top_p=0.9, min_p=0.05),
            [
                hf.TemperatureLogitsWarper(1.4),
                hf.TopKLogitsWarper(12),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.05),
            ],
        ),
    ]:
        assert torch.allclose(probabilities(logits, sampling), theirs(warpers), atol=1e-12)
