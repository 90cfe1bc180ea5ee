"""A draft vocabulary chosen anew: what is kept is kept bit for bit, and every row is its token's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.adapters import vocabulary_remap
from redraft.adapters.vocabulary_remap import (
    ADDED,
    HEAD,
    NAMES,
    NEW_ROWS,
    REMOVED,
    apply,
    attach,
    exchange,
    exchanged,
    extract,
    miss_rate,
    predict_rows,
    remap,
    row_mask,
)
from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer, StepTrace
from redraft.drafts.base import vocabulary_map
from redraft.drafts.new import new_draft
from redraft.metrics.replay import replay
from redraft.models.target import Target
from redraft.training.train import train
from tests.conftest import fresh_draft

SIZE, K = 40, 4


def saying(*tokens: int) -> Answer:
    """An answer whose supervised tokens are `tokens`."""
    return Answer("a", (1,), (0, *tokens), len(tokens) + 1, "length")


def spread_draft(target: Target, size: int = SIZE) -> Any:
    """A draft that says every sixth token, so that new tokens come between old ones."""
    tokens = range(7, 7 + 6 * size, 6)
    draft: Any = new_draft(target, [saying(*tokens)], draft_vocab_size=size, width=24)
    draft.reinitialise(3)
    return draft.eval().requires_grad_(False)


@pytest.fixture
def draft(target: Target) -> Any:
    return spread_draft(target)


@pytest.fixture(scope="module")
def wanted(answers: list[Answer]) -> set[int]:
    return {token for answer in answers for token in answer.answer[1:]}


def by_token(draft: Any) -> dict[int, Tensor]:
    """Each token's row of the head."""
    rows = draft.lm_head.weight.detach().clone()
    return dict(zip(draft.draft_vocab.tolist(), rows, strict=True))


def misread(draft: Any, rows: dict[int, Tensor]) -> float:
    """The worst difference between a token's logit and what its row in `rows` gives."""
    states = torch.randn(7, draft.hidden_size, generator=torch.Generator().manual_seed(2)).double()
    draft = draft.double()
    with torch.no_grad():
        logits, normed = draft.logits(states), draft.norm(states)
    tokens = draft.to_target_ids(torch.arange(logits.shape[-1])).tolist()
    said = [(logits[:, i], normed @ rows[token].double()) for i, token in enumerate(tokens)]
    return max(float((logit - expected).abs().max()) for logit, expected in said)


def check_map(before: dict[int, Tensor], draft: Any) -> None:
    after = by_token(draft)
    ids = draft.draft_vocab
    assert ids.dtype == torch.int64
    assert bool((ids[1:] > ids[:-1]).all())
    assert len(after) == len(before) == draft.lm_head.weight.shape[0]
    assert all(torch.equal(after[token], before[token]) for token in before.keys() & after.keys())


# -- what is chosen ----------------------------------------------------------------------------


def test_the_most_frequent_tokens_come_in_for_the_least() -> None:
    vocab = torch.tensor([2, 3, 5, 8])
    counts = torch.tensor([9, 0, 4, 0, 3, 1, 1, 0, 0, 0])  # missing: 0 (9 times), 4 (3), 6 (1)
    added, removed = exchange(vocab, counts, ())
    assert (added.tolist(), removed.tolist()) == ([0, 4], [3, 8])  # 6 is no better than 5


def test_of_unseen_tokens_the_highest_ids_go_first_and_stop_tokens_never() -> None:
    vocab, counts = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0, 0, 5])
    assert [ids.tolist() for ids in exchange(vocab, counts, ())] == [[4], [3]]
    assert [ids.tolist() for ids in exchange(vocab, counts, (3,))] == [[4], [2]]
    assert [ids.tolist() for ids in exchange(vocab, counts, (1, 2, 3))] == [[], []]


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_tokens_are_the_most_frequent_ones(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (50,), generator=generator)
    vocab = torch.randperm(50, generator=generator)[:20].sort().values
    added, removed = exchange(vocab, counts, ())
    chosen = (set(vocab.tolist()) | set(added.tolist())) - set(removed.tolist())
    assert set(added.tolist()).isdisjoint(vocab.tolist())
    assert set(removed.tolist()) <= set(vocab.tolist())
    assert sum(counts[list(chosen)]) == sum(counts.sort(descending=True).values[:20])
    # Every exchange gains: fewer would do worse.
    assert bool((counts[added] > 0).all())
    assert not len(added) or int(counts[added].min()) > int(counts[removed].max())


def test_miss_rate_counts_supervised_tokens() -> None:
    answers = [saying(4, 4, 5, 6), saying(7)]
    assert miss_rate(torch.tensor([4, 6]), answers) == pytest.approx(2 / 5)
    assert miss_rate(None, answers) == 0.0
    assert miss_rate(torch.tensor([4]), [saying()]) == 0.0


# -- the draft afterwards ----------------------------------------------------------------------


def test_remapping_keeps_rows_size_and_order(
    target: Target, draft: Any, answers: list[Answer], wanted: set[int]
) -> None:
    before, vocab = by_token(draft), draft.draft_vocab
    rows = draft.lm_head.weight.detach().clone()
    made = remap(draft, target, answers)
    check_map(before, draft)
    assert made.changed
    assert made.added[0] < max(before.keys() - set(made.removed.tolist()))  # so rows have to move
    for token, row in zip(
        made.added.tolist(), predict_rows(target.head.weight, vocab, rows, made.added), strict=True
    ):
        assert torch.equal(by_token(draft)[token], row)
    assert made.missed_after < made.missed_before
    assert set(made.added.tolist()) == by_token(draft).keys() - before.keys() <= wanted
    assert set(made.removed.tolist()) == before.keys() - by_token(draft).keys()
    assert made.missed_after == miss_rate(draft.draft_vocab, answers)
    assert torch.isfinite(draft.lm_head.weight).all()
    assert misread(draft, by_token(draft)) < 1e-9


def test_again_changes_nothing(target: Target, draft: Any, answers: list[Answer]) -> None:
    first = remap(draft, target, answers)
    vocab, head = draft.draft_vocab, draft.lm_head.weight
    again = remap(draft, target, answers)
    assert not again.changed
    assert again.missed_before == again.missed_after == first.missed_after
    assert draft.draft_vocab is vocab
    assert draft.lm_head.weight is head


def test_a_draft_that_says_everything_is_left_alone(target: Target, draft: Any) -> None:
    said = draft.draft_vocab[:3].tolist()
    made = remap(draft, target, [saying(*said)])
    assert (made.added.tolist(), made.missed_before, made.missed_after) == ([], 0.0, 0.0)


def test_rows_in_their_old_order_are_caught(
    target: Target, draft: Any, answers: list[Answer]
) -> None:
    """New rows where the removed ones were: right only if the ids were not sorted anew."""
    original = draft.draft_vocab
    rows = draft.lm_head.weight.detach().clone()
    remap(draft, target, answers)
    right = by_token(draft)
    private = extract(draft, original)
    rows[torch.isin(original, private[REMOVED])] = private[NEW_ROWS]
    with torch.no_grad():
        draft.lm_head.weight.copy_(rows)
    assert misread(draft, right) > 1e-2


@pytest.mark.parametrize("own", [(), (HEAD,)])
def test_a_copy_that_shares_tensors_is_not_changed(
    target: Target, draft: Any, answers: list[Answer], own: tuple[str, ...]
) -> None:
    copy, before = draft.copy_sharing(own), by_token(draft)
    remap(copy, target, answers)
    assert by_token(copy).keys() != before.keys()
    after = by_token(draft)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[token], before[token]) for token in before)


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_a_draft_of_the_whole_vocabulary_has_nothing_to_retarget(
    target: Target, answers: list[Answer], kind: str
) -> None:
    whole = fresh_draft(target, kind=kind)
    with pytest.raises(
        UserError, match=r"a row for each of .* nothing to remap; leave out --vocab"
    ):
        remap(whole, target, answers)


# -- rows of new tokens ------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_new_rows_follow_a_linear_map_of_the_embedding() -> None:
    embedding = noise(300, 12)
    rows = embedding @ noise(12, 8, seed=1) + noise(8, seed=2)
    vocab, added = torch.arange(0, 200), torch.arange(200, 300)
    error = predict_rows(embedding, vocab, rows[:200], added) - rows[200:]
    assert float(error.square().mean()) < 1e-3 * float(rows.var())


def test_rows_the_embedding_says_nothing_of_stay_near_the_mean() -> None:
    embedding, rows = noise(60, 40), noise(50, 8, seed=1)
    mean = rows.mean(0)
    found = predict_rows(embedding, torch.arange(50), rows, torch.arange(50, 60))
    unpenalised = torch.linalg.lstsq(embedding[:50] - embedding[:50].mean(0), rows - mean).solution
    wild = (embedding[50:] - embedding[:50].mean(0)) @ unpenalised
    assert float((found - mean).norm()) < 0.3 * float(wild.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_embedding_a_new_row_is_the_mean_row(
    target: Target, draft: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(target.model, "get_output_embeddings", lambda: None)
    draft = draft.to(dtype)
    mean = draft.lm_head.weight.detach().double().mean(0).to(dtype)
    made = remap(draft, target, [saying(200, 200)])
    assert made.added.tolist() == [200]
    assert torch.equal(by_token(draft)[200], mean)


def test_few_rows_still_predict() -> None:
    for count in (1, 2, 4, 5, 6):
        found = predict_rows(noise(10, 3), torch.arange(count), noise(count, 4), torch.tensor([9]))
        assert found.shape == (1, 4)
        assert torch.isfinite(found).all()


def test_large_vocabularies_are_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = (noise(60, 6), torch.arange(50), noise(50, 4, seed=1), torch.arange(50, 60))
    whole = predict_rows(*case)
    monkeypatch.setattr(vocabulary_remap, "CHUNK", 7)
    assert torch.allclose(predict_rows(*case), whole, atol=1e-6)


# -- the adapter tensors -----------------------------------------------------------------------


def halved(found: StoredDraft, **as_dtype: torch.dtype) -> StoredDraft:
    """A stored draft in bfloat16, its maps in other dtypes."""
    tensors = {
        n: t.bfloat16() if t.is_floating_point() else t.to(as_dtype.get(n, t.dtype))
        for n, t in found.tensors.items()
    }
    return dataclasses.replace(found, tensors=tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apply_and_extract_make_the_draft_that_is_saved(
    target: Target, draft: Any, answers: list[Answer], tmp_path: Path, dtype: str
) -> None:
    found = stored(draft, target)
    shared = halved(found) if dtype == "bfloat16" else found
    trained: Any = shared.build(target, torch.float32)
    original = trained.draft_vocab
    remap(trained, target, answers)
    private = extract(trained, original)
    assert set(private) == set(NAMES)
    assert private[ADDED].dtype == private[REMOVED].dtype == torch.int64
    merged = shared.with_tensors({**shared.tensors, **apply(shared.tensors, private)}, {})
    merged.save(tmp_path / "fused")
    back = read_draft(str(tmp_path / "fused"))
    assert back.tensors[HEAD].dtype == shared.tensors[HEAD].dtype
    rebuilt: Any = back.build(target, torch.float32)
    assert torch.equal(rebuilt.draft_vocab, trained.draft_vocab)
    rows, kept = by_token(trained), set(original.tolist())
    for token, row in by_token(rebuilt).items():
        exact = dtype == "float32" or token in kept
        assert torch.equal(row, rows[token] if exact else rows[token].bfloat16().float())
    assert misread(rebuilt, rows) < (1e-9 if dtype == "float32" else 0.05)
    others = shared.tensors.keys() - {HEAD, "d2t", "t2d"}
    assert all(torch.equal(back.tensors[n], shared.tensors[n]) for n in others)
    # And in memory: the saved draft is the one that was remapped.
    if dtype == "float32":
        stored(trained, target).save(tmp_path / "trained")
        saved = read_draft(str(tmp_path / "trained")).tensors
        assert all(torch.equal(saved[n], t) for n, t in back.tensors.items())


def test_apply_keeps_the_stored_dtypes_and_adds_no_map(
    target: Target, draft: Any, answers: list[Answer]
) -> None:
    shared = halved(stored(draft, target), d2t=torch.int32, t2d=torch.uint8)
    original = draft.draft_vocab
    remap(draft, target, answers)
    private = extract(draft, original)
    made = apply(shared.tensors, private)
    assert [made[n].dtype for n in (HEAD, "d2t", "t2d")] == [
        torch.bfloat16,
        torch.int32,
        torch.uint8,
    ]
    maps = vocabulary_map(draft.draft_vocab, target.vocab_size)
    assert torch.equal(made["d2t"].long(), maps["d2t"])
    assert torch.equal(made["t2d"].bool(), maps["t2d"])
    bare = {n: t for n, t in shared.tensors.items() if n != "t2d"}
    assert set(apply(bare, private)) == {HEAD, "d2t"}


def test_private_tensors_of_an_unchanged_draft_are_empty_and_change_nothing(
    target: Target, draft: Any
) -> None:
    private = extract(draft, draft.draft_vocab)
    assert [len(private[name]) for name in NAMES] == [0, 0, 0]
    shared = stored(draft, target).tensors
    assert all(torch.equal(shared[n], t) for n, t in apply(shared, private).items())
    before = by_token(draft)
    attach(draft, private)
    check_map(before, draft)


def test_attach_puts_them_into_a_fresh_draft_and_again_into_the_same(
    target: Target, draft: Any, answers: list[Answer]
) -> None:
    original, fresh = draft.draft_vocab, spread_draft(target)
    remap(draft, target, answers)
    private = extract(draft, original)
    attach(fresh, private)
    assert torch.equal(fresh.draft_vocab, draft.draft_vocab)
    assert torch.equal(fresh.lm_head.weight, draft.lm_head.weight)
    parameter = fresh.lm_head.weight
    attach(fresh, {**private, NEW_ROWS: private[NEW_ROWS] + 1})
    assert fresh.lm_head.weight is parameter
    new = torch.isin(fresh.draft_vocab, private[ADDED])
    assert torch.equal(fresh.lm_head.weight[new], private[NEW_ROWS] + 1)
    assert torch.equal(fresh.lm_head.weight[~new], draft.lm_head.weight[~new])


def test_tensors_of_another_vocabulary_are_refused(
    target: Target, draft: Any, answers: list[Answer]
) -> None:
    original = draft.draft_vocab
    remap(draft, target, answers)
    private = extract(draft, original)
    other = spread_draft(target, SIZE - 10)
    with pytest.raises(ValueError, match="it belongs to another draft"):
        attach(other, private)
    with pytest.raises(ValueError, match="it belongs to another draft"):
        apply(stored(other, target).tensors, private)
    ids, one = torch.tensor([1, 2]), torch.ones(1, 3)
    with pytest.raises(ValueError, match="of a draft vocabulary with 1 and 1 of them"):
        exchanged(ids, torch.ones(2, 3), torch.tensor([2]), torch.tensor([1]), one)


# -- training ----------------------------------------------------------------------------------


def test_only_new_rows_are_trained(target: Target, draft: Any, answers: list[Answer]) -> None:
    made = remap(draft, target, answers)
    head = draft.lm_head.weight.requires_grad_(True)
    before, new = head.detach().clone(), torch.isin(draft.draft_vocab, made.added)
    optimizer = torch.optim.AdamW([head], lr=0.1, weight_decay=0.0)
    handle = row_mask(draft, made.added)
    for _ in range(3):
        draft.logits(noise(5, draft.hidden_size)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(head[~new], before[~new])
    assert bool((head[new] != before[new]).any(1).all())
    handle.remove()
    draft.logits(noise(5, draft.hidden_size)).square().sum().backward()
    assert head.grad is not None
    assert bool((head.grad[~new] != 0).any(1).all())


def accepted_tokens(answers: Sequence[Answer], traces: Sequence[StepTrace]) -> set[int]:
    found: set[int] = set()
    for answer, trace in zip(answers, traces, strict=True):
        at = 1
        for count in trace.accepted:
            found |= set(answer.tokens[at : at + count])
            at += count + 1
    return found


@pytest.mark.slow
def test_what_a_draft_cannot_say_it_cannot_accept_until_it_can(
    target: Target, answers: list[Answer], wanted: set[int]
) -> None:
    counts = torch.bincount(torch.tensor([t for a in answers for t in a.answer[1:]]))
    common = counts.argsort(descending=True)
    in_vocab = {int(t) for t in common[12:24]} | set(
        range(SIZE)
    )  # the twelve most frequent left out
    in_vocab -= {int(t) for t in common[:12]}
    size = len(in_vocab)
    draft: Any = new_draft(target, [saying(*in_vocab)], draft_vocab_size=size)
    assert set(draft.draft_vocab.tolist()) == in_vocab
    config = TrainConfig(
        method="full", lr=1e-2, epochs=8, batch_tokens=512, rollout=4, evaluations=1
    )
    draft.reinitialise(0)
    train(target, draft, answers, answers[:4], config, k=K)
    before = replay(target, draft, answers, k=K)
    assert accepted_tokens(answers, before) <= in_vocab
    made = remap(draft, target, answers)
    assert made.missed_after < made.missed_before
    train(target, draft, answers, answers[:4], config, k=K)
    after = replay(target, draft, answers, k=K)
    assert accepted_tokens(answers, after) & set(made.added.tolist())
    assert sum(t.gained for t in after) > 1.5 * sum(t.gained for t in before)
