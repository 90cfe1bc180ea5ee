"""The suite of real models, built of a tiny one."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import LlamaConfig

from redraft.config import RegenerateConfig
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.pipeline.stages import Shape
from redraft_experiments import datasets, real_drafts, real_methods, real_suite
from redraft_experiments.real_drafts import DRAFTS, Pruned, Trained
from redraft_experiments.real_members import MEMBERS, RealMember
from redraft_experiments.real_suite import Ask
from tests.certify.conftest import reduced_folder  # noqa: F401 - a fixture, here too
from tests.conftest import SHAPE, make_tokenizer, save_target

ROWS = 120


@pytest.fixture
def novels(tmp_path: Path) -> str:
    """A folder of running texts."""
    folder = tmp_path / "novels"
    folder.mkdir()
    for name in datasets.TEXT_FILES["novels"]:
        with gzip.open(folder / name, "wt") as stream:
            text = " ".join(f"word {i % 7} and {i % 11}" for i in range(600))
            stream.write(json.dumps({"text": text}) + "\n")
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every file of chats and of compared answers, with a few rows each."""
    folder = tmp_path / "data"
    folder.mkdir()
    files = [*sum(datasets.CHAT_FILES.values(), ()), *sum(datasets.EVAL_FILES.values(), ())]
    for name in files:
        turns = (
            [
                {"role": "user", "content": f"{name[:-9]} {i * 7}?"},
                {"role": "assistant", "content": f"It is {i}."},
            ]
            for i in range(ROWS)
        )
        rows = [json.dumps({"id": f"{name}/{i}", "messages": t}) for i, t in enumerate(turns)]
        with gzip.open(folder / name, "wt") as stream:
            stream.write("\n".join(rows) + "\n")
    compared = [
        {
            "id": f"pair/{i}",
            "prompt": f"\n\nHuman: Harm {i}?\n\nAssistant:",
            "chosen": "No.",
            "rejected": f"Do {i}.",
        }
        for i in range(ROWS)
    ]
    for name, rows in ((datasets.PREFERENCE_FILE, compared), (datasets.LOOK_ALIKE_FILE, [])):
        with gzip.open(folder / name, "wt") as stream:
            stream.write("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def small_real(monkeypatch: pytest.MonkeyPatch) -> list[RegenerateConfig]:
    """A tiny model, few questions and steps; this process answers in the engine's place."""
    asked: list[RegenerateConfig] = []

    def model(name: str, out: Path) -> None:
        save_target(out, LlamaConfig(vocab_size=len(make_tokenizer()), **SHAPE))

    def answer(target: Target, source: object, asks: Sequence[Ask], python: str | None) -> None:
        for ask in asks:
            asked.append(ask.config)
            config = dataclasses.replace(ask.config, max_new_tokens=12)
            regenerate(target, ask.prompts, ask.out, config, ask.lookahead)

    monkeypatch.setattr(real_suite, "build_model", model)
    for module in (real_suite, real_methods):
        monkeypatch.setattr(module, "answer_with_engine", answer)
    monkeypatch.setattr(real_suite, "QUESTIONS", {"base": 6, "heldout": 2, "adapt": 9, "eval": 5})
    monkeypatch.setattr(real_suite, "MORE_CHAT", 3)
    config = dataclasses.replace(
        real_drafts.DRAFT, epochs=1, batch_tokens=256, evaluations=2, precision="fp32"
    )
    eagle3, eagle = Shape(draft_vocab_size=64, width=16), Shape(kind="eagle", width=16)
    for name, row in (
        ("eagle3", Trained("draft", eagle3, config)),
        ("eagle", Trained("draft-eagle", eagle, dataclasses.replace(config, method="scratch"))),
        ("small-lm", Pruned("draft-lm", (0, 2), 2)),
    ):
        monkeypatch.setitem(DRAFTS, name, row)
    monkeypatch.setitem(MEMBERS, "math-sft", RealMember("math", None, 2, 1e-4))
    monkeypatch.setitem(MEMBERS, "code-lora", RealMember("code", 2, 2, 1e-3))
    monkeypatch.setitem(MEMBERS, "safety-dpo", RealMember("safety", 2, 1, 1e-3, 0.1))
    return asked
