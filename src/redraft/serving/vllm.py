"""vLLM's OpenAI server as a child process: its command line, and what it needs around it.

Some of its defaults would make two runs of it incomparable, or take it online, so they are set:
prefix caching off (a repeated prompt must cost the same again), the model's own sampling defaults
off (they may hold a repetition penalty), an explicit dtype (its `auto` turns fp32 into half
precision), usage statistics off, and no Hub access where every model is a local folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from ..core.folders import find_folder, read_json
from .engine_client import Client
from .environment import Environment, clean_environment
from .server import HOST, free_port, serving

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM takes for --max-lora-rank."""
SERVED, ADAPTED = "target", "adapted"
"""Names under which requests ask for the target, and for the target with its adapter."""


@dataclass(frozen=True)
class Speculation:
    """A draft for the engine: vLLM's name of the method, the draft's folder, K tokens a step."""

    method: str
    draft: str
    k: int


@dataclass(frozen=True)
class Serving:
    """What to serve and how.

    `dtype` is a torch dtype name. `eager` None means: on a CPU build. `port` None picks a free one.
    `patience` is the longest start, in seconds.
    """

    target: str
    dtype: str
    max_model_len: int
    adapter: str | None = None
    speculation: Speculation | None = None
    eager: bool | None = None
    port: int | None = None
    patience: float = 900.0


@contextlib.contextmanager
def serve(environment: Environment, what: Serving, log: Path) -> Iterator[Client]:
    """A running vLLM server and the client that asks it; stopped when the block ends.

    Raises UserError when it cannot be started (see `server.serving`).
    """
    port = what.port or free_port()
    name = f"vLLM {environment.version}"
    command = command_line(environment, what, port)
    variables = variables_for(environment, what)
    patience = what.patience
    with serving(name, command, variables, port=port, log=log, patience=patience) as server:
        yield Client(server, ADAPTED if what.adapter else SERVED)


def command_line(environment: Environment, what: Serving, port: int) -> list[str]:
    """The server's command line."""
    command = [environment.python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", what.target, "--served-model-name", SERVED, "--dtype", what.dtype]
    command += ["--max-model-len", str(what.max_model_len), "--host", HOST, "--port", str(port)]
    command += ["--generation-config", "vllm", "--no-enable-prefix-caching"]
    if what.eager if what.eager is not None else environment.cpu:
        command.append("--enforce-eager")
    if what.adapter is not None:
        rank = _lora_rank(what.adapter)
        command += ["--enable-lora", "--lora-modules", f"{ADAPTED}={what.adapter}"]
        command += ["--max-lora-rank", str(rank)]
    if what.speculation is not None:
        config = {
            "method": what.speculation.method,
            "model": what.speculation.draft,
            "num_speculative_tokens": what.speculation.k,
        }
        command += ["--speculative-config", json.dumps(config)]
    return command


def variables_for(environment: Environment, what: Serving) -> dict[str, str]:
    """The server's environment variables; what the user has set stays."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1"}
    if environment.cpu:
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
    draft = what.speculation.draft if what.speculation else None
    models = [what.target, *(m for m in (what.adapter, draft) if m is not None)]
    if all(Path(model).exists() for model in models):
        variables["HF_HUB_OFFLINE"] = "1"
    return {**variables, **clean_environment()}


def _lora_rank(adapter: str) -> int:
    """The least --max-lora-rank that holds a PEFT adapter."""
    config = read_json(find_folder(adapter) / "adapter_config.json")
    needed = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    for rank in LORA_RANKS:
        if needed <= rank:
            return rank
    raise UserError(
        f"--target-adapter {adapter} has rank {needed}; vLLM serves adapters up to rank "
        f"{LORA_RANKS[-1]}"
    )
