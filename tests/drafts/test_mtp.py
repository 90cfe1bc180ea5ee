"""MTP heads against Transformers' own layers, and their checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen_moe
from transformers.models.qwen3_next import modeling_qwen3_next as qwen_next

from redraft.checkpoints.load import read_draft, stored
from redraft.checkpoints.reload_check import check_export
from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.core.rng import seeded
from redraft.drafts.mtp.network import MtpConfig, MtpDraft
from redraft.metrics.live import live
from redraft.metrics.measure import measure
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double
from tests.drafts.mtp_targets import ROUTED, SAVED, routed_head, routed_in_double

NEAR = 1e-5
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3_5": {},
    "ungated": {"output_gate": False},
    "turned whole": {"rotary_share": 1.0},
}


CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "qwen3_5_text": (
        qwen.Qwen3_5DecoderLayer,
        qwen.Qwen3_5RMSNorm,
        qwen.Qwen3_5TextRotaryEmbedding,
    ),
    "qwen2": (qwen2.Qwen2DecoderLayer, qwen2.Qwen2RMSNorm, qwen2.Qwen2RotaryEmbedding),
    "qwen3_5_moe_text": (
        qwen_moe.Qwen3_5MoeDecoderLayer,
        qwen_moe.Qwen3_5MoeRMSNorm,
        qwen_moe.Qwen3_5MoeTextRotaryEmbedding,
    ),
    "qwen3_next": (
        qwen_next.Qwen3NextDecoderLayer,
        qwen_next.Qwen3NextRMSNorm,
        qwen_next.Qwen3NextRotaryEmbedding,
    ),
    "glm4_moe": (glm.Glm4MoeDecoderLayer, glm.Glm4MoeRMSNorm, glm.Glm4MoeRotaryEmbedding),
}
"""Transformers' layer, norm and rotary embedding by the target's model_type."""


@pytest.fixture(scope="module", params=[*SAVED, *ROUTED])
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target of each family, in float64; also of those whose layers have routed experts."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ROUTED:
        return routed_in_double(ROUTED[request.param](folder))
    return in_double(SAVED[request.param](folder))


def head_of(target: Target) -> MtpDraft:
    if target.model.config.model_type.removesuffix("_text") in ROUTED:
        return routed_head(target)
    dense: MtpDraft = fresh_draft(target, kind="mtp", width=96)
    return dense


def of_transformers(target: Target, draft: MtpDraft) -> tuple[Any, Any, Any]:
    """The layer, the norms and the rotary embedding of the target's family, with the draft's weights."""
    config = target.model.config
    layer_class, norm, rotary = CLASSES[config.model_type]
    layer = layer_class(config, 1).double()
    layer.load_state_dict(
        {n.removeprefix("layers.0."): t for n, t in draft.state_dict().items() if "layers.0." in n}
    )

    def normed(x: Tensor, name: str) -> Tensor:
        made = norm(x.shape[-1], eps=1e-6).double()
        made.load_state_dict({"weight": draft.state_dict()[f"{name}.weight"]})
        return made(x)

    return layer, normed, rotary(config)


@torch.no_grad()
def test_the_first_step_is_that_of_transformers_layers(own: Target) -> None:
    """The conventions around the layer are written out here once more."""
    draft = head_of(own)
    layer, normed, rotary = of_transformers(own, draft)
    tokens = torch.randint(3, own.vocab_size, (2, 12), generator=seeded(0, "tokens"))
    states: list[Tensor] = []
    hook = own.final_norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    reading = own.read(tokens, draft.aux_layers)
    hook.remove()
    mimo = draft.config.family == "mimo"
    state = states[0][:, :-2] if mimo else reading.features_BTF[:, :-2]
    embedded = own.embedding_VH[tokens[:, 1:-1]].clone()
    if draft.config.family != "qwen3_5":
        embedded[:, 0] = 0.0
    parts = [normed(embedded, "embedding_norm"), normed(state, "hidden_norm")]
    x = draft.fc(torch.cat(parts[::-1] if mimo else parts, dim=-1))
    place = torch.arange(10)[None]
    mask = torch.full((10, 10), -1e30, dtype=torch.float64).triu(1)[None, None]
    x = layer(x, position_embeddings=rotary(x, place), attention_mask=mask)
    expected = own.head(normed(x, "norm"))
    got = draft.logits(next(draft.rollout(tokens, reading.features_BTF, 0, 1)))
    assert far(got, expected) < NEAR
    for change in (
        {"state_first": not draft.config.state_first},
        {"norm_offset": 1.0 - draft.config.norm_offset},
        {"zero_first": not draft.config.zero_first},
    ):
        wrong = MtpDraft(dataclasses.replace(draft.config, **change)).double()
        wrong.load_state_dict(draft.state_dict())
        wrong.bind(own)
        got = wrong.logits(next(wrong.rollout(tokens, reading.features_BTF, 0, 1)))
        assert far(got, expected) > 1e3 * NEAR, change


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_a_head_of_each_family_is_written_and_read_by_a_second_reader(
    own: Target, tmp_path: Path
) -> None:
    draft = stored(head_of(own), own)
    draft.save(tmp_path / "d")
    back = read_draft(str(tmp_path / "d"))
    assert back.hash() == draft.hash()
    assert dataclasses.replace(back.config, checkpoint={}) == dataclasses.replace(
        draft.config, checkpoint={}, rope_parameters=back.config.rope_parameters
    )
    assert check_export(draft, tmp_path / "d") < 1e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_function_are_read_by_a_second_reader(
    target: Target, tmp_path: Path, name: str
) -> None:
    draft = stored(fresh_draft(target, kind="mtp", **VARIANTS[name]), target)
    draft.save(tmp_path / "d")
    assert check_export(draft, tmp_path / "d") < 1e-6


def test_a_head_of_the_nextn_layout(target: Target, tmp_path: Path) -> None:
    checkpoint = {
        **{k: v for k, v in target.model.config.to_dict().items() if k != "dtype"},
        "architectures": ["Glm4MoeForCausalLM"],
        "num_nextn_predict_layers": 1,
    }
    fields = {
        "family": "nextn",
        "norm_offset": 0.0,
        "output_gate": False,
        "rotary_share": 1.0,
        "head_norms": False,
        "raw_feedback": True,
        "zero_first": True,
        "checkpoint": checkpoint,
    }
    draft = stored(fresh_draft(target, kind="mtp", **fields), target)
    draft.save(tmp_path / "d")
    assert "model.layers.8.eh_proj.weight" in read_names(tmp_path / "d")
    assert check_export(draft, tmp_path / "d") < 1e-6


def read_names(folder: Path) -> set[str]:
    from redraft.core.folders import tensor_files

    return set(tensor_files(folder))


def test_the_state_before_the_norm_needs_a_norm(target_folder: Path) -> None:
    found = load_target(str(target_folder))
    draft = fresh_draft(found, kind="mtp")
    found.model.model.norm = nn.LayerNorm(found.hidden_size)
    other = MtpDraft(dataclasses.replace(draft.config, before_norm=True))
    with pytest.raises(UserError, match="cannot be had from the state after it"):
        other.bind(found)


def test_a_head_of_another_size_is_refused(target: Target) -> None:
    config = MtpConfig(
        hidden_size=16,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=target.vocab_size,
    )
    with pytest.raises(UserError, match="hidden sizes differ: the target's is 32, this MTP head's"):
        MtpDraft(config).bind(target)


@pytest.mark.parametrize("change", ["leading_pair", "zero_first", "before_norm", "raw_feedback"])
def test_replay_is_the_live_loop_for_every_function(
    target_folder: Path, change: str, prompts: list[Prompt]
) -> None:
    """And the function is another one than the usual."""
    target = in_double(target_folder)
    draft = fresh_draft(target, kind="mtp")
    other = MtpDraft(dataclasses.replace(draft.config, **{change: True})).double()
    other.load_state_dict(draft.state_dict())
    other.bind(target)
    target.final_norm.weight.data += torch.linspace(0, 1, target.hidden_size)
    other.bind(target)
    steps, _ = live(target, other, prompts[:6], 4, 24)
    assert measure(target, other, prompts[:6], k=4, max_new_tokens=24).traces == steps
    tokens = torch.randint(3, target.vocab_size, (1, 12), generator=seeded(0, "tokens"))
    features = target.read(tokens, draft.aux_layers).features_BTF
    ours, theirs = (d.logits(list(d.rollout(tokens, features, 0, 2))[-1]) for d in (draft, other))
    assert far(ours, theirs) > 1e-4
