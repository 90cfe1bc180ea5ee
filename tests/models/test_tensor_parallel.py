"""What cannot be shared among processes; the rest is in tests/ranks, which starts some."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config

from redraft.core import ranks
from redraft.core.errors import UserError
from redraft.models.loading import load_target
from redraft.models.tensor_parallel import TENSOR_PARALLEL, shared_layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "this is one process; start several: torchrun"),
        (
            {"max_memory": "cpu=1GB"},
            "--max-memory goes with --device-map auto, not tensor-parallel",
        ),
    ],
)
def test_one_process_shares_nothing(
    options: dict[str, str], message: str, target_folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_target(str(target_folder), device_map=TENSOR_PARALLEL, **options)
    assert ranks.shares() == 1


def test_models_that_cannot_be_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(ranks, "_here", ranks.Place(0, 2, 0))
    config = GPT2Config(n_layer=1, n_head=4, n_embd=8, vocab_size=16)
    with pytest.raises(UserError, match="no plan to cut GPT2LMHeadModel; spread its layers"):
        shared_layers("gpt2", config, None)
    with pytest.raises(UserError, match="--target-adapter lora cannot be put on layers"):
        shared_layers("model", config, "lora")
    with pytest.raises(UserError, match="a GGUF file is read whole"):
        shared_layers(str(tmp_path / "model.gguf"), config, None)
    config.n_head = 3
    with pytest.raises(UserError, match="num_attention_heads are 3, which 2 processes"):
        shared_layers("gpt2", config, None)
    assert ranks.shares() == 2, "nothing was decided"
