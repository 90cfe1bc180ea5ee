"""SGLang as a server on a CPU, with the functions that its wheel lacks there (`sglang_cpu/`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from redraft.serving.environment import clean_environment
from redraft.serving.server import HOST, Server, free_port, serving

HERE = Path(__file__).parent / "sglang_cpu"
PYTHON = os.environ.get("REDRAFT_SGLANG_PYTHON", "")
"""The Python of an environment that `make test-sglang` makes."""


@contextlib.contextmanager
def served(target: Path, draft: Path, k: int, log: Path) -> Iterator[Server]:
    """A server of the target with its EAGLE-3 draft, a chain of K, in float32."""
    port = free_port()
    flags = {
        "model-path": target,
        "host": HOST,
        "port": port,
        "device": "cpu",
        "dtype": "float32",
        "max-total-tokens": 4096,
        "max-running-requests": 4,
        # `intel_amx` by these names alone: without AMX --attention-backend falls back to a backend without drafts.
        "attention-backend": "torch_native",
        "prefill-attention-backend": "intel_amx",
        "decode-attention-backend": "intel_amx",
        "speculative-algorithm": "EAGLE3",
        "speculative-draft-model-path": draft,
        "speculative-num-steps": k,
        "speculative-eagle-topk": 1,
        "speculative-num-draft-tokens": k + 1,
    }
    command = [PYTHON, "-m", "sglang.launch_server", "--disable-radix-cache"]
    command += ["--disable-cuda-graph", "--skip-server-warmup"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    environment = {
        **clean_environment(),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
    }
    with serving(
        "SGLang", command, environment, port=port, log=log, patience=600, health="/v1/models"
    ) as server:
        yield server
