"""The run folder: which stages are done, by the hash of their inputs.

    run.json     resolved configuration with the origin of each value, versions
    state.json   stage -> {inputs: hash, done, seconds}

A stage whose inputs have not changed and whose outputs are there is skipped, and says so; one
whose inputs changed starts afresh; one that was interrupted continues what it left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .console import say
from .errors import UserError
from .formats.folders import read_json, write_text


class RunFolder:
    """A folder that one adaptation lives in."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; name a folder for the run")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"--out {self.path} cannot be created: {problem.strerror}") from None
        others = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        if others and not (self.path / "state.json").is_file():
            raise UserError(
                f"--out {self.path} holds other files ({', '.join(sorted(others)[:3])}) and no run; "
                "name an empty folder"
            )
        has_state = (self.path / "state.json").is_file()
        self.state: dict[str, Any] = read_json(self.path / "state.json") if has_state else {}

    def stage(
        self, name: str, inputs: Mapping[str, Any], outputs: list[str], work: Callable[[], None]
    ) -> str:
        """Run `work` unless its outputs are there for these inputs; returns the inputs' hash.

        Later stages name that hash among their own inputs, so a change travels down the run.
        """
        text = json.dumps(inputs, sort_keys=True, default=str)
        key = hashlib.sha256(f"{name} {text}".encode()).hexdigest()[:16]
        known = self.state.get(name, {})
        paths = [self.path / output for output in outputs]
        if known.get("inputs") == key and known.get("done") and all(p.exists() for p in paths):
            say(f"{name}: nothing to do, already done in {known['seconds']:.0f} s")
            return key
        if known.get("inputs") != key:
            for path in paths:
                _remove(path)
                _remove(path.with_suffix(".about.json"))
        spent = known.get("seconds", 0.0) if known.get("inputs") == key else 0.0
        self._mark(name, {"inputs": key, "done": False, "seconds": spent})
        started = time.monotonic()
        try:
            work()
        except BaseException:
            spent += time.monotonic() - started
            self._mark(name, {"inputs": key, "done": False, "seconds": spent})
            raise
        spent += time.monotonic() - started
        self._mark(name, {"inputs": key, "done": True, "seconds": spent})
        return key

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage."""
        return {name: entry["seconds"] for name, entry in self.state.items() if entry["done"]}

    def write_json(self, name: str, content: Any) -> None:
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def _mark(self, name: str, entry: dict[str, Any]) -> None:
        self.state[name] = entry
        self.write_json("state.json", self.state)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
