"""One draft for a fleet: rows are read each with its own adapter, and a run ends as its figures say."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from redraft.checkpoints.load import read_draft
from redraft.cli.app import app
from redraft.config import resolve
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.fleet import adapt as adapt_module
from redraft.fleet.adapt import FleetAdapted, MemberAdapted, fleet_prompts
from redraft.fleet.member import Member
from redraft.fleet.page import write_adapted_page
from redraft.generation.answer_file import read_answers
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay
from redraft.models.batching import collate
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.models.target_adapters import BASE, adapter_on, fleet_on
from redraft.training.stream import AnswerStream
from redraft.training.teacher_batch import read_teacher_batch
from tests.conftest import tiny_model, write_prompts

SMALL = ("regenerate.max_new_tokens=24", "measure.eval_new_tokens=24", "measure.heldout=4")
QUICK = (
    *("measure.eval_limit=5", "measure.k=3", "general.tolerance=0.9"),
    *("train.epochs=16", "train.precision=fp32", "train.lr=0.003", "train.batch_tokens=256"),
)


def owned(answers: list[Answer], names: list[str]) -> list[Answer]:
    return [
        dataclasses.replace(answer, id=f"{names[i % len(names)]}/{answer.id}")
        for i, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_each_row_is_read_with_its_own_adapter(
    fleet: Path, target_folder: Path, answers: list[Answer], dtype: str
) -> None:
    """Against the target with one adapter alone; with the rows' names exchanged they differ."""
    base = load_target(str(target_folder), dtype=dtype)
    rows = owned(answers[:6], ["loud", "base", "still"])
    adapters = {name: str(fleet / name) for name in ("loud", "still")}
    layers = (1, 3)
    with fleet_on(base, adapters) as target:
        with target.giving(rows):
            found = read_teacher_batch(target, collate(rows, target.device), layers).features_BTF
        exchanged = owned(answers[:6], ["still", "base", "loud"])
        with target.giving(exchanged):
            wrong = read_teacher_batch(target, collate(rows, target.device), layers).features_BTF
        fingerprint = target.fingerprint()
    assert type(base.model).__name__ == "LlamaForCausalLM"
    assert fingerprint != base.fingerprint()
    near = 1e-9 if dtype == "float64" else 3e-2  # PEFT adds in another order where rows are mixed
    for at, answer in enumerate(rows):
        name = answer.id.partition("/")[0]
        adapter = None if name == "base" else str(fleet / name)
        alone = load_target(str(target_folder), adapter=adapter, dtype=dtype)
        own = read_teacher_batch(alone, collate(rows, alone.device), layers).features_BTF
        scale = own[at].abs().max()
        assert (found[at] - own[at]).abs().max() <= near * scale
        if name == "loud":
            assert (wrong[at] - own[at]).abs().max() > 0.1 * scale


def test_training_and_measuring_read_each_answer_as_what_gave_it(
    fleet: Path, target_folder: Path, draft_folder: Path, answers: list[Answer]
) -> None:
    """The stream of training batches, and replay: as each adapter alone gives them, and not as the base does."""
    base = load_target(str(target_folder), dtype="float64")
    stored = read_draft(str(draft_folder))
    rows = owned(answers[:6], ["loud", "base"])
    plan = [[0, 1, 2], [3, 4, 5]]
    adapters = {name: str(fleet / name) for name in ("loud", "still")}
    with fleet_on(base, adapters) as target:
        draft = stored.build(target)
        stream = AnswerStream(target, draft.aux_layers, rows, plan, hold=False)
        batches = [part.features_BTF for at in range(2) for part in stream.parts(at)]
        runs = replay(target, draft, rows, 3)
    differs = 0.0
    for at, answer in enumerate(rows):
        name = answer.id.partition("/")[0]
        adapter = None if name == "base" else str(fleet / name)
        alone = load_target(str(target_folder), adapter=adapter, dtype="float64")
        batch = collate([rows[i] for i in plan[at // 3]], alone.device)
        own = read_teacher_batch(alone, batch, draft.aux_layers).features_BTF[at % 3]
        assert torch.allclose(batches[at // 3][at % 3], own, atol=1e-9)
        assert replay(alone, stored.build(alone), [answer], 3) == [runs[at]]
        plain = read_teacher_batch(base, batch, draft.aux_layers).features_BTF[at % 3]
        differs = max(differs, float((plain - own).abs().max()))
    assert differs > 0.01


def command(fleet: Path, target: Path, draft: Path, out: Path, *more: str) -> Any:
    words = ["--target", str(target), "--draft", str(draft), "--fleet", str(fleet)]
    sets = [word for each in (*SMALL, *QUICK) for word in ("--set", each)]
    return CliRunner().invoke(
        app, ["fleet", "adapt", *words, *sets, "--out", str(out), "--json", *more]
    )


@pytest.fixture(scope="module")
def wide(fleet: Path) -> Path:
    """The fleet with more prompts, and traffic of the base."""
    rows = yaml.safe_load((fleet / "fleet.yaml").read_text())
    for at, name in enumerate(("still", "loud", "base")):
        write_prompts(fleet / f"{name}-more.jsonl", 24, 100 * at)
        rows.setdefault(name, {})["prompts"] = f"{name}-more.jsonl"
    (fleet / "wide.yaml").write_text(yaml.safe_dump(rows))
    return fleet / "wide.yaml"


@pytest.fixture(scope="module")
def run(
    wide: Path, target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("adapted") / "run"
    done = command(wide, target_folder, draft_folder, out, "--budget", "0.5")
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def test_the_figures_are_those_of_the_checkpoint(
    run: tuple[Path, dict[str, Any]], fleet: Path, target_folder: Path, draft_folder: Path
) -> None:
    out, record = run
    members = {row["name"]: row for row in record["members"]}
    assert set(members) == {"loud", "still", "base"}
    for name, row in members.items():
        adapter = None if name == "base" else str(fleet / name)
        target = load_target(str(target_folder), adapter=adapter)
        answers = [a for a in read_answers(out / f"answers/{name}/eval.jsonl") if a.length > 1]
        for when, folder in (("before", draft_folder), ("after", out / "draft")):
            draft = read_draft(str(folder)).build(target)
            assert row[when][0] == pytest.approx(pooled_tau(replay(target, draft, answers, 3)))
        assert row["change"][0] == pytest.approx(row["after"][0] - row["before"][0])
    assert members["loud"]["share"] == pytest.approx(3 / 5)
    passes = [
        sum(r["share"] * 1000 / r[when][0] for r in members.values())
        for when in ("before", "after")
    ]
    assert record["passes"] == pytest.approx(passes)
    assert passes[0] != passes[1], "nothing was trained"


def test_the_budget_follows_the_loss(run: tuple[Path, dict[str, Any]]) -> None:
    out, record = run
    members = {row["name"]: row for row in record["members"]}
    assert members["loud"]["lost"] > 0
    assert members["still"]["lost"] == 0.0
    asked = {name: len(read_answers(out / f"answers/{name}/adapt.jsonl")) for name in members}
    assert asked == {name: row["trained_on"] for name, row in members.items()}
    assert sum(asked.values()) == 22  # half of three times 24 - 5 - 4
    assert asked["loud"] == 15 > asked["still"]  # all that it has
    assert min(asked.values()) >= 1


def test_a_finished_run_does_nothing(
    run: tuple[Path, dict[str, Any]], wide: Path, target_folder: Path, draft_folder: Path
) -> None:
    out, record = run
    times = {p: p.stat().st_mtime_ns for p in (out / "answers").rglob("*.jsonl")}
    weights = (out / "draft" / "model.safetensors").stat().st_mtime_ns
    again = command(wide, target_folder, draft_folder, out, "--budget", "0.5")
    assert json.loads(again.stdout) == record
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert (out / "draft" / "model.safetensors").stat().st_mtime_ns == weights


def test_members_that_share_prompts_lend_the_base_each_once(
    fleet: Path, target_folder: Path
) -> None:
    """No prompt of the base is in two of its parts, nor twice in one."""
    base = load_target(str(target_folder))
    write_prompts(fleet / "shared-24.jsonl", 24)
    write_prompts(fleet / "shared-30.jsonl", 30)
    some = [
        Member(name, str(fleet / "loud"), str(fleet / f"shared-{count}.jsonl"))
        for name, count in (("a", 24), ("b", 30), ("c", 24))
    ]
    found = fleet_prompts(base, some, resolve([("test", {"measure.heldout": 6})]).config)[BASE]
    parts = [[p.tokens for p in part] for part in (found.adapt, found.heldout, found.measured)]
    assert all(parts)
    assert len({tokens for part in parts for tokens in part}) == sum(map(len, parts))


def test_the_worst_is_named() -> None:
    row = MemberAdapted("a", 8, 4, 0.0, 1.0, (2, 1, 3), (1.8, 1, 3), (-0.2, -0.3, -0.1))
    assert row.lost_by_it
    assert not dataclasses.replace(row, change=(-0.2, -0.4, 0.1)).lost_by_it


def variant(target_folder: Path, folder: Path, **how: Any) -> str:
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    torch.manual_seed(0)
    get_peft_model(model, LoraConfig(r=2, **how)).save_pretrained(
        folder, save_embedding_layers=False
    )
    return str(folder)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            "adapter odd .* is LORA with use_dora, and a fleet takes plain LoRA",
        ),
        ({"target_modules": ["lm_head"]}, "adapter odd .* changes .*lm_head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "adapter odd .* changes .*embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "parts of the base"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "init_lora_weights: olora"),
    ],
)
def test_an_adapter_that_a_fleet_cannot_hold_is_named(
    fleet: Path, target_folder: Path, tmp_path: Path, how: dict[str, Any], says: str
) -> None:
    base = load_target(str(target_folder))
    odd = variant(target_folder, tmp_path / "odd", **how)
    with (
        pytest.raises(UserError, match=says),
        fleet_on(base, {"a": str(fleet / "loud"), "odd": odd}),
    ):
        pass
    assert type(base.model).__name__ == "LlamaForCausalLM"
    assert not [name for name, _ in base.model.named_modules() if "member" in name]


def test_a_second_adapter_that_does_not_fit_leaves_the_base_unchanged(
    fleet: Path, target_folder: Path, tmp_path: Path
) -> None:
    base = load_target(str(target_folder))
    broken = variant(target_folder, tmp_path / "b", target_modules=["q_proj"])
    file = Path(broken) / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 2', '"r": 3'))
    with pytest.raises(UserError), fleet_on(base, {"a": str(fleet / "loud"), "b": broken}):
        pass
    assert not [name for name, _ in base.model.named_modules() if "member" in name]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "2000t"), "--budget 2000t"),
        (("--budget", "auto"), "fleet adapt does not take"),
        (("--set", "select.select=rejection"), "select.select=rejection"),
        (("--method", "feature-map+body"), "--method feature-map"),
        (("--method", "scratch"), "--method scratch"),
        (("--set", "general.guard=off"), "general.guard=off"),
        (("--set", "general.share=1.0"), "general.share"),
        (("--set", "select.by=prompts"), "select.by=prompts"),
        (("--target-adapter", "x"), "name every adapter"),
    ],
)
def test_settings_that_mean_nothing_for_a_fleet_are_refused(
    wide: Path, target_folder: Path, draft_folder: Path, tmp_path: Path, words: Any, says: str
) -> None:
    done = command(wide, target_folder, draft_folder, tmp_path / "out", *words)
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_name_the_member(
    wide: Path, fleet: Path, target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    rows = yaml.safe_load(wide.read_text())
    write_prompts(fleet / "few.jsonl", 3)
    rows["still"]["prompts"] = "few.jsonl"
    (fleet / "few.yaml").write_text(yaml.safe_dump(rows))
    done = command(fleet / "few.yaml", target_folder, draft_folder, tmp_path / "out")
    assert isinstance(done.exception, UserError)
    assert "still, " in str(done.exception)
    assert "few.jsonl: 3 prompts" in str(done.exception)


class StopError(Exception):
    """Training is not reached."""


def until_training(
    monkeypatch: pytest.MonkeyPatch, wide: Path, target: Path, draft: Path, out: Path
) -> Any:
    """The job as training would get it."""
    caught: list[Any] = []

    def stop(job: Any, *args: Any, **more: Any) -> str:
        caught.append(job)
        raise StopError

    monkeypatch.setattr(adapt_module, "train", stop)
    assert isinstance(command(wide, target, draft, out).exception, StopError)
    return caught[0]


def test_need_is_measured_on_the_same_prompts(
    wide: Path,
    target_folder: Path,
    draft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An adapter that changes nothing has none, though the base answers fewer of its prompts."""
    monkeypatch.setattr(adapt_module, "REFERENCE", 1)
    until_training(monkeypatch, wide, target_folder, draft_folder, tmp_path / "out")
    needs = json.loads((tmp_path / "out" / "needs.json").read_text())
    assert needs["still"] == 0.0
    assert needs["loud"] != 0.0


def test_the_draft_gets_as_many_rows_as_a_padded_base(
    wide: Path,
    fleet: Path,
    target_folder: Path,
    draft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    rows = model.config.vocab_size + 8
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "padded")
    load_target(str(target_folder)).tokenizer.save_pretrained(tmp_path / "padded")
    job = until_training(monkeypatch, wide, tmp_path / "padded", draft_folder, tmp_path / "out")
    assert job.draft.config.vocab_size == rows


def test_a_family_that_flattens_rows_is_refused_before_anything_is_answered(
    tmp_path: Path,
) -> None:
    model = tiny_model("opt", ffn_dim=96, word_embed_proj_dim=64)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["fc1"]))
    tuned.save_pretrained(tmp_path)
    base = Target(tiny_model("opt", ffn_dim=96, word_embed_proj_dim=64), None, ["opt"])
    with (
        pytest.raises(UserError, match="cannot be read with an adapter of its own in each row"),
        fleet_on(base, {"a": str(tmp_path)}),
    ):
        pass


def test_a_member_is_rendered_at_its_base_s_time(fleet: Path, target_folder: Path) -> None:
    base = load_target(str(target_folder))
    base.rendered_at = datetime(2020, 1, 1)
    with adapter_on(base, str(fleet / "loud")) as target:
        assert target.rendered_at == base.rendered_at
    with fleet_on(base, {"loud": str(fleet / "loud")}) as many:
        assert many.rendered_at == base.rendered_at


def test_a_member_that_answers_in_single_tokens_is_named(
    wide: Path,
    fleet: Path,
    target_folder: Path,
    draft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is trained."""
    real = adapt_module.read_answers

    def short(path: Path) -> list[Answer]:
        found = real(path)
        return [dataclasses.replace(a, length=1) for a in found] if "loud" in str(path) else found

    monkeypatch.setattr(adapt_module, "read_answers", short)
    done = command(wide, target_folder, draft_folder, tmp_path / "out")
    assert isinstance(done.exception, UserError)
    assert "loud answers 0 of 4 prompts with more than a token" in str(done.exception)
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_page_draws_before_above_after(tmp_path: Path) -> None:
    member = MemberAdapted(
        "<loud>", 9, 30, 12.0, 1.0, (1.25, 1.2, 1.3), (1.75, 1.7, 1.8), (0.5, 0.4, 0.6)
    )
    worse = dataclasses.replace(member, name="quiet", change=(-0.5, -0.6, -0.4))
    found = FleetAdapted("base", "draft", "adapted", 4, (member, worse), (800.0, 571.4))
    write_adapted_page(tmp_path / "fleet.html", found)
    page = (tmp_path / "fleet.html").read_text()
    drawn = re.findall(r'rect class="(\w+)".*?>(\d\.\d\d)</text>', page, re.DOTALL)
    assert drawn[:2] == [("before", "1.25"), ("after", "1.75")]
    assert "800 → 571" in page
    assert "&lt;loud&gt;, 9 prompts" in page
    assert "quiet lost: -0.50 [-0.60, -0.40] of tau." in page
    assert "<loud>" not in page
