"""Targets that Transformers stores quantised: their states are those of the numbers that the bits mean, and a draft trains on them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from redraft.config import resolve
from redraft.models.loading import load_target
from redraft.pipeline.adapt import adapt
from redraft_experiments.kinds.quantised import FORMS as BENCH_FORMS
from tests.conftest import SHAPE, fresh_draft, make_tokenizer, save_target, stored, write_prompts

WIDE = {**SHAPE, "hidden_size": 64, "intermediate_size": 64}  # bitsandbytes packs rows of 64
CONFIG = LlamaConfig(vocab_size=len(make_tokenizer()), **WIDE)
GROUP = 32
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
)
"""The sixteen numbers of QLoRA's NF4 (arXiv 2305.14314, appendix E)."""


def nf4(folder: Path, out: Path) -> Callable[[Tensor], Tensor]:
    """Blocks of 64 in the order of storage, each divided by its largest magnitude."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    _store(folder, out, config)

    def meant(weight: Tensor) -> Tensor:
        blocks = weight.reshape(-1, 64)
        scale = blocks.abs().amax(-1, keepdim=True)
        nearest = (blocks / scale).unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(-1)
        return (torch.tensor(NF4)[nearest] * scale).reshape(weight.shape)

    return meant


def int8(folder: Path, out: Path) -> Callable[[Tensor], Tensor]:
    """A scale for each row. The layers' input is rounded in the same way, and computed in half precision."""
    from transformers import BitsAndBytesConfig

    _store(folder, out, BitsAndBytesConfig(load_in_8bit=True))
    return rows_in_127


def rows_in_127(wide: Tensor) -> Tensor:
    return _rounded(wide, wide.abs().amax(-1, keepdim=True).clip(1e-9) / 127)


def torchao_int8(folder: Path, out: Path) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    _store(folder, out, TorchAoConfig(Int8WeightOnlyConfig()))
    return lambda weight: _rounded(weight, weight.abs().amax(-1, keepdim=True) / 127.5)


def compressed(folder: Path, out: Path) -> Callable[[Tensor], Tensor]:
    """4 bits with a scale for each group of a row, as llm-compressor packs them for vLLM."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=["lm_head"],
            format="pack-quantized",
            quantization_status="frozen",
        ),
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(_scales(module.weight).squeeze(-1))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.zero_()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    _with_tokenizer(folder, out)

    def meant(weight: Tensor) -> Tensor:
        found: Tensor = (_steps(weight) * _scales(weight)).reshape(weight.shape)
        return found

    return meant


def _scales(weight: Tensor) -> Tensor:
    groups = weight.reshape(len(weight), -1, GROUP)
    return groups.abs().amax(-1, keepdim=True) / 7.5


def _steps(weight: Tensor) -> Tensor:
    groups = weight.reshape(len(weight), -1, GROUP)
    return (groups / _scales(weight)).round().clip(-8, 7)


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clip(-128, 127) * scale


def _store(folder: Path, out: Path, config: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, trust_remote_code=False
    )
    model.save_pretrained(out)
    _with_tokenizer(folder, out)


def _with_tokenizer(folder: Path, out: Path) -> None:
    for file in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
        (out / file.name).write_bytes(file.read_bytes())


SETTINGS = {
    "general.guard": "off",
    "regenerate.max_new_tokens": 16,
    "train.epochs": 1,
    "train.batch_tokens": 256,
    "measure.eval_limit": 5,
    "measure.heldout": 4,
    "measure.eval_new_tokens": 12,
}
FORMS = {
    "nf4": (nf4, "bitsandbytes", 0.02),  # on a CPU its scales are bf16
    "int8": (int8, "bitsandbytes", 0.03),
    "torchao": (torchao_int8, "torchao", 0.006),
    "compressed-tensors": (compressed, "compressed_tensors", 1e-5),
}
"""How each is made, the package that it needs, and how far its logits may be off, as a share of their norm."""


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(40)[None]).logits
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_target_computes_with_what_its_bits_mean(form: str, tmp_path: Path) -> None:
    make, package, close = FORMS[form]
    pytest.importorskip(package)
    folder = save_target(tmp_path / "model", CONFIG)
    meant = make(folder, tmp_path / form)
    with safe_open(tmp_path / form / "model.safetensors", "pt") as file:
        kinds = {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    assert kinds & {"U8", "I8", "I32"}
    found = logits(load_target(str(tmp_path / form)).model)
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    layers = [module for module in plain.model.modules() if isinstance(module, nn.Linear)]
    for module in layers:
        module.weight.data = meant(module.weight.data)
        if form == "int8":
            module.register_forward_pre_hook(lambda _, given: (rows_in_127(given[0]),))
    wanted = logits(plain)
    assert (found - wanted).norm() < close * wanted.norm()
    for module in layers:  # scales that are a twentieth too large are seen
        module.weight.data *= 1.05
    assert (found - logits(plain)).norm() > 2 * close * wanted.norm()


@pytest.mark.parametrize("form", FORMS)
def test_a_draft_is_adapted_to_a_quantised_target(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, package, _ = FORMS[form]
    pytest.importorskip(package)
    folder = save_target(tmp_path / "model", CONFIG)
    make(folder, tmp_path / form)
    whole = load_target(str(folder))
    stored(fresh_draft(whole), whole).save(tmp_path / "draft")
    prompts = write_prompts(tmp_path / "prompts.jsonl", 24)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        target = load_target(str(tmp_path / form))
        found = adapt(
            target,
            str(tmp_path / "draft"),
            str(prompts),
            out=tmp_path / "run",
            config=resolve([("test", SETTINGS)]),
        )
    assert not [record for record in caplog.records if "MatMul8bitLt" in record.message]
    assert found.report.train.steps
    assert len(found.report.train.heldout_tau) > 1


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_forms_of_the_bench_load(form: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = save_target(tmp_path / "model", CONFIG)
    BENCH_FORMS[form].make(folder, tmp_path / form, None)
    whole, target = load_target(str(folder)), load_target(str(tmp_path / form))
    apart = (logits(target.model) - logits(whole.model)).norm() / logits(whole.model).norm()
    assert 1e-3 < apart < 0.5
    assert target.render([{"role": "user", "content": "2"}])
