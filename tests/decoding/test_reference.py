"""The fast loop is its slow reference implementation, step for step; and the edges: a full context, empty prompts, dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.core.errors import UserError
from redraft.decoding import acceptance_modes
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.plain import decode_plain
from redraft.decoding.reference import Reference
from redraft.decoding.sampling import Sampling
from redraft.decoding.speculative import decode_speculative
from redraft.drafts.base import Draft
from redraft.models.kv_cache import RowCache
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double
from tests.decoding.cheat import CheatingDraft

LONGEST = 12
PROMPTS = [[2, 50, 60, 70], [2, 81], [2, 90, 33, 47, 58, 69, 71]]
DRAFTS: dict[str, Callable[[Target], Draft]] = {
    "cheat": CheatingDraft,
    "eagle3": lambda target: fresh_draft(target),
    "eagle3, own vocabulary": lambda target: fresh_draft(target, vocab=40),
    "eagle": lambda target: fresh_draft(target, kind="eagle"),
}
WAYS = [
    Decoding(),
    Decoding("seeded", Sampling(1.0)),
    Decoding("seeded", Sampling(0.2), "deterministic"),
    Decoding("sampled", Sampling(1.2)),
    Decoding("sampled", Sampling(0.7, top_k=9, top_p=0.9)),
    Decoding("sampled", Sampling(0.2, min_p=0.05), "deterministic"),
]


@pytest.fixture(scope="module")
def double(target_folder: Path) -> Target:
    return in_double(target_folder)


def both(target: Target, draft: Draft, k: int, way: Decoding) -> tuple[Any, Any]:
    seeds = range(len(PROMPTS))
    fast = decode_speculative(target, draft, PROMPTS, k, LONGEST, way, list(seeds))
    slow = [Reference(target, draft, k, way, s).decode(p, LONGEST) for s, p in zip(seeds, PROMPTS)]  # noqa: B905
    return fast, slow


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.mode}-{w.draft_token}-{w.sampling}")
@pytest.mark.parametrize("name", DRAFTS)
def test_the_fast_loop_is_the_slow_one(double: Target, name: str, way: Decoding) -> None:
    draft = DRAFTS[name](double)
    for k in (1, 5) if name == "cheat" else (3,):
        fast, slow = both(double, draft, k, way)
        assert fast == slow
    assert name != "cheat" or any(n for d in fast for n in d.accepted)


def one_fewer(patch: pytest.MonkeyPatch) -> None:
    right = acceptance_modes.accept_sampled

    def wrong(p: Tensor, q: Tensor, tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        n, following = right(p, q, tokens, u)
        return (n - 1).clamp(min=0), following

    patch.setattr(acceptance_modes, "accept_sampled", wrong)


def never_forgets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowCache, "roll_back", lambda self, tokens: None)


def chain_kept(patch: pytest.MonkeyPatch) -> None:
    """The draft reads the accepted tokens after its own chain instead of in its place."""
    right = CheatingDraft.extend

    def wrong(self: Any, cache: Any, *rest: Any) -> Tensor:
        for row, chain in zip(cache["true"], cache["drafted"], strict=True):
            row += chain
        return right(self, cache, *rest)

    patch.setattr(CheatingDraft, "extend", wrong)


@pytest.mark.parametrize("mutant", [one_fewer, never_forgets, chain_kept])
def test_the_twin_catches_wrong_loops(
    double: Target, mutant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, way = CheatingDraft(double, noise=0.5), WAYS[3]
    fast, slow = both(double, draft, 4, way)
    assert fast == slow
    mutant(monkeypatch)
    seeds = list(range(len(PROMPTS)))
    assert decode_speculative(double, draft, PROMPTS, 4, LONGEST, way, seeds) != slow


def test_no_step_runs_past_the_context(double: Target) -> None:
    target = copy.copy(double)
    draft = CheatingDraft(double, noise=0.0)
    target.max_positions = len(PROMPTS[2]) + 7
    read = target.model.forward
    seen: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        cache, at = kwargs.get("past_key_values"), kwargs.get("position_ids")
        if cache is not None:  # not the cheating draft's own readings
            ends = cache.get_seq_length() + kwargs["input_ids"].shape[1]
            seen.append(ends if at is None else int(at.max()) + 1)
        return read(*args, **kwargs)

    plain = [decode_plain(target, p, 99, Decoding()) for p in PROMPTS]
    target.model.forward = watched
    try:
        for rows in (PROMPTS[2:], PROMPTS):
            found = decode_speculative(target, draft, rows, 5, 99)
            assert [d.tokens for d in found] == plain[-len(rows) :]
    finally:
        target.model.forward = read
    assert max(seen) <= target.max_positions
    assert len(plain[2]) == 7


def test_prompts_without_room_are_named(double: Target) -> None:
    draft = CheatingDraft(double)
    with pytest.raises(UserError, match="prompt 2 of 2 is empty: there is nothing to continue"):
        decode_speculative(double, draft, [[2, 5], []], 3, 9)
    long = [2] * double.max_positions
    with pytest.raises(
        UserError, match=r"prompt 1 of 1 has 256 tokens and fills the context of 256"
    ):
        decode_speculative(double, draft, [long], 3, 9)


def test_a_draft_elsewhere_is_named(double: Target) -> None:
    draft = CheatingDraft(double).to("meta")
    with pytest.raises(
        UserError, match=r"draft is on meta and the target on cpu; .*draft.to\('cpu'\)"
    ):
        decode_speculative(double, draft, PROMPTS, 3, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_draft_of_another_dtype_changes_no_word(double: Target, dtype: torch.dtype) -> None:
    draft = fresh_draft(double).to(dtype)
    for way in (WAYS[0], WAYS[1]):
        plain = [decode_plain(double, p, LONGEST, way, s) for s, p in enumerate(PROMPTS)]
        found = decode_speculative(double, draft, PROMPTS, 3, LONGEST, way, [0, 1, 2])
        assert [d.tokens for d in found] == plain


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Decoding("greedi"), "no acceptance mode 'greedi'; did you mean 'greedy'?"),
        (lambda: Decoding("greedy", Sampling(1.0)), "takes the most likely token and ignores"),
        (
            lambda: Decoding("seeded", Sampling(1.0), "sampled"),
            "seeded cannot judge draft tokens picked 'sampled'; it takes coupled or deterministic",
        ),
    ],
)
def test_wrong_combinations_are_named(make: Callable[[], Decoding], says: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert says in str(caught.value)
