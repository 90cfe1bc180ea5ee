"""What training did, step by step: always a file of JSON lines, and the trackers that a user names.

    log.jsonl   {"step", "loss", "lr", "tokens_per_second", "seconds", "memory_mb"} after a step
                {"step", "heldout_tau"} after an evaluation

A resumed run goes on after the step that its checkpoint holds. Of adapters that train together the first is tracked.
Trackers are those of accelerate; they keep to this machine unless their own environment variables say otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import ranks
from ..core.errors import UserError, as_sentence
from ..core.files import append_lines, write_text

FILE = "log.jsonl"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""The packages of which a tracker needs one, where that is not the one of its name."""
OFFLINE = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": ""}
"""Environment variables that are set unless they are there; an empty one becomes a file next to the log."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        packages = PACKAGES.get(name, (name,))
        if not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(
                f"--track {name} needs the package {packages[-1]}: pip install {packages[-1]}"
            )


class TrainingLog:
    """The log of one run in `folder` (none: nothing is kept), continued after `step` (-1: from the beginning)."""

    def __init__(
        self, folder: Path | None, step: int, trackers: tuple[str, ...], about: Mapping[str, Any]
    ):
        self._path = folder / FILE if folder else None
        self._rows: list[dict[str, Any]] = []
        self._accelerator: Any = None
        if self._path and ranks.is_first():
            write_text(self._path, "".join(f"{json.dumps(row)}\n" for row in self._kept(step)))
        if trackers and folder and ranks.is_first():
            self._start(trackers, folder, about)

    def note(self, step: int, row: Mapping[str, Any]) -> None:
        """A row of figures after a step; on the disk with the next `flush`."""
        if self._path is None or not ranks.is_first():
            return
        self._rows.append({"step": step, **row})
        if self._accelerator is not None:
            self._accelerator.log(dict(row), step=step)

    def flush(self) -> None:
        if self._path is not None and self._rows:
            append_lines(self._path, [json.dumps(row) for row in self._rows])
            self._rows = []

    def finish(self, costs: Mapping[str, Any]) -> None:
        """The last row, of what all of it cost."""
        self.flush()
        if self._accelerator is not None:
            self._accelerator.log(dict(costs))
            self._accelerator.end_training()

    def _kept(self, step: int) -> list[dict[str, Any]]:
        """The rows so far of a run that goes on after a step."""
        if self._path is None or step < 0 or not self._path.is_file():
            return []
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was cut off
            if row.get("step", step + 1) <= step:
                kept.append(row)
        return kept

    def _start(self, trackers: tuple[str, ...], folder: Path, about: Mapping[str, Any]) -> None:
        from accelerate import Accelerator

        for name, value in OFFLINE.items():
            os.environ.setdefault(name, value or f"sqlite:///{folder.resolve()}/mlflow.db")
        with as_sentence(f"--track {', '.join(trackers)}"):
            self._accelerator = Accelerator(log_with=list(trackers), project_dir=folder)
            self._accelerator.init_trackers("redraft", config=dict(about))
