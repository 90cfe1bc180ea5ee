"""The noise is SplitMix64 keyed by seed, stream, position and token, and it draws as it should.

The oracle is the generator as published, on Python's whole numbers modulo 2^64: a key's n-th number
is the generator's n-th output. Wrong versions (an arithmetic shift, noise that ignores the token or
the position) run through the same checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from redraft.decoding import noise
from redraft.decoding.noise import ACCEPT, DRAFT, REPLACE, TOKEN, seeds_tensor, uniform

CPU = torch.device("cpu")
WORD = 1 << 64
STEP = 0x9E3779B97F4A7C15
STREAMS = (TOKEN, DRAFT, ACCEPT, REPLACE)
SEEDS = [0, 1, 7, -1, -(1 << 63), (1 << 63) - 1, 1 << 63, WORD - 1, WORD + 5, 123456789012345678]
LEVEL = 1e-6


class SplitMix64:
    """The generator of Steele, Lea and Flood, written for the tests."""

    def __init__(self, seed: int):
        self.state = seed % WORD

    def next(self) -> int:
        self.state = (self.state + STEP) % WORD
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        return z ^ (z >> 31)

    def nth(self, n: int) -> int:
        """Output number n, from 0, of a fresh generator."""
        self.state = (self.state + n * STEP) % WORD
        return self.next()


def hashed(seed: int, stream: int, at: int, token: int | None = None) -> int:
    place = SplitMix64(SplitMix64(seed).nth(stream)).nth(at)
    return place if token is None else SplitMix64(place).nth(token)


def unmixed(z: int) -> int:
    """The state whose output is z."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9)):
        z = unshifted(z, shift) * pow(factor, -1, WORD) % WORD
    return unshifted(z, 30)


def unshifted(z: int, shift: int) -> int:
    found = z
    for _ in range(64 // shift):
        found = z ^ (found >> shift)
    return found


def seed_for(z: int, stream: int, at: int) -> int:
    """The seed under which a place's hash is z."""
    key = (unmixed(z) - (at + 1) * STEP) % WORD
    return (unmixed(key) - (stream + 1) * STEP) % WORD


def at_table(rows: int, positions: Sequence[int]) -> Tensor:
    return torch.tensor([list(positions)] * rows)


def uniform_is_the_oracles() -> bool:
    positions = [0, 1, 2, 50, 100_000]
    for stream in STREAMS:
        found = uniform(seeds_tensor(SEEDS, CPU), at_table(len(SEEDS), positions), stream)
        for row, seed in enumerate(SEEDS):
            for column, at in enumerate(positions):
                exact = Fraction(hashed(seed, stream, at), WORD)
                if abs(Fraction(float(found[row, column])) - exact) > Fraction(1, 1 << 52):
                    return False
    return True


def gumbel_is_the_oracles() -> bool:
    positions, size = [0, 3, 999], 17
    for stream in (TOKEN, REPLACE):
        found = noise.gumbel(
            seeds_tensor(SEEDS, CPU), at_table(len(SEEDS), positions), size, stream
        )
        for row, seed in enumerate(SEEDS):
            for column, at in enumerate(positions):
                for token in range(size):
                    u = hashed(seed, stream, at, token) / WORD
                    exact = -math.log(-math.log(u))
                    if abs(float(found[row, column, token]) - exact) > 1e-9:
                        return False
    return True


def arithmetic_shift(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(noise, "_shifted", lambda z, bits: z >> bits)


def without_token(patch: pytest.MonkeyPatch) -> None:
    """Every token of a position gets the same noise."""
    right = noise.gumbel

    def wrong(seeds: Tensor, at: Tensor, vocabulary: int, stream: int = TOKEN) -> Tensor:
        return right(seeds, at, 1, stream).expand(-1, -1, vocabulary)

    patch.setattr(noise, "gumbel", wrong)


def without_position(patch: pytest.MonkeyPatch) -> None:
    right = noise._place
    patch.setattr(noise, "_place", lambda seeds, at, stream: right(seeds, at * 0, stream))


def without_stream(patch: pytest.MonkeyPatch) -> None:
    right = noise._place
    patch.setattr(noise, "_place", lambda seeds, at, stream: right(seeds, at, 0))


# -- the numbers themselves ------------------------------------------------------------------------


def test_the_oracle_is_the_published_generator() -> None:
    """The published outputs for seed 1234567."""
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert SplitMix64(1234567).nth(4) == 16408922859458223821
    assert all(SplitMix64(unmixed(z) - STEP).next() == z for z in (0, 1, WORD - 1, 1 << 63))


def test_uniform_numbers_are_those_of_the_oracle() -> None:
    assert uniform_is_the_oracles()


def test_gumbel_noise_is_that_of_the_oracle() -> None:
    assert gumbel_is_the_oracles()


@pytest.mark.parametrize("wrong", [arithmetic_shift, without_position, without_stream])
def test_wrong_hashes_are_not_the_oracles(
    wrong: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch)
    assert not uniform_is_the_oracles()
    assert not gumbel_is_the_oracles()


def test_noise_without_the_token_is_not_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    without_token(monkeypatch)
    assert not gumbel_is_the_oracles()


def test_seeds_are_taken_modulo_2_to_the_64() -> None:
    for seed in SEEDS:
        [found] = seeds_tensor([seed], CPU).tolist()
        assert found % WORD == seed % WORD
        assert -(1 << 63) <= found < 1 << 63


def test_numbers_lie_strictly_between_0_and_1() -> None:
    numbers = uniform(seeds_tensor(range(500), CPU), at_table(500, range(400)), ACCEPT)
    assert numbers.dtype == torch.float64
    assert 0 < float(numbers.min()) < 1e-4
    assert 1 - 1e-4 < float(numbers.max()) < 1


@pytest.mark.parametrize("z", [0, 1, 1 << 63, WORD - 1, WORD - (1 << 11)])
def test_the_extreme_hashes_lie_strictly_between_0_and_1(z: int) -> None:
    """Seeds made for them by running the generator backwards."""
    for stream in STREAMS:
        seed = seed_for(z, stream, 3)
        assert hashed(seed, stream, 3) == z
        number = float(uniform(seeds_tensor([seed], CPU), torch.tensor([[3]]), stream))
        assert 0 < number < 1


def test_gumbel_noise_is_finite_at_the_extreme_hashes() -> None:
    for z in (0, WORD - 1):
        place = (unmixed(z) - STEP) % WORD  # the first token's hash is z
        seed = seed_for(place, TOKEN, 3)
        assert hashed(seed, TOKEN, 3, 0) == z
        found = noise.gumbel(seeds_tensor([seed], CPU), torch.tensor([[3]]), 4)
        assert bool(torch.isfinite(found).all())


def test_every_part_of_the_key_changes_every_number() -> None:
    base = noise.gumbel(seeds_tensor([5], CPU), torch.tensor([[8]]), 50, TOKEN)
    assert len(set(base.flatten().tolist())) == 50
    for seed, at, stream in [(6, 8, TOKEN), (5, 9, TOKEN), *((5, 8, s) for s in STREAMS[1:])]:
        other = noise.gumbel(seeds_tensor([seed], CPU), torch.tensor([[at]]), 50, stream)
        assert not set(other.flatten().tolist()) & set(base.flatten().tolist())


def test_streams_share_no_numbers() -> None:
    seeds, at = seeds_tensor(range(40), CPU), at_table(40, range(40))
    found = [set(uniform(seeds, at, stream).flatten().tolist()) for stream in STREAMS]
    assert all(len(numbers) == 1600 for numbers in found)
    assert len(set().union(*found)) == 4 * 1600


def test_a_position_has_its_noise_whichever_shape_asks() -> None:
    seeds = seeds_tensor(SEEDS, CPU)
    whole = noise.gumbel(seeds, at_table(len(SEEDS), range(12)), 9)
    wide = noise.gumbel(seeds, at_table(len(SEEDS), range(12)), 30)
    assert torch.equal(wide[..., :9], whole)
    flat = uniform(seeds, at_table(len(SEEDS), range(12)), ACCEPT)
    order = [11, 4, 0]
    for row in range(len(SEEDS)):
        alone = noise.gumbel(seeds[row : row + 1], torch.tensor([order]), 9)
        assert torch.equal(alone[0], whole[row, order])
        numbers = uniform(seeds[row : row + 1], torch.tensor([order]), ACCEPT)
        assert torch.equal(numbers[0], flat[row, order])
    # Rows at different positions, as in a batch whose rows accepted different counts.
    uneven = torch.arange(len(SEEDS))[:, None] + torch.arange(2)
    found = noise.gumbel(seeds, uneven, 9)
    for row in range(len(SEEDS)):
        assert torch.equal(found[row], whole[row, row : row + 2])


# -- how the numbers are distributed ---------------------------------------------------------------


def chance_of(statistic: float, freedom: int) -> float:
    """How often a chi-square number of this many degrees of freedom is at least this large."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def fit(cells: Tensor, expected: Tensor) -> float:
    """The chi-square test's p-value of counts in cells."""
    statistic = float(((cells.double() - expected) ** 2 / expected).sum())
    return chance_of(statistic, cells.numel() - 1)


def cells_of(numbers: Tensor, bits: int) -> Tensor:
    return (numbers * (1 << bits)).long().clamp(max=(1 << bits) - 1)


def evenness(numbers: Tensor, bits: int) -> float:
    counts = torch.bincount(cells_of(numbers.flatten(), bits), minlength=1 << bits)
    return fit(counts, torch.full((1 << bits,), numbers.numel() / (1 << bits)).double())


def pairing(one: Tensor, other: Tensor, bits: int) -> float:
    """Evenness of pairs of numbers over the cells of a square."""
    cells = cells_of(one.flatten(), bits) * (1 << bits) + cells_of(other.flatten(), bits)
    total = 1 << (2 * bits)
    counts = torch.bincount(cells, minlength=total)
    return fit(counts, torch.full((total,), one.numel() / total).double())


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_the_chi_square_tail_by_hand() -> None:
    assert chance_of(4.0, 2) == pytest.approx(math.exp(-2))  # 2 degrees: exp(-x / 2)
    assert chance_of(3.841459, 1) == pytest.approx(0.05, abs=1e-6)


def numbers_table() -> Tensor:
    """Uniform numbers of 400 neighbouring seeds at 500 neighbouring positions."""
    return uniform(seeds_tensor(range(400), CPU), at_table(400, range(500)), TOKEN)


def test_numbers_are_even_and_neighbours_independent() -> None:
    found = numbers_table()
    for bits in (1, 4, 8, 12):
        assert evenness(found, bits) > LEVEL
    limit = 5 / math.sqrt(found.numel())  # five standard errors of a correlation of 0
    for one, other in [
        (found[:, :-1], found[:, 1:]),  # positions
        (found[:-1], found[1:]),  # seeds
        (found, uniform(seeds_tensor(range(400), CPU), at_table(400, range(500)), ACCEPT)),
    ]:
        assert abs(correlation(one, other)) < limit
        assert pairing(one, other, 4) > LEVEL


def test_the_lowest_bits_are_even_too() -> None:
    found = numbers_table() * (1 << 20)
    assert evenness(found - found.floor(), 8) > LEVEL


def test_noise_of_neighbouring_tokens_is_independent_gumbel() -> None:
    found = (
        -(-noise.gumbel(seeds_tensor(range(100), CPU), at_table(100, range(40)), 50)).exp()
    ).exp()
    assert evenness(found, 8) > LEVEL  # the distribution function of a Gumbel number is uniform
    limit = 5 / math.sqrt(found.numel())
    for one, other in [
        (found[..., :-1], found[..., 1:]),
        (found[:, :-1], found[:, 1:]),
        (found[:, 1:, :-1], found[:, :-1, 1:]),  # token v of position t + 1, v + 1 of t
    ]:
        assert abs(correlation(one, other)) < limit
        assert pairing(one, other, 4) > LEVEL


def test_numbers_that_repeat_or_lean_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evenness(numbers_table() ** 1.1, 8) < LEVEL
    monkeypatch.setattr(noise, "_mix", lambda z: z)  # counters that are not hashed
    found = numbers_table()
    assert min(evenness(found, 12), pairing(found[:, :-1], found[:, 1:], 4)) < LEVEL


P = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05, 0.0], dtype=torch.float64)
SAMPLES = 20_000


def draws(at: int) -> Tensor:
    """argmax(log p + noise) at one position under many seeds."""
    found = noise.gumbel(seeds_tensor(range(SAMPLES), CPU), torch.full((SAMPLES, 1), at), len(P))
    return (P.log() + found[:, 0]).argmax(-1)


def test_the_gumbel_trick_follows_the_distribution() -> None:
    """Chi-square at level 1e-6; the token of probability 0 never comes."""
    for at in (0, 1, 777):
        counts = torch.bincount(draws(at), minlength=len(P))
        assert int(counts[-1]) == 0
        assert fit(counts[:-1], SAMPLES * P[:-1]) > LEVEL


def test_two_positions_draw_independently() -> None:
    pairs = draws(4) * 5 + draws(5)
    expected = SAMPLES * (P[:5, None] * P[None, :5]).flatten()
    assert fit(torch.bincount(pairs, minlength=25), expected) > LEVEL


@pytest.mark.parametrize("wrong", [arithmetic_shift, without_token, without_position])
def test_wrong_noise_draws_wrongly(
    wrong: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch)
    chances = [fit(torch.bincount(draws(at), minlength=6)[:5], SAMPLES * P[:5]) for at in (4, 5)]
    pairs = torch.bincount(draws(4) * 5 + draws(5), minlength=25)[:25]
    chances.append(fit(pairs, SAMPLES * (P[:5, None] * P[None, :5]).flatten()))
    assert min(torch.tensor(chances).nan_to_num(0.0).tolist()) < LEVEL
