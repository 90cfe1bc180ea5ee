"""What changed between base and target, and what was lost by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from redraft.check.attribution import find_causes
from redraft.check.base_check import compare
from redraft.checkpoints.load import read_draft
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.decoding.sampling import Sampling
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import SHAPE, make_tokenizer, save_target


def test_a_model_is_its_own_parent(
    target: Target, prompts: list[Prompt], answers: list[Answer], draft_folder: Path
) -> None:
    changes = compare(target, target, prompts, prompts)
    assert (changes.template, changes.renders, changes.added_tokens) == (False, 0.0, 0)
    assert changes.embedding == changes.head == 0.0
    stored = read_draft(str(draft_folder))
    found = find_causes(target, target, stored, answers, answers, 4)
    assert found is not None
    assert found.base_states == pooled_tau(replay(target, stored.build(target), answers, 4))
    assert found.base_embedding is None
    assert abs(found.divergence) < 1e-9
    assert found.agreement == 1.0
    assert found.cosine == pytest.approx(1.0)
    assert (found.missed, found.left_out) == (0.0, 0)


def distance_by_hand(
    target: Target, base: Target, answers: list[Answer], shift: int = 0
) -> tuple[float, float]:
    """KL and agreement, one position at a time from a prefix of its own."""
    divergence, hits, tokens = 0.0, 0, 0
    for answer in answers:
        row = [*answer.prompt, *answer.answer]
        for at in range(len(answer.prompt), len(row)):
            prefix = torch.tensor([row[: at - shift]])
            p, q = (m.read(prefix, ()).logits_BTV[0, -1].double() for m in (target, base))
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
            hits += int(q.argmax()) == row[at]
            tokens += 1
    return divergence / tokens, hits / tokens


@torch.inference_mode()
def test_distances_are_those_of_a_reading_by_hand(
    target: Target, prompts: list[Prompt], tuned: Callable[..., Target], draft_folder: Path
) -> None:
    child, stored = tuned(0.1), read_draft(str(draft_folder))
    answers = answer_all(child, prompts[:4], 12, 8, Sampling())
    on_base = answer_all(target, prompts[:4], 12, 8, Sampling())
    found = find_causes(child, target, stored, answers, on_base, 4)
    assert found is not None
    divergence, agreement = distance_by_hand(child, target, answers)
    assert found.divergence == pytest.approx(divergence, rel=1e-4)
    assert found.agreement == pytest.approx(agreement)
    shifted = distance_by_hand(child, target, answers, shift=1)
    assert shifted[0] != pytest.approx(found.divergence, rel=1e-2)
    assert found.base_states == pooled_tau(replay(target, stored.build(target), answers, 4))
    assert found.base_embedding is not None
    assert 0 < found.cosine < 1


def test_what_changed_is_measured(
    target: Target, prompts: list[Prompt], tuned: Callable[..., Target]
) -> None:
    child = tuned(0.1)
    theirs = [*prompts[:6], *(Prompt(p.id, (*p.tokens, 3)) for p in prompts[6:8])]
    changes = compare(child, target, prompts[:8], theirs)
    moved = (child.embedding_VH - target.embedding_VH).norm() / target.embedding_VH.norm()
    assert changes.embedding == pytest.approx(float(moved), rel=1e-5)
    assert changes.renders == 0.25


def test_a_base_that_is_not_the_parent(
    target: Target, prompts: list[Prompt], tmp_path: Path
) -> None:
    vocabulary = len(make_tokenizer())
    stranger = save_target(tmp_path / "a", LlamaConfig(vocab_size=vocabulary, **SHAPE), seed=7)
    with pytest.raises(UserError, match="is not what .* was tuned from: their embeddings have"):
        compare(target, load_target(str(stranger)), prompts, prompts)
    other = {**SHAPE, "hidden_size": 64}
    wide = save_target(tmp_path / "b", LlamaConfig(vocab_size=vocabulary, **other))
    with pytest.raises(UserError, match="it has 8 layers of size 64, the target 8 of 32"):
        compare(target, load_target(str(wide)), prompts, prompts)
    other_words = load_target(str(stranger))
    other_words.tokenizer.add_tokens([f"<{n}>" for n in range(20)])
    with pytest.raises(UserError, match="20 of its tokens mean something else"):
        compare(target, other_words, prompts, prompts)


def test_a_reserved_token_may_have_another_name(
    target: Target, target_folder: Path, prompts: list[Prompt]
) -> None:
    parent = load_target(str(target_folder))
    parent.tokenizer.add_tokens(["<reserved>"])
    assert compare(target, parent, prompts, prompts).renamed == 1


def test_a_draft_that_reads_no_states_has_no_cosine(
    target: Target, answers: list[Answer], kind_folder: Callable[[str], Path]
) -> None:
    stored = read_draft(str(kind_folder("token_lm")))
    found = find_causes(target, target, stored, answers, answers, 4)
    assert found is not None
    assert found.cosine is None
