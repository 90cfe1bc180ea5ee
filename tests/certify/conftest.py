"""A certified draft with a reduced vocabulary, and what a server says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.checkpoints.load import read_draft, stored
from redraft.config import TrainConfig
from redraft.core.records import Answer, Prompt
from redraft.drafts.base import Draft
from redraft.drafts.new import new_draft
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving import certificate_check
from redraft.serving.certificate import certify
from redraft.serving.certificate_check import Certificate, CheckResult, check
from redraft.training.train import train
from tests.certify.stand_in import Known, StandIn, decode, running

MOST = 48
OWNERS = ("vllm", "llamacpp", "sglang")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for counters, and no key or proxy of the person who runs the tests."""
    monkeypatch.setattr(certificate_check, "COUNTER_SECONDS", 0.2)
    monkeypatch.setattr(certificate_check, "COUNTER_PAUSE", 0.01)
    for name in ("REDRAFT_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def reduced_folder(
    target: Target, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A trained draft with aux layers of its own and part of the vocabulary.

    It is trained under the target's head, of which its own is a noisy copy, so that it accepts tokens with
    either.
    """
    draft: Any = new_draft(target, answers, draft_vocab_size=150, aux_layers=(2, 4, 5))
    draft.reinitialise(5)
    with torch.no_grad():
        draft.lm_head.weight.copy_(target.head.weight[draft.draft_vocab])
    config = TrainConfig(
        method="body", lr=1e-2, epochs=16, batch_tokens=512, rollout=4, evaluations=1
    )
    train(target, draft, answers, answers[:4], config, k=4)
    with torch.no_grad():
        noise = torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
        draft.lm_head.weight.add_(0.1 * draft.lm_head.weight.std() * noise)
    folder = tmp_path_factory.mktemp("reduced") / "draft"
    stored(draft, target).save(folder)
    return folder


@pytest.fixture(scope="session")
def certificate(target: Target, prompts: list[Prompt], reduced_folder: Path) -> Certificate:
    return certify(target, read_draft(str(reduced_folder)), prompts, MOST)


@pytest.fixture(scope="session")
def ending_target(target_folder: Path, answers: list[Answer]) -> Target:
    """The target, ending its answers at a token that it writes now and then."""
    ending = load_target(str(target_folder))
    late = [answer.answer[20] for answer in answers]
    ending.model.generation_config.eos_token_id = max(set(late), key=late.count)
    return ending


@pytest.fixture(scope="session")
def decoded(
    target: Target, reduced_folder: Path, certificate: Certificate
) -> Callable[[int], Known]:
    """What the live loop makes of the certificate's prompts with the right draft, for each K."""
    draft = read_draft(str(reduced_folder)).build(target)
    return functools.cache(lambda k: served(certificate, target, draft, k))


def served(certificate: Certificate, target: Target, draft: Draft, k: int, **how: Any) -> Known:
    prompts = [one.prompt for one in certificate.prompts]
    return decode(target, draft, prompts, k, certificate.max_new_tokens, **how)


def checked(certificate: Certificate, owner: str, known: Known, k: int, **how: Any) -> CheckResult:
    """The check of a stand-in that serves `known`."""
    stops, most = certificate.stop_ids, certificate.max_new_tokens
    with running(StandIn(owner, known, k, most, stops, **how)) as url:
        return check(certificate, url)
