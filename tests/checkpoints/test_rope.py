"""Rotary embeddings of drafts: what is computed, against its published formula, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import load_draft, read_draft
from redraft.core.errors import UserError
from redraft.models.target import Target
from tests.checkpoints.crafted import LAYOUTS, edit
from tests.conftest import fresh_draft

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(params=["safeai_eagle3", "safeai_eagle"])
def folder(request: pytest.FixtureRequest, target: Target, tmp_path: Path) -> Path:
    kind = "eagle" if request.param == "safeai_eagle" else "eagle3"
    return LAYOUTS[request.param](tmp_path / "d", fresh_draft(target, kind=kind))


def frequencies(folder: Path, **config: Any) -> torch.Tensor:
    edit(folder, **config)
    rotary: torch.Tensor = read_draft(str(folder)).build().rotary.inv_freq  # type: ignore[union-attr,assignment]
    return rotary


def plain(theta: float) -> torch.Tensor:
    return torch.tensor([theta ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        ({"rope_theta": None}, 1e4),
        ({"rope_theta": ...}, 1e4),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": None, "rope_theta": None}}, 5e5),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "type": "mrope"}}, 1e6),
    ],
)
def test_the_default_embedding_by_any_of_its_names(
    folder: Path, config: dict[str, Any], theta: float
) -> None:
    torch.testing.assert_close(frequencies(folder, **config), plain(theta), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("theta", "expected"), [(5e5, 5e5), (None, 1e6)])
def test_of_two_settings_that_of_the_scaling_counts(
    folder: Path, theta: float | None, expected: float
) -> None:
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    found = frequencies(folder, rope_theta=theta, **both)
    torch.testing.assert_close(found, plain(expected) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_linear_and_llama3(folder: Path, key: str) -> None:
    found = frequencies(folder, **{key: {"type": "linear", "factor": 4.0}})
    torch.testing.assert_close(found, plain(1e4) / 4, rtol=1e-6, atol=0)
    blended = []
    for angle in plain(1e4).tolist():
        turns = 64 * angle / (2 * math.pi)
        blend = min(max((turns - 1.0) / 3.0, 0.0), 1.0)
        blended.append((1 - blend) * angle / 8 + blend * angle)
    found = frequencies(folder, **{key: LLAMA3})
    torch.testing.assert_close(found, torch.tensor(blended).double(), rtol=1e-5, atol=0)


def test_the_context_of_llama3_is_the_drafts_own_where_it_names_none(folder: Path) -> None:
    without = {k: v for k, v in LLAMA3.items() if not k.startswith("original")}
    edit(folder, max_position_embeddings=64)
    expected = frequencies(folder, rope_scaling=LLAMA3)
    assert torch.equal(frequencies(folder, rope_scaling=without), expected)
    edit(folder, max_position_embeddings=512, original_max_position_embeddings=64)
    assert torch.equal(frequencies(folder, rope_scaling=without), expected)


def test_mrope_computes_what_it_is_on_text_and_is_kept_for_engines(
    target: Target, folder: Path, tmp_path: Path
) -> None:
    usual = load_draft(str(folder), target)
    section = {"type": "mrope", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    edit(folder, rope_scaling=section)
    draft = read_draft(str(folder)).build(target)
    tokens = torch.randint(5, 200, (1, 12))
    features = torch.randn(1, 12, draft.feature_size)
    with torch.no_grad():
        for states, expected in zip(
            draft.rollout(tokens, features, 0, 3),
            usual.rollout(tokens, features, 0, 3),
            strict=True,
        ):
            assert torch.equal(states, expected)
    read_draft(str(folder)).save(tmp_path / "out")
    written = read_draft(str(tmp_path / "out")).config.rope_parameters  # type: ignore[union-attr]
    assert written["rope_type"] == "default"
    assert written["mrope_section"] == [1, 1, 2]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "su", "short_factor": [1.0], "long_factor": [1.0]}, "'su' rotary embeddings"),
        ({"rope_type": "longrope", "factor": 4.0}, "'longrope' rotary embeddings"),
        ({"rope_type": "proportional"}, "'proportional' rotary embeddings"),
        ({"full_attention": {"rope_type": "default"}}, "'one per layer type' rotary"),
        ({"rope_type": "llama3", "factor": 8.0}, "expected a key 'low_freq_factor'"),
        ({"rope_type": "yarn"}, "rotary embedding: expected a key 'factor'"),
        ({"rope_type": "linear", "factor": -2.0}, "a finite number above 0 as factor, found -2.0"),
        ({"rope_type": "linear", "factor": "2"}, "a finite number above 0 as factor, found '2'"),
        ({"rope_type": ["yarn"]}, r"a text as rope_type, found \['yarn'\]"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "less than high_freq_factor 4.0"),
        ({"rope_theta": 0}, "above 0 as rope_theta, found 0"),
        (
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0},
            "no rotary embedding can be made",
        ),
        ({"partial_rotary_factor": 0.5}, "expected 1 as partial_rotary_factor, found 0.5"),
    ],
)
def test_what_is_not_computed_is_refused_also_without_a_target(
    folder: Path, rope: dict[str, Any], message: str
) -> None:
    edit(folder, rope_parameters=rope)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))
    found = inspect_draft(str(folder))
    assert found.unreadable is not None
    assert "rotary" in found.unreadable or "rope" in found.unreadable


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_dim": 7}, "rotary embeddings need an even head_dim, found 7"),
        (
            {"num_key_value_heads": 3},
            r"a divisor of num_attention_heads \(4\) as num_key_value_hea",
        ),
        ({"rms_norm_eps": -1e-6}, "a finite number above 0 as rms_norm_eps, found -1e-06"),
        ({"hidden_size": "32"}, "a positive integer below 2.31 as hidden_size, found '32'"),
        ({"num_attention_heads": 4.0}, "a positive integer below 2.31 as num_attention_heads"),
        ({"attention_bias": "no"}, "expected true or false as attention_bias, found 'no'"),
        ({"vocab_size": None}, "expected a key 'vocab_size'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 is not supported"),
        ({"logit_scale": 0.25}, "logit_scale 0.25 is not supported"),
        ({"layer_types": ["chunked_attention"]}, "one of full_attention, sliding_attention first"),
    ],
)
def test_values_that_would_not_compute_are_named(
    folder: Path, config: dict[str, Any], message: str
) -> None:
    edit(folder, **config)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))


def test_null_counts_as_absent(folder: Path, target: Target) -> None:
    keys = (
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "sliding_window",
        "layer_types",
    )
    edit(folder, **dict.fromkeys(keys), attention_bias=None, use_sliding_window=None)
    config: Any = read_draft(str(folder)).config
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)
    assert inspect_draft(str(folder), target).unreadable is None


@pytest.mark.parametrize("layers", [40, 2, 0, "x", ...])
def test_the_layers_in_the_file_count(folder: Path, tmp_path: Path, layers: Any) -> None:
    expected = read_draft(str(folder))
    edit(folder, num_hidden_layers=layers)
    found = read_draft(str(folder))
    assert found.config == expected.config
    found.save(tmp_path / "out")
    assert inspect_draft(str(tmp_path / "out")).serves("vllm") == "serves it unchanged"
    edit(tmp_path / "out", num_hidden_layers=layers)
    assert inspect_draft(str(tmp_path / "out")).serves("vllm") != "serves it unchanged"


def test_heads_need_not_share_the_hidden_size(target: Target, tmp_path: Path) -> None:
    """5 heads of 8 in a hidden size of 32, which no head count divides."""
    for kind in ("eagle3", "eagle"):
        draft = fresh_draft(target, kind=kind, num_attention_heads=5, num_key_value_heads=5)
        folder = LAYOUTS[f"safeai_{kind}"](tmp_path / kind, draft)
        edit(folder, head_dim=8)
        assert read_draft(str(folder)).build(target).config.num_attention_heads == 5
