"""Vocabulary maps: rows in any order are one draft, identities are dropped, wrong maps are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.adapters.vocabulary_remap import remap
from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import load_draft, read_draft, stored
from redraft.checkpoints.reload_check import check_export
from redraft.core.errors import UserError
from redraft.core.folders import WEIGHTS
from redraft.core.records import Answer
from redraft.drafts.stored.reference_reader import Reference
from redraft.metrics.replay import replay
from redraft.models.target import Target
from tests.checkpoints.crafted import LAYOUTS, edit, retensor
from tests.conftest import fresh_draft
from tests.drafts.test_drafts import read

D = 40


def by_frequency(folder: Path, dtype: torch.dtype = torch.int64, mask: bool = True) -> torch.Tensor:
    """The same draft with the rows of its head in another order; returns the order."""
    tensors = load_file(folder / WEIGHTS)
    head = tensors["lm_head.weight"]
    rows = torch.arange(len(head))
    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(2))
    ids = tensors.get("d2t", torch.zeros(len(head)).long()) + rows
    tensors |= {"lm_head.weight": head[order].clone(), "d2t": (ids[order] - rows).to(dtype)}
    if not mask:
        tensors.pop("t2d", None)
    save_file(tensors, folder / WEIGHTS)
    (folder / "redraft.json").unlink(missing_ok=True)
    return order


@pytest.fixture
def pair(target: Target, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A reduced draft as it is, and with its rows in another order."""

    def make(layout: str = "specforge", **how: object) -> tuple[Path, Path]:
        draft = fresh_draft(target, vocab=D)
        plain, other = (LAYOUTS[layout](tmp_path / n, draft) for n in ("plain", "other"))
        by_frequency(other, **how)  # type: ignore[arg-type]
        return plain, other

    return make


@pytest.mark.parametrize("layout", ["specforge", "safeai_eagle3", "speculators"])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_order_of_rows_changes_nothing(
    target: Target,
    pair: Callable[..., tuple[Path, Path]],
    layout: str,
    mask: bool,
    dtype: torch.dtype,
) -> None:
    plain, other = pair(layout, mask=mask, dtype=dtype)
    sorted_, back = (load_draft(str(folder), target) for folder in (plain, other))
    assert back.draft_vocab is not None
    assert torch.equal(back.draft_vocab, sorted_.draft_vocab)  # type: ignore[arg-type]
    tokens, features = read(target, back)
    with torch.no_grad():
        chains = zip(
            back.rollout(tokens, features, 0, 4),
            sorted_.rollout(tokens, features, 0, 4),
            strict=True,
        )
        for states, expected in chains:
            assert torch.equal(back.logits(states), sorted_.logits(expected))
    if mask and dtype == torch.int64:
        assert read_draft(str(other)).hash() == read_draft(str(plain)).hash()


def test_a_row_says_the_token_that_its_file_says(
    target: Target, pair: Callable[..., tuple[Path, Path]]
) -> None:
    """Against the second reading, which takes rows as the file has them."""
    _, other = pair()
    draft = load_draft(str(other), target, torch.float64)
    tokens, features = read(target, draft)
    reference = Reference(other, target.embedding_VH)
    theirs = reference.chain_logits(tokens[0].tolist(), features[0], 3, 3)
    ids = load_file(other / WEIGHTS)["d2t"] + torch.arange(D)
    with torch.no_grad():
        ours = [draft.logits(s)[0, 3] for s in draft.rollout(tokens, features.double(), 0, 3)]
    for mine, expected in zip(ours, theirs, strict=True):
        spread = torch.full((target.vocab_size,), -torch.inf, dtype=torch.float64)
        assert torch.allclose(
            spread.clone().index_copy(0, draft.draft_vocab, mine),  # type: ignore[arg-type]
            spread.index_copy(0, ids, expected),
            atol=1e-5,
        )


def test_acceptance_is_the_same(
    target: Target, kind_folder: Callable[[str], Path], answers: list[Answer], tmp_path: Path
) -> None:
    """Of a trained draft, whose map of the whole vocabulary is then the identity."""
    trained = read_draft(str(kind_folder("eagle3")))
    trained.save(tmp_path / "d")
    by_frequency(tmp_path / "d")
    back = read_draft(str(tmp_path / "d"))
    assert back.hash() == trained.hash()
    assert set(back.tensors) == set(trained.tensors)
    expected = replay(target, trained.build(target), answers[:6], 4)
    assert replay(target, back.build(target), answers[:6], 4) == expected
    assert sum(trace.gained for trace in expected) > 0


def test_the_rest_of_the_work_goes_on_from_it(
    target: Target,
    pair: Callable[..., tuple[Path, Path]],
    answers: list[Answer],
    tmp_path: Path,
) -> None:
    """Replay, an exchange of tokens, export, and the check of the export."""
    plain, other = pair()
    found = []
    for folder in (plain, other):
        source = read_draft(str(folder))
        draft = source.build(target)
        exchanged = remap(draft, target, answers[:8])
        source.save(tmp_path / f"{folder.name}-out")
        assert check_export(source, tmp_path / f"{folder.name}-out") < 1e-6
        found.append(
            (replay(target, source.build(target), answers[:4], 3), exchanged.added.tolist())
        )
    (steps, added), (other_steps, other_added) = found
    assert steps == other_steps
    assert added == other_added
    assert len(added) > 0
    files = [load_file(tmp_path / f"{name}-out" / WEIGHTS) for name in ("plain", "other")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_engines_do_not_care_for_the_order(pair: Callable[..., tuple[Path, Path]]) -> None:
    _, other = pair()
    edit(other, eagle_config=...)
    found = inspect_draft(str(other))
    assert found.unreadable is None
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert found.serves(engine) == "serves it unchanged", found.engines


@pytest.mark.parametrize("mask", [True, False])
def test_an_identity_is_dropped(target: Target, tmp_path: Path, mask: bool) -> None:
    draft = fresh_draft(target)
    folder = LAYOUTS["safeai_eagle3"](tmp_path / "d", draft)
    V = target.vocab_size
    retensor(folder, d2t=torch.zeros(V).long(), t2d=torch.ones(V).bool() if mask else None)
    back = read_draft(str(folder))
    assert not {"d2t", "t2d"} & set(back.tensors)
    assert back.build(target).draft_vocab is None
    back.save(tmp_path / "out")
    assert inspect_draft(str(tmp_path / "out")).serves("vllm") == "serves it unchanged"


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([5, 9, 9, 11], None, "d2t leads from rows 1 and 2 to the same target id 9"),
        ([5, 9, 700, 11], None, "d2t leads from row 2 to target id 700, outside 0 to 260"),
        ([5, 9, -1, 11], None, "d2t leads from row 2 to target id -1, outside"),
        ([11, 5, 9, 7], [5, 7, 9, 12], "d2t names 4 target ids, t2d marks 4, and 3 are the same"),
    ],
)
def test_a_wrong_map_is_named(
    target: Target, tmp_path: Path, ids: list[int], mask: list[int] | None, message: str
) -> None:
    stored(fresh_draft(target, vocab=4), target).save(tmp_path / "d")
    t2d = None
    if mask is not None:
        t2d = torch.zeros(target.vocab_size, dtype=torch.bool)
        t2d[mask] = True
    retensor(tmp_path / "d", d2t=torch.tensor(ids) - torch.arange(4), t2d=t2d)
    with pytest.raises(UserError, match=message):
        read_draft(str(tmp_path / "d"))


@pytest.mark.parametrize("mask", [True, False])
def test_absolute_ids_in_any_order_are_noticed(target: Target, tmp_path: Path, mask: bool) -> None:
    draft = fresh_draft(target, vocab=120)
    stored(draft, target).save(tmp_path / "d")
    ids = draft.draft_vocab[torch.randperm(120, generator=torch.Generator().manual_seed(1))]
    retensor(tmp_path / "d", d2t=ids, **({} if mask else {"t2d": None}))
    with pytest.raises(UserError, match="these look like absolute ids"):
        read_draft(str(tmp_path / "d"))


def test_a_reduced_head_without_a_map_is_refused(target: Target, tmp_path: Path) -> None:
    stored(fresh_draft(target, vocab=D), target).save(tmp_path / "d")
    for changes in ({"d2t": None}, {"d2t": None, "t2d": None}):
        retensor(tmp_path / "d", **changes)
        with pytest.raises(UserError, match="rows for 40 of 261 tokens .* no d2t says for which"):
            read_draft(str(tmp_path / "d"))
