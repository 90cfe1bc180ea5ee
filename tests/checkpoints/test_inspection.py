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

from redraft.checkpoints.inspect import Inspection, engines, inspect_draft
from redraft.checkpoints.load import stored
from redraft.core.records import to_json
from redraft.models.target import Target
from redraft.report.terminal import print_inspection
from tests.checkpoints.crafted import LAYOUTS, edit, retensor
from tests.conftest import fresh_draft


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
    "aux layer ids for SGLang only": Trap(
        "specforge", {"vllm": ("wrong", "aux layer ids only in eagle_config")}
    ),
    "aux layer ids for vLLM only": Trap(
        "specforge",
        {"sglang": ("wrong", "aux layer ids only at the top level")},
        config={"eagle_aux_hidden_state_layer_ids": [2, 4, 5], "eagle_config": ...},
    ),
    "aux layer ids off by one": Trap(
        "specforge",
        {
            "vllm": (
                "wrong",
                r"eagle_config says [1, 3, 4], which in its own numbering is [2, 4, 5]",
            )
        },
        config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
    ),
    "aux layer ids out of order": Trap(
        "specforge",
        {"vllm": ("wrong", "[5, 4, 2] are sorted and deduplicated")},
        config={"eagle_aux_hidden_state_layer_ids": [5, 4, 2], "eagle_config": ...},
    ),
    "two aux layers": Trap(
        "specforge",
        {"vllm": ("refused", "2 aux layers need num_aux_hidden_states")},
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
    "aux layer ids for SGLang only, in llama.cpp": Trap(
        "specforge",
        {"llama.cpp": ("wrong", "aux layer ids only in eagle_config: the default layers")},
    ),
    "two aux layers in llama.cpp": Trap(
        "specforge",
        {"llama.cpp": ("refused", "2 aux layer ids; it takes exactly three")},
        config={"eagle_aux_hidden_state_layer_ids": [2, 4], "eagle_config": ...},
    ),
    "a norm before fc, nested": Trap(
        "specforge",
        {"llama.cpp": ("refused", "norm_before_fc is read at the top level of config.json only")},
        {"norm_before_fc": True},
        {"eagle_config": {"norm_before_fc": True}},
    ),
    "a norm per aux layer in llama.cpp": Trap(
        "specforge",
        {"llama.cpp": ("refused", "fc_norm: it has no such tensors")},
        {"fc_norm": 3},
        {"fc_norm": True},
    ),
    "norm_output in llama.cpp": Trap(
        "speculators", {"llama.cpp": ("wrong", "norm_output is ignored")}, {"norm_output": True}
    ),
    "norm before residual left out, in llama.cpp": Trap(
        "speculators",
        {"llama.cpp": ("wrong", "counts as false; this layout means true")},
        config={"norm_before_residual": ...},
    ),
    "another activation in llama.cpp": Trap(
        "specforge", {"llama.cpp": ("wrong", "silu is computed")}, config={"hidden_act": "gelu"}
    ),
    "a tensor missing in llama.cpp": Trap(
        "specforge",
        {"llama.cpp": ("refused", "norm.weight missing")},
        tensors={"norm__weight": lambda d: None},
    ),
    "biases in llama.cpp": Trap(
        "safeai_eagle3", {"llama.cpp": ("refused", "fc.bias: it has no such")}, tensors=BIAS
    ),
    "a reduced head without a map": Trap(
        "specforge",
        {
            "vllm": ("wrong", "the first 40 of 261 tokens are proposed"),
            "sglang": ("wrong", "the first 40 of 261 tokens are proposed"),
            "llama.cpp": ("refused", "no d2t for a head of 40 rows"),
        },
        {"vocab": 40},
        tensors={"d2t": lambda d: None},
    ),
    "the target's number of layers": Trap(
        "safeai_eagle3",
        {
            "vllm": ("wrong", "makes 40 layers (num_hidden_layers) of which the file fills one"),
            "llama.cpp": ("refused", "num_hidden_layers 1"),
        },
        config={"num_hidden_layers": 40},
    ),
    "the target's number of layers, EAGLE-1": Trap(
        "safeai_eagle",
        {"vllm": ("wrong", "makes 32 layers (num_hidden_layers) of which the file fills one")},
        {"kind": "eagle"},
        {"num_hidden_layers": ...},
    ),
    "a map that is the identity": Trap(
        "safeai_eagle3",
        {"vllm": ("refused", "d2t with a draft_vocab_size that is missing or equal")},
        tensors={"d2t": lambda d: torch.zeros(261).long(), "t2d": lambda d: torch.ones(261).bool()},
    ),
    "no size, in SGLang": Trap(
        "specforge",
        {"sglang": ("wrong", "draft_vocab_size null: the target's head is used")},
        config={"draft_vocab_size": None, "eagle_config": ...},
    ),
    "fc for another target": Trap(
        "specforge",
        {"vllm": ("refused", "fc.weight reads 96 numbers, config.json says 3 aux layers")},
        config={"target_hidden_size": 64, "eagle_config": ...},
    ),
    "two rows for a token": Trap(
        "specforge",
        {
            "vllm": ("wrong", "leads two rows to the same token"),
            "llama.cpp": ("refused", "leads two rows to the same token"),
        },
        {"vocab": 40},
        tensors={"d2t": lambda d: torch.tensor([1, 0] * 20)},
    ),
    "norms of q and k for a Llama layer": Trap(
        "specforge",
        {"vllm": ("refused", "q_norm and k_norm in the file"), "sglang": ("wrong", "q_norm")},
        {"head_norms": True},
    ),
    "a Qwen3 layer without norms": Trap(
        "safeai_eagle3",
        {"vllm": ("wrong", "the file has no q_norm and k_norm")},
        config={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    ),
    "a tensor of another layout": Trap(
        "specforge",
        {
            "vllm": ("refused", "extra.weight in the file, which it has no place for"),
            "sglang": ("wrong", "extra.weight is skipped"),
        },
        tensors={"extra__weight": lambda d: torch.ones(2)},
    ),
    "a sliding window": Trap(
        "specforge",
        {
            "sglang": ("wrong", "the sliding window is ignored"),
            "vllm": ("wrong", "use_sliding_window without layer_types"),
        },
        config={"sliding_window": 8, "use_sliding_window": True},
    ),
    "a name that nobody knows": Trap(
        "specforge",
        dict.fromkeys(
            ("vllm", "sglang", "llama.cpp"), ("unknown", "is not known to redraft's rules")
        ),
        config={"architectures": ["Eagle3BrandNewForCausalLM"], "eagle_config": ...},
    ),
    "a name that nobody knows, EAGLE-1": Trap(
        "safeai_eagle",
        {"vllm": ("unknown", "architecture BrandNewForCausalLM is not known to redraft's rules")},
        {"kind": "eagle"},
        {"architectures": ["BrandNewForCausalLM"]},
    ),
    "a value that is none": Trap(
        "specforge",
        {"vllm": ("unknown", "draft_vocab_size in config.json is [40], which no rule can judge")},
        config={"draft_vocab_size": [40]},
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
        verdict = {
            "refused": "does not load it",
            "wrong": "serves another function",
            "unknown": "is not known to redraft's rules",
        }
        if level == "unknown":
            assert found.serves(engine) == verdict[level]
        elif level in verdict:
            assert found.serves(engine) in verdict.values()


@pytest.mark.parametrize(("aux_layers", "harmless"), [((2, 4, 5), True), ((1, 3, 6), False)])
def test_tap_ids_that_name_the_default_layers_are_harmless_for_a_known_target(
    target: Target, tmp_path: Path, aux_layers: tuple[int, ...], harmless: bool
) -> None:
    LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target, aux_layers=aux_layers))
    assert inspect_draft(str(tmp_path / "d")).serves("vllm") == "serves another function"
    known = inspect_draft(str(tmp_path / "d"), target)
    assert (known.serves("vllm") == "serves it unchanged") == harmless
    edit(tmp_path / "d", eagle_aux_hidden_state_layer_ids=[1, 3, 4])
    assert inspect_draft(str(tmp_path / "d"), target).serves("vllm") == "serves another function"


@pytest.mark.parametrize(
    ("model_type", "does"),
    [
        ("llama", "serves it unchanged"),
        ("qwen2", "does not load it"),
        ("newest", "is not known to redraft's rules"),
    ],
)
def test_llama_cpp_needs_a_target_whose_states_it_keeps(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, does: str
) -> None:
    LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target))
    monkeypatch.setattr(target.model.config, "model_type", model_type)
    assert inspect_draft(str(tmp_path / "d"), target).serves("llama.cpp") == does


def test_llama_cpp_does_not_keep_the_state_after_the_last_layer(
    target: Target, tmp_path: Path
) -> None:
    LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target))
    edit(tmp_path / "d", eagle_aux_hidden_state_layer_ids=[2, 4, target.num_layers])
    found = inspect_draft(str(tmp_path / "d"), target)
    words = [f.says for f in found.engines if (f.engine, f.level) == ("llama.cpp", "wrong")]
    assert any("aux layer id 8 is the state after the last layer" in says for says in words)


def test_the_loss_with_several_slots_is_noted(target: Target, tmp_path: Path) -> None:
    LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target))
    found = inspect_draft(str(tmp_path / "d"), target)
    assert found.serves("llama.cpp") == "serves it unchanged"
    assert any("--no-spec-draft-backend-sampling" in f.says for f in found.engines)


@pytest.mark.parametrize(
    ("name", "model_type", "norms"),
    [
        ("LlamaForCausalLM", "llama", False),
        ("Eagle3LlamaForCausalLM", "llama", False),
        ("Eagle3Qwen2_5vlForCausalLM", "llama", False),
        ("Eagle3Qwen3vlForCausalLM", "llama", False),
        ("Eagle3MiniMaxM2ForCausalLM", "llama", False),
        ("Qwen3ForCausalLM", "qwen3", True),
        ("Eagle3Qwen3ForCausalLM", "qwen3", True),
    ],
)
def test_architectures_that_vllm_registers(
    target: Target, tmp_path: Path, name: str, model_type: str, norms: bool
) -> None:
    LAYOUTS["safeai_eagle3"](tmp_path / "d", fresh_draft(target, head_norms=norms))
    edit(tmp_path / "d", architectures=[name], model_type=model_type)
    found = inspect_draft(str(tmp_path / "d"))
    assert found.unreadable is None
    assert found.serves("vllm") == "serves it unchanged"
    assert found.serves("sglang") == "does not load it"


@pytest.mark.parametrize("by", ["key", "tensors"])
def test_latent_attention_is_refused_by_name_and_not_judged(
    target: Target, tmp_path: Path, by: str
) -> None:
    LAYOUTS["safeai_eagle3"](tmp_path / "d", fresh_draft(target))
    edit(tmp_path / "d", architectures=["Eagle3DeepseekV2ForCausalLM"], model_type="kimi_k2")
    if by == "key":
        edit(tmp_path / "d", kv_lora_rank=8, q_lora_rank=16)
    else:
        retensor(tmp_path / "d", midlayer__self_attn__kv_a_proj_with_mqa__weight=torch.ones(2, 2))
    found = inspect_draft(str(tmp_path / "d"))
    assert "multi-head latent attention (kv_lora_rank" in str(found.unreadable)
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert found.serves(engine) == "is not known to redraft's rules"


def test_what_redraft_cannot_read_it_does_not_vouch_for(target: Target, tmp_path: Path) -> None:
    LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target))
    edit(tmp_path / "d", eagle_config=...)
    assert inspect_draft(str(tmp_path / "d")).serves("vllm") == "serves it unchanged"
    retensor(tmp_path / "d", norm__weight=torch.full((32,), float("nan")))
    assert inspect_draft(str(tmp_path / "d")).serves("vllm") == "is not known to redraft's rules"


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "token_lm"])
def test_a_good_export_has_no_finding_for_its_engine(
    target: Target, tmp_path: Path, kind: str
) -> None:
    stored(fresh_draft(target, kind=kind), target).save(tmp_path / "d")
    found = inspect_draft(str(tmp_path / "d"), target)
    assert found.unreadable is None
    assert found.serves("vllm") == "serves it unchanged"
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
    edit(tmp_path / "d", vocab_size=3000)
    retensor(tmp_path / "d", embed_tokens__weight=torch.zeros(3000, 32))
    assert inspect_draft(str(tmp_path / "d")).unreadable is None
    found = inspect_draft(str(tmp_path / "d"), target)
    assert found.unreadable is not None
    assert "vocabularies differ" in found.unreadable
