"""What a bug report needs to know of this machine: versions, devices, engines. No model is loaded."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import UserError, as_sentence
from ..core.visible import visible
from ..serving.engines import ENGINES, NOT_RUN
from ..serving.environment import installed, interpreters
from .bundles import OutputFlags
from .extensions import GROUP

PACKAGES = ("torch", "transformers", "safetensors", "peft", "accelerate", "numpy")
VARIABLES = (
    "REDRAFT_API_KEY",
    "REDRAFT_CACHE",
    "REDRAFT_DATA",
    "REDRAFT_LLAMACPP_PYTHON",
    "REDRAFT_RANK_TIMEOUT",
    "REDRAFT_SPECULATORS_PYTHON",
    "REDRAFT_TRACEBACK",
    "REDRAFT_VLLM_PYTHON",
    "OPENAI_API_KEY",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
)
"""Environment variables that redraft and its libraries read. Their values are not printed."""
LLAMA_CPP = ("llama-server", "llama-cli")


def env(output: OutputFlags) -> None:
    """Print versions, devices and engines, to be pasted into a bug report.

    Example: redraft env
    """
    found = {
        "redraft": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commands": [
            f"{point.name} of {point.dist.name} {point.dist.version}"
            for point in metadata.entry_points(group=GROUP)
            if point.dist
        ],
        "devices": [_cpu(), *_accelerators()],
        "engines": _engines(),
        "variables": {name: bool(os.environ.get(name)) for name in VARIABLES},
    }
    output.finish(_as_text(found), found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.is_file() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": "cpu",
        "name": f"{named[1] if named else platform.processor() or platform.machine()}, {usable} cores",
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _accelerators() -> list[dict[str, Any]]:
    """What PyTorch computes on besides the CPU; one entry with the reason where it cannot be asked."""
    try:
        with as_sentence("PyTorch cannot list its devices"):
            import torch

            runtime = (
                f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
            )
            properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
            found: list[dict[str, Any]] = [
                {"device": f"cuda:{i}", "name": f"{p.name}, {runtime}", "memory": p.total_memory}
                for i, p in enumerate(properties)
            ]
            if torch.backends.mps.is_available():
                memory = torch.mps.recommended_max_memory()
                found.append({"device": "mps", "name": "Apple GPU", "memory": memory})
            return found
    except UserError as problem:
        return [{"device": "unknown", "name": str(problem), "memory": None}]


def _engines() -> list[dict[str, str]]:
    """Engines in this environment, in the Pythons that `redraft verify` would find, and on the PATH."""
    found = []
    packages_of = [row.package for row in ENGINES]
    names = [*(name for package in packages_of for name in package.names), *NOT_RUN]
    variables = {p.variable: os.environ.get(p.variable) for p in packages_of}
    for where, python in {**interpreters(), **variables}.items():
        try:
            packages = installed(names, python) if python else {}
        except UserError as problem:
            packages = {"unknown": str(problem)}
        found += [{"engine": e, "version": v, "where": where} for e, v in packages.items()]
    found += [
        {"engine": name, "version": _program_version(name), "where": "PATH"}
        for name in LLAMA_CPP
        if shutil.which(name)
    ]
    return found


def _program_version(name: str) -> str:
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as problem:
        return f"--version failed: {problem}"
    printed = re.search(r"version: (.+)", done.stdout + done.stderr)
    return printed[1] if printed else f"--version printed no version (exit code {done.returncode})"


def _as_text(found: dict[str, Any]) -> str:
    def memory(device: dict[str, Any]) -> str:
        return f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""

    rows = [(name, found[name]) for name in ("redraft", "python", "platform")]
    rows += [(name, version or "not installed") for name, version in found["packages"].items()]
    rows += [(d["device"], d["name"] + memory(d)) for d in found["devices"]]
    rows += [(e["engine"], f"{e['version']} in {e['where']}") for e in found["engines"]]
    rows += [] if found["engines"] else [("engines", "none found")]
    rows += [("command", command) for command in found["commands"]]
    rows += [(name, "set") for name, is_set in found["variables"].items() if is_set]
    return visible("\n".join(f"{name:20} {value}" for name, value in rows))
