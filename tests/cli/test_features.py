"""`redraft features` and `redraft train --features`, as a person types them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from redraft import cli
from redraft.core.records import Answer
from tests.cli.test_cli import run


@pytest.fixture
def redraft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def files(
    target_folder: Path,
    draft_folder: Path,
    answers: list[Answer],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Answers to train on and to hold out, and their features."""
    root = tmp_path_factory.mktemp("cli")
    for name, some in (("train", answers[:12]), ("heldout", answers[12:16])):
        (root / f"{name}.jsonl").write_text("".join(f"{a.to_line()}\n" for a in some))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            [
                *("redraft", "features", "--target", str(target_folder), "--quiet"),
                *("--answers", str(root / "train.jsonl")),
                *("--answers", str(root / "heldout.jsonl")),
                *("--draft", str(draft_folder), "--out", str(root / "store")),
            ],
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return {
        "train": root / "train.jsonl",
        "heldout": root / "heldout.jsonl",
        "store": root / "store",
        "target": target_folder,
        "draft": draft_folder,
    }


def training(files: dict[str, Any], out: Path, *more: object) -> tuple[object, ...]:
    return (
        *("train", "--target", files["target"], "--draft", files["draft"], "--out", out, "--json"),
        *("--answers", files["train"], "--heldout", files["heldout"], "--method", "expert+fc"),
        *("--width", 4, "--epochs", 1, "--batch-tokens", 64, "--precision", "fp32", *more),
    )


def test_training_beside_features_needs_no_layers(
    redraft: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    code, out, err = redraft(*training(files, tmp_path / "streamed"))
    assert code == 0, err
    streamed = json.loads(out)
    code, out, err = redraft(*training(files, tmp_path / "p", "--features", files["store"]))
    assert code == 0, err
    stored = json.loads(out)
    assert stored["final_loss"] == pytest.approx(streamed["final_loss"], rel=1e-3)
    assert stored["target_flops"] < streamed["target_flops"]
    card = json.loads((tmp_path / "p" / "adapter.json").read_text())
    own = json.loads((tmp_path / "streamed" / "adapter.json").read_text())
    assert card["target_fingerprint"] == own["target_fingerprint"]


def test_the_stores_own_answers_are_an_answers_file(
    redraft: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    alone = {**files, "train": files["store"] / "answers.jsonl"}
    code, _, err = redraft(*training(alone, tmp_path / "p", "--features", files["store"]))
    assert code == 0, err


def test_a_store_is_checked(redraft: Any, files: dict[str, Any], tmp_path: Path) -> None:
    code, out, err = redraft(
        "features", "--target", files["target"], "--check", files["store"], "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["layout"]) == (16, "redraft")
    assert set(found["difference"]) == {"hs[2]", "hs[4]", "hs[5]", "last"}
    assert max(found["difference"].values()) < 1e-5


def test_foreign_features_go_in_and_out(
    redraft: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    convert = ("features", "--target", files["target"], "--quiet", "--from")
    code, out, err = redraft(
        *(*convert, files["store"], "--layout", "speculators", "--out", tmp_path / "spec")
    )
    assert code == 0, err
    assert "features of 16 answers" in out
    (tmp_path / "spec" / "redraft-features.json").unlink()  # as speculators itself would write it
    code, _, err = redraft(*convert, tmp_path / "spec", "--out", tmp_path / "back")
    assert code == 2
    assert "do not say which layers they hold; name them with --aux-layers" in err
    aux_layers = ("--aux-layers", "2,4,5")
    code, _, err = redraft(*convert, tmp_path / "spec", *aux_layers, "--out", tmp_path / "back")
    assert code == 0, err
    direct = ("--features", tmp_path / "spec", "--feature-aux-layers", "2,4,5")
    for i, features in enumerate((("--features", tmp_path / "back"), direct)):
        code, _, err = redraft(*training(files, tmp_path / f"p{i}", *features))
        assert code == 0, err
    # The wrong layers are seen where the target is there to compare with.
    code, _, err = redraft(
        *(
            "features",
            "--target",
            files["target"],
            "--check",
            tmp_path / "spec",
            "--aux-layers",
            "3,5,6",
        )
    )
    assert code == 2
    assert "its states are not what target" in err


def test_pickles_need_their_flag(redraft: Any, files: dict[str, Any], tmp_path: Path) -> None:
    forged = ("--layout", "specforge", "--out", tmp_path / "forged", "--quiet")
    code, _, err = redraft(
        "features", "--target", files["target"], "--from", files["store"], *forged
    )
    assert code == 0, err
    features = ("--features", tmp_path / "forged")
    code, _, err = redraft(*training(files, tmp_path / "p", *features))
    assert code == 2
    assert "can run code of whoever made it" in err
    code, _, err = redraft(*training(files, tmp_path / "p", *features, "--allow-pickle"))
    assert code == 0, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--out is needed: the folder to write features to"),
        (("--out", "x"), "--answers is needed: the rows whose features are to be stored"),
        (
            ("--answers", "A", "--out", "x", "--aux-layers", "2,y"),
            "--aux-layers takes layer numbers",
        ),
        (("--answers", "A", "--out", "x", "--aux-layers", "9"), "aux layer 9 is out of range"),
        (("--answers", "A", "--out", "x", "--aux-layers", "2", "--draft", "d"), "not both"),
        (("--answers", "A", "--out", "x", "--max-gb", "0.00001"), "more than --max-gb 1e-05"),
        (
            ("--answers", "A", "--out", "x", "--capture", "http://localhost:1"),
            "no answer of a vLLM",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    redraft: Any,
    files: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(files["train"], "A")
    code, _, err = redraft("features", "--target", files["target"], *flags)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_row_without_features_says_so(
    redraft: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    code, _, err = redraft(
        *("features", "--target", files["target"], "--answers", files["train"], "--quiet"),
        *("--out", tmp_path / "some"),
    )
    assert code == 0, err
    code, _, err = redraft(*training(files, tmp_path / "p", "--features", tmp_path / "some"))
    assert code == 2
    assert "is not among the features in" in err
    assert "write those of all answers, held-out ones too" in err


def test_stored_answers_are_measured_with_and_without_layers(
    redraft: Any, files: dict[str, Any], answers: list[Answer], tmp_path: Path
) -> None:
    command = ("measure", "--target", files["target"], "--draft", files["draft"], "--json")
    found = []
    for more in ((), ("--features", files["store"])):
        code, out, err = redraft(*command, "--answers", files["heldout"], *more)
        assert code == 0, err
        found.append(json.loads(out))
    assert found[0]["tau"] == found[1]["tau"]
    assert found[0]["left_out"] == 0
    other = tmp_path / "other.jsonl"
    other.write_text(answers[17].to_line() + "\n")
    assert redraft(*command, "--answers", other)[0] == 0
    code, _, err = redraft(*command, "--answers", other, "--features", files["store"])
    assert code == 2
    assert "is not among the features" in " ".join(err.split())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for wrong, words in (
        ((), "name either prompts"),
        (("--answers", empty), "no answer of two tokens"),
        (("--answers", files["heldout"], "--mode", "live"), "no use for --mode live"),
        (("--answers", files["heldout"], "--k", "auto"), "no use for --k auto"),
        (("--answers", files["heldout"], "--temperature", 1), "no use for --temperature"),
        (("--answers", files["heldout"], "--top-p", 0.5), "no use for --temperature, --top-k"),
        (("--prompts", empty, "--features", files["store"]), "cannot answer prompts"),
        (("--answers", files["heldout"], "--k", 16), "regenerate it with --lookahead 16"),
    ):
        code, _, err = redraft(*command, *wrong)
        assert code == 2, err
        assert words in " ".join(err.split())
