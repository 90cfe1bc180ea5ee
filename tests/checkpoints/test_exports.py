"""Layouts out: what each engine is given, exact padding, the card, the check by a second reading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from redraft.checkpoints.engine_rules import judge
from redraft.checkpoints.load import load_draft, read_draft, stored
from redraft.checkpoints.reload_check import check_export
from redraft.core.errors import UserError
from redraft.core.folders import WEIGHTS, read_json, read_tensors
from redraft.core.hub import push_to_hub
from redraft.drafts.base import Draft
from redraft.drafts.kinds import formats
from redraft.drafts.token_lm.files import companions, parse
from redraft.models.target import Target
from tests.conftest import fresh_draft


def outputs(draft: Draft) -> list[torch.Tensor]:
    tokens = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 12, draft.feature_size, generator=torch.Generator().manual_seed(1))
    return [draft.logits(s) for s in draft.rollout(tokens, features, 1, 4)]


@pytest.mark.parametrize("format", formats())
@pytest.mark.parametrize("vocab", [None, 40])
def test_an_export_reads_back_and_its_engines_take_it(
    target: Target, tmp_path: Path, format: str, vocab: int | None
) -> None:
    row, layout = formats()[format]
    draft = fresh_draft(target, kind=row.name, vocab=vocab if row.name == "eagle3" else None)
    stored(draft, target).save(tmp_path / "d", format)
    back = load_draft(str(tmp_path / "d"), target)
    for a, b in zip(outputs(draft), outputs(back), strict=True):
        assert torch.equal(a, b)
    raw, tensors = read_json(tmp_path / "d" / "config.json"), read_tensors(tmp_path / "d")
    for finding in judge(row, raw, tensors):
        if finding.engine in layout.engines:
            assert finding.level == "note", finding


def test_one_eagle_draft_becomes_two_folders(target: Target, tmp_path: Path) -> None:
    draft = stored(fresh_draft(target, kind="eagle"), target)
    for format in ("vllm-eagle", "sglang-eagle"):
        draft.save(tmp_path / format, format)
    files = {name: load_file(tmp_path / name / WEIGHTS) for name in ("vllm-eagle", "sglang-eagle")}
    assert set(files["sglang-eagle"]) - set(files["vllm-eagle"]) == {"fc.bias"}
    assert not files["sglang-eagle"]["fc.bias"].any()
    architectures = [
        read_json(tmp_path / name / "config.json")["architectures"]
        for name in ("vllm-eagle", "sglang-eagle")
    ]
    assert architectures == [["LlamaForCausalLM"], ["LlamaForCausalLMEagle"]]
    assert read_draft(str(tmp_path / "sglang-eagle")).hash() == draft.hash()


@pytest.mark.parametrize(
    ("kind", "options", "format", "message"),
    [
        ("eagle", {"fc_bias": True}, "vllm-eagle", "vLLM would drop it without a word"),
        ("eagle", {}, "eagle3", "can be exported as vllm-eagle, sglang-eagle"),
        ("eagle3", {}, "vllm-eagle", "can be exported as eagle3, speculators"),
        (
            "eagle3",
            {},
            "gguf",
            "unknown export format 'gguf'; known: eagle3, hf, mtp, sglang-eagle",
        ),
    ],
)
def test_a_format_that_does_not_fit_is_refused_before_anything_is_written(
    target: Target, tmp_path: Path, kind: str, options: dict[str, Any], format: str, message: str
) -> None:
    draft = stored(fresh_draft(target, kind=kind, **options), target)
    with pytest.raises(UserError, match=message):
        draft.save(tmp_path / "x", format)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("missing", ["fc.weight", "midlayer.mlp.down_proj.weight"])
def test_an_incomplete_draft_is_never_written(target: Target, tmp_path: Path, missing: str) -> None:
    draft = stored(fresh_draft(target), target)
    del draft.tensors[missing]
    with pytest.raises(UserError, match=f"cannot export: .* missing {missing}"):
        draft.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_padding_for_tensor_parallelism_changes_nothing(
    target: Target, tmp_path: Path, kind: str
) -> None:
    draft = fresh_draft(target, kind=kind, width=21)
    made = stored(draft, target)
    made.save(tmp_path / "d", tp=[1, 2])
    back = read_draft(str(tmp_path / "d"))
    assert back.config.intermediate_size == 22
    assert back.provenance["zero_neurons"] == 1
    gate = next(t for n, t in back.tensors.items() if n.endswith("gate_proj.weight"))
    assert not gate[21:].any()
    narrow, wide = made.build(target, torch.float64), back.build(target, torch.float64)
    for a, b in zip(outputs(narrow), outputs(wide), strict=True):
        assert float((a - b).abs().max()) < (1e-6 if kind == "eagle" else 1e-12)
    with pytest.raises(UserError, match="--tp 3: a draft of 4 attention heads and 2 key/value"):
        made.save(tmp_path / "e", tp=[3])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("eagle3", {}),
        ("eagle3", {"vocab": 40, "norm_before_residual": True, "head_norms": True}),
        ("eagle", {}),
    ],
)
def test_the_second_reading_passes_good_exports_and_catches_wrong_ones(
    target: Target, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    made = stored(fresh_draft(target, kind=kind, **options), target)
    made.save(tmp_path / "d")
    assert check_export(made, tmp_path / "d") < 1e-6
    tensors = load_file(tmp_path / "d" / WEIGHTS)
    name = next(n for n in tensors if n.endswith("up_proj.weight"))
    save_file({**tensors, name: tensors[name].flip(0)}, tmp_path / "d" / WEIGHTS)
    with pytest.raises(UserError, match="computes another function than what was exported"):
        check_export(made, tmp_path / "d")


def test_the_card_says_what_the_record_knows(target: Target, tmp_path: Path) -> None:
    made = stored(fresh_draft(target), target)
    made.provenance.update(target="org/model", method="expert", config={"lr": 0.01})
    made.save(tmp_path / "d")
    card = (tmp_path / "d" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "org/model"
    assert "speculative-decoding" in header["tags"]
    record = json.loads((tmp_path / "d" / "redraft.json").read_text())
    for fact in (record["tensors_hash"], record["tokenizer_hash"], "lr: 0.01", "## Licence"):
        assert fact in card


def test_publishing_uploads_the_folder_and_quotes_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> str:
            calls.append((repo, options))
            return f"https://hub/{repo}"

        def upload_folder(self, **options: Any) -> None:
            if options["repo_id"] == "org/full":
                raise OSError("quota exceeded")
            calls.append(options["folder_path"])

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push_to_hub(tmp_path, "org/draft") == "https://hub/org/draft"
    assert calls == [("org/draft", {"private": True, "exist_ok": True}), tmp_path]
    with pytest.raises(UserError, match="quota exceeded.*can be uploaded again"):
        push_to_hub(tmp_path, "org/full")


@pytest.mark.parametrize(
    ("format", "kind"), [("auto", "eagle3"), ("speculators", "eagle3"), ("hf", "token_lm")]
)
def test_no_path_of_this_machine_is_written(
    target: Target, tmp_path: Path, format: str, kind: str
) -> None:
    made = stored(fresh_draft(target, kind=kind), target)
    home = tmp_path / "somebody"
    cached = home / "hub" / "models--org--base-draft" / "snapshots" / "0a1b"
    made.provenance.update(
        target=f"{home}/tuned+{home}/adapter/",
        shared=str(cached),
        config={"out": [str(home / "x")]},
    )
    if kind == "token_lm":
        (home / "lm").mkdir(parents=True)
        named = {"name_or_path": str(home / "lm"), "unk_token": "/"}
        (home / "lm" / "tokenizer_config.json").write_text(json.dumps(named))
        made.companions.update(companions(home / "lm"))
        raw = {**made.config.json(), "_name_or_path": str(home)}  # type: ignore[union-attr]
        made = dataclasses.replace(made, config=parse(raw, made.tensors, home)[0])
    made.save(tmp_path / "d", format)
    for path in (tmp_path / "d").iterdir():
        if path.suffix != ".safetensors":
            assert "somebody" not in path.read_text(), path
    record = json.loads((tmp_path / "d" / "redraft.json").read_text())
    assert (record["target"], record["shared"]) == ("tuned+adapter", "org/base-draft")
    assert record["config"] == {"out": ["x"]}
    assert record["tokenizer_hash"] == target.tokenizer_hash()
    if kind == "token_lm":
        beside = json.loads((tmp_path / "d" / "tokenizer_config.json").read_text())
        assert beside == {"name_or_path": "lm", "unk_token": "/"}
    if format == "speculators":
        config = json.loads((tmp_path / "d" / "config.json").read_text())
        assert config["speculators_config"]["verifier"]["name_or_path"] == "tuned+adapter"
