"""The bench of quantised targets: each draft is trained on the answers and states that it names, and measured on the form's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from redraft.checkpoints.load import read_draft
from redraft.config import RegenerateConfig, TrainConfig
from redraft.core.errors import UserError
from redraft.generation.answer_file import read_answers
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft_experiments import quantised
from redraft_experiments.kinds.quantised import FORMS, Form
from redraft_experiments.kinds.weights import rounded
from redraft_experiments.quantised import bench_quantised
from tests.conftest import write_prompts

MEMBER = "medical-sft"


def four_bits(model: Path, out: Path, python: str | None) -> None:
    shutil.copytree(model, out)
    whole = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    with torch.no_grad():
        for module in whole.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, 4))
    whole.save_pretrained(out)


@pytest.fixture
def suite(
    target_folder: Path, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    folder = tmp_path / "suite"
    shutil.copytree(target_folder, folder / "base")
    shutil.copytree(draft_folder, folder / "draft")
    shutil.copytree(target_folder, folder / "members" / MEMBER)  # which the draft was trained for
    (folder / "prompts").mkdir()
    write_prompts(folder / "prompts" / "medical-adapt.jsonl", 14)
    write_prompts(folder / "prompts" / "medical-eval.jsonl", 6, 100)
    monkeypatch.setattr(quantised, "POOL", 8)
    monkeypatch.setattr(quantised, "ASIDE", 4)
    monkeypatch.setattr(
        quantised, "ANSWERS", RegenerateConfig(temperature=0.7, greedy_share=0.5, max_new_tokens=12)
    )
    monkeypatch.setattr(quantised, "LONGEST", 12)
    monkeypatch.setattr(
        quantised, "TRAIN", TrainConfig(epochs=1.0, batch_tokens=256, rollout=2, precision="bf16")
    )
    monkeypatch.setitem(FORMS, "four", Form("4 bits", four_bits))
    return folder


def test_every_draft_is_measured_on_the_forms_own_answers(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    train = quantised.train

    def noted(target, draft, answers, *rest, **more):  # type: ignore[no-untyped-def]
        seen.append((Path(target.name).name, [tuple(a.tokens) for a in answers]))
        return train(target, draft, answers, *rest, **more)

    monkeypatch.setattr(quantised, "train", noted)
    out = tmp_path / "out"
    cells = bench_quantised(suite, out, MEMBER, ["four"])
    plain = ["unadapted", "bf16"]
    assert [(c.form, c.draft) for c in cells if c.measured == "greedy"] == [
        *(("bf16", name) for name in plain),
        *(("four", name) for name in (*plain, "states", "own")),
    ]
    said = {
        form: [
            tuple(a.tokens)
            for a in sorted(
                read_answers(out / "answers" / form / "adapt.jsonl"), key=lambda a: a.id
            )
            if a.length >= 2
        ]
        for form in ("bf16", "four")
    }
    assert said["bf16"] != said["four"]
    assert seen == [("bf16", said["bf16"]), ("bf16", said["four"]), ("four", said["four"])]
    target = load_target(str(out / "models" / "four"), dtype="bfloat16")
    whole = load_target(str(out / "models" / "bf16"), dtype="bfloat16")
    by_name = {(c.form, c.draft, c.measured): c for c in cells}
    taus: dict[str, list[float]] = {"right": [], "wrong": []}
    for measured in ("greedy", "sampled"):
        answers = read_answers(out / "answers" / "four" / f"{measured}.jsonl")
        answers = [answer for answer in answers if answer.length >= 2]
        for name, folder in (("unadapted", suite / "draft"), ("own", out / "drafts/four-own")):
            for by, model in (("right", target), ("wrong", whole)):
                draft = read_draft(str(folder)).build(model)
                found = replay(model, draft, answers, quantised.K)
                taus[by].append(pooled_tau([trace for trace in found if trace.accepted]))
            assert by_name["four", name, measured].tau == pytest.approx(taus["right"][-1])
    assert taus["wrong"] != pytest.approx(taus["right"])
    assert by_name["four", "unadapted", "greedy"].change == 0
    quantised.print_cells(cells)
    assert "states" in capsys.readouterr().out
    assert bench_quantised(suite, out, MEMBER, ["four"]) == cells
    assert len(seen) == 3


def test_unknown_forms_are_named(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q4_k_m"):
        bench_quantised(suite, tmp_path / "out", MEMBER, ["q4"])
