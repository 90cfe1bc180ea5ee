"""A target with added tokens keeps its draft, which goes on saying the tokens it knew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.cli.app import app
from redraft.config import resolve
from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.adapt import adapt
from tests.conftest import write_prompts


@pytest.fixture(scope="module")
def grown(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The target with three more tokens, which it never says."""
    child = load_target(str(target_folder))
    child.tokenizer.add_tokens(["<call>", "</call>", "<think>"])
    child.model.resize_token_embeddings(len(child.tokenizer))
    with torch.no_grad():
        child.model.get_output_embeddings().weight[-3:] = 0.0
    folder = tmp_path_factory.mktemp("grown")
    child.model.save_pretrained(folder)
    child.tokenizer.save_pretrained(folder)
    return load_target(str(folder))


def own_embedding(stored: StoredDraft, target: Target) -> StoredDraft:
    embedded = {**stored.tensors, "embed_tokens.weight": target.embedding_VH.clone()}
    return dataclasses.replace(stored, tensors=embedded)


def test_a_published_draft_records_no_tokenizer(
    target: Target, grown: Target, draft_folder: Path
) -> None:
    """Tokens that were added may be past its end; tokens of the tokenizer's own make may not."""
    published = dataclasses.replace(read_draft(str(draft_folder)), provenance={})
    assert published.fitted(grown).config.vocab_size == target.vocab_size + 3
    assert published.build(grown) is not None
    words = dataclasses.replace(published.config, vocab_size=target.vocab_size - 20)
    fewer = dataclasses.replace(published, config=words)
    assert fewer.fitted(grown) is fewer


@pytest.mark.parametrize("own", [False, True])
def test_the_draft_does_as_before(
    target: Target, grown: Target, prompts: list[Prompt], draft_folder: Path, own: bool
) -> None:
    stored = read_draft(str(draft_folder))
    if own:
        stored = own_embedding(stored, target)
    assert stored.fitted(target) is stored
    fitted = stored.fitted(grown)
    assert fitted.config.vocab_size == target.vocab_size + 3
    assert int(fitted.tensors["t2d"].sum()) == target.vocab_size
    answers = answer_all(grown, prompts[:6], 16, 4, Sampling())
    before = replay(target, stored.build(target), answers, 4)
    assert replay(grown, stored.build(grown), answers, 4) == before
    assert sum(trace.gained for trace in before) > 0
    if own:
        rows = fitted.tensors["embed_tokens.weight"][-3:]
        assert torch.equal(rows, grown.embedding_VH[-3:])


def test_a_grown_target_is_adapted_and_exported(
    grown: Target, draft_folder: Path, tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 24)
    settings = {
        "train.epochs": 1,
        "train.batch_tokens": 512,
        "measure.eval_limit": 4,
        "measure.heldout": 4,
        "measure.eval_new_tokens": 16,
        "regenerate.max_new_tokens": 16,
    }
    resolved = resolve([("test", settings)])
    found = adapt(grown, str(draft_folder), str(file), out=tmp_path / "run", config=resolved)
    exported = read_draft(str(found.run / "draft"))
    assert exported.config.vocab_size == grown.vocab_size
    assert exported.fitted(grown) is exported


def test_a_part_trained_under_a_grown_vocabulary_is_exported_with_its_target(
    grown: Target, draft_folder: Path, tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 10)
    where, asked = str(grown.sources[0]), ["--prompts", str(file), "--max-new-tokens", "12", "-q"]
    answers, part = str(tmp_path / "a.jsonl"), str(tmp_path / "part")
    trained = ["--epochs", "1", "--batch-tokens", "512", "--answers", answers, "--heldout", answers]
    models = ["--target", where, "--draft", str(draft_folder)]
    for command in (
        ["regenerate", "--target", where, *asked, "--out", answers, "--lookahead", "4"],
        ["train", *models, *trained, "--out", part, "-q"],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, (found.output, found.exception)
    export = ["export", "--draft", str(draft_folder), "--adapter", part]
    alone = CliRunner().invoke(app, [*export, "--out", str(tmp_path / "x")])
    assert "with --target where the target's vocabulary grew" in str(alone.exception)
    both = CliRunner().invoke(app, [*export, "--target", where, "--out", str(tmp_path / "y")])
    assert both.exit_code == 0, both.exception
    assert read_draft(str(tmp_path / "y")).config.vocab_size == grown.vocab_size


def test_other_tokenizers_are_no_growth(
    target: Target, tuned_tokens: Callable[[], Target], draft_folder: Path
) -> None:
    stranger = tuned_tokens()
    stored = read_draft(str(draft_folder))
    assert stored.fitted(stranger) is stored
    with pytest.raises(UserError, match="tokenizers differ"):
        stored.build(stranger)


@pytest.fixture
def tuned_tokens(target_folder: Path) -> Callable[[], Target]:
    """A target whose tokenizer has as many tokens more, and one of the old ones under another id."""

    def make() -> Target:
        child = load_target(str(target_folder))
        child.tokenizer.add_tokens(["<call>"])
        child.model.resize_token_embeddings(len(child.tokenizer))
        child.vocab_size += 1
        true = child.tokenizer.get_vocab()
        first, second = sorted(true, key=true.__getitem__)[10:12]
        swapped = {**true, first: true[second], second: true[first]}
        child.tokenizer.get_vocab = lambda: swapped
        return child

    return make
