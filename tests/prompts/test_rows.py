"""Files of every kind give the same rows, one at a time, and say where they end early."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from redraft.core import hub
from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.models.target import Target
from redraft.prompts import json_items
from redraft.prompts.disk_list import Picked, PromptPool
from redraft.prompts.prompts import PromptReader, read_prompts
from redraft.prompts.rows import read_rows

ROWS: list[dict[str, Any]] = [
    {"id": f"r{i}", "prompt": f"Say {i}.", "weight": 0.5} for i in range(600)
]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"p.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=100)
    elif kind.startswith("json."):
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_bytes(gzip.compress(lines) if kind.endswith(".gz") else lines)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    assert list(read_rows(str(path))) == list(enumerate(ROWS, 1))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if kind == "jsonl":
        *whole, (number, last) = read_rows(str(path))
        assert isinstance(last, ValueError)
        assert "not valid JSON" in str(last)
        assert len(whole) == number - 1
    else:
        with pytest.raises(UserError, match="could not be read to the end"):
            list(read_rows(str(path)))


def test_marks_of_byte_order_and_damage(tmp_path: Path) -> None:
    for name, text in (("p.json", json.dumps(ROWS)), ("p.jsonl", json.dumps(ROWS[0]) + "\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert next(read_rows(str(tmp_path / name))) == (1, ROWS[0])
    path = write(tmp_path, "jsonl.gz")
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="could not be read to the end"):
        list(read_rows(str(path)))


THREE = [{"prompt": text} for text in ("a", "é, ü", '[c]}\\"')]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in THREE)
LAYOUTS = {
    "lines": LINES,
    "lines without an end": LINES.rstrip(),
    "list": json.dumps(THREE),
    "list over lines": json.dumps(THREE, indent=1, ensure_ascii=False),
    "under a key": json.dumps({"version": 1, "data": THREE, "more": 2}),
    "under a key over lines": json.dumps({"train": THREE}, indent=0),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in THREE),
}


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.json.gz", "p"])
def test_layouts_encodings_and_names(layout: str, encoding: str, name: str, tmp_path: Path) -> None:
    content = LAYOUTS[layout].encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_rows(str(path))) == list(enumerate(THREE, 1))


def test_one_object_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    for indent in (None, 2):
        (tmp_path / "p.json").write_text(json.dumps(row, indent=indent))
        assert list(read_rows(str(tmp_path / "p.json"))) == [(1, row)]


BAD = {
    "another encoding": (
        '{"prompt": "é"}'.encode("latin-1"),
        "byte 13 of the row is not valid in UTF-8",
    ),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "a giant number": (b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}", "4300 digits"),
    "zeros": (b"\0\0\0", "not valid JSON"),
    "a form feed": (b'{"prompt": "x\x0c"}', "Invalid control character"),
    "a key twice": (b'{"prompt": "x", "prompt": "y"}', "the key 'prompt' is there twice"),
    "no JSON": (b"{prompt: x}", "not valid JSON"),
}


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_costs_itself_alone(bad: str, listed: bool, tmp_path: Path) -> None:
    content, reason = BAD[bad]
    rows = [json.dumps(row).encode() for row in THREE]
    rows.insert(1, content)
    path = tmp_path / "p.json"
    path.write_bytes(b"[" + b",\n".join(rows) + b"]" if listed else b"\n".join(rows))
    found = [row for _, row in read_rows(str(path))]
    problem = found.pop(1)
    assert found == THREE
    assert isinstance(problem, ValueError)
    assert reason in str(problem)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_what_is_no_character_costs_its_row(encoding: str, tmp_path: Path) -> None:
    rows = ['{"prompt": "a"}', '{"prompt": "\ud800"}', '{"prompt": "c"}', '{"prompt": "d"}']
    path = tmp_path / "p.jsonl"
    path.write_bytes("\n".join(rows).encode(encoding, "surrogatepass")[:-1])
    found = [row for _, row in read_rows(str(path))]
    assert (found[0], found[2]) == ({"prompt": "a"}, {"prompt": "c"})
    assert all("not valid in UTF-8, or in the file's own" in str(found[at]) for at in (1, 3))


def test_an_emoji_and_nan_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00", "score": NaN}\n')
    (_, row), *_ = read_rows(str(path))
    assert row["prompt"] == "\N{GRINNING FACE}"


def test_values_of_a_list_do_not_depend_on_where_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([*THREE, 5, "x,]", [1, {"a": []}]], indent=1))
    whole = list(read_rows(str(path)))
    assert [row for _, row in whole[3:]] == [5, "x,]", [1, {"a": []}]]
    for block in (1, 2, 3, 7):
        monkeypatch.setattr(json_items, "BLOCK", block)
        assert list(read_rows(str(path))) == whole


def test_what_follows_the_first_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"train": THREE, "test": THREE}))
    *rows, (number, problem) = read_rows(str(path))
    assert (len(rows), number) == (3, 4)
    assert "more follows the first list" in str(problem)
    path.write_text(json.dumps(THREE)[:-1])
    with pytest.raises(UserError, match="the list has no end"):
        list(read_rows(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.csv", b"prompt,answer\na,b\n", r"\.csv files are not read; convert it to JSONL"),
        ("p.csv.gz", gzip.compress(b"prompt\na\n", mtime=0), r"\.csv files are not read"),
        ("p.tsv", b"a\tb\n", r"\.tsv files"),
        ("p.txt", b"Say a.\n", r"\.txt files"),
        ("p.yaml", b"- prompt: a\n", r"\.yaml files"),
        ("p.jsonl.zst", b"\x28\xb5\x2f\xfd....", "packed with Zstandard"),
        ("p.jsonl", b"PK\x03\x04....", "zip archive"),
        ("p.parquet", b"PAR1", "could not be read to the end"),
        (
            "p.jsonl",
            gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9],
            "could not be read to the end",
        ),
    ],
)
def test_files_of_another_kind_say_what_to_do(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        list(read_rows(str(tmp_path / name)))
    with pytest.raises(UserError, match="a folder; name a file in it"):
        list(read_rows(str(tmp_path)))


def test_a_cut_file_gives_the_rows_before_the_cut(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode() * 9)[:-4])
    assert len(read_prompts(str(path), target, limit=3).prompts) == 3
    with pytest.raises(UserError, match="could not be read to the end"):
        read_prompts(str(path), target)


def test_a_text_that_is_no_text_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array([b"a", b"\xe9", b"c"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "p.parquet")
    first, (_, problem), last = read_rows(str(tmp_path / "p.parquet"))
    assert (first, last) == ((1, {"prompt": "a"}), (3, {"prompt": "c"}))
    assert isinstance(problem, ValueError)


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [row["prompt"] for _, row in read_rows(str(path))] == ["a", "b"]


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two configs, the first with two files, as the Hub lists and gives them."""
    import huggingface_hub

    file = write(tmp_path, "parquet")
    names = [
        "README.md",
        "default/train/0000.parquet",
        "default/train/0001.parquet",
        "other/test/0000.parquet",
    ]

    class Api:
        def list_repo_files(self, repo: str, **where: str) -> list[str]:
            assert where == {"repo_type": "dataset", "revision": "refs/convert/parquet"}
            if repo != "org/chats":
                raise OSError("404 not found")
            return names

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **where: str(file))
    return file


@pytest.mark.usefixtures("on_the_hub")
def test_a_data_set_on_the_hub_is_read_file_after_file() -> None:
    rows = list(read_rows("org/chats"))
    assert [number for number, _ in rows] == list(range(1, 1201))
    assert len(list(read_rows("org/chats:other/test"))) == 600
    with pytest.raises(UserError, match=r"no split 'valid'; it has train; name one as owner/name"):
        list(read_rows("org/chats:default/valid"))
    with pytest.raises(UserError, match=r"no config 'mine'; it has default, other"):
        list(read_rows("org/chats:mine/train"))
    with pytest.raises(UserError, match=r"no such file, and the Hub gave no data set of that name"):
        list(read_rows("org/none"))


def test_what_is_a_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    assert hub.looks_like_hub("org/name")
    assert hub.looks_like_hub("org/name:config/split")
    for path in ("org/name.jsonl", "./name", str(tmp_path / "x"), "prompts.json.gz", "a/b/c"):
        assert not hub.looks_like_hub(path)
    with pytest.raises(UserError, match=r"no such file; expected JSONL, JSON"):
        list(read_rows("org/name.jsonl"))


def test_a_pool_gives_back_what_was_put_in_from_memory_and_from_disk() -> None:
    prompts = [
        Prompt("a", (1, 2), (3,)),
        Prompt(
            "é#", (4,), None, ({"role": "user", "content": "ü\n"},), ((None, {"role": "user"}),)
        ),
        Prompt("c", (5,), None, tools=({"name": "f"},)),
    ]
    for memory in (1 << 20, 1):
        pool = PromptPool(prompts, memory)
        assert list(pool) == prompts
        assert pool[-1] == prompts[-1]
        assert list(pool[1:]) == prompts[1:]
        picked = Picked(pool, [2, 0])
        assert [p.id for p in picked] == ["c", "a"]
        assert [p.id for p in picked[1:]] == ["a"]
        assert pool[0] == prompts[0]


def test_memory_does_not_grow_with_the_file(target: Target) -> None:
    """Twenty times the rows: the pool goes to disk, and what stays is a few dozen bytes a row."""

    def peak(count: int) -> float:
        reader = PromptReader(target)
        reader.pool = PromptPool(memory=1 << 16)
        tracemalloc.start()
        for number in range(count):
            reader.take(number, {"input_ids": [number % 250, number // 250, *range(100)]})
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(reader.pool) == count
        return found

    few, many = peak(250), peak(5000)
    assert (many - few) / 4750 < 300  # bytes; the tokens alone are 102 pointers
