"""A hundred thousand answers or prompts fit half a gigabyte, and reading them changes no file."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redraft.config import RegenerateConfig
from redraft.core import files
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.decoding.batched import plan_generation
from redraft.decoding.sampling import Sampling
from redraft.features.writer import answers_hash, lines_of
from redraft.generation import regenerate as regenerate_module
from redraft.generation.answer_file import continued, iter_answers, read_answers
from redraft.generation.endpoint_check import Findings, remarks
from redraft.generation.endpoints import Endpoints
from redraft.generation.regenerate import regenerate
from redraft.generation.server_states import Work
from redraft.models.target import Target
from redraft.prompts.disk_list import Picked, PromptPool
from redraft.serving.completion import Asking

MANY, HERE = 100_000, 1500
BAR = 400e6
"""Bytes that so many answers, or prompts, may take; a run has half a gigabyte for them."""
PROMPT, ANSWER = 300, 256


def sample(number: int) -> Answer:
    draw = random.Random(number)
    prompt, tokens = ([draw.randrange(150_000) for _ in range(n)] for n in (PROMPT, ANSWER))
    return Answer(f"sample-{number}", prompt, tokens, ANSWER, "length")


def taken(work: Callable[[], Any]) -> tuple[float, float]:
    """Bytes kept and bytes at the peak, for as many as `MANY`."""
    tracemalloc.start()
    found = work()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == HERE
    return kept / HERE * MANY, peak / HERE * MANY


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bounded") / "a.jsonl"
    path.write_text("".join(f"{sample(i).to_line()}\n" for i in range(HERE)))
    return path


# -- memory ----------------------------------------------------------------------------------------


def test_answers_are_read_within_the_bar(written: Path) -> None:
    kept, peak = taken(lambda: read_answers(written))
    assert kept < BAR
    assert peak < BAR


def test_answers_as_tuples_would_not_be(written: Path) -> None:
    def as_before() -> list[Any]:
        rows = [json.loads(line) for line in written.read_text().splitlines()]
        return [(row["id"], tuple(row["prompt"]), tuple(row["tokens"])) for row in rows]

    kept, _ = taken(as_before)
    assert kept > 3 * BAR


def test_a_file_is_gone_through_in_next_to_no_memory(written: Path) -> None:
    _, peak = taken(lambda: [answer.length for answer in iter_answers(written)])
    assert peak < BAR / 10


def test_prompts_are_kept_within_the_bar() -> None:
    prompts = (Prompt(a.id, a.prompt, a.tokens) for a in map(sample, range(HERE)))
    kept, peak = taken(lambda: list(prompts))
    assert kept < BAR
    assert peak < BAR


def test_prompts_on_disk_are_planned_without_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(str(i), range(i % 7 + 1)) for i in range(50)]
    pool = PromptPool(prompts, memory=1)
    plans = [plan_generation(some, 8, 100, 10) for some in (prompts, prompts[::-1][5:])]
    picked = Picked(Picked(pool, range(49, -1, -1)), range(5, 50))
    monkeypatch.setattr(PromptPool, "__getitem__", None)
    assert plan_generation(pool, 8, 100, 10) == plans[0]
    assert plan_generation(picked, 8, 100, 10) == plans[1]
    assert list(picked[3:6].lengths) == [len(p.tokens) for p in prompts[::-1][8:11]]


class Counted(Sequence[Prompt]):
    """Prompts of the lengths named, and how many of them were read."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.read = lengths, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: Any) -> Any:
        self.read += 1
        return Prompt(f"p{range(len(self))[at]}", range(self.lengths[at]))


def test_endpoints_take_prompts_one_by_one() -> None:
    asyncio.run(taken_one_by_one(Counted([3, 4, 5, 6])))


async def taken_one_by_one(prompts: Counted) -> None:
    work = Work(prompts)
    assert (work.open, prompts.read) == (4, 0)
    first = await work.take()
    assert (first.id, prompts.read) == ("p0", 1)
    work.put_back(first)
    assert await work.take() is first
    work.put_back(first)
    assert [(await work.take()).id for _ in range(4)] == ["p0", "p1", "p2", "p3"]
    assert prompts.read == 4


def test_what_endpoints_serve_is_compared_by_length(target: Target) -> None:
    prompts = Counted([3, 4, 50, 60])
    asking = Asking(target, Sampling.of(RegenerateConfig()), 16, 0)
    found = Findings("m", "v", 62, True, 9, 0.0, 0.0, ())
    assert "2 answers may be cut short" in remarks("http://x", found, asking, prompts)[-1]
    assert prompts.read == 0


def test_endpoints_are_given_only_what_is_left(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Sequence[Prompt]] = []
    monkeypatch.setattr(Endpoints, "answers", lambda self, prompts: asked.append(prompts) or gone())
    out, pool = tmp_path / "a.jsonl", PromptPool([Prompt(str(i), (i, i)) for i in range(1, 6)])
    served = RegenerateConfig(endpoints="http://127.0.0.1:1")
    regenerate_module.claim(out, regenerate_module.answer_inputs(target, pool, served, 0), pool)
    out.write_text(
        "".join(Answer(i, (int(i),) * 2, (1,), 1, "stop").to_line() + "\n" for i in "25")
    )
    regenerate(target, pool, out, served)
    assert isinstance(asked[0], Picked)
    assert [prompt.id for prompt in asked[0]] == ["1", "3", "4"]


def gone() -> Iterator[list[Answer]]:
    yield from ()


def test_a_hash_of_answers_is_that_of_their_lines() -> None:
    some = [sample(i) for i in range(5)]
    assert answers_hash(some) == hashlib.sha256(lines_of(some).encode()).hexdigest()[:16]


# -- reading next to a writer -----------------------------------------------------------------------


LINES = [Answer(f"a{i}", (1, 2, 3), range(50 + i % 7), 50 + i % 7, "length") for i in range(300)]


def test_a_reader_beside_a_writer_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held in the middle of a line while others read, as `features --answers` does."""
    path = tmp_path / "a.jsonl"
    files.append_lines(path, [answer.to_line() for answer in LINES[:100]])
    halfway, go = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        if name == "lines: half" and not halfway.is_set():
            halfway.set()
            go.wait(10)

    def write() -> None:
        files.append_lines(path, [answer.to_line() for answer in LINES[100:200]])
        files.append_lines(path, [answer.to_line() for answer in LINES[200:]])

    monkeypatch.setattr("redraft.core.failpoints.armed", wait)
    writer = threading.Thread(target=write)
    writer.start()
    assert halfway.wait(10)
    before = path.stat()
    seen = read_answers(path)
    after = path.stat()
    go.set()
    writer.join()
    assert 100 < len(seen) < 200
    assert seen == LINES[: len(seen)]
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        *(before.st_ino, before.st_size, before.st_mtime_ns),
    )
    assert read_answers(path) == LINES


def test_a_line_that_grows_while_it_is_read_is_the_last(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{LINES[0].to_line()}\n{LINES[1].to_line()}")
    reading = iter_answers(path)
    assert [next(reading), next(reading)] == LINES[:2]
    with path.open("a") as stream:
        stream.write(f"\n{LINES[2].to_line()}\n")
    assert list(reading) == []
    assert read_answers(path) == LINES[:3]


@pytest.mark.parametrize("length", [1, 3, 200, 400])
def test_a_cut_line_is_ended_by_its_writer_alone(tmp_path: Path, length: int) -> None:
    """Wherever it was cut, and with lines longer than the blocks in which its begin is looked for."""
    path = tmp_path / "a.jsonl"
    for block, count in itertools.product((7, 1 << 16), range(3)):
        whole = "".join(f"{answer.to_line()}\n" for answer in LINES[:count])
        path.write_text(whole + LINES[5].to_line()[:length])
        cut = path.read_bytes()
        whole_line = length >= len(LINES[5].to_line())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "BLOCK", block)
            assert len(read_answers(path)) == count + whole_line
            assert path.read_bytes() == cut
            for _ in range(2):
                names = {a.id for a in LINES[:count]} | ({"a5"} if whole_line else set())
                assert continued(path) == names
                ended = f"{LINES[5].to_line()}\n" if whole_line else ""
                assert path.read_text() == whole + ended
    assert continued(tmp_path / "none.jsonl") == set()


def test_a_cut_line_is_answered_again(
    target: Target, prompts: list[Prompt], tmp_path: Path
) -> None:
    out, config = tmp_path / "a.jsonl", RegenerateConfig(max_new_tokens=6, batch_size=2)
    found = regenerate(target, prompts[:6], out, config)
    lines = out.read_text().splitlines(keepends=True)
    for rest in (lines[4][:-20], lines[4][:-1]):
        out.write_text("".join(lines[:4]) + rest)
        assert regenerate(target, prompts[:6], out, config) == found
        assert out.read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"id": 1}\n', "line 2: not an answer record"),
        (b"\n", "line 2: not an answer record"),
        (b'{"id":"a","prompt":[1.5],"tokens":[],"length":0,"finish":"stop"}\n', "line 2: not an"),
        (b'{"id":"a","prompt":[99999999999],"tokens":[],"length":0,"finish":"stop"}\n', "line 2"),
        (b"\xff\n", "is damaged .* remove it to answer again"),
    ],
)
def test_a_damaged_line_is_an_error_and_a_damaged_rest_is_not(
    tmp_path: Path, line: bytes, said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES[0].to_line().encode() + b"\n" + line)
    with pytest.raises(UserError, match=said):
        read_answers(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_answers(path) == LINES[:1]


# -- batches ---------------------------------------------------------------------------------------


def test_the_bound_of_a_batch_is_no_input_of_an_answer(
    target: Target, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RegenerateConfig(max_new_tokens=8, temperature=0.8)
    out = tmp_path / "a.jsonl"
    found = regenerate(target, prompts[:9], out, config, lookahead=2)
    about = (tmp_path / "a.about.json").read_text()
    sizes: list[int] = []
    true = regenerate_module.generate_answers

    def watched(target: Target, prompts: Any, plan: Any, **more: Any) -> Any:
        for batch in plan:
            longest = max(len(prompts[i].tokens) for i in batch)
            assert len(batch) == 1 or len(batch) * (longest + 10) <= 80
        sizes.extend(map(len, plan))
        return true(target, prompts, plan, **more)

    monkeypatch.setattr(regenerate_module, "generate_answers", watched)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]))
    small = replace(config, batch_tokens=80)
    resumed = regenerate(target, prompts[:9], out, small, lookahead=2)
    assert {a.id: a for a in resumed} == {a.id: a for a in found}
    assert max(sizes) > 1
    assert (tmp_path / "a.about.json").read_text() == about
