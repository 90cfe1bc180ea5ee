"""A tiny family built from nothing, and the draft of its fine-tune really repaired."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from redraft import flow
from redraft.bench.corpus import MEMBERS, SIZES, Corpus
from redraft.bench.family import (
    _supervised,
    build_family,
    describe_family,
    draft_folder,
    load_member,
)
from redraft.bench.language_model import validation_loss
from redraft.config import resolve
from redraft.drafts.table import KINDS
from redraft.errors import UserError
from redraft.measuring.acceptance import pooled_tau
from redraft.measuring.live import live
from redraft.records import Prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the family is built in its first test


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("family")
    return out, build_family(out, size="tiny", kinds=list(KINDS))


def test_every_member_is_there_and_measured(family: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = family
    assert set(manifest["members"]) == set(MEMBERS)
    for name, row in manifest["members"].items():
        assert row["reused"]["steps"] > 0
        assert (out / "members" / name).is_dir()
        other = {"sft-medical": "records", "replay-medical": "records", "sft-code": "code"}
        assert row["domain"] == other.get(name, "math")
        target = load_member(out, name)
        assert target.hidden_size == SIZES["tiny"].shape.hidden
    assert manifest["members"]["lora4"]["adapter"] is not None
    assert manifest["members"]["sft"]["loss"] < manifest["members"]["sft-tenth"]["loss"]
    gates = {gate["gate"] for gate in manifest["gates"]}
    assert gates >= {"tau reused on sft", "loop rate of sft", "loop rate of sft-medical"}
    shown = io.StringIO()
    describe_family(manifest, Console(file=shown, width=200))
    row = next(line for line in shown.getvalue().splitlines() if "sft-medical" in line)
    assert "records" in row


def test_a_fine_tune_of_another_domain_knows_that_domain_better(
    family: tuple[Path, dict[str, Any]],
) -> None:
    out, manifest = family
    corpus = Corpus(SIZES["tiny"], None, 0)
    for name in ("sft-medical", "sft-code"):
        domain = manifest["members"][name]["domain"]
        tuned, other = load_member(out, name), load_member(out, "sft")
        chats = [_supervised(tuned.tokenizer, c) for c in corpus.chats(domain, 64, "heldout")]
        assert validation_loss(tuned.model, chats) < validation_loss(other.model, chats)


def test_prompt_files_are_disjoint(family: tuple[Path, dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for path in sorted((family[0] / "prompts").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            first = json.loads(line)["messages"][0]["content"]
            assert seen.setdefault(first, path.name) == path.name, first


@pytest.mark.parametrize("kind", list(KINDS))
def test_adapting_repairs_the_draft_and_changes_no_output(
    family: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    out = family[0]
    target = load_member(out, "sft")
    settings = {
        "train.method": "expert+norms" if kind == "token_lm" else "expert+fc+norms",
        "regenerate.max_new_tokens": 48,
        "train.lr": 1e-2,
        "train.epochs": 5,
        "train.batch_tokens": 512,
        "train.rollout": 4,
        "measure.eval_new_tokens": 48,
        "measure.heldout": 16,
    }
    result = flow.adapt(
        target,
        str(out / draft_folder(kind)),
        str(out / "prompts" / "math-adapt.jsonl"),
        out=tmp_path / "run",
        config=resolve([("test", settings)]),
    )
    assert result.after.ci[0] > result.before.ci[1], (result.before.tau, result.after.tau)
    # The live loop agrees with what the report says, on the report's own prompts.
    answers = [
        json.loads(line) for line in (tmp_path / "run/answers/eval.jsonl").read_text().splitlines()
    ]
    prompts = [Prompt(a["id"], tuple(a["prompt"])) for a in answers[:12]]
    from redraft.formats.load import load_draft

    draft = load_draft(str(result.run / "draft"), target)
    traces, found = live(target, draft, prompts, 4, 48)
    identical = [
        list(f.answer) == a["tokens"][: a["length"]] for f, a in zip(found, answers, strict=False)
    ]
    assert sum(identical) >= len(prompts) - 1  # float32: one near-tie may fall either way
    assert pooled_tau([t for t in traces if t.accepted]) > result.before.tau


def test_unknown_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown size 'nana'; did you mean 'nano'"):
        build_family(tmp_path, size="nana")
    with pytest.raises(UserError, match="unknown kind of draft 'eagle2'; did you mean 'eagle'"):
        build_family(tmp_path, size="tiny", kinds=["eagle2"])
    with pytest.raises(UserError, match="unknown member 'sftt'; did you mean 'sft'"):
        build_family(tmp_path, size="tiny", members=["sftt"])
    with pytest.raises(UserError, match="unknown member 'sft-medicl'; did you mean 'sft-medical'"):
        build_family(tmp_path, size="tiny", members=["sft-medicl"])
    monkeypatch.delenv("REDRAFT_DATA", raising=False)
    with pytest.raises(UserError, match="reads real data: name its folder with --data"):
        build_family(tmp_path, size="micro")
