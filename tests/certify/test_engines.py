"""Engines that compute a draft otherwise than its files have it: the certificate holds their counts too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from redraft.checkpoints.load import StoredDraft, stored
from redraft.config import TrainConfig
from redraft.core.records import Answer, Prompt
from redraft.drafts.mtp.network import MtpDraft
from redraft.models.target import Target
from redraft.serving.certificate import certify
from redraft.serving.certificate_check import (
    Certificate,
    _checksum,
    read_certificate,
    steps_of,
)
from redraft.training.train import train
from tests.certify.conftest import MOST, checked, served
from tests.conftest import fresh_draft


@pytest.fixture(scope="module")
def head(target: Target, answers: list[Answer]) -> StoredDraft:
    """An MTP head, trained a little, whose second token depends on the engine."""
    draft: MtpDraft = fresh_draft(target, kind="mtp", family="nextn", raw_feedback=True)
    config = TrainConfig(
        method="body", lr=1e-2, epochs=24, batch_tokens=512, rollout=3, evaluations=1
    )
    train(target, draft, answers, answers[:4], config, k=4)
    return stored(draft, target)


@pytest.fixture(scope="module")
def of_head(target: Target, prompts: list[Prompt], head: StoredDraft) -> Certificate:
    return certify(target, head, prompts, MOST)


def test_each_engine_is_held_against_its_own_counts(
    of_head: Certificate, target: Target, head: StoredDraft
) -> None:
    known = {
        owner: served(of_head, target, head.as_served(engine).build(target), 4)
        for owner, engine in (("vllm", "vllm"), ("llamacpp", "llama.cpp"), ("sglang", "sglang"))
    }
    for owner, decoded in known.items():
        found = checked(of_head, owner, decoded, 4)
        assert (found.holds, found.exact, found.distance) == (True, True, 0), owner
    found = checked(of_head, "llamacpp", known["vllm"], 4)
    assert not found.exact


def test_the_counts_of_an_engine_are_in_the_file(of_head: Certificate) -> None:
    assert set(of_head.engines) == {"sglang", "llama.cpp"}
    one, runs = of_head.prompts[0], of_head.engines["llama.cpp"][0]
    assert len(runs) == len(one.answer) - 1
    assert of_head.served_by("llama.cpp").prompts[0].accepted[3] == steps_of(runs, 3)
    assert of_head.served_by("vllm") is of_head


def test_a_file_of_before_has_none(of_head: Certificate, tmp_path: Path) -> None:
    row = json.loads(of_head.to_text())
    del row["engines"]
    row["checksum"] = _checksum(row)
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert read_certificate(path) == dataclasses.replace(of_head, engines={})
