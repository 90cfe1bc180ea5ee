"""Several processes at one job: the same result as one, whatever their number, and sentences for what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3TextConfig,
    Glm4Config,
    MixtralConfig,
    Olmo2Config,
    Qwen3MoeConfig,
)

from redraft.checkpoints.adapter_folder import load_adapter
from redraft.checkpoints.load import stored
from redraft.core import ranks
from redraft.core.folders import read_json
from redraft.core.records import Answer
from redraft.generation import regenerate
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.models.tensor_parallel import TENSOR_PARALLEL
from tests.conftest import FAMILIES, SHAPE, fresh_draft, make_tokenizer, save_target, write_prompts
from tests.ranks.rank import CASES, WRONG, read_twice, train_all

RANK = "tests.ranks.rank"
ROOT = Path(__file__).parents[2]
SECONDS = 120
MORE: dict[str, Callable[[int], Any]] = {
    "mixtral": lambda v: MixtralConfig(vocab_size=v, num_local_experts=4, **SHAPE),
    "gemma3": lambda v: Gemma3TextConfig(vocab_size=v, head_dim=8, sliding_window=16, **SHAPE),
    "qwen3-moe": lambda v: Qwen3MoeConfig(
        vocab_size=v,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        **SHAPE,
    ),
    "glm4": lambda v: Glm4Config(vocab_size=v, head_dim=8, **SHAPE),
    "olmo2": lambda v: Olmo2Config(vocab_size=v, **SHAPE),
}
EXACT = 1e-11
"""Of float64 sums in another order, over a whole training."""


def launched(count: int, *words: object) -> list[str]:
    """The command that runs rank.py in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    return [*launcher, "--nproc-per-node", str(count), "-m", RANK, *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "REDRAFT_RANK_TIMEOUT": "60", **more}


def run(count: int, *words: object) -> subprocess.CompletedProcess[str]:
    command = launched(count, *words)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=environment()
    )


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def alone(target_folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return train_all(str(target_folder))


@pytest.mark.bench
@pytest.mark.parametrize(("count", "how"), [(2, ()), (3, ()), (2, [TENSOR_PARALLEL])])
def test_training_equals_that_of_one_process(
    count: int,
    how: Sequence[str],
    target_folder: Path,
    tmp_path: Path,
    alone: dict[str, dict[str, torch.Tensor]],
) -> None:
    """In float64, with batches that the processes do not divide. Each rank dividing by its own labels would be seen."""
    ended = run(count, "train", target_folder, tmp_path, *how)
    assert ended.returncode == 0, ended.stderr
    places, held = zip(*json.loads((tmp_path / "ranks.json").read_text()), strict=True)
    assert places == tuple(range(count))
    whole = 2 * sum(
        t.numel() for name, t in alone["plain"].items() if name not in ("taus", "loss", "rows")
    )
    assert sum(held) == whole, "AdamW's two numbers for each"
    assert max(held) < 1.4 * whole / count
    for name in (*CASES, "together"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert far(found, alone[name]) < EXACT, name
    if not how:
        assert far(load_file(tmp_path / f"{WRONG}.safetensors"), alone["plain"]) > 1e4 * EXACT


def test_what_ranks_own_is_about_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.owners([5, 1, 9]) == [0, 0, 0]
    monkeypatch.setattr(ranks, "_here", ranks.Place(1, 3, 1))
    sizes = [7, 1, 30, 12, 9, 9, 2]
    found = ranks.owners(sizes)
    assert sorted(
        sum(s for s, by in zip(sizes, found, strict=True) if by == r) for r in range(3)
    ) == [20, 20, 30]


def test_accumulated_parts_are_the_step(alone: dict[str, dict[str, torch.Tensor]]) -> None:
    assert far(alone["accumulate"], alone["plain"]) < EXACT
    assert far(alone["noise"], alone["plain"]) > 1e-6


# -- whole jobs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(target: Target, target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The words of a job whose training matters."""
    folder = tmp_path_factory.mktemp("job")
    stored(fresh_draft(target), target).save(folder / "draft")
    write_prompts(folder / "p.jsonl", 24)
    for rank in range(2):
        write_prompts(folder / f"{rank}.jsonl", 24, start=rank)
    settings = {
        "regenerate.max_new_tokens": 24,
        "regenerate.temperature": 0.2,
        "regenerate.greedy_share": 0.5,
        "regenerate.batch_size": 3,
        "general.guard": "off",
        "select.select": "draft_loss",
        "select.budget": "0.8",
        "train.method": "full",
        "train.lr": 0.01,
        "train.epochs": 20,
        "train.precision": "fp32",
        "train.batch_tokens": 256,
        "train.rollout": 3,
        "train.evaluations": 4,
        "measure.k": 3,
        "measure.eval_limit": 6,
        "measure.heldout": 4,
        "measure.eval_new_tokens": 20,
    }

    def words(out: Path, prompts: str = "p.jsonl", **more: object) -> list[str]:
        sets = [f"--set={key}={value}" for key, value in {**settings, **more}.items()]
        given = ["--target", str(target_folder), "--draft", str(folder / "draft")]
        return ["adapt", *given, "--prompts", str(folder / prompts), "--out", str(out), *sets]

    return words


@pytest.fixture(scope="module")
def whole(job: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "redraft", *job(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment())
    trained = load_adapter(out / "adapter").card["train"]
    assert trained["best_step"] > trained["steps"] // 2, "what is trained has to matter"
    return out


def same_run(out: Path, whole: Path) -> None:
    """Answers, selection and steps are equal, the trained tensors within rounding."""
    for name in ("answers/adapt.jsonl", "answers/heldout.jsonl", "answers/eval.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text(), name
    for name in ("adapter", "draft"):
        files = [folder / name / "model.safetensors" for folder in (out, whole)]
        assert far(*map(load_file, files)) < 1e-4
    chosen = [(folder / "selection.jsonl").read_text().splitlines() for folder in (out, whole)]
    assert [json.loads(line)["id"] for line in chosen[0]] == [
        json.loads(line)["id"] for line in chosen[1]
    ]
    before = [read_json(folder / "measure/eval-before.json")["accepted"] for folder in (out, whole)]
    assert before[0] == before[1]


@pytest.mark.bench
def test_a_job_of_two_is_killed_and_ends_with_three(
    job: Callable[..., list[str]], whole: Path, tmp_path: Path
) -> None:
    """Reference: the run of one process."""
    out = tmp_path / "run"
    begun = subprocess.Popen(
        launched(2, "job", *job(out)),
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + SECONDS
    while not (out / "checkpoints/checkpoint.safetensors").exists():
        assert begun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((out / ".lock").read_text()), signal.SIGKILL)
    assert begun.wait(SECONDS) != 0
    assert not read_json(out / "state.json")["train"]["done"]
    ended = run(3, "job", *job(out))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("already done") == 4  # said once, not by each
    same_run(out, whole)


@pytest.mark.bench
def test_features_are_written_by_all(
    job: Callable[..., list[str]], whole: Path, target_folder: Path, tmp_path: Path
) -> None:
    given = ["--target", target_folder, "--answers", whole / "answers/adapt.jsonl"]
    given += ["--aux-layers", "2,4", "--layout", "specforge", "--set", "batch-tokens=100"]
    ended = run(2, "job", "features", *given, "--out", tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    one = [sys.executable, "-m", "redraft", "features", *map(str, given)]
    one += ["--out", str(tmp_path / "one")]
    subprocess.run(one, check=True, capture_output=True, cwd=ROOT, env=environment())
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) > 12
    for name in files:
        if not name.name.startswith("."):
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


# -- a target that is shared -----------------------------------------------------------------------

SHARED = ("--device-map", TENSOR_PARALLEL)


@pytest.mark.bench
def test_a_job_on_a_shared_target_is_killed_and_ends_in_one_process(
    job: Callable[..., list[str]], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    begun = run(2, "dies", *job(out), *SHARED)
    assert begun.returncode != 0
    state = read_json(out / "state.json")
    assert not state["train"]["done"]
    assert state["regenerate adapt"]["done"]
    command = [sys.executable, "-m", "redraft", *job(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment())
    same_run(out, whole)
    again = run(2, "job", *job(tmp_path / "shared"), *SHARED)
    assert again.returncode == 0, again.stderr
    same_run(tmp_path / "shared", whole)
    flops = [
        load_adapter(f / "adapter").card["train"]["target_flops"]
        for f in (out, tmp_path / "shared")
    ]
    assert flops[1] == pytest.approx(flops[0], rel=0.2)


@pytest.mark.bench
def test_every_family_reads_as_whole(tmp_path: Path) -> None:
    """Logits, hidden states, and logits after a cache. A rank that reads on with its own part of a sum would be seen."""
    for name, config in (FAMILIES | MORE).items():
        save_target(tmp_path / name, config(len(make_tokenizer())))
    ended = run(2, "read", tmp_path)
    assert ended.returncode == 0, ended.stderr
    for name in FAMILIES | MORE:
        whole = read_twice(load_target(str(tmp_path / name)))
        assert far(load_file(tmp_path / f"{name}.safetensors"), whole) < 1e-4, name
    last = read_twice(load_target(str(tmp_path / max(FAMILIES | MORE))))
    assert far(load_file(tmp_path / f"{WRONG}.safetensors"), last) > 1e-2


@pytest.mark.bench
def test_features_of_a_shared_target_are_written_once(
    whole: Path, target_folder: Path, tmp_path: Path
) -> None:
    given = ["features", "--target", target_folder, "--answers", whole / "answers/adapt.jsonl"]
    given += ["--set", "batch-tokens=100", "--out"]
    ended = run(2, "job", *given, tmp_path / "two", *SHARED)
    assert ended.returncode == 0, ended.stderr
    one = [sys.executable, "-m", "redraft", *map(str, given), str(tmp_path / "one")]
    subprocess.run(one, check=True, capture_output=True, cwd=ROOT, env=environment())
    two, one_ = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("two", "one"))
    assert [path.name for path in two] == [path.name for path in one_]
    for found, expected in zip(two, one_, strict=True):
        assert far(load_file(found), load_file(expected)) < 1e-5
    lines = [(tmp_path / name / "shards.jsonl").read_text().count("\n") for name in ("two", "one")]
    assert lines[0] == lines[1]


@pytest.mark.bench
def test_heads_that_processes_cannot_share_are_named(
    job: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = run(3, "job", *job(tmp_path / "run"), *SHARED)
    assert ended.returncode != 0
    assert ended.stderr.count("its num_attention_heads are 4, which 3 processes cannot share") == 1


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.bench
def test_what_goes_wrong_on_one_is_said_once(job: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    for how, message in (
        ("fails", "redraft: rank 1 of 2: the disk of this rank is full"),
        ("full", "redraft: the disk of this rank is full"),
        ("dies", "another process of this job"),
    ):
        began = time.monotonic()
        ended = run(2, how, *job(out))
        assert ended.returncode != 0
        assert ended.stderr.count(message) == 1, ended.stderr
        assert time.monotonic() - began < 60
    for file, place, message in (
        ("{rank}.jsonl", "other", "redraft: this job: prompts is "),
        ("p.jsonl", "run-{rank}", "is not the same folder for all processes"),
    ):
        ended = run(2, "job", *job(tmp_path / place, file))
        assert ended.returncode != 0
        assert ended.stderr.count(message) == 1, ended.stderr


def test_commands_that_do_not_share_say_so(tmp_path: Path) -> None:
    for words, message in (
        (["inspect", str(tmp_path)], "`redraft inspect` runs in one process"),
        (["measure", "--target", "t", "--draft", "d"], "other processes of this job cannot be met"),
    ):
        for rank in ("0", "1"):
            ended = subprocess.run(
                [sys.executable, "-m", "redraft", *words],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=environment(WORLD_SIZE="2", RANK=rank),
            )
            assert ended.returncode == 2
            assert (message in ended.stderr) == (rank == "0")
            assert "Traceback" not in ended.stderr
    ended = subprocess.run(
        [sys.executable, "-m", "redraft", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(WORLD_SIZE="8"),  # of a cluster, without a launcher
    )
    assert "expected a file config.json" in ended.stderr


@pytest.mark.parametrize("others", [True, False])
def test_batches_of_ranks_that_compute_together_count_once(
    others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank has the same batches, or none: rank 0 alone asks endpoints. It is heard after each batch."""
    heard = []

    def everyone(said: object) -> list[object]:
        heard.append(said)
        return [said, said if others else None]

    monkeypatch.setattr(ranks, "_here", ranks.Place(0, 2, 0))
    monkeypatch.setattr(ranks, "_together", True)
    monkeypatch.setattr(ranks, "everyone", everyone)
    batches = [[Answer("a", (1,), (2,), 1, "stop")], [Answer("b", (1,), (2,), 1, "stop")]]
    assert list(regenerate._in_step(iter(batches))) == batches
    assert len(heard) == 3
