"""Every trap between the engines has a crafted folder and a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from redraft.formats.inspection import Inspection, engines, inspect_draft
from redraft.formats.load import stored
from redraft.records import to_json
from redraft.report.terminal import print_inspection
from redraft.target import Target
from tests.conftest import fresh_draft
from tests.formats.crafted import LAYOUTS, edit, retensor


@dataclass
class Trap:
    """A folder with one mistake, and what is said of it: engine -> level and words."""

    layout: str
    expected: dict[str, tuple[str, str]]
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Callable[[Any], torch.Tensor | None]] = field(default_factory=dict)


BIAS: dict[str, Any] = {"fc__bias": lambda d: torch.ones(32)}
TRAPS = {
    "fc.bias dropped": Trap(
        "safeai_eagle",
        {"vllm": ("wrong", "fc.bias is dropped without a word")},
        {"kind": "eagle", "fc_bias": True},
    ),
    "fc.bias missing": Trap(
        "safeai_eagle",
        {"sglang": ("wrong", "no fc.bias: fc has one all the same, at random values")},
        {"kind": "eagle"},
        {"architectures": ["LlamaForCausalLMEagle"], "bias": False},
    ),
    "fc.bias in EAGLE-3": Trap(
        "safeai_eagle3", {"vllm": ("wrong", "fc.bias is dropped")}, tensors=BIAS
    ),
    "bias: true": Trap(
        "specforge",
        {"vllm": ("wrong", "bias: true is read as attention biases")},
        config={"bias": True},
    ),
    "bias: true, EAGLE-1": Trap(
        "safeai_eagle",
        {
            "vllm": ("wrong", "bias: true is read as attention biases"),
            "sglang": ("wrong", "bias: true is read as attention biases"),
        },
        {"kind": "eagle", "fc_bias": True},
    ),
    "a tensor missing": Trap(
        "specforge",
        {
            "vllm": ("wrong", "loads without midlayer.mlp.down_proj.weight"),
            "sglang": ("wrong", "loads without midlayer.mlp.down_proj.weight"),
        },
        tensors={"midlayer__mlp__down_proj__weight": lambda d: None},
    ),
    "a tensor missing, EAGLE-1": Trap(
        "safeai_eagle",
        {"vllm": ("wrong", "loads without layers.0.self_attn.o_proj.weight")},
        {"kind": "eagle"},
        tensors={"layers__0__self_attn__o_proj__weight": lambda d: None},
    ),
    "tap ids for SGLang only": Trap(
        "specforge", {"vllm": ("wrong", "tap ids only in eagle_config")}
    ),
    "tap ids for vLLM only": Trap(
        "specforge",
        {"sglang": ("wrong", "tap ids only at the top level")},
        config={"eagle_aux_hidden_state_layer_ids": [2, 4, 5], "eagle_config": ...},
    ),
    "tap ids off by one": Trap(
        "specforge",
        {
            "vllm": (
                "wrong",
                r"eagle_config says [1, 3, 4], which in its own numbering is [2, 4, 5]",
            )
        },
        config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
    ),
    "tap ids out of order": Trap(
        "specforge",
        {"vllm": ("wrong", "[5, 4, 2] are sorted and deduplicated")},
        config={"eagle_aux_hidden_state_layer_ids": [5, 4, 2], "eagle_config": ...},
    ),
    "two taps": Trap(
        "specforge",
        {"vllm": ("refused", "2 taps need num_aux_hidden_states")},
        config={"eagle_aux_hidden_state_layer_ids": [2, 4], "eagle_config": ...},
    ),
    "norm before residual": Trap(
        "specforge",
        {"sglang": ("wrong", "norm_before_residual is not implemented")},
        {"norm_before_residual": True},
        {"norm_before_residual": True},
    ),
    "norm before residual left out": Trap(
        "speculators",
        {
            "vllm": ("note", "norm_before_residual is absent and counts as true"),
            "sglang": ("refused", "the speculators layout"),
        },
        config={"norm_before_residual": ...},
    ),
    "norm_output of two meanings": Trap(
        "specforge",
        {"vllm": ("note", "SpecForge writes the same key")},
        config={"norm_output": True},
    ),
    "an EAGLE-1 architecture for vLLM": Trap(
        "safeai_eagle",
        {"sglang": ("refused", "architectures ['LlamaForCausalLM']")},
        {"kind": "eagle"},
    ),
    "an EAGLE-1 architecture for SGLang": Trap(
        "safeai_eagle",
        {"vllm": ("refused", "architectures ['LlamaForCausalLMEagle']")},
        {"kind": "eagle"},
        {"architectures": ["LlamaForCausalLMEagle"]},
    ),
    "an EAGLE-1 head for Qwen": Trap(
        "safeai_eagle",
        {"vllm": ("refused", "architectures ['Qwen2ForCausalLM']")},
        {"kind": "eagle"},
        {"architectures": ["Qwen2ForCausalLM"]},
    ),
    "a final norm in EAGLE-1": Trap(
        "safeai_eagle",
        {"vllm": ("refused", "norm.weight in the file")},
        {"kind": "eagle"},
        tensors={"norm__weight": lambda d: torch.ones(32)},
    ),
    "absolute ids": Trap(
        "specforge",
        {"vllm": ("wrong", "absolute ids?"), "sglang": ("wrong", "absolute ids?")},
        {"vocab": 40},
        tensors={"d2t": lambda d: d.draft_vocab.clone()},
    ),
    "a map without a size": Trap(
        "safeai_eagle3",
        {"vllm": ("refused", "d2t with a draft_vocab_size that is missing")},
        {"vocab": 40},
        {"draft_vocab_size": ...},
    ),
    "no model_type": Trap(
        "specforge", {"vllm": ("refused", "no model_type")}, config={"model_type": ...}
    ),
    "another activation": Trap(
        "specforge", {"vllm": ("refused", "hidden_act 'gelu'")}, config={"hidden_act": "gelu"}
    ),
    "attention biases unfilled": Trap(
        "specforge",
        {"vllm": ("wrong", "attention_bias without midlayer.self_attn.q_proj.bias")},
        config={"attention_bias": True},
    ),
    "own taps in llama.cpp": Trap(
        "specforge", {"llama.cpp": ("wrong", "taps the default layers whatever")}
    ),
    "EAGLE-1 in llama.cpp": Trap(
        "safeai_eagle", {"llama.cpp": ("refused", "not supported")}, {"kind": "eagle"}
    ),
}


def set_trap(trap: Trap, target: Target, folder: Path) -> Inspection:
    draft = fresh_draft(target, **trap.options)
    LAYOUTS[trap.layout](folder, draft)
    edit(folder, **trap.config)
    if trap.tensors:
        retensor(folder, **{name: make(draft) for name, make in trap.tensors.items()})
    return inspect_draft(str(folder))


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_named(target: Target, tmp_path: Path, name: str) -> None:
    trap = TRAPS[name]
    found = set_trap(trap, target, tmp_path / "d")
    for engine, (level, words) in trap.expected.items():
        said = [(f.level, f.says) for f in found.engines if f.engine == engine]
        assert any(have == level and words in says for have, says in said), said
        verdict = {"refused": "does not load it", "wrong": "serves another function"}
        if level in verdict:
            assert found.serves(engine) in verdict.values()


@pytest.mark.parametrize(("taps", "harmless"), [((2, 4, 5), True), ((1, 3, 6), False)])
def test_tap_ids_that_name_the_default_layers_are_harmless_for_a_known_target(
    target: Target, tmp_path: Path, taps: tuple[int, ...], harmless: bool
) -> None:
    LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target, taps=taps))
    assert inspect_draft(str(tmp_path / "d")).serves("vllm") == "serves another function"
    known = inspect_draft(str(tmp_path / "d"), target)
    assert (known.serves("vllm") == "serves it as it is") == harmless
    edit(tmp_path / "d", eagle_aux_hidden_state_layer_ids=[1, 3, 4])
    assert inspect_draft(str(tmp_path / "d"), target).serves("vllm") == "serves another function"


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "token_lm"])
def test_a_good_export_has_no_finding_for_its_engine(
    target: Target, tmp_path: Path, kind: str
) -> None:
    stored(fresh_draft(target, kind=kind), target).save(tmp_path / "d")
    found = inspect_draft(str(tmp_path / "d"), target)
    assert found.unreadable is None
    assert found.serves("vllm") == "serves it as it is"
    assert json.loads(json.dumps(to_json(found)))["kind"] == kind


def test_a_folder_redraft_refuses_is_inspected_all_the_same(target: Target, tmp_path: Path) -> None:
    found = set_trap(TRAPS["a tensor missing"], target, tmp_path / "d")
    assert found.unreadable is not None
    assert "missing midlayer.mlp.down_proj.weight" in found.unreadable
    console = Console(record=True, width=200)
    print_inspection(found, console)
    text = console.export_text()
    assert "refuses it" in text
    for engine in engines("eagle3"):
        assert engine in text


def test_a_draft_for_another_target_is_told_apart(target: Target, tmp_path: Path) -> None:
    LAYOUTS["safeai_eagle"](tmp_path / "d", fresh_draft(target, kind="eagle"))
    edit(tmp_path / "d", vocab_size=300)
    retensor(tmp_path / "d", embed_tokens__weight=torch.zeros(300, 32))
    assert inspect_draft(str(tmp_path / "d")).unreadable is None
    found = inspect_draft(str(tmp_path / "d"), target)
    assert found.unreadable is not None
    assert "vocabularies differ" in found.unreadable
