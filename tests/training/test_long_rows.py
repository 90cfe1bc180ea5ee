"""The memory of a training step grows with the tokens of a row, not with their square; measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redraft.config import TrainConfig
from redraft.core.records import Answer
from redraft.drafts import chain_attention
from redraft.drafts.new import new_draft
from redraft.models.target import Target
from redraft.training.train import train
from tests.conftest import make_tokenizer

ROOT = Path(__file__).parents[2]
SHORT, LONG = 1024, 4096
HEADS = 8
SQUARE = LONG**2 * HEADS * 4 / 2**20
"""Megabytes of the scores of every start with every pair, in float32."""
CONFIG = TrainConfig(
    method="body", epochs=1, batch_tokens=LONG, rollout=2, evaluations=1, precision="fp32"
)


def one_step(tokens: int) -> None:
    """Train one step on a row of so many tokens, and print the peak of memory in megabytes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=LONG, **sizes, **heads)
    target = Target(AutoModelForCausalLM.from_config(config).eval(), tokenizer, ["random"])
    ids = torch.randint(5, len(tokenizer), (tokens,)).tolist()
    row = Answer("row", tuple(ids[:8]), tuple(ids[8:]), tokens - 8, "length")
    short = Answer("short", tuple(ids[:8]), tuple(ids[8:40]), 28, "length")
    draft = new_draft(target, [row], kind="eagle3", width=48)
    draft.bind(target)
    train(target, draft, [row], [short], CONFIG, k=2)
    # Not getrusage, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024)


def peak(tokens: int, before: str = "") -> float:
    code = f"from tests.training import test_long_rows as t; {before}t.one_step({tokens})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return float(done.stdout.split()[-1])


@pytest.mark.bench
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_memory_grows_with_the_row() -> None:
    short, long = peak(SHORT), peak(LONG)
    print(f"{short:.0f} MB at {SHORT} tokens, {long:.0f} MB at {LONG}")
    assert long - short < SQUARE / 4
    whole = peak(LONG, "t.chain_attention.SCORES = 1 << 40; ")  # all starts at once
    assert whole - short > SQUARE
    assert chain_attention.SCORES < LONG**2
