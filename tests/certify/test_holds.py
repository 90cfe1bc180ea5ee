"""Right set-ups hold, on every engine and at every K: no false alarms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft.checkpoints.load import read_draft
from redraft.core.records import Prompt
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving import certificate_check
from redraft.serving.certificate import certify
from redraft.serving.certificate_check import DIALECTS, Certificate, cut_steps, whole_steps
from tests.certify.conftest import MOST, OWNERS, checked, served
from tests.certify.stand_in import Known


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_a_right_server_holds_to_the_last_token(
    certificate: Certificate, decoded: Callable[[int], Known], owner: str, k: int
) -> None:
    found = checked(certificate, owner, decoded(k), k)
    assert (found.holds, found.exact, found.cause, found.distance) == (True, True, "", 0)
    assert (found.k, found.equal, found.different) == (k, len(certificate.prompts), 0)
    assert found.served == found.expected
    assert found.conclusion.startswith("holds: the counts of 24 of 24 answers")


@pytest.fixture(scope="module")
def ending(ending_target: Target, prompts: list[Prompt], reduced_folder: Path) -> Certificate:
    return certify(ending_target, read_draft(str(reduced_folder)), prompts, MOST)


@pytest.mark.parametrize("k", [2, 5])
def test_answers_that_end_are_cut_as_the_engine_cuts_them(
    ending: Certificate, ending_target: Target, reduced_folder: Path, k: int
) -> None:
    ended = [one for one in ending.prompts if one.answer[-1] in ending.stop_ids]
    assert len(ended) >= 4
    draft = read_draft(str(reduced_folder)).build(ending_target)
    known = served(ending, ending_target, draft, k)
    for owner in OWNERS:
        found = checked(ending, owner, known, k)
        assert (found.holds, found.exact, found.k) == (True, True, k), found.conclusion


def test_counts_cut_as_another_engine_cuts_them_do_not_hold(
    certificate: Certificate, decoded: Callable[[int], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = tuple(
        dataclasses.replace(row, cut=cut_steps if row.cut is whole_steps else whole_steps)
        for row in DIALECTS
    )
    monkeypatch.setattr(certificate_check, "DIALECTS", swapped)
    found = checked(certificate, "vllm", decoded(7), 7)
    assert not found.exact
    assert found.served != found.expected


def test_half_precision_holds(
    target_folder: Path, prompts: list[Prompt], reduced_folder: Path
) -> None:
    """One prompt at a time against a batch: the two round differently."""
    half = load_target(str(target_folder), dtype="bfloat16")
    stored = read_draft(str(reduced_folder))
    certificate = certify(half, stored, prompts, 24)
    assert certificate.dtype == "bfloat16"
    assert any(one.near_ties for one in certificate.prompts)
    known = served(certificate, half, stored.build(half), 4, alone=True)
    for owner in OWNERS:
        found = checked(certificate, owner, known, 4)
        assert found.holds, found.conclusion
        assert (found.k, found.different) == (4, 0)


@pytest.mark.parametrize("kind", ["eagle", "token_lm"])
def test_every_kind_holds(
    target: Target, prompts: list[Prompt], kind_folder: Callable[[str], Path], kind: str
) -> None:
    stored = read_draft(str(kind_folder(kind)))
    certificate = certify(target, stored, prompts, 24)
    known = served(certificate, target, stored.build(target), 5)
    for owner in OWNERS:
        found = checked(certificate, owner, known, 5)
        assert (found.holds, found.exact, found.k) == (True, True, 5), found.conclusion
