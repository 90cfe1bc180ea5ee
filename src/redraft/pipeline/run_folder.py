"""The run folder: which stages are done, by the hash of their inputs and of what they wrote.

    run.json     resolved configuration with the origin of each value
    state.json   stage -> {inputs: hash, of: {input: hash}, versions, done, seconds, outputs: {file: hash}}
    .lock        held by the process that works here

A stage whose inputs have not changed and whose outputs are as it left them is skipped, which is reported;
one whose inputs changed starts again; one that was interrupted continues what it left; one whose
outputs were changed or damaged afterwards is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core import ranks
from ..core.console import say
from ..core.errors import UserError
from ..core.failpoints import point
from ..core.files import remove, set_aside, write_text
from ..core.folders import read_json
from ..core.lock import held
from ..core.records import versions

STATE = "state.json"
FIELDS = {"inputs", "done", "seconds", "outputs"}


class RunFolder:
    """The folder of one job. `worked` is True once a stage had work to do."""

    def __init__(self, path: Path):
        self.path = path
        self.worked = False
        self.state = self._read_state()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | Path) -> Iterator[RunFolder]:
        """The run folder `path`, made if need be, for this process alone until the block ends.

        Raises UserError for a file, a folder of other files, and a folder that is in use.
        """
        folder = Path(path)
        ranks.check_same("this job", {"versions": versions()})
        _make(folder)
        with held(folder):
            run = cls(folder)
            ranks.wait()
            if not all(ranks.everyone((folder / STATE).is_file())):
                raise UserError(
                    f"--out {folder} is not the same folder for all processes of this job; put it on a disk that all of "
                    "them see"
                )
            yield run

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        work: Callable[[], None],
        continues: Sequence[str] = (),
        keeps: Sequence[str] = (),
    ) -> str:
        """Run `work` unless its `outputs` (files or folders) are there for these inputs.

        `continues` are paths that the work takes up again and that name their own inputs, so they
        outlive a lost state.json. `keeps` are outputs that cost too much to remove: the work itself sees
        to them when inputs change, and damaged ones are set aside. Returns a hash of inputs and outputs:
        later stages name it among their inputs, so a change travels down the run.
        """
        text = json.dumps(inputs, sort_keys=True, default=str)
        key = _short(f"{name} {text}".encode())
        ranks.check_same(f"stage '{name}'", _each(inputs))
        known = self.state.get(name)
        same = known is not None and known["inputs"] == key
        if known and same and known["done"]:
            hashes = known["outputs"]
            changed = ranks.first(lambda: [each for each in outputs if self._changed(each, hashes)])
            if not changed:
                say(f"{name}: nothing to do, already done in {known['seconds']:.0f} s")
                return self._version(name)
            say(f"{name}: {', '.join(changed)} is not as this stage left it; doing it again")
            self._set_aside([output for output in changed if output in keeps])
            self._remove([output for output in changed if output not in keeps])
        elif not same:
            if known:
                say(f"{name}: {_what_changed(known, inputs)} changed; doing it again")
            self._remove([o for o in outputs if o not in keeps and (known or o not in continues)])
            self._remove(continues if known else ())
        entry = {
            "inputs": key,
            "done": False,
            "seconds": known["seconds"] if known and same else 0.0,
            "outputs": {},
            "of": _each(inputs),
            "versions": versions(),
        }
        self._work(name, entry, work, outputs)
        return self._version(name)

    def versions(self) -> dict[str, str]:
        """The versions that did the stages, where one differs with each that took part ("1.0, 1.1")."""
        found: dict[str, list[str]] = {}
        for entry in self.state.values():
            for name, version in entry.get("versions", {}).items():
                seen = found.setdefault(name, [])
                seen += [version] if version not in seen else []
        return {name: ", ".join(seen) for name, seen in found.items()}

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage."""
        return {name: entry["seconds"] for name, entry in self.state.items() if entry["done"]}

    def write_json(self, name: str, content: Any) -> None:
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def _work(
        self,
        name: str,
        entry: dict[str, Any],
        work: Callable[[], None],
        outputs: Sequence[str],
    ) -> None:
        """Do a stage's work and record its outputs in `entry`; seconds of earlier tries are added."""
        self.worked = True
        spent = entry["seconds"]
        self._mark(name, entry)
        started = time.monotonic()
        try:
            point("stage: before work")
            ranks.wait()
            work()
            ranks.wait()
        except BaseException:
            entry["seconds"] = spent + time.monotonic() - started
            with contextlib.suppress(UserError):  # a disk that is full is told by the first error
                self._mark(name, entry)
            raise
        point("stage: worked")
        entry["seconds"] = spent + time.monotonic() - started
        found = ranks.first(lambda: self._hashes(outputs))
        self._mark(name, {**entry, "done": True, "outputs": found})
        point("stage: marked done")

    def _mark(self, name: str, entry: dict[str, Any]) -> None:
        self.state[name] = entry
        self.write_json(STATE, self.state)

    def _version(self, name: str) -> str:
        entry = self.state[name]
        return _short(json.dumps([entry["inputs"], entry["outputs"]], sort_keys=True).encode())

    def _hashes(self, outputs: Sequence[str]) -> dict[str, str]:
        """Hash of each output file, by its path in the folder; hidden files are nobody's."""
        files = [
            file
            for path in (self.path / output for output in outputs)
            for file in ([path] if path.is_file() else sorted(path.rglob("*")))
            if file.is_file() and not file.name.startswith(".")
        ]
        return {file.relative_to(self.path).as_posix(): _hash_file(file) for file in files}

    def _changed(self, output: str, known: Mapping[str, str]) -> bool:
        """Whether a recorded file of an output is missing or another; new files do not matter."""
        own = {f: h for f, h in known.items() if f == output or f.startswith(f"{output}/")}
        return not own or not own.items() <= self._hashes([output]).items()

    def _set_aside(self, names: Sequence[str]) -> None:
        for name in names:
            if (self.path / name).exists():
                say(f"{name}: kept as {set_aside(self.path / name).name}")

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            remove(self.path / name)

    def _read_state(self) -> dict[str, dict[str, Any]]:
        """The stages so far; of a damaged file nothing, so that every stage is looked at again."""
        path = self.path / STATE
        if path.exists():
            try:
                state = read_json(path)
                if all(set(entry) >= FIELDS for entry in state.values()):
                    return state
                problem = "not a record of stages"
            except (UserError, AttributeError, TypeError) as found:
                problem = str(found)
            aside = set_aside(path)
            say(f"{path} is damaged ({problem}); set aside as {aside.name}, every stage is redone")
        write_text(path, "{}\n")  # from now on this is a run folder
        return {}


def _make(folder: Path) -> None:
    """Make the folder; refuse a file, and a folder that holds other things than a run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder for the run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as problem:
        raise UserError(f"--out {folder} cannot be created: {problem.strerror}") from None
    if others and not any(name.startswith(STATE) for name in others):
        raise UserError(
            f"--out {folder} holds other files ({', '.join(sorted(others)[:3])}) and no run; "
            "name an empty folder"
        )


def _each(inputs: Mapping[str, Any]) -> dict[str, str]:
    """A hash of every input by itself, so that what changed can be named."""
    return {
        key: _short(json.dumps(value, sort_keys=True, default=str).encode())
        for key, value in inputs.items()
    }


def _what_changed(known: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    before, now = known.get("of", {}), _each(inputs)
    changed = sorted(key for key in now.keys() | before.keys() if before.get(key) != now.get(key))
    return ", ".join(changed) if before else "its inputs"


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
