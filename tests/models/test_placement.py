"""A target whose layers lie on the disk: the same numbers as in memory, in everything that is done with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.placement import read_max_memory
from redraft.models.target import Target
from redraft.training.train import train
from tests.conftest import SHAPE, fresh_draft, make_tokenizer, save_target

SMALL = "cpu=120KB"
"""Less than half of the tiny target."""


@pytest.fixture(scope="module")
def spread(target_folder: Path) -> Target:
    return load_target(str(target_folder), device_map="auto", max_memory=SMALL)


def places(target: Target) -> set[str]:
    return {str(p.device) for p in target.model.parameters()}


def test_it_reads_answers_and_trains_as_in_memory(
    spread: Target, target: Target, answers: list[Answer]
) -> None:
    assert places(spread) == {"cpu", "meta"}
    assert not spread.embedding_VH.is_meta
    tokens = torch.randint(5, 200, (2, 9))
    found, expected = (one.read(tokens, (2, 4, 8)) for one in (spread, target))
    assert torch.equal(found.features_BTF, expected.features_BTF)
    assert torch.equal(found.logits_BTV, expected.logits_BTV)
    assert torch.equal(
        spread.logits_from(found.features_BTF[0, :, -32:]),
        target.logits_from(expected.features_BTF[0, :, -32:]),
    )
    config = TrainConfig(epochs=1, batch_tokens=512, rollout=2, evaluations=1, precision="fp32")
    trained, traces = [], []
    for one in (spread, target):
        draft = fresh_draft(one)
        trained.append(train(one, draft, answers[:8], answers[8:12], config, k=3))
        traces.append(replay(one, draft, answers[8:], 3))
    assert trained[0].record.heldout_tau == trained[1].record.heldout_tau
    assert all(torch.equal(t, trained[1].tensors[name]) for name, t in trained[0].tensors.items())
    assert traces[0] == traces[1]


def test_it_answers_as_in_memory(spread: Target, target: Target, answers: list[Answer]) -> None:
    from redraft.core.records import Prompt
    from redraft.decoding.sampling import Sampling
    from redraft.metrics.measure import answer_all

    prompts = [Prompt(answer.id, answer.prompt) for answer in answers[:4]]
    assert answer_all(spread, prompts, 32, 8, Sampling()) == answers[:4]


def test_tied_embeddings_are_spread_and_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=len(make_tokenizer()), tie_word_embeddings=True, **SHAPE)
    folder = str(save_target(tmp_path / "tied", config))
    one, other = load_target(folder), load_target(folder, device_map="auto", max_memory=SMALL)
    assert "meta" in places(other)
    tokens = torch.randint(5, 200, (1, 7))
    assert torch.equal(one.read(tokens, (3,)).logits_BTV, other.read(tokens, (3,)).logits_BTV)
    get_peft_model(one.model, LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="merge the adapter into the model first"):
        load_target(folder, adapter=str(tmp_path / "lora"), device_map="auto", max_memory=SMALL)


def test_one_that_fits_stays_whole(target_folder: Path) -> None:
    assert places(load_target(str(target_folder), device_map="auto")) == {"cpu"}


def test_mistakes_are_named(target_folder: Path) -> None:
    assert read_max_memory("0=20GiB, cpu=1.5GB") == {0: "20GiB", "cpu": "1.5GB"}
    for text in ("20GiB", "gpu=20GiB", "cpu=", "cpu=20", "0=20GiB,,"):
        with pytest.raises(UserError, match="expected devices and sizes such as"):
            read_max_memory(text)
    with pytest.raises(UserError, match="--device-map balanced: unknown; known: auto"):
        load_target(str(target_folder), device_map="balanced")
