"""One tokenizer, other numbers of rows: a draft is cut or filled up, and nothing that it says changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from typer.testing import CliRunner

from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.checkpoints.vocabulary_rows import same_tokens
from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.drafts.base import MOST_PADDING
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.checkpoints.crafted import LAYOUTS
from tests.conftest import fresh_draft

MORE = 59
"""Rows of padding."""


@pytest.fixture(scope="module")
def padded(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The target with rows of padding, which it never says."""
    child = load_target(str(target_folder))
    child.model.resize_token_embeddings(len(child.tokenizer) + MORE)
    with torch.no_grad():
        child.model.get_output_embeddings().weight[-MORE:] = 0.0
    folder = tmp_path_factory.mktemp("padded")
    child.model.save_pretrained(folder)
    child.tokenizer.save_pretrained(folder)
    return load_target(str(folder))


def as_published(draft: StoredDraft, **tensors: torch.Tensor) -> StoredDraft:
    """The same draft without a record, and with further tensors."""
    return dataclasses.replace(draft, provenance={}, tensors={**draft.tensors, **tensors})


def with_padding(draft: StoredDraft) -> StoredDraft:
    """As a tool would have made it for the padded target: rows of noise past the tokenizer's."""
    noise = torch.Generator().manual_seed(7)
    sizes: dict[str, Any] = {"vocab_size": draft.config.vocab_size + MORE}
    tensors = dict(draft.tensors)
    grown = ["embed_tokens.weight"]
    if "d2t" in tensors:
        tensors["t2d"] = pad(tensors["t2d"], (0, MORE))
    elif draft.kind == "eagle3":
        grown.append("lm_head.weight")
        sizes["draft_vocab_size"] = sizes["vocab_size"]
    for name in grown:
        if name in tensors:
            rows = 9 * torch.randn(MORE, tensors[name].shape[1], generator=noise)
            tensors[name] = torch.cat([tensors[name], rows])
    config = dataclasses.replace(draft.config, **sizes)
    return dataclasses.replace(draft, config=config, tensors=tensors)


@pytest.fixture
def made(target: Target, kind_folder: Callable[[str], Path]) -> Callable[[str, bool], StoredDraft]:
    """A draft of each kind, with or without an embedding of its own, as published."""

    def make(kind: str, own: bool) -> StoredDraft:
        if kind == "reduced":
            draft = stored(fresh_draft(target, vocab=40), target)
        else:
            draft = read_draft(str(kind_folder(kind)))
        beside = {"embed_tokens.weight": target.embedding_VH.clone()} if own else {}
        return as_published(draft, **beside)

    return make


KINDS = [(kind, own) for kind in ("eagle3", "reduced", "eagle") for own in (False, True)]


@pytest.mark.parametrize(("kind", "own"), KINDS)
def test_surplus_rows_are_cut(
    target: Target, answers: list[Answer], made: Any, tmp_path: Path, kind: str, own: bool
) -> None:
    draft = made(kind, own)
    padded_ = with_padding(draft)
    back = padded_.fitted(target)
    assert back.config == draft.config
    assert back.hash() == draft.hash()
    expected = replay(target, draft.build(target), answers[:4], 3)
    assert replay(target, padded_.build(target), answers[:4], 3) == expected
    back.save(tmp_path / "out")
    found = inspect_draft(str(tmp_path / "out"), target)
    assert found.unreadable is None
    assert found.serves("vllm") == "serves it unchanged", found.engines


@pytest.mark.parametrize(("kind", "own"), KINDS)
def test_missing_rows_are_never_proposed(
    target: Target,
    padded: Target,
    answers: list[Answer],
    made: Any,
    tmp_path: Path,
    kind: str,
    own: bool,
) -> None:
    draft = made(kind, own)
    expected = replay(target, draft.build(target), answers[:4], 3)
    fitted = draft.fitted(padded)
    assert fitted.config.vocab_size == padded.vocab_size
    assert replay(padded, fitted.build(padded), answers[:4], 3) == expected
    if kind != "reduced":
        assert sum(trace.gained for trace in expected) > 0
    if own:
        rows = fitted.tensors["embed_tokens.weight"]
        assert torch.equal(rows[-MORE:], padded.embedding_VH[-MORE:])
    fitted.save(tmp_path / "out")
    assert read_draft(str(tmp_path / "out")).fitted(padded).hash() == fitted.hash()
    assert inspect_draft(str(tmp_path / "out"), padded).serves("vllm") == "serves it unchanged"


def test_tokens_past_the_targets_rows_are_dropped_from_a_map(target: Target, made: Any) -> None:
    draft = with_padding(made("reduced", False))
    tensors = dict(draft.tensors)
    ids = tensors["d2t"] + torch.arange(40)
    ids[-3:] = torch.arange(3) + target.vocab_size
    tensors["d2t"] = ids - torch.arange(40)
    tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool)
    tensors["t2d"][ids] = True
    fitted = dataclasses.replace(draft, tensors=tensors).fitted(target)
    assert fitted.config.draft_vocab_size == 37
    assert torch.equal(fitted.tensors["lm_head.weight"], tensors["lm_head.weight"][:-3])
    assert torch.equal(fitted.build(target).draft_vocab, ids[:-3])  # type: ignore[arg-type]


def test_what_decides_that_the_tokens_are_the_same(target: Target) -> None:
    V, own = target.vocab_size, target.tokenizer_hash()
    assert same_tokens(target, 5 * V + 5000, own)  # the hash decides, however many rows
    assert not same_tokens(target, V + 8, "0" * 16)
    assert same_tokens(target, V + MOST_PADDING, None)
    assert not same_tokens(target, V + MOST_PADDING + 1, None)  # more than padding
    assert not same_tokens(target, V - 1, None)  # a token without a row


def test_other_tokenizers_are_refused_with_the_reason(target: Target, made: Any) -> None:
    draft = with_padding(made("eagle3", False))
    other = dataclasses.replace(draft, provenance={"tokenizer_hash": "0" * 16})
    with pytest.raises(UserError, match="vocabularies differ|tokenizers differ"):
        other.build(target)
    for _ in range(MOST_PADDING // MORE + 1):
        draft = with_padding(draft)
    with pytest.raises(UserError, match="261 rows for 261 tokens, this draft has .* more than pad"):
        draft.build(target)
    bare = Target(target.model, None, ["bare"])
    with pytest.raises(UserError, match="without the target's tokenizer nobody knows"):
        with_padding(made("eagle3", False)).build(bare)


def test_the_decision_is_told(
    target: Target, made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from redraft.core import console

    console.set_quiet(False)
    try:
        with_padding(made("eagle", False)).fitted(target)
    finally:
        console.set_quiet(True)
    told = " ".join(capsys.readouterr().err.split())
    assert "records no tokenizer" in told
    assert "surplus rows are cut" in told


def test_inspect_and_export_with_a_target(target: Target, made: Any, tmp_path: Path) -> None:
    draft = with_padding(made("eagle3", False))
    folder = LAYOUTS["specforge"](tmp_path / "d", with_shape(draft, target))
    found = inspect_draft(str(folder), target)
    assert found.unreadable is None
    assert found.serves("vllm") == "serves another function"  # as stored: it says ids from 261 on
    assert any("rows for the target's 261" in finding.says for finding in found.engines)
    export = ["export", "--draft", str(folder), "--target", str(target.sources[0]), "-q"]
    done = CliRunner().invoke(app, [*export, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert inspect_draft(str(tmp_path / "out"), target).serves("vllm") == "serves it unchanged"


def with_shape(draft: StoredDraft, target: Target) -> Any:
    """A stored draft as the writers of crafted layouts take one."""

    class Written:
        config, aux_layers = draft.config, (2, 4, 5)

        @staticmethod
        def stored_state() -> dict[str, torch.Tensor]:
            return draft.tensors

    return Written
