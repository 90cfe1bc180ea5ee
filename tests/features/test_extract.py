"""Writing features: predicted size, room on the disk, resuming to the same bytes, other layouts."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.features import extract as features_module
from redraft.features.extract import Plan, compare_features, convert_features, write_features
from redraft.features.layouts import WRITERS, open_features
from redraft.features.store import FeatureStore
from redraft.features.stored_target import StoredTarget, load_stored_target
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.faults.crashes import WRITES, Bomb, Crash, armed

AUX_LAYERS = (2, 4, 5)
Usage = namedtuple("Usage", "total used free")


def plan(out: Path, layout: str = "redraft", **more: Any) -> Plan:
    return Plan(out, layout, **{"shard_mb": 0.2, "batch_tokens": 128, **more})


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def store(target: Target, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "store"
    write_features(target, answers, AUX_LAYERS, plan(out))
    return out


@pytest.fixture(scope="module")
def beside(target_folder: Path, store: Path) -> StoredTarget:
    return load_stored_target(str(target_folder), [open_features(store)])


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_is_predicted_within_a_few_percent(
    target_folder: Path, answers: list[Answer], tmp_path: Path, layout: str, dtype: str
) -> None:
    target = load_target(str(target_folder), dtype=dtype)
    done = write_features(target, answers, AUX_LAYERS, plan(tmp_path, layout))
    small = ("manifest.json", "about.json", "witness.safetensors", "redraft-features.json")
    actual = sum(len(c) for n, c in contents(tmp_path).items() if n not in small)
    assert done.predicted == pytest.approx(actual, rel=0.03)
    assert (done.samples, done.tokens) == (24, sum(len(a.prompt) + len(a.tokens) for a in answers))


def test_too_much_is_refused_before_anything_is_read(
    target: Target, answers: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "read_states", None)
    with pytest.raises(UserError, match=r"take about 0.00\d GB, more than --max-gb 0.0005; store"):
        write_features(target, answers, AUX_LAYERS, plan(tmp_path / "a", max_gb=0.0005))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 20_100_000))
    with pytest.raises(
        UserError, match=r"need about 0.00\d GB more, and the disk of .* 0.000 GB to"
    ):
        write_features(target, answers, AUX_LAYERS, plan(tmp_path / "b"))
    for refused in ("a", "b"):  # so that the folder is free for less
        assert list((tmp_path / refused).glob("[!.]*")) == []


def test_what_is_there_already_needs_no_room(
    target: Target,
    answers: list[Answer],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = Path(shutil.copytree(store, tmp_path / "s"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 20_100_000))
    write_features(target, answers, AUX_LAYERS, plan(out))
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="need about 0.000 GB more"):
        write_features(target, answers, AUX_LAYERS, plan(out))


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WRITERS)
def test_a_crash_anywhere_resumes_to_the_same_bytes(
    target: Target, answers: list[Answer], tmp_path: Path, layout: str
) -> None:
    write_features(target, answers[:5], AUX_LAYERS, plan(tmp_path / "whole", layout))
    expected = contents(tmp_path / "whole")
    hits = []
    for after in range(200):
        out = tmp_path / f"{after}"
        with armed(bomb := Bomb(after)):
            try:
                write_features(target, answers[:5], AUX_LAYERS, plan(out, layout))
            except Crash:
                hits.append(bomb.hit)
        if not bomb.hit:
            break
        if layout == "redraft" and not (out / "manifest.json").is_file():
            with pytest.raises(UserError, match="expected features|no manifest.json"):
                open_features(out)
        write_features(target, answers[:5], AUX_LAYERS, plan(out, layout))
        left = {n: c for n, c in contents(out).items() if not n.endswith(".tmp")}
        assert left == expected, bomb.hit
        shutil.rmtree(out)
    assert len(hits) > 20
    if layout == "redraft":
        assert {"features: shard written", "features: shard listed", "lines: half"} <= set(hits)


def test_a_full_disk_is_one_sentence_and_resumes(
    target: Target, answers: list[Answer], store: Path, tmp_path: Path
) -> None:
    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bomb = Bomb(6, full, lambda name: name.startswith(WRITES))
    with (
        armed(bomb),
        pytest.raises(UserError, match="No space left on device; everything finished"),
    ):
        write_features(target, answers, AUX_LAYERS, plan(tmp_path / "s"))
    write_features(target, answers, AUX_LAYERS, plan(tmp_path / "s"))
    assert contents(tmp_path / "s") == contents(store)


def test_only_missing_shards_are_written_again(
    target: Target,
    answers: list[Answer],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = Path(shutil.copytree(store, tmp_path / "s"))
    lost = out / "shard-00001.safetensors"
    lost.unlink()
    read = []
    honest = features_module.read_states

    def counted(*args: Any) -> Any:
        read.append(args[2].shape)
        return honest(*args)

    monkeypatch.setattr(features_module, "read_states", counted)
    write_features(target, answers, AUX_LAYERS, plan(out))
    assert (
        0
        < len(read)
        < len(json.loads((store / "shards.jsonl").read_text().splitlines()[0])["rows"])
    )
    assert {
        n: c for n, c in contents(out).items() if "shards.jsonl" not in n and "manifest" not in n
    } == {
        n: c for n, c in contents(store).items() if "shards.jsonl" not in n and "manifest" not in n
    }
    assert list(FeatureStore(out).check())
    read.clear()
    write_features(target, answers, AUX_LAYERS, plan(out))
    assert read == []


def test_another_job_is_not_continued(
    target: Target, answers: list[Answer], store: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="holds features made with other answers_hash, aux_layers; name"
    ):
        write_features(target, answers[:3], (2, 3, 4), plan(store))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds other files .notes.txt.; name an empty folder"):
        write_features(target, answers, AUX_LAYERS, plan(tmp_path))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layout", "unknown layout 'parquet'"),
        ("answers", "there are no answers whose features could be stored"),
    ],
)
def test_mistakes_are_named(
    target: Target, answers: list[Answer], tmp_path: Path, what: str, message: str
) -> None:
    layout, some = ("parquet", answers) if what == "layout" else ("redraft", [])
    with pytest.raises(UserError, match=message):
        write_features(target, some, AUX_LAYERS, plan(tmp_path / "x", layout))


# -- from one layout to another --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["speculators", "specforge"])
def test_layouts_go_there_and_back(
    target: Target,
    beside: StoredTarget,
    store: Path,
    answers: list[Answer],
    tmp_path: Path,
    layout: str,
) -> None:
    source = open_features(store)
    convert_features(beside, source, None, plan(tmp_path / "there", layout), beside.normed)
    direct = tmp_path / "direct"
    write_features(target, answers, AUX_LAYERS, plan(direct, layout))
    there = open_features(tmp_path / "there", unpickle=True)
    for row in range(len(answers)):
        own = open_features(direct, unpickle=True).states(row)
        assert torch.allclose(there.states(row), own, atol=1e-5)
    back = tmp_path / "back"
    convert_features(beside, there, answers, plan(back), beside.normed)
    again = FeatureStore(back)
    assert again.answers() == answers
    assert again.pre_norm == (layout == "speculators")
    for row in range(len(answers)):
        expected = source.states(row)
        if layout == "specforge":  # the state before the norm is gone
            expected[:, -1] = beside.normed(expected[:, -1])
        assert torch.equal(again.states(row), expected)


def test_a_norm_cannot_be_undone(
    target: Target, beside: StoredTarget, answers: list[Answer], tmp_path: Path
) -> None:
    write_features(target, answers[:2], AUX_LAYERS, plan(tmp_path / "f", "specforge"))
    source = open_features(tmp_path / "f", unpickle=True)
    with pytest.raises(UserError, match="a norm cannot be undone; write them from the target"):
        convert_features(beside, source, None, plan(tmp_path / "s", "speculators"), beside.normed)


def test_answers_choose_among_captured_rows(
    beside: StoredTarget, store: Path, answers: list[Answer], tmp_path: Path
) -> None:
    source = open_features(store)
    stranger = Answer("x", (1, 2, 3), (4, 5), 2, "stop")
    some = [answers[5], stranger, answers[2]]
    convert_features(beside, source, some, plan(tmp_path / "some"), beside.normed)
    assert FeatureStore(tmp_path / "some").answers() == [answers[5], answers[2]]
    with pytest.raises(UserError, match="none of the 1 answers is among the 24 rows"):
        convert_features(beside, source, [stranger], plan(tmp_path / "no"), beside.normed)


def test_comparing_with_the_target_sees_other_taps(
    target: Target, answers: list[Answer], store: Path, tmp_path: Path
) -> None:
    assert max(compare_features(target, open_features(store)).values()) < 1e-5
    write_features(target, answers[:3], AUX_LAYERS, plan(tmp_path / "s", "speculators"))
    apart = compare_features(target, open_features(tmp_path / "s", (3, 5, 6)))
    assert list(apart) == ["hs[3]", "hs[5]", "hs[6]", "last"]
    assert min(list(apart.values())[:3]) > 0.1
    assert apart["last"] < 1e-5
