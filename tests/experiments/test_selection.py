"""The selection bench: a pool of known mixture, cells that resume, figures as they are defined."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from redraft.core.errors import UserError
from redraft.core.records import to_json
from redraft_experiments import selection as bench
from redraft_experiments.selection import (
    WAYS,
    SelectionCell,
    bench_selection,
    mixed,
    print_selection,
    read_selection_cells,
)
from tests.conftest import FAMILIES, make_tokenizer, save_target

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def suite(
    target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A toy suite of random models, in the shape of a built one."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copytree(target_folder, folder / "base")
    save_target(folder / "members" / "replay", FAMILIES["llama"](len(make_tokenizer())), seed=1)
    shutil.copytree(draft_folder, folder / "draft")
    about = {
        "size": "tiny",
        "seed": 0,
        "members": {"replay": {"domain": "math"}},
        "general_domains": ["dialogue", "records", "code"],
    }
    (folder / "suite.json").write_text(json.dumps(about))
    return folder


def run(suite: Path, out: Path, ways: list[str], **more: Any) -> list[SelectionCell]:
    settings: dict[str, Any] = {"budgets": ["0.25"], "schedules": ["steps"], "seeds": [1], **more}
    return bench_selection(suite, out, member="replay", ways=ways, **settings)


def test_cells_are_run_once_and_say_what_they_are(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ["random", "rejection", "mahalanobis of prompts"]
    cells = run(suite, tmp_path, ways)
    assert [(c.way, c.schedule) for c in cells] == [
        ("unadapted", ""),
        *((way, "steps") for way in ways),
    ]
    (_, passes) = run(suite, tmp_path, ["random"], schedules=["epochs"])
    assert passes.optimizer_steps % bench.EPOCHS == 0
    pool = [
        json.loads(line)["id"]
        for line in (tmp_path / "tiny/replay/prompts/pool.jsonl").read_text().splitlines()
    ]
    assert Counter(name.split("/")[0] for name in pool) == {"drifted": 12, "stable": 20, "copy": 8}
    by_way = {(c.way, c.schedule): c for c in cells}
    plain, scored = by_way["random", "steps"], by_way["rejection", "steps"]
    assert plain.optimizer_steps == scored.optimizer_steps == bench.SCALES["tiny"].steps
    assert plain.scored_tokens == plain.scoring_flops == 0
    assert scored.scored_tokens > 0
    assert scored.scoring_flops > 0
    assert plain.generated_tokens == plain.kept_tokens < scored.generated_tokens
    prompted = by_way["mahalanobis of prompts", "steps"]
    assert prompted.generated_tokens == prompted.kept_tokens
    assert 0 < prompted.kept <= 10
    monkeypatch.setattr(bench, "train_adapter", None)  # nothing is trained again
    assert run(suite, tmp_path, ways) == cells
    assert sorted(map(str, read_selection_cells(tmp_path))) == sorted(map(str, [*cells, passes]))
    out = Console(record=True, width=200)
    print_selection(cells, out)
    assert "mahalanobis of prompts" in out.export_text()


def test_an_order_is_scored_once_for_all_budgets(suite: Path, tmp_path: Path) -> None:
    small, large = run(suite, tmp_path, ["rejection"], budgets=["0.1", "0.5"])[1:]
    stored = json.loads((tmp_path / "tiny/replay/scores/rejection.json").read_text())
    order = [row["id"] for row in stored["samples"]]
    assert [row["score"] for row in stored["samples"]] == sorted(
        (row["score"] for row in stored["samples"]), reverse=True
    )
    found = {b: bench._within(stored, b).kept for b in ("0.1", "0.5")}
    assert [s.id for s in found["0.1"]] == order[: round(len(order) / 10)]
    assert {s.id for s in found["0.1"]} < {s.id for s in found["0.5"]}
    assert small.kept < large.kept
    assert small.scoring_seconds == large.scoring_seconds


def test_figures_are_what_they_are_called() -> None:
    kept = {"drifted/1", "copy/drifted/1", "copy/stable/2", "stable/7"}
    answers: Any = [type("A", (), {"id": f"drifted/{i}"})() for i in range(4)]
    assert bench._found(kept, answers) == 0.25
    assert bench._copies(kept) == 0.25
    cell = SelectionCell(
        "tiny", "m", "random", "0.1", "steps", 1, ((1, 1),) * 10, ((2, 2),) * 10, {}
    )
    assert mixed(cell) == (*((2, 2),) * 10, *((1, 1),) * 6)  # 50 % stable to 30 % drifted
    assert SelectionCell.from_json(json.loads(json.dumps(to_json(cell)))) == cell


def test_copies_are_near_duplicates() -> None:
    from redraft.selection.near_duplicates import near_duplicates

    text = "A baker has 12 loaves and sells 7 of them before noon; how many loaves are left for the afternoon, "
    text += "if each of them is cut in two and the cat eats one half?"
    message = {"role": "user", "content": text}
    row = bench.Sample("s/1", "math", (message, {"role": "assistant", "content": "5"}))
    copied = bench._copy(row)
    assert copied.id == "copy/s/1"
    tokens = [list(m["content"].encode()) for m in (row.messages[0], copied.messages[0])]
    assert near_duplicates(tokens, [0, 1], 0.7) == {1: 0}


def test_mistakes_name_what_is_there(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown way 'rejections'; did you mean 'rejection"):
        run(suite, tmp_path, ["rejections"])
    with pytest.raises(UserError, match="unknown schedule 'step'; did you mean 'steps'"):
        run(suite, tmp_path, ["random"], schedules=["step"])
    with pytest.raises(UserError, match="has no fine-tune 'other'"):
        bench_selection(suite, tmp_path, member="other", ways=["random"])


def test_every_way_is_a_setting_that_selection_takes() -> None:
    from redraft.config import SelectConfig, resolve

    for way in WAYS.values():
        settings = {
            f"select.{n}": getattr(way, n) for n in ("select", "by", "duplicates", "coverage")
        }
        found = resolve([("way", settings)]).config.select
        assert found == dataclasses.replace(
            SelectConfig(), **{k.split(".")[1]: v for k, v in settings.items()}
        )
