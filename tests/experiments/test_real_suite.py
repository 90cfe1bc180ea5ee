"""The suite of real models, built of a tiny one: what is there, what a second run skips, what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from redraft.checkpoints.load import load_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.generation.answer_file import read_answers
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.pipeline.stages import Shape
from redraft.prompts.prompts import read_prompts
from redraft_experiments import datasets, real_suite
from redraft_experiments.real_members import MEMBERS, RealMember
from redraft_experiments.real_suite import build_real_suite, load_real
from tests.conftest import SHAPE, make_tokenizer, save_target

ROWS = 120


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every file of chats, with a few rows each."""
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
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> list[RegenerateConfig]:
    """A tiny model, few questions and steps; this process answers in the engine's place."""
    asked: list[RegenerateConfig] = []

    def model(name: str, out: Path) -> None:
        save_target(out, LlamaConfig(vocab_size=len(make_tokenizer()), **SHAPE))

    def answer(
        target: Target,
        source: object,
        prompts: str,
        out: Path,
        config: RegenerateConfig,
        lookahead: int,
        python: str | None,
    ) -> list[Answer]:
        asked.append(config)
        found = read_prompts(prompts, target).prompts
        return regenerate(target, found, out, config, lookahead)

    monkeypatch.setattr(real_suite, "build_model", model)
    monkeypatch.setattr(real_suite, "answer_with_engine", answer)
    monkeypatch.setattr(real_suite, "QUESTIONS", {"base": 6, "heldout": 2, "adapt": 9, "eval": 5})
    monkeypatch.setattr(real_suite, "MORE_CHAT", 3)
    short: dict[str, Any] = {"max_new_tokens": 12}
    for name in ("ANSWERS", "HELDOUT"):
        config = getattr(real_suite, name)
        monkeypatch.setattr(real_suite, name, dataclasses.replace(config, **short))
    draft = dataclasses.replace(
        real_suite.DRAFT, epochs=1, batch_tokens=256, evaluations=2, precision="fp32"
    )
    monkeypatch.setattr(real_suite, "DRAFT", draft)
    monkeypatch.setattr(real_suite, "DRAFT_SHAPE", Shape(draft_vocab_size=64, width=16))
    monkeypatch.setitem(MEMBERS, "math-sft", RealMember("math", None, 2, 1e-4))
    monkeypatch.setitem(MEMBERS, "code-lora", RealMember("code", 2, 2, 1e-3))
    return asked


def test_it_is_built_once_and_loads(
    data: Path, tmp_path: Path, small: list[RegenerateConfig]
) -> None:
    out = tmp_path / "real"
    suite = build_real_suite(out, data=str(data), members=["math-sft", "code-lora"])
    assert [bool(c.temperature) for c in small] == [True, False]
    state = json.loads((out / "state.json").read_text())
    build_real_suite(out, data=str(data), members=["math-sft", "code-lora"])
    assert len(small) == 2
    assert json.loads((out / "state.json").read_text()) == state
    base = load_real(out, "base")
    assert load_draft(suite["draft"], base).aux_layers
    assert len({load_real(out, name).weights_hash() for name in ("base", *suite["members"])}) == 3
    answers = read_answers(out / "answers" / "base.jsonl")
    assert {bool(a.temperature) for a in answers} == {True, False}


def test_no_question_is_in_two_files_but_the_drafts_own_share_of_chat(
    data: Path, tmp_path: Path
) -> None:
    build_real_suite(tmp_path / "real", data=str(data), members=[])
    texts = {
        file.stem: [json.loads(line)["messages"][0]["content"] for line in file.open()]
        for file in (tmp_path / "real/prompts").glob("*.jsonl")
    }
    assert {len(texts[f"{d}-adapt"]) for d in real_suite.DOMAINS} == {9}
    assert len(texts["base"]) == 4 * 6 + 3
    every = [text for found in texts.values() for text in found]
    assert len(set(every)) == len(every)


def test_mistakes_are_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"unknown member 'math'; did you mean"):
        build_real_suite(tmp_path / "real", data=str(data), members=["math"])
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(UserError, match="name a folder of real data: --data FOLDER"):
        build_real_suite(tmp_path / "real")
