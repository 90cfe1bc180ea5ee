"""The file: what it holds, that it is the same each time, and every way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.checkpoints.load import read_draft
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.metrics.lossless import audit, near_ties, slack_of
from redraft.models.target import Target
from redraft.serving import certificate as module
from redraft.serving.certificate import certify
from redraft.serving.certificate_check import Certificate, CheckError, read_certificate
from tests.certify.conftest import MOST
from tests.conftest import in_double


@pytest.fixture
def file(certificate: Certificate, tmp_path: Path) -> Path:
    path = tmp_path / "certificate.json"
    path.write_text(certificate.to_text(), encoding="utf-8")
    return path


def test_it_holds_what_the_target_says_and_names_what_it_is_of(
    certificate: Certificate, target: Target, answers: list[Answer], reduced_folder: Path
) -> None:
    assert certificate.target["weights_hash"] == target.weights_hash()
    assert certificate.target["tokenizer_hash"] == target.tokenizer_hash()
    assert certificate.target["template_hash"] == target.template_hash()
    assert certificate.draft["tensors_hash"] == read_draft(str(reduced_folder)).hash()
    assert "/" not in certificate.target["name"] + certificate.draft["name"], "no path is published"
    assert certificate.dtype == "float32"
    by_prompt = {tuple(a.prompt): a.answer for a in answers}
    for one in certificate.prompts:
        known = list(by_prompt[one.prompt])
        assert list(one.answer[: len(known)]) == known
        assert len(one.lookahead) == module.LARGEST_K
        assert set(one.accepted) == set(range(1, 8))
        assert max(one.accepted[7]) <= 7
    for fault in certificate.faults:
        assert fault.causes
        assert [len(r) for r in fault.runs] == [len(o.answer) - 1 for o in certificate.prompts]


def test_it_is_read_back_and_written_the_same_again(
    certificate: Certificate,
    file: Path,
    target: Target,
    prompts: list[Prompt],
    reduced_folder: Path,
) -> None:
    assert read_certificate(file).to_text() == certificate.to_text()
    again = certify(target, read_draft(str(reduced_folder)), prompts, MOST)
    assert again.to_text() == certificate.to_text()
    later = dataclasses.replace(certificate, date="2030-01-01")
    changed = [
        (a, b)
        for a, b in zip(later.to_text().split("\n"), certificate.to_text().split("\n"), strict=True)
        if a != b
    ]
    assert [a.strip() for a, _ in changed] == ['"date":"2030-01-01",'.replace(":", ": ")]
    assert len(certificate.to_text().encode()) < 200_000


def _changed(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


def _without(key: str) -> Callable[[str], str]:
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != key})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], r"no whole JSON file .* cut short .* copy it again"),
        (lambda text: "", "no whole JSON file"),
        (lambda text: "[1, 2]", r"is no certificate: expected \"format\": .* redraft certify"),
        (_without("format"), "is no certificate"),
        (_changed(version=2), r"version 2, this checker reads version 1; use the checker of"),
        (_changed(largest_k=5), "was edited or damaged .* copy it again"),
        (_changed(prompts=[]), "was edited or damaged"),
        (_without("checksum"), "is damaged or of another format .* write it again"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(
    file: Path, spoil: Callable[[str], str], message: str
) -> None:
    file.write_text(spoil(file.read_text()))
    with pytest.raises(CheckError, match=re.compile(message, re.DOTALL)):
        read_certificate(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="nowhere.json could not be read"):
        read_certificate(tmp_path / "nowhere.json")


def test_too_few_prompts_are_refused(
    target: Target, prompts: list[Prompt], reduced_folder: Path
) -> None:
    stored = read_draft(str(reduced_folder))
    with pytest.raises(UserError, match="12 of 12 prompts are of use .* needs 16"):
        certify(target, stored, prompts[:12], MOST)
    with pytest.raises(UserError, match="0 of 24 prompts are of use"):
        certify(target, stored, prompts, 240)


def test_a_certificate_that_is_too_large_drops_its_longest_prompts(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(certificate.to_text().encode())
    monkeypatch.setattr(module, "LARGEST", size - 500)
    smaller = module._small_enough(certificate)
    assert len(smaller.to_text().encode()) <= size - 500
    kept, longest = len(smaller.prompts), max(len(one.prompt) for one in certificate.prompts)
    assert 16 <= kept < len(certificate.prompts)
    gone = [one for one in certificate.prompts if one not in smaller.prompts]
    assert {len(one.prompt) for one in gone} == {longest}
    at = [certificate.prompts.index(one) for one in smaller.prompts]
    for whole, less in zip(certificate.faults, smaller.faults, strict=True):
        assert less.runs == tuple(whole.runs[i] for i in at)
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(UserError, match="with 16 prompts, 1,000 are allowed; name shorter prompts"):
        module._small_enough(certificate)


# -- near-ties -------------------------------------------------------------------------------------


def test_a_near_tie_is_where_another_token_is_as_good(
    target_folder: Path, prompts: list[Prompt], answers: list[Answer]
) -> None:
    """The head's row of one written token is copied to a token that is never written."""
    tied = in_double(target_folder)
    answer, unused = answers[0], 3
    assert unused not in answer.answer
    token = answer.answer[5]
    with torch.no_grad():
        tied.model.get_output_embeddings().weight[unused] = tied.head.weight[token] * (1 - 1e-15)
    at = [i for i, written in enumerate(answer.answer) if written == token]
    slack = slack_of([audit(tied, prompts[0], answer.answer)], tied.dtype)
    assert list(near_ties(tied, prompts[0], answer.answer, slack)) == at
    plain = in_double(target_folder)
    assert near_ties(plain, prompts[0], answer.answer, slack) == ()
    assert near_ties(plain, prompts[0], answer.answer, 1e18) == tuple(range(len(answer.answer)))
