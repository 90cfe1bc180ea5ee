"""A fleet of two adapters on the tiny target: one that changes much and one that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import write_prompts


@pytest.fixture(scope="package")
def fleet(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fleet.yaml with two adapters, one of which changes nothing."""
    folder = tmp_path_factory.mktemp("fleet")
    for name, scale in (("loud", 0.4), ("still", 0.0)):
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_pretrained(target_folder)
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        for parameter in (p for n, p in tuned.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(parameter, std=scale) if scale else torch.nn.init.zeros_(
                parameter
            )
        tuned.save_pretrained(folder / name)
        write_prompts(folder / f"{name}.jsonl", 12)
    rows = {
        "still": {"adapter": "still", "prompts": "still.jsonl"},
        "loud": {"adapter": "loud", "prompts": "loud.jsonl", "share": 3},
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump(rows))
    return folder
