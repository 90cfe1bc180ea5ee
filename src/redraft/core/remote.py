"""Files and folders at an address (s3://bucket/run, gs://, abfs://, ...), worked on in a copy on this machine.

    $REDRAFT_CACHE/HASH/NAME      the copy (default: ~/.cache/redraft)
    $REDRAFT_CACHE/HASH.json      what the address held when the two were equal last

Stores of objects have no rename, so nothing is worked on there. What changed in the copy is sent now and then and at the end, what
says that the rest is whole (`state.json`, `config.json`) last: a folder that was cut off is seen as such by what reads it. A file that
changed at both ends is refused, not merged.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .console import Progress, say
from .errors import UserError, as_sentence
from .files import write_text
from .hub import FILES

VARIABLE = "REDRAFT_CACHE"
MEGABYTE = 1_000_000
PUSH_SECONDS = 120.0
"""How often changes are sent while a command works."""
LAST = ("state.json", "config.json")
"""Files that are sent after all others."""
HERE = ("http", "https", "file", "local", "hf", "tcp", "unix")
"""Protocols of servers, which are no places of files, and of this machine."""
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://(.+)")
TAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation")
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


def is_address(text: str) -> bool:
    """Whether a text names files elsewhere, and no server."""
    found = ADDRESS.fullmatch(text)
    return found is not None and found[1] not in HERE


def cache_folder() -> Path:
    """Where copies are kept."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "redraft")


def fetched(name: str) -> str:
    """The copy of what is at an address, brought up to date; any other name unchanged."""
    if not is_address(name):
        return name
    mirror = Mirror(name)
    mirror.fetch()
    return str(mirror.path)


def address_of(path: str | Path) -> str:
    """The address that a path of a copy stands for; any other path unchanged. MODEL+ADAPTER are two."""
    return "+".join(map(_address, str(path).split("+")))


def _address(text: str) -> str:
    cache, path = cache_folder(), Path(text)
    if not path.is_relative_to(cache):
        return text
    name, *rest = path.relative_to(cache).parts
    record = cache / f"{name}.json"
    if not record.is_file():
        return text
    address: str = json.loads(record.read_text(encoding="utf-8"))["address"]
    return "/".join([address, *rest[1:]])


@dataclass(frozen=True)
class Seen:
    """A file as it was when both ends were equal: its mark there, its size and time here."""

    mark: str
    size: int
    time: int


class Mirror:
    """A file or a folder at an address, and its copy. With a file go those next to it that are named after it (answers.about.json)."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        from fsspec.core import url_to_fs

        with as_sentence(f"{address} cannot be reached"):
            self.store, where = url_to_fs(self.address)
        self.above, _, self.name = str(where).rpartition("/")
        if not self.above or not self.name:
            raise UserError(f"{address}: name a file or a folder in a bucket (s3://bucket/run)")
        key = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        self.folder = cache_folder() / key
        self.record = cache_folder() / f"{key}.json"
        self.seen = self._read_record()
        self._one_at_a_time = threading.Lock()

    @property
    def path(self) -> Path:
        """The copy."""
        return self.folder / self.name

    def fetch(self) -> None:
        """Bring what is new there. Raises UserError for a file that changed at both ends, and for a store that fails."""
        infos, here = self._there(), self._here()
        there = {name: _mark(info) for name, info in infos.items()}
        self._adopt(there, here)
        wanted = [name for name, mark in there.items() if not self._same(name, mark, here)]
        both = [name for name in wanted if name in here and not self._unchanged(name, here)]
        if both:
            raise UserError(
                f"{self.address}: {both[0]} changed there and in the copy {self.folder}; move one of the two away"
            )
        size = sum(int(infos[name].get("size") or 0) for name in wanted)
        with _megabytes(f"fetching {self.address}", size) as counting, self._recording():
            for name in wanted:
                self._bring(name, infos[name], counting)
                self.seen[name] = Seen(there[name], *_size_and_time(self.folder / name))
            for name in self.seen.keys() - there.keys():  # removed there
                if name in here and self._unchanged(name, here):
                    (self.folder / name).unlink()
                del self.seen[name]

    def push(self, shown: bool = False) -> int:
        """Send what changed here, with progress if it is `shown`; how many files.

        Raises UserError where someone else wrote there in between.
        """
        with self._one_at_a_time:
            there, here = {n: _mark(info) for n, info in self._there().items()}, self._here()
            self._adopt(there, here)
            others = [
                name
                for name in there.keys() | self.seen.keys()
                if there.get(name) != (self.seen[name].mark if name in self.seen else None)
            ]
            if others:
                raise UserError(
                    f"{self.address}: {sorted(others)[0]} was written by someone else since this command began, so nothing "
                    f"is sent; what was done here is in {self.folder}"
                )
            changed = [name for name in here if not self._unchanged(name, here)]
            gone = [name for name in self.seen if name not in here]
            size = sum(here[name][0] for name in changed) if shown else 0
            with _megabytes(f"sending to {self.address}", size) as counting, self._recording():
                for name in sorted(changed, key=lambda name: (Path(name).name in LAST, name)):
                    with as_sentence(
                        f"{self._at(name)} cannot be written (the copy is {self.folder})"
                    ):
                        at = self._at(name)
                        self.store.put_file(str(self.folder / name), at, callback=counting)
                        mark = _mark(self.store.info(self._at(name)))
                    self.seen[name] = Seen(mark, *here[name])
                for name in gone:
                    with as_sentence(f"{self._at(name)} cannot be removed"):
                        self.store.rm_file(self._at(name))
                    del self.seen[name]
            return len(changed) + len(gone)

    def _adopt(self, there: Mapping[str, str], here: Mapping[str, tuple[int, int]]) -> None:
        """Take files for equal that are, though a command that was killed did not record it."""
        for name in there.keys() & here.keys():
            if not self._same(name, there[name], here) and not self._unchanged(name, here):
                scratch = self._download(name)
                if filecmp.cmp(scratch, self.folder / name, shallow=False):
                    self.seen[name] = Seen(there[name], *here[name])
                scratch.unlink()

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Write the record when the block ends, however it ends."""
        try:
            yield
        finally:
            self._write_record()

    def _bring(self, name: str, info: Mapping[str, Any], counting: Any) -> None:
        to = self.folder / name
        scratch = self._download(name, counting)
        time = _time(info)
        if time is not None:  # the same on every machine, as a model's fingerprint goes by it
            os.utime(scratch, (time, time))
        scratch.replace(to)

    def _download(self, name: str, counting: Any = None) -> Path:
        scratch = self.folder / Path(name).parent / f".{Path(name).name}.tmp"
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with as_sentence(f"{self._at(name)} cannot be read"):
            more = {} if counting is None else {"callback": counting}
            self.store.get_file(self._at(name), str(scratch), **more)
        return scratch

    def _there(self) -> dict[str, Mapping[str, Any]]:
        """What the store says of each file at the address."""
        whole = f"{self.above}/{self.name}"
        with as_sentence(f"{self.address} cannot be listed"):
            self.store.invalidate_cache()
            found: dict[str, Any] = {}
            if self.store.isdir(whole):
                found |= self.store.find(whole, detail=True)
            if self.store.isdir(self.above):
                found |= {
                    info["name"]: info
                    for info in self.store.ls(self.above, detail=True)
                    if info["type"] == "file" and self._goes_along(Path(info["name"]).name)
                }
        above = f"{self.above.lstrip('/')}/"
        names = {path.lstrip("/").removeprefix(above): info for path, info in found.items()}
        return {name: info for name, info in names.items() if not _hidden(name)}

    def _here(self) -> dict[str, tuple[int, int]]:
        """Size and time of each file of the copy."""
        if not self.folder.is_dir():
            return {}
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not _hidden(name):
                found[name] = _size_and_time(path)
        return found

    def _goes_along(self, name: str) -> bool:
        """Whether a file at the address's own level is the one named, or goes with it."""
        named = Path(self.name)
        return name == self.name or (
            named.suffix.lower() in FILES and name.startswith(f"{named.stem}.")
        )

    def _same(self, name: str, mark: str, here: Mapping[str, tuple[int, int]]) -> bool:
        """Whether the copy has what is there."""
        return name in here and name in self.seen and self.seen[name].mark == mark

    def _unchanged(self, name: str, here: Mapping[str, tuple[int, int]]) -> bool:
        """Whether a file of the copy is what it was when both ends were equal."""
        return name in self.seen and (self.seen[name].size, self.seen[name].time) == here[name]

    def _at(self, name: str) -> str:
        return f"{self.above}/{name}"

    def _read_record(self) -> dict[str, Seen]:
        if not self.record.is_file():
            return {}
        try:
            row = json.loads(self.record.read_text(encoding="utf-8"))
            return {name: Seen(*values) for name, values in row["files"].items()}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.record}, which says what {self.address} held, is damaged; move it and {self.folder} away, and what "
                "is there is fetched again"
            ) from None

    def _write_record(self) -> None:
        files = {name: [one.mark, one.size, one.time] for name, one in sorted(self.seen.items())}
        write_text(self.record, json.dumps({"address": self.address, "files": files}) + "\n")


@contextlib.contextmanager
def _megabytes(label: str, size: int) -> Iterator[Any]:
    """A callback of fsspec whose bytes are shown as progress; nothing is shown of less than a megabyte."""
    from fsspec.callbacks import Callback

    counting = Callback()
    if size < MEGABYTE:
        yield counting
        return
    with Progress(label, size // MEGABYTE, "MB") as progress:
        done = 0

        def add(count: int = 1) -> None:
            nonlocal done
            done += count
            progress.advance(done // MEGABYTE - progress.done)

        counting.relative_update = add
        yield counting


@contextlib.contextmanager
def kept_up(mirrors: list[Mirror]) -> Iterator[None]:
    """Send the changes of the copies every PUSH_SECONDS while the block runs, and at its end, however it ends.

    Raises UserError where that fails at the end; the copies are kept.
    """
    ended = threading.Event()

    def now_and_then() -> None:
        while not ended.wait(PUSH_SECONDS):
            for mirror in mirrors:
                try:
                    mirror.push()
                except UserError as problem:
                    say(f"{problem}; going on here")

    def send() -> None:
        ended.set()
        sender.join()
        for mirror in mirrors:
            if count := mirror.push(shown=True):
                say(f"{count} files sent to {mirror.address}")

    sender = threading.Thread(target=now_and_then, name="redraft-push", daemon=True)
    sender.start()
    try:
        yield
    except BaseException:
        try:
            send()
        except UserError as problem:  # the first error is the one to tell
            say(str(problem))
        raise
    send()


def _size_and_time(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _mark(info: Mapping[str, Any]) -> str:
    """What changes with a file at a store: its tag, or its time, and its size."""
    tag = next((info[key] for key in TAGS if info.get(key)), None)
    return f"{tag or _time(info)} {info.get('size')}"


def _time(info: Mapping[str, Any]) -> float | None:
    """When a file at a store was written, in seconds; None where it does not say."""
    found = next((info[key] for key in TIMES if info.get(key)), None)
    if isinstance(found, datetime):
        return found.timestamp()
    if isinstance(found, str):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(found).timestamp()
    return float(found) if isinstance(found, int | float) else None
