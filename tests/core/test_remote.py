"""Work at an address: what is there comes, what changed goes back, and nothing is overwritten unseen."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from redraft.cli.addresses import at_hand
from redraft.core import remote
from redraft.core.errors import UserError
from redraft.core.remote import LAST, Mirror, address_of, fetched, is_address, kept_up

RUN = "memory://bucket/run"


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    memory.makedirs("/bucket")
    yield memory
    memory.store.clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Work as on a machine of this name, with a cache of its own."""

    def use(name: str) -> None:
        monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / name))

    use("one")
    return use


def write(mirror: Mirror, name: str, text: str) -> None:
    path = mirror.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_addresses_are_told_from_servers_hub_ids_and_paths() -> None:
    assert is_address("s3://bucket/run")
    assert is_address("gs://bucket/prompts.jsonl")
    for text in (
        "http://host:8000",
        "https://host/v1",
        "org/name",
        "./run",
        "/run",
        "C:\\run",
        "s3://",
    ):
        assert not is_address(text)


def test_what_one_machine_does_another_goes_on_with(store: Any, machine: Any) -> None:
    first = Mirror(RUN)
    first.fetch()
    write(first, "run/state.json", "{}")
    write(first, "run/answers/adapt.jsonl", "a\n")
    write(first, "run/.lock", "held")
    assert first.push() == 2
    assert first.push() == 0
    assert store.cat("/bucket/run/answers/adapt.jsonl") == b"a\n"
    assert not store.exists("/bucket/run/.lock")
    machine("two")
    second = Mirror(RUN)
    second.fetch()
    assert (second.path / "answers/adapt.jsonl").read_text() == "a\n"
    write(second, "run/answers/adapt.jsonl", "a\nb\n")
    (second.path / "state.json").unlink()
    assert second.push() == 2
    assert second.push() == 0
    machine("one")
    back = Mirror(RUN)
    back.fetch()
    assert (back.path / "answers/adapt.jsonl").read_text() == "a\nb\n"
    assert not (back.path / "state.json").exists()


def test_a_file_has_the_time_that_it_has_there_on_every_machine(store: Any, machine: Any) -> None:
    store.pipe("/bucket/model/model.safetensors", b"weights")
    times = set()
    for name in ("one", "two"):
        machine(name)
        times.add((Path(fetched("memory://bucket/model")) / "model.safetensors").stat().st_mtime_ns)
        time.sleep(0.02)
    assert len(times) == 1


def test_what_is_at_hand_is_not_fetched_again(store: Any, machine: Any, monkeypatch: Any) -> None:
    store.pipe("/bucket/prompts.jsonl", b"{}\n")
    fetched("memory://bucket/prompts.jsonl")
    monkeypatch.setattr(type(store), "get_file", lambda *_, **__: pytest.fail("fetched again"))
    fetched("memory://bucket/prompts.jsonl")


def test_what_is_named_after_a_file_goes_with_it_and_nothing_else(store: Any, machine: Any) -> None:
    for name in (
        "answers.jsonl",
        "answers.about.json",
        "answers-2.jsonl",
        "v1.0.tar",
        "v1.0/config.json",
    ):
        store.pipe(f"/bucket/{name}", b"{}")
    copy = Path(fetched("memory://bucket/answers.jsonl"))
    assert sorted(p.name for p in copy.parent.iterdir()) == ["answers.about.json", "answers.jsonl"]
    folder = Path(fetched("memory://bucket/v1.0"))
    assert [p.name for p in folder.parent.iterdir()] == ["v1.0"]


def test_transfers_show_their_megabytes(store: Any, machine: Any, monkeypatch: Any) -> None:
    """In steps, as a store hands over parts of a file."""
    shown: list[tuple[str, int, int]] = []

    class Seen(remote.Progress):
        def __exit__(self, *given: Any) -> None:
            shown.append((self.label, self.done, self.total))

    monkeypatch.setattr(remote, "Progress", Seen)
    store.pipe("/bucket/model/model.safetensors", bytes(3_500_000))
    store.pipe("/bucket/model/config.json", b"{}")
    copy = Path(fetched("memory://bucket/model"))
    mirror = Mirror(RUN)
    write(mirror, "run/state.json", " " * 2_000_000)
    with kept_up([mirror]):
        pass
    assert shown == [("fetching memory://bucket/model", 3, 3), (f"sending to {RUN}", 2, 2)]
    assert (copy / "model.safetensors").stat().st_size == 3_500_000


def test_states_are_sent_after_what_they_speak_of(
    store: Any, machine: Any, monkeypatch: Any
) -> None:
    mirror, sent = Mirror(RUN), []
    put = type(store).put_file
    monkeypatch.setattr(
        type(store),
        "put_file",
        lambda self, a, b, **m: (sent.append(Path(b).name), put(self, a, b, **m)),
    )
    for name in ("a.json", *LAST, "z.json", "draft/config.json", "draft/model.safetensors"):
        write(mirror, f"run/{name}", "x")
    mirror.push()
    assert set(sent[-3:]) == {*LAST}
    assert sent[:3] == ["a.json", "model.safetensors", "z.json"]


def test_a_file_that_changed_at_both_ends_is_refused(store: Any, machine: Any) -> None:
    mirror = Mirror(RUN)
    write(mirror, "run/state.json", "1")
    mirror.push()
    write(mirror, "run/state.json", "of this machine")
    store.pipe("/bucket/run/state.json", b"of another machine")
    with pytest.raises(
        UserError, match=r"run/state.json was written by someone else .* nothing is sent"
    ):
        mirror.push()
    assert store.cat("/bucket/run/state.json") == b"of another machine"
    with pytest.raises(UserError, match=r"run/state.json changed there and in the copy"):
        Mirror(RUN).fetch()
    assert (mirror.path / "state.json").read_text() == "of this machine"


def test_changes_go_back_while_the_work_goes_on_and_when_it_fails(
    store: Any, machine: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(remote, "PUSH_SECONDS", 0.05)
    mirror = Mirror(RUN)
    with pytest.raises(KeyboardInterrupt):
        with kept_up([mirror]):
            write(mirror, "run/state.json", "begun")
            deadline = time.monotonic() + 10
            while not store.exists("/bucket/run/state.json") and time.monotonic() < deadline:
                time.sleep(0.02)
            assert store.cat("/bucket/run/state.json") == b"begun"
            monkeypatch.setattr(remote, "PUSH_SECONDS", 100.0)
            write(mirror, "run/state.json", "interrupted")
            raise KeyboardInterrupt
    assert store.cat("/bucket/run/state.json") == b"interrupted"
    assert not any(thread.name == "redraft-push" for thread in threading.enumerate())


def test_a_command_that_was_killed_left_no_record(store: Any, machine: Any) -> None:
    """Between a transfer and the record: equal files are equal, and others are still told."""
    store.pipe("/bucket/run/state.json", b"same")
    store.pipe("/bucket/run/other.json", b"there")
    mirror = Mirror(RUN)
    write(mirror, "run/state.json", "same")
    write(mirror, "run/other.json", "here!")
    with pytest.raises(UserError, match=r"run/other.json changed there and in the copy"):
        mirror.fetch()
    (mirror.path / "other.json").unlink()
    Mirror(RUN).fetch()
    assert Mirror(RUN).push() == 0
    mirror = Mirror(RUN)
    write(mirror, "run/state.json", "sent, not recorded")
    store.pipe("/bucket/run/state.json", b"sent, not recorded")
    assert mirror.push() == 0
    assert not list(mirror.folder.rglob("*.tmp"))


def test_a_transfer_that_ends_in_the_middle_goes_on(
    store: Any, machine: Any, monkeypatch: Any
) -> None:
    for name in ("a", "b", "c"):
        store.pipe(f"/bucket/model/{name}.json", name.encode())
    get, brought = type(store).get_file, []

    def some(self: Any, path: str, to: str, **more: Any) -> None:
        if len(brought) == 2:
            raise KeyboardInterrupt
        brought.append(path)
        get(self, path, to, **more)

    monkeypatch.setattr(type(store), "get_file", some)
    with pytest.raises(KeyboardInterrupt):
        fetched("memory://bucket/model")
    monkeypatch.setattr(
        type(store), "get_file", lambda *given, **more: (brought.append(""), get(*given, **more))
    )
    assert len(list(Path(fetched("memory://bucket/model")).iterdir())) == 3
    assert len(brought) == 3, "each file is brought once"


def test_the_first_error_is_the_one_told(store: Any, machine: Any, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(remote, "say", said.append)
    mirror = Mirror(RUN)
    with pytest.raises(UserError, match="the work failed"):
        with kept_up([mirror]):
            write(mirror, "run/state.json", "here")
            store.pipe("/bucket/run/state.json", b"someone else's")
            raise UserError("the work failed")
    assert "written by someone else" in said[0]


def test_a_store_that_fails_ends_in_a_sentence_and_keeps_the_copy(
    store: Any, machine: Any, monkeypatch: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    mirror = Mirror(RUN)
    monkeypatch.setattr(type(store), "put_file", refuse)
    with pytest.raises(
        UserError, match=r"/bucket/run/state.json cannot be written .*Access Denied"
    ):
        with kept_up([mirror]):
            write(mirror, "run/state.json", "kept")
    assert (mirror.path / "state.json").read_text() == "kept"


def test_a_store_without_its_package_is_named(machine: Any, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match=r"nowhere://bucket/run cannot be reached"):
        Mirror("nowhere://bucket/run")
    with pytest.raises(UserError, match=r"name a file or a folder in a bucket"):
        Mirror("memory://bucket")


def test_names_of_copies_are_told_as_addresses(store: Any, machine: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/model/config.json", b"{}")
    copy = fetched("memory://bucket/model")
    assert address_of(copy) == "memory://bucket/model"
    assert address_of(f"{copy}/config.json") == "memory://bucket/model/config.json"
    assert address_of(f"{copy}+{tmp_path / 'lora'}") == f"memory://bucket/model+{tmp_path / 'lora'}"
    assert address_of(tmp_path / "one" / "other") == str(tmp_path / "one" / "other")


def test_arguments_are_copies_and_what_is_written_goes_back(store: Any, machine: Any) -> None:
    store.pipe("/bucket/chat.jsonl", b"{}\n")
    given = {
        "target": "org/name",
        "off_domain": ["chat=memory://bucket/chat.jsonl"],
        "endpoint": "http://127.0.0.1:8000",
        "out": RUN,
        "k": 4,
    }
    with at_hand(given) as local:
        name, _, path = local["off_domain"][0].partition("=")
        assert (name, Path(path).read_bytes()) == ("chat", b"{}\n")
        assert {**local, "off_domain": 0, "out": 0} == {**given, "off_domain": 0, "out": 0}
        Path(local["out"]).mkdir(parents=True)
        (Path(local["out"]) / "report.json").write_text("{}")
        Path(path).write_text("changed here")
    assert store.cat("/bucket/run/report.json") == b"{}"
    assert store.cat("/bucket/chat.jsonl") == b"{}\n", "what is read only is not sent"
    with pytest.raises(
        UserError, match=r"--record memory://bucket/a.json: expected a path of this machine"
    ):
        with at_hand({"record": "memory://bucket/a.json"}):
            pass


def test_several_processes_are_refused(store: Any, machine: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="several processes of a job"):
        with at_hand({"out": RUN}):
            pass


def test_a_damaged_record_of_the_copy_is_a_sentence(store: Any, machine: Any) -> None:
    store.pipe("/bucket/prompts.jsonl", b"{}\n")
    fetched("memory://bucket/prompts.jsonl")
    record = Mirror("memory://bucket/prompts.jsonl").record
    record.write_text(json.dumps({"address": "x"})[:-4])
    with pytest.raises(UserError, match=r"is damaged; move it and .* away"):
        fetched("memory://bucket/prompts.jsonl")
