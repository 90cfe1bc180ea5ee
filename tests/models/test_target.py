"""Targets of every shape: features are Hugging Face's hidden states, whatever the architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from redraft.core.errors import UserError
from redraft.models import versions
from redraft.models.kv_cache import new_cache
from redraft.models.loading import load_target
from redraft.models.target import Target, check_aux_layers, default_aux_layers
from tests.conftest import FAMILIES, make_tokenizer, save_target


@pytest.mark.parametrize("family", list(FAMILIES))
def test_taps_are_hidden_states(family: str, tmp_path: Path) -> None:
    target = load_target(str(save_target(tmp_path, FAMILIES[family](len(make_tokenizer())))))
    tokens = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    aux_layers = default_aux_layers(target.num_layers)
    reading = target.read(tokens, aux_layers)
    with torch.no_grad():
        output = target.model(input_ids=tokens, output_hidden_states=True)
    assert len(output.hidden_states) == target.num_layers + 1
    expected = torch.cat([output.hidden_states[aux_layer] for aux_layer in aux_layers], dim=-1)
    assert torch.equal(reading.features_BTF, expected)
    assert torch.equal(reading.logits_BTV, output.logits)
    wrong = torch.cat([output.hidden_states[aux_layer + 1] for aux_layer in aux_layers], dim=-1)
    assert not torch.equal(reading.features_BTF, wrong)
    # A padded neighbour and a cache change nothing but the order of sums.
    cache = new_cache(target)
    pieces = [
        target.read(tokens[:1, part], aux_layers, cache) for part in (slice(0, 20), slice(20, 24))
    ]
    again = torch.cat([piece.features_BTF for piece in pieces], dim=1)
    assert float((again - expected[:1]).abs().max()) < 1e-3


def test_an_adapter_goes_on_top(target_folder: Path, tmp_path: Path) -> None:
    plain = load_target(str(target_folder))
    model = get_peft_model(plain.model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    adapted = load_target(str(target_folder), adapter=str(tmp_path / "adapter"))
    tokens = torch.tensor([[5, 6, 7, 8]])
    reference = load_target(str(target_folder))
    assert adapted.name == f"{target_folder}+{tmp_path / 'adapter'}"
    assert adapted.fingerprint() != reference.fingerprint()
    assert adapted.hidden_size == reference.hidden_size
    difference = adapted.read(tokens, (2,)).features_BTF - reference.read(tokens, (2,)).features_BTF
    assert float(difference.abs().max()) > 1e-3
    with pytest.raises(UserError, match="expected a PEFT folder with adapter_config.json"):
        load_target(str(target_folder), adapter=str(target_folder))


@pytest.mark.parametrize("layers", [1, 4, 6])
def test_default_taps_collapse_in_shallow_targets(layers: int) -> None:
    with pytest.raises(
        UserError, match=rf"collapse to .* {layers} layers \(7 are needed\).*--aux-layers"
    ):
        default_aux_layers(layers)


def test_default_and_chosen_taps() -> None:
    assert default_aux_layers(7) == (2, 3, 4)
    assert default_aux_layers(32) == (2, 16, 29)
    assert check_aux_layers((0, 3, 6), 7) == (0, 3, 6)
    with pytest.raises(UserError, match=r"aux layer 7 is out of range: a target of 7 layers"):
        check_aux_layers((1, 3, 7), 7)
    with pytest.raises(UserError, match="must ascend without repeats"):
        check_aux_layers((3, 1), 7)


def test_no_chat_template_says_how_to_pass_one(tmp_path: Path) -> None:
    folder = save_target(tmp_path / "t", FAMILIES["llama"](len(make_tokenizer())), template=None)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match="has no chat template.*--chat-template FILE"):
        load_target(str(folder)).render(messages)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}")
    rendered = load_target(str(folder), chat_template=str(template)).render(messages)
    assert len(rendered) == 3
    with pytest.raises(UserError, match="no such file"):
        load_target(str(folder), chat_template=str(tmp_path / "none.jinja"))


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="expected a model folder with config.json, or a GGUF file; found none in it",
    ):
        load_target(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        load_target(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="--dtype float3: unknown; known: auto, float32"):
        save_target(tmp_path / "t", FAMILIES["llama"](len(make_tokenizer())))
        load_target(str(tmp_path / "t"), dtype="float3")


def test_fingerprints_follow_weights_and_template(target_folder: Path, tmp_path: Path) -> None:
    first = load_target(str(target_folder)).fingerprint()
    assert first == load_target(str(target_folder)).fingerprint()
    other = save_target(tmp_path, FAMILIES["llama"](len(make_tokenizer())), seed=1)
    assert load_target(str(other)).fingerprint() != first


@torch.no_grad()
@pytest.mark.parametrize("first", [None, (9, 0)], ids=["as usual", "all states are read"])
def test_states_are_those_after_their_layers(
    target: Target, monkeypatch: pytest.MonkeyPatch, first: tuple[int, int] | None
) -> None:
    """As hooks see them, whichever way this version of Transformers is asked; those of the next layers are others."""
    monkeypatch.setattr(versions, "NAMES_STATES", first or versions.NAMES_STATES)
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda *args: seen.append(args[-1]))
        for layer in target.decoder.layers
    ]
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    found = target.read(tokens, (2, 5)).features_BTF
    for hook in hooks:
        hook.remove()
    states = [one[0] if isinstance(one, tuple) else one for one in seen]
    assert torch.equal(found, torch.cat([states[1], states[4]], -1))
    assert not torch.allclose(found, torch.cat([states[2], states[5]], -1))
