"""Readers of real data: splits, trimming and errors, on small crafted files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from redraft.core.errors import UserError
from redraft_experiments import datasets
from redraft_experiments.synthetic import SPLITS


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with gzip.open(folder / name, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def chat(number: int, *contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"id": f"row/{number}", "messages": turns}


def questions(folder: Path, domain: str, split: str) -> list[str]:
    return [s.messages[0]["content"] for s in datasets.chats(folder, domain, split=split)]


def test_folder_comes_from_argument_then_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDRAFT_DATA", raising=False)
    assert datasets.data_folder() is None
    monkeypatch.setenv("REDRAFT_DATA", str(tmp_path))
    assert datasets.data_folder() == tmp_path
    (tmp_path / "inner").mkdir()
    assert datasets.data_folder(str(tmp_path / "inner")) == tmp_path / "inner"


def test_folder_that_is_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the given path .* not a folder"):
        datasets.data_folder(str(tmp_path / "absent"))
    monkeypatch.setenv("REDRAFT_DATA", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"REDRAFT_DATA .* not a folder"):
        datasets.data_folder()


def test_splits_are_disjoint_complete_and_in_proportion(tmp_path: Path) -> None:
    rows = [chat(i, f"Question {i}?", f"Answer {i}.") for i in range(2000)]
    write(tmp_path, "dialogue_sgd.jsonl.gz", rows)
    parts = {split: questions(tmp_path, "dialogue", split) for split in SPLITS}
    together = [text for part in parts.values() for text in part]
    assert sorted(together) == sorted(f"Question {i}?" for i in range(2000))
    for split, percent in datasets.SHARES.items():
        assert len(parts[split]) / 20 == pytest.approx(percent, abs=3)


def test_same_question_stays_in_one_split(tmp_path: Path) -> None:
    write(tmp_path, "code_gpteacher_codegen.jsonl.gz", [chat(0, "Sort a list", "a")])
    write(tmp_path, "code_mbpp.jsonl.gz", [chat(1, "sort  a List ", "b")])
    sizes = [len(datasets.chats(tmp_path, "code", split=split)) for split in SPLITS]
    assert sorted(sizes) == [0, 0, 0, 0, 2]


def test_math_keeps_its_test_file_for_eval(tmp_path: Path) -> None:
    train = [chat(i, f"What is {i} + 1?", "Let us see.") for i in range(50)]
    write(tmp_path, "math_gsm8k_train.jsonl.gz", train)
    write(tmp_path, "math_gsm8k_test.jsonl.gz", [chat(0, "What is 7 + 1?", "8")])
    assert questions(tmp_path, "math", "eval") == ["What is 7 + 1?"]
    others = [q for split in SPLITS[:-1] for q in questions(tmp_path, "math", split)]
    assert len(others) == 49
    assert "What is 7 + 1?" not in others


def test_chats_end_with_an_answer_and_long_answers_are_dropped(tmp_path: Path) -> None:
    rows = [
        chat(0, "Is it flu?", "Maybe.", "Thanks", "Welcome.", "Bye"),
        chat(1, "And this?", "x" * 1201),
        chat(2, "No answer here"),
        {"id": "row/3", "messages": [{"role": "assistant", "content": "I start"}]},
        {"id": "row/4", "text": "no chat"},
    ]
    write(tmp_path, "medical_medquad.jsonl.gz", rows)
    found = [s for split in SPLITS for s in datasets.chats(tmp_path, "medical", split=split)]
    assert [sample.id for sample in found] == ["row/0"]
    assert [m["content"] for m in found[0].messages] == [
        "Is it flu?",
        "Maybe.",
        "Thanks",
        "Welcome.",
    ]
    assert found[0].domain == "medical"


def test_texts_are_read_in_order(tmp_path: Path) -> None:
    write(
        tmp_path, "text_novels_a.jsonl.gz", [{"id": "a", "text": "One."}, {"id": "b", "text": ""}]
    )
    write(tmp_path, "text_novels_b.jsonl.gz", [{"id": "c", "text": "Two."}])
    assert datasets.texts(tmp_path, "novels") == ["One.", "Two."]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dialogue_sgd.* is missing: .*REDRAFT_DATA"):
        datasets.chats(tmp_path, "dialogue", split="base")
    with pytest.raises(UserError, match=r"tinystories.* is missing"):
        datasets.texts(tmp_path, "stories")
    with pytest.raises(UserError, match=r"unknown domain 'poems'.*math, dialogue"):
        datasets.chats(tmp_path, "poems", split="base")
    with pytest.raises(UserError, match=r"unknown domain 'math'.*stories, novels"):
        datasets.texts(tmp_path, "math")
    with pytest.raises(ValueError, match=r"unknown split 'test'.*heldout"):
        datasets.chats(tmp_path, "math", split="test")


@pytest.mark.parametrize("domain", datasets.CHAT_DOMAINS)
def test_real_data(domain: str) -> None:
    folder = datasets.data_folder()
    if folder is None:
        pytest.skip("REDRAFT_DATA is not set")
    parts = {split: set(questions(folder, domain, split)) for split in SPLITS}
    assert all(len(part) > 100 for part in parts.values())
    assert len(set().union(*parts.values())) == sum(len(part) for part in parts.values())
