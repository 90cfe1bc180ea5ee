"""A whole run at an address, begun on one machine and gone on with on another: in memory, and on S3 as moto serves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from redraft.checkpoints.load import read_draft
from redraft.cli.engine import read_run
from tests.cli.test_cli import run
from tests.conftest import write_prompts

SETTINGS = [
    word
    for setting in (
        *("train.epochs=1", "train.rollout=2", "train.batch_tokens=256", "general.guard=off"),
        *("regenerate.max_new_tokens=12", "measure.eval_limit=4", "measure.heldout=4"),
        *("measure.eval_new_tokens=12", "export.certificate=off"),
    )
    for word in ("--set", setting)
]


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket."""
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        memory.makedirs("/bucket", exist_ok=True)
        yield "memory://bucket"
        memory.store.clear()
        return
    pytest.importorskip("s3fs", reason="make test-cloud has s3fs and moto")
    moto = pytest.importorskip("moto.server", reason="make test-cloud has s3fs and moto")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    fsspec.filesystem("s3", skip_instance_cache=True).makedirs("bucket", exist_ok=True)
    yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def use(name: str) -> Path:
        monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / name))
        return tmp_path / name

    return use


def test_a_run_goes_on_on_another_machine(
    bucket: str,
    machine: Callable[[str], Path],
    target_folder: Path,
    draft_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = fsspec.filesystem(bucket.partition("://")[0])
    root = bucket.partition("://")[2]
    for folder, name in ((target_folder, "model"), (draft_folder, "draft")):
        store.put(str(folder), f"{root}/{name}", recursive=True)
    store.put_file(str(write_prompts(tmp_path / "p.jsonl", 24)), f"{root}/prompts.jsonl")
    command = ["adapt", "--target", f"{bucket}/model", "--draft", f"{bucket}/draft", "--json"]
    command += ["--prompts", f"{bucket}/prompts.jsonl", "--out", f"{bucket}/run", *SETTINGS]

    machine("one")
    code, out, err = run(capsys, monkeypatch, *command)
    assert code == 0, err
    report = json.loads(out)
    assert report["draft"] == f"{bucket}/run/draft"
    assert report["prompts"]["source"] == f"{bucket}/prompts.jsonl"
    assert f"files sent to {bucket}/run" in err
    for name in ("state.json", "report.html", "draft/model.safetensors", "answers/adapt.jsonl"):
        assert store.exists(f"{root}/run/{name}")
    shutil.rmtree(machine("one"))

    two = machine("two")
    code, again, err = run(capsys, monkeypatch, *command)
    assert code == 0, err
    assert "train: nothing to do" in err
    assert json.loads(again)["after"] == json.loads(out)["after"]
    (copy,) = two.glob("*/run/draft")
    assert read_draft(str(copy)).hash() == read_draft(str(copy)).provenance["tensors_hash"]
    shutil.rmtree(next(two.glob("*/model")).parent)
    assert (Path(read_run(str(copy.parent)).target) / "config.json").is_file(), "of the report"
    store.rm_file(f"{root}/run/adapter/model.safetensors")

    machine("three")  # what was lost there is done again
    code, again, err = run(capsys, monkeypatch, *command)
    assert code == 0, err
    assert "answers adapt: nothing to do" in err or "regenerate adapt: nothing to do" in err
    assert "train: nothing to do" not in err
    assert store.exists(f"{root}/run/adapter/model.safetensors")

    code, out, err = run(capsys, monkeypatch, *(word for word in command if word != "--json"))
    assert code == 0, err
    err = " ".join(err.split())  # lines are broken to fit a terminal
    assert f"redraft verify --run {bucket}/run measures" in out
    assert f"nothing to do: every stage was done already; report {bucket}/run/report.html" in err
    assert f"24 prompts from {bucket}/prompts.jsonl" in err
    assert str(tmp_path) not in out + err, "people know addresses, not where copies lie"


def test_a_mistake_in_an_address_is_a_sentence(
    bucket: str,
    machine: Callable[[str], Path],
    draft_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine("one")
    command = ["inspect", f"{bucket}/nothing"]
    code, _, err = run(capsys, monkeypatch, *command)
    assert code == 2
    assert err.count("\n") <= 6
    assert "nothing" in err
