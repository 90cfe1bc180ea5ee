"""The command line: contracts that others script against, exit codes, and messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft import cli
from redraft.core.lock import held
from redraft.core.records import Answer
from redraft.drafts.kinds import kind_names
from tests.checkpoints.crafted import as_pickle, retensor
from tests.conftest import write_prompts

CONTRACT = {
    "tau",
    "ci",
    "accepted",
    "steps",
    "prompts",
    "excluded",
    "k",
    "temperature",
    "per_position",
    "loop_rate",
    "mode",
    "seconds",
}


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["redraft", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def redraft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize("mode", ["replay", "live"])
def test_measure_prints_one_object(
    redraft: Any, target_folder: Path, draft_folder: Path, tmp_path: Path, mode: str
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    ids = tmp_path / "ids.json"
    code, out, err = redraft(
        *("measure", "--target", target_folder, "--draft", draft_folder, "--prompts", prompts),
        *("--k", 3, "--max-new-tokens", 16, "--limit", 5, "--mode", mode, "--save-ids", ids),
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert set(found) >= CONTRACT
    assert found["tau"] == 1 + found["accepted"] / found["steps"]
    assert found["prompts"] + found["excluded"] == 5
    assert len(found["per_position"]) == found["k"] == 3
    assert found["mode"] == mode
    rows = json.loads(ids.read_text())
    assert len(rows) == 5
    assert all(isinstance(token, int) for row in rows for token in row)


@pytest.mark.parametrize("kind", kind_names())
def test_the_stages_are_commands_that_fit_together(
    redraft: Any, target_folder: Path, kind_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    draft_folder = kind_folder(kind)
    prompts = write_prompts(tmp_path / "p.jsonl", 12)
    held = write_prompts(tmp_path / "h.jsonl", 4, start=50)
    answers, heldout = tmp_path / "a.jsonl", tmp_path / "h-answers.jsonl"
    target = ("--target", target_folder)
    for source, out, extra in ((prompts, answers, ()), (held, heldout, ("--lookahead", 4))):
        code, text, err = redraft(
            *("regenerate", *target, "--prompts", source, "--out", out, "--max-new-tokens", 20),
            *(*extra, "--json"),
        )
        assert code == 0, err
        assert json.loads(text)["answers"] == (12 if source == prompts else 4)
    selection = tmp_path / "s.jsonl"
    code, text, _ = redraft(
        "select", "--answers", answers, "--out", selection, "--budget", "0.5", "--json"
    )
    assert json.loads(text)["kept"] == 6
    code, text, err = redraft(
        *("train", *target, "--draft", draft_folder, "--answers", answers, "--heldout", heldout),
        *("--selection", selection, "--out", tmp_path / "adapter", "--method", "expert"),
        *("--width", 8, "--epochs", 1, "--batch-tokens", 256, "--rollout", 2, "--json"),
    )
    assert code == 0, err
    assert json.loads(text)["trained_parameters"] == 3 * 8 * 32
    code, text, err = redraft(
        *("export", "--draft", draft_folder, "--adapter", tmp_path / "adapter"),
        *("--out", tmp_path / "fused", "--tp", "1,2", "--verify", "--json"),
    )
    assert code == 0, err
    widths = [
        json.loads((folder / "config.json").read_text())["intermediate_size"]
        for folder in (draft_folder, tmp_path / "fused")
    ]
    assert widths[1] == widths[0] + 8
    assert json.loads(text)["worst_difference"] < 1e-6
    code, text, err = redraft("inspect", tmp_path / "fused", "--target", target_folder, "--json")
    assert code == 0, err
    assert json.loads(text)["kind"] == kind
    code, _, err = redraft(
        *("export", "--draft", draft_folder, "--adapter", tmp_path / "adapter"),
        *("--out", tmp_path / "fused"),
    )
    assert code == 2
    assert "is not an empty folder" in err


def test_a_pickled_draft_is_converted_once(
    redraft: Any, draft_folder: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(draft_folder, tmp_path / "old"))
    as_pickle(old)
    code, _, err = redraft("inspect", old)
    assert code == 2
    assert "if you trust it, convert it once with redraft export --allow-pickle" in err
    export = ("export", "--draft", old, "--out", tmp_path / "new", "--format", "speculators")
    code, out, err = redraft(*export, "--allow-pickle", "--verify")
    assert code == 0, err
    assert "verified by a second reading" in out
    code, out, _ = redraft("inspect", tmp_path / "new")
    assert code == 0
    assert "speculators layout" in out
    assert "the speculators layout; export with --format eagle3" in out  # SGLang's verdict


def test_inspect_fails_on_a_draft_that_redraft_refuses(
    redraft: Any, draft_folder: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(draft_folder, tmp_path / "broken"))
    retensor(broken, midlayer__mlp__up_proj__weight=None)
    code, out, _ = redraft("inspect", broken)
    assert code == 2
    assert "missing midlayer.mlp.up_proj.weight" in out
    assert "loads without midlayer.mlp.up_proj.weight" in out
    code, _, err = redraft("export", "--draft", draft_folder, "--out", tmp_path / "x", "--tp", "a")
    assert code == 2
    assert "--tp takes sizes like 1,2,4; got 'a'" in err


def test_scratch_makes_a_draft_from_nothing(
    redraft: Any, target_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 8)
    target = ("--target", target_folder)
    for name, extra in (("a", ()), ("h", ("--lookahead", 4))):
        redraft(
            *("regenerate", *target, "--prompts", prompts, "--out", tmp_path / f"{name}.jsonl"),
            *("--max-new-tokens", 16, *extra, "--quiet"),
        )
    code, _, err = redraft(
        *("train", *target, "--answers", tmp_path / "a.jsonl", "--heldout", tmp_path / "h.jsonl"),
        *("--out", tmp_path / "draft", "--method", "scratch", "--draft-vocab", 60),
        *("--draft-width", 16, "--aux-layers", "1,4,7", "--epochs", 1, "--rollout", 2, "--quiet"),
    )
    assert code == 0, err
    code, out, err = redraft(
        *("measure", *target, "--draft", tmp_path / "draft", "--prompts", prompts),
        *("--max-new-tokens", 12, "--json", "--quiet"),
    )
    assert code == 0, err
    assert json.loads(out)["provenance"]["aux_layers"] == [1, 4, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "--set", "train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (["adapt", "--config", "demoo"], "no recipe or file named 'demoo'; did you mean 'demo'?"),
        (["adapt", "--method", "magic"], "names the adapter 'magic'"),
        (["adapt", "--off-domain", "x"], "--off-domain takes name=FILE"),
    ],
)
def test_the_users_mistakes_exit_with_2_before_anything_is_loaded(
    redraft: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    needed = ["--target", "nowhere", "--draft", "nowhere", "--prompts", "nowhere", "--out"]
    code, out, err = redraft(*arguments, *needed, tmp_path / "run")
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_one_process_trains_or_checks_in_a_folder(
    redraft: Any, target_folder: Path, draft_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text("".join(answer.to_line() + "\n" for answer in answers[:20]))
    prompts = write_prompts(tmp_path / "p.jsonl", 16)
    out.mkdir()
    models = ("--target", target_folder, "--draft", draft_folder)
    with held(out):
        for command in (
            ("train", *models, "--answers", file, "--heldout", file, "--out", out),
            ("check", *models, "--prompts", prompts, "--out", out),
        ):
            code, _, err = redraft(*command)
            assert code == 2, err
            assert "another redraft process" in " ".join(err.split())


def test_a_wrong_target_is_one_sentence(redraft: Any, tmp_path: Path) -> None:
    code, _, err = redraft(
        "measure", "--target", tmp_path, "--draft", "x", "--prompts", "y", "--json"
    )
    assert code == 2
    assert "expected a model folder with config.json" in " ".join(err.split())


def test_recipes_are_listed_and_copied(
    redraft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = redraft("recipes")
    assert code == 0
    assert "demo" in out
    code, out, _ = redraft("recipes", "copy", "demo")
    assert (tmp_path / "demo.yaml").is_file()
    code, _, err = redraft("recipes", "copy", "demo")
    assert code == 2
    assert "exists already" in err


def test_every_command_shows_an_example() -> None:
    from typer.main import get_command

    def walk(command: Any, name: str) -> list[tuple[str, str]]:
        if hasattr(command, "commands"):
            return [r for n, c in command.commands.items() for r in walk(c, f"{name} {n}")]
        return [(name, command.help or "")]

    commands = walk(get_command(cli.app), "redraft")
    assert len(commands) >= 11
    for name, text in commands:
        assert "Example: " in text, name


def test_version_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "redraft", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("redraft 0.")


def test_generate_says_the_same_words_with_any_draft(
    redraft: Any, target_folder: Path, kind_folder: Callable[[str], Path]
) -> None:
    said = []
    for kind, k in (("eagle3", "3"), ("eagle", "1"), ("eagle3", "auto")):
        code, out, err = redraft(
            *("generate", "--target", target_folder, "--draft", kind_folder(kind), "--k", k),
            *("--prompt", "Say 7 and 1.", "--temperature", 0.8, "--top-p", 0.95, "--seed", 4),
            *("--max-new-tokens", 20, "--json"),
        )
        assert code == 0, err
        found = json.loads(out)
        said.append((found["text"], tuple(found["tokens"])))
        assert found["acceptance"] == "seeded"
        assert "".join(piece for piece, _ in found["pieces"]) == found["text"]
        assert len(found["tokens"]) <= 20
        assert ("predicted speed-up by K" in " ".join(err.split())) == (k == "auto")
    assert len(set(said)) == 1


def test_generate_streams_and_names_bad_flags(
    redraft: Any, target_folder: Path, draft_folder: Path
) -> None:
    common = ("generate", "--target", target_folder, "--draft", draft_folder, "--prompt", "Hi")
    code, out, err = redraft(*common, "--k", 2, "--max-new-tokens", 12, "--show-drafts")
    assert code == 0, err
    assert out.strip()
    assert "green: drafted and accepted" in " ".join(err.split())
    assert "steps, tau" in err
    for flags, says in (
        (("--k", "many"), "--k takes a whole number from 1 to 16, or auto; got 'many'"),
        (("--acceptance", "greedy", "--temperature", 1), "takes the most likely token and ignores"),
        (("--acceptance", "gredy"), "did you mean 'greedy'?"),
        (("--draft-token", "sampled"), "cannot judge draft tokens picked 'sampled'"),
    ):
        code, _, err = redraft(*common, *flags)
        assert code == 2
        assert says in " ".join(err.split())


def test_measure_in_expectation(
    redraft: Any, target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    code, out, err = redraft(
        *("measure", "--target", target_folder, "--draft", draft_folder, "--prompts", prompts),
        *("--k", "auto", "--max-new-tokens", 16, "--temperature", 1, "--mode", "expected"),
        *("--acceptance", "sampled", "--json"),
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["acceptance"], found["draft_token"]) == ("sampled", "sampled")
    assert found["tau"] == pytest.approx(1 + found["accepted"] / found["steps"])


def test_bench_decode_races_and_resumes(
    redraft: Any, target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    command = (
        *("bench", "decode", "--target", target_folder, "--draft", draft_folder),
        *("--prompts", prompts, "--assistant", target_folder, "--padded", 3e5, "--out"),
        *(tmp_path / "cells", "--batches", "1,2", "--ks", "1,3", "--limit", 4, "--repeats", 1),
        *("--max-new-tokens", 8),
    )
    code, out, err = redraft(*command, "--json", "--record", tmp_path / "cells.json")
    assert code == 0, err
    cells = json.loads(out)["cells"]
    assert [(cell["batch"], cell["padded"]) for cell in cells] == [
        (1, False),
        (2, False),
        (1, True),
        (2, True),
    ]
    names = [row["name"] for row in cells[0]["rows"]]
    assert {"generate", "plain", "lookup", "assisted", "K=1", "K=3"} <= set(names)
    for cell in cells:
        assert abs(cell["parameters"] - 3e5) < 3e4 or not cell["padded"]
        for outputs in cell["identical"].values():
            assert outputs["identical"] + outputs["excused"] == outputs["prompts"] == 4
        assert 0 < cell["outside"] < 1
    assert cells[0]["tau"] == cells[2]["tau"], "padding changes nothing that is decoded"
    assert json.loads((tmp_path / "cells.json").read_text())["cells"] == cells
    code, out, err = redraft(*command)
    assert code == 0
    assert "nothing to do, already done" in err
    code, _, err = redraft(*command, "--batches", "9")
    assert code == 2
    assert "4 prompts do not fill a batch of 9" in err
