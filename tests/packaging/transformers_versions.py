"""Chosen tests under each version of Transformers that redraft claims to work with; `make test-transformers` runs it.

A version is put before this environment's packages, with those of its requirements that are too new here, so that
PyTorch is not installed again. What is found is written to docs/results/transformers.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from redraft.models.versions import READS_ON

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "transformers"
RECORD = ROOT / "docs" / "results" / "transformers.json"
VERSIONS = ("5.2.0", "5.10.4", "5.16.0", "5.19.0", "5.20.2", "5.23.0")
"""The oldest that pyproject.toml allows, one between, the first of READS_ON, vLLM's, and those of constraints.txt."""
TESTS = (
    "tests/decoding/test_transformers_generate.py",
    "tests/models/test_loading.py",
    "tests/models/test_target.py",
    "tests/drafts/test_mtp.py",
    "tests/certify/test_holds.py",
)
RECURRENT = (
    "recurrent_state or (taken_back and not llama) or hybrid_family or does_not_read_on_is_refused "
    "or (test_mtp and qwen3_5)"
)
"""Tests of targets with a recurrent state, which are refused before READS_ON."""


def folder_of(version: str) -> Path:
    """A folder with this version and what else of its requirements is not met here; kept."""
    folder = BUILD / version
    if not (folder / ".installed").is_file():
        install(folder, f"transformers=={version}")
        (found,) = metadata.distributions(name="transformers", path=[str(folder)])
        needed = [Requirement(text) for text in found.requires or ()]
        needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
        install(folder, *(f"{one.name}{one.specifier}" for one in needed if not met(one)))
        (folder / ".installed").touch()
    return folder


def met(needed: Requirement) -> bool:
    try:
        return needed.specifier.contains(metadata.version(needed.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def install(folder: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    if what:
        subprocess.run([*command, "--upgrade", "--target", str(folder), *what], check=True)


def run(version: str) -> dict[str, Any]:
    """What the tests find, as a row of the record."""
    chosen = tuple(map(int, version.split(".")[:2])) < READS_ON
    search = (folder_of(version), ROOT / "src", ROOT / "experiments", ROOT)
    variables = {"PYTHONPATH": os.pathsep.join(map(str, search)), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **variables}
    asked = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    seen = subprocess.run(asked, env=environment, check=True, capture_output=True, text=True)
    assert seen.stdout.strip() == version
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        [*command, *(("-k", f"not ({RECURRENT})") if chosen else ())],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last_line(done))}
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return {
        "version": version,
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0),
        "left_out": counts.get("deselected", 0),
        "date": time.strftime("%Y-%m-%d"),
        "python": "{}.{}".format(*sys.version_info),
        "torch": metadata.version("torch"),
    }


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """pytest's sum. Ends the program where there is none, as after an error while tests are collected."""
    if done.returncode not in (0, 1):
        sys.exit(done.stdout)
    return done.stdout.strip().splitlines()[-1]


def main() -> int:
    rows = []
    for version in sys.argv[1:] or VERSIONS:
        rows.append(run(version))
        print(json.dumps(rows[-1]), flush=True)
    kept = json.loads(RECORD.read_text())["rows"] if RECORD.is_file() else []
    by_version = {row["version"]: row for row in [*kept, *rows]}
    order = sorted(by_version, key=lambda version: tuple(map(int, version.split("."))))
    text = json.dumps({"rows": [by_version[version] for version in order]}, indent=2)
    RECORD.write_text(text + "\n", encoding="utf-8")
    return int(any(row["failed"] or not row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
