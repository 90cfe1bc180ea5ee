"""A tiny suite built from nothing, and the draft of its fine-tune really repaired."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from redraft.config import resolve
from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.decoding.sampling import Sampling
from redraft.drafts.kinds import kind_names
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.live import live
from redraft.metrics.measure import answer_all
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft_experiments.corpus import SIZES, Corpus, chat_of
from redraft_experiments.language_model import IGNORE, supervised, validation_loss
from redraft_experiments.members import DEFAULT
from redraft_experiments.suite import (
    build_suite,
    describe_suite,
    draft_folder,
    load_member,
    suite_prompts,
)
from redraft_experiments.synthetic_harm import Pair

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]  # the suite is built in its first test


FIRST = [name for name in DEFAULT if name not in ("sft-code", "replay", "replay-medical")]
"""The default members but for the slowest to build, and for others' kinds in another domain."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("suite")
    return out, build_suite(out, size="tiny", members=FIRST, kinds=kind_names())


def test_every_member_is_there_and_measured(suite: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = suite
    assert set(manifest["members"]) == set(FIRST)
    for name, row in manifest["members"].items():
        assert row["unadapted"]["steps"] > 0
        assert (out / "members" / name).is_dir()
        assert row["domain"] == ("records" if name == "sft-medical" else "math")
        target = load_member(out, name)
        assert target.hidden_size == SIZES["tiny"].shape.hidden
    assert manifest["members"]["lora4"]["adapter"] is not None
    kinds = [manifest["members"][name]["kind"] for name in ("lora4", "pretrained", "sft")]
    assert kinds == ["lora", "pretrained", "sft"]
    assert manifest["members"]["sft"]["loss"] < manifest["members"]["sft-tenth"]["loss"]
    gates = {gate["gate"] for gate in manifest["gates"]}
    assert gates >= {"tau unadapted on sft", "loop rate of sft", "loop rate of sft-medical"}
    shown = io.StringIO()
    describe_suite(manifest, Console(file=shown, width=200))
    row = next(line for line in shown.getvalue().splitlines() if "sft-medical" in line)
    assert "records" in row


def test_a_fine_tune_of_another_domain_knows_that_domain_better(
    suite: tuple[Path, dict[str, Any]],
) -> None:
    out, manifest = suite
    corpus = Corpus(SIZES["tiny"], None, 0)
    domain = manifest["members"]["sft-medical"]["domain"]
    tuned, other = load_member(out, "sft-medical"), load_member(out, "sft")
    chats = [supervised(tuned.tokenizer, c) for c in corpus.chats(domain, 64, "heldout")]
    assert validation_loss(tuned.model, chats) < validation_loss(other.model, chats)


def test_prompt_files_are_disjoint(suite: tuple[Path, dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for path in sorted((suite[0] / "prompts").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            first = json.loads(line)["messages"][0]["content"]
            assert seen.setdefault(first, path.name) == path.name, first


@pytest.mark.parametrize("kind", kind_names())
def test_adapting_repairs_the_draft_and_changes_no_output(
    suite: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    out = suite[0]
    target = load_member(out, "sft")
    settings = {
        "general.guard": "off",
        "train.method": "expert+norms" if kind == "token_lm" else "expert+fc+norms",
        "regenerate.max_new_tokens": 48,
        "train.lr": 1e-2,
        "train.epochs": 5,
        "train.batch_tokens": 512,
        "train.rollout": 4,
        "measure.eval_new_tokens": 48,
        "measure.heldout": 16,
    }
    result = pipeline.adapt(
        target,
        str(out / draft_folder(kind)),
        str(out / "prompts" / "math-adapt.jsonl"),
        out=tmp_path / "run",
        config=resolve([("test", settings)]),
        limit=128,
    )
    assert result.after.ci[0] > result.before.ci[1], (result.before.tau, result.after.tau)
    # The live loop agrees with what the report says, on the report's own prompts.
    answers = [
        json.loads(line) for line in (tmp_path / "run/answers/eval.jsonl").read_text().splitlines()
    ]
    prompts = [Prompt(a["id"], tuple(a["prompt"])) for a in answers[:12]]
    from redraft.checkpoints.load import load_draft

    draft = load_draft(str(result.run / "draft"), target)
    traces, found = live(target, draft, prompts, 4, 48)
    identical = [
        list(f.answer) == a["tokens"][: a["length"]] for f, a in zip(found, answers, strict=False)
    ]
    assert sum(identical) >= len(prompts) - 1  # float32: one near-tie may fall either way
    assert pooled_tau([t for t in traces if t.accepted]) > result.before.tau


ADDED = ("merge-half", "int8-sft", "template", "tokens-grown")
PREFERRED = ("dpo-refuse",) if find_spec("trl") else ()


@pytest.fixture(scope="module")
def zoo(suite: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The same suite with members of the other kinds."""
    out = suite[0]
    before = json.loads((out / "state.json").read_text())
    manifest = build_suite(out, size="tiny", members=[*ADDED, *PREFERRED])
    after = json.loads((out / "state.json").read_text())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"gates"}  # what was there is used as it is
    return out, manifest


def test_members_of_every_kind_are_measured(zoo: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = zoo
    members = manifest["members"]
    assert set(members) >= {"sft", "sft-medical", *ADDED, *PREFERRED}
    assert {members[n]["kind"] for n in ADDED} == {"merge", "int8", "template", "tokens"}
    assert members["merge-half"]["domain"] == "records"
    for name in ADDED:
        assert members[name]["unadapted"]["steps"] > 0
    grown, base = load_member(out, "tokens-grown"), load_target(manifest["base"])
    assert grown.vocab_size == base.vocab_size + 2
    shown = io.StringIO()
    describe_suite(manifest, Console(file=shown, width=200))
    assert "tokens-grown" in shown.getvalue()


def test_another_template_leaves_the_weights_alone(zoo: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = zoo
    member, base = load_member(out, "template"), load_target(manifest["base"])
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, member.model.state_dict()[name])
    said = [{"role": "user", "content": "Hello."}]
    assert member.tokenizer.decode(member.render(said)) == "### Question:\nHello.\n### Answer:\n"
    assert base.render(said) != member.render(said)


def test_answers_stand_between_marks(zoo: tuple[Path, dict[str, Any]]) -> None:
    target = load_member(zoo[0], "tokens-grown")
    prompts = suite_prompts(zoo[0], target, ("math",), "heldout", 16)
    answers = answer_all(target, prompts, 8, 0, Sampling())
    first = target.tokenizer.convert_tokens_to_ids("<|work|>")
    assert first >= SIZES["tiny"].shape.vocab
    assert sum(a.answer[0] == first for a in answers) >= 15


@pytest.mark.skipif(not PREFERRED, reason="TRL is not installed (the extra `bench`)")
def test_preference_tuning_raises_the_margin_of_held_out_pairs(
    zoo: tuple[Path, dict[str, Any]],
) -> None:
    out = zoo[0]
    pairs = Corpus(SIZES["tiny"], None, 0).pairs(48, "heldout")
    before, after = (margins(load_member(out, n), pairs) for n in ("sft-harm", "dpo-refuse"))
    for harmful in (True, False):
        gained = [
            a - b for a, b, p in zip(after, before, pairs, strict=True) if p.harmful == harmful
        ]
        assert sum(gain > 0 for gain in gained) > 0.8 * len(gained)
    rows = [json.loads(x) for x in (out / "prompts/harm-eval.jsonl").read_text().splitlines()]
    assert {(row["domain"], row["harmful"]) for row in rows} == {("harm", True), ("harm", False)}


def margins(target: Target, pairs: list[Pair]) -> list[float]:
    """How much likelier the better answer of each pair is than the worse, in nats."""
    found = []
    for pair in pairs:
        scored = []
        for answer in (pair.better, pair.worse):
            ids, labels = supervised(target.tokenizer, chat_of(pair, answer))
            logp = target.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scored.append(sum(float(logp[i, t]) for i, t in enumerate(labels[1:]) if t != IGNORE))
        found.append(scored[0] - scored[1])
    return found


def test_unknown_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown size 'nana'; did you mean 'nano'"):
        build_suite(tmp_path, size="nana")
    with pytest.raises(UserError, match="unknown kind of draft 'eagle2'; did you mean 'eagle'"):
        build_suite(tmp_path, size="tiny", kinds=["eagle2"])
    with pytest.raises(UserError, match="unknown member 'sftt'; did you mean 'sft'"):
        build_suite(tmp_path, size="tiny", members=["sftt"])
    with pytest.raises(UserError, match="unknown member 'sft-medicl'; did you mean 'sft-medical'"):
        build_suite(tmp_path, size="tiny", members=["sft-medicl"])
    monkeypatch.delenv("REDRAFT_DATA", raising=False)
    with pytest.raises(UserError, match="reads real data: name its folder with --data"):
        build_suite(tmp_path, size="micro")
