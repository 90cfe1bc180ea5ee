"""A plan made of shapes alone: against the model that is there, its training, and what it is known to weigh."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
from typer.testing import CliRunner

from redraft.check.devices import GPUS, HERE, Device, device_named, this_machine
from redraft.check.plan import Sizes, lines_of, plan, target_of_shapes
from redraft.checkpoints.load import load_draft
from redraft.cli.app import app
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.models.target import Target
from redraft.training.stream import SHARE_KEPT
from redraft.training.train import train

DEVICE = Device("a device", 1e9, 1e12, 1e11)
K = 3


def even(answers: list[Answer], prompt: int = 12, length: int = 20) -> list[Answer]:
    """Answers of one size, so that no batch is padded."""
    return [
        Answer(
            a.id,
            (*a.prompt, *a.prompt)[:prompt],
            (*a.tokens, *a.tokens)[: length + K],
            length,
            "length",
        )
        for a in answers
    ]


@pytest.mark.parametrize("method", ["body", "full", "lora"])
def test_operations_are_those_that_training_counts(
    target: Target, target_folder: Path, draft_folder: Path, answers: list[Answer], method: str
) -> None:
    config = TrainConfig(method=method, epochs=2, batch_tokens=128, precision="fp32", patience=9)
    draft = load_draft(str(draft_folder), target, torch.float32)
    same = even(answers)
    record = train(target, draft, same, same[:2], config, k=K).record
    vocabulary = None if draft.draft_vocab is None else len(draft.draft_vocab)
    sizes = Sizes(len(same), 12, 20, "eagle3", vocabulary)
    found = plan(target_of_shapes(str(target_folder)), sizes, config, DEVICE)
    assert found.train_tokens == 2 * len(same) * 32
    # PyTorch counts no attention on a CPU: 8 layers, 32 wide, rows of 32 tokens, half of them seen; each row is read once
    attention = 4.0 * 8 * 32 * 32 / 2 * found.train_tokens / 2
    assert found.target_flops - attention == pytest.approx(record.target_flops, rel=0.02)
    assert found.draft_flops == pytest.approx(record.draft_flops, rel=0.1)
    assert found.trained_parameters == record.trained_parameters
    assert found.train_seconds == pytest.approx((found.target_flops + found.draft_flops) / 1e12)


def test_parameters_and_bytes_are_those_of_the_model(target_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    target = target_of_shapes(str(target_folder), "bfloat16")
    assert {p.device.type for p in target.model.parameters()} == {"meta"}
    found = plan(target, Sizes(draft_vocab=64), TrainConfig(), DEVICE)
    total = sum(p.numel() for p in model.parameters())
    assert (found.parameters, found.active, found.target_bytes) == (total, total, 2 * total)
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    assert found.train_bytes - found.stored_bytes == pytest.approx(2 * layers, rel=0.02)
    # hs[2], hs[4], hs[5] and the last, and an id, of each token
    size = 500 * (128 + 192) * (4 * target.hidden_size * 2 + 8)
    assert found.feature_bytes == size
    assert found.kept_bytes == size - 500 * (128 + 192) * 8, "no ids"
    assert any(line.startswith("kept ") for line in lines_of(found))


def test_states_that_do_not_fit_into_memory_are_not_kept(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sizes = target_of_shapes(str(target_folder), "bfloat16"), Sizes(draft_vocab=64)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    large = dataclasses.replace(DEVICE, measured=True, memory=4e9)
    config = TrainConfig(epochs=3)
    kept, once = (plan(target, sizes, each, large) for each in (config, TrainConfig(epochs=1)))
    assert (kept.kept_bytes > 0, once.kept_bytes) == (True, 0.0)
    assert kept.train_bytes - once.train_bytes == pytest.approx(kept.kept_bytes)
    small = dataclasses.replace(
        large, memory=kept.kept_bytes / SHARE_KEPT * 0.99 + kept.target_bytes
    )
    read_again = plan(target, sizes, config, small)
    assert read_again.kept_bytes == 0.0
    assert not any(line.startswith("kept ") for line in lines_of(read_again))
    tight = dataclasses.replace(large, memory=kept.train_bytes - 1)
    assert (
        plan(target, sizes, config, tight).kept_bytes,
        plan(target, sizes, config, tight).fits,
    ) == (
        0.0,
        True,
    )
    assert kept.target_flops < read_again.target_flops == pytest.approx(3 * once.target_flops)


def folder_of(config: Any, folder: Path) -> str:
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def test_a_large_target_is_planned_without_its_weights(tmp_path: Path) -> None:
    """Shapes of Llama 3.1 70B, whose parameters are public: 70.55 billion."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    target = target_of_shapes(folder_of(config, tmp_path / "large"))
    found = plan(target, Sizes(draft_vocab=32000), TrainConfig(), device_named("h100"))
    assert found.parameters == 70_553_706_496
    assert not found.fits
    assert any("features" in line for line in lines_of(found) if line.startswith("fits"))
    halved = plan(target, Sizes(draft_vocab=32000), TrainConfig(), device_named("H100"), 2)
    assert halved.draft_flops == found.draft_flops
    assert halved.target_flops == found.target_flops, "an answer is read once"
    assert halved.train_seconds == pytest.approx(found.train_seconds / 2)
    assert halved.train_bytes <= found.train_bytes
    huge = TrainConfig(method="full")  # the gradients of a whole head alone are more
    worse = plan(target, Sizes(), huge, device_named("T4"))
    assert any("not even" in line for line in lines_of(worse))


def test_of_routed_experts_those_chosen_count(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
    }
    config = Qwen3MoeConfig(**shape, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1)
    target = target_of_shapes(folder_of(config, tmp_path / "experts"), "float32")
    found = plan(target, Sizes(), TrainConfig(), DEVICE)
    expert = 3 * 64 * 32
    assert found.parameters - found.active == 8 * 6 * expert
    assert "take part in a token" in lines_of(found)[0]


def test_the_step_of_an_answer_is_the_longer_of_reading_and_computing(target_folder: Path) -> None:
    target = target_of_shapes(str(target_folder), "float32")
    slow_memory = dataclasses.replace(DEVICE, bandwidth=1e3)
    found = plan(target, Sizes(64, 12, 20), TrainConfig(), slow_memory)
    assert found.answer_seconds == pytest.approx(20 * found.parameters * 4 / 1e3)
    slow_products = dataclasses.replace(DEVICE, flops=1e3)
    found = plan(target, Sizes(64, 12, 20), TrainConfig(), slow_products)
    assert found.answer_seconds == pytest.approx(20 * 2 * 64 * found.parameters / 1e3)


@pytest.mark.parametrize(
    ("sizes", "method", "says"),
    [
        (Sizes(kind="token_lm"), "full", "kind token_lm .* cannot be laid out without numbers"),
        (Sizes(draft_vocab=10**9), "body", "--draft-vocab 1000000000: expected 1 to"),
        (Sizes(kind="none"), "body", "unknown kind of draft 'none'"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(
    target_folder: Path, sizes: Sizes, method: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan(target_of_shapes(str(target_folder)), sizes, TrainConfig(method=method), DEVICE)


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'H200'"):
        device_named("H2000")
    assert all(gpu.memory > 1e10 and gpu.flops > 1e13 for gpu in GPUS.values())


def test_a_trial_of_this_machine_gives_rates() -> None:
    found = this_machine(64, torch.float32)
    assert (found.name, found.measured) == (HERE, True)
    assert 1e8 < found.flops < 1e15
    assert 1e8 < found.bandwidth < 1e13


def test_the_command_needs_no_weights(target_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((target_folder / "config.json").read_bytes())
    words = ["plan", "--target", str(tmp_path), "--gpu", "L4", "--prompt-count", "64"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["device"], found["fits"], found["sizes"]["prompts"]) == ("L4", True, 64)
    assert "fits        on L4, 24 GB" in CliRunner().invoke(app, words).stdout
