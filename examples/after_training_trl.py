"""Fine-tune a model that has an MTP head with TRL, look at what TRL wrote, give the head back, and look again.

    python examples/after_training_trl.py --base ./base --chats chats.jsonl --out after [--lora]

`chats.jsonl` has a chat (`messages`) a line, which ends with an answer. Further flags go to `redraft mtp`.

    after/tuned             what TRL wrote; with --lora an adapter
    after/merged            with --lora: the adapter merged into the base
    after/mtp/checkpoint    the fine-tune with its head
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def tune(base: str, chats: str, out: Path, *, lora: bool, steps: int, lr: float) -> Path:
    """The folder of the fine-tuned model, as training tools leave it: without the head."""
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    lines = Path(chats).read_text(encoding="utf-8").splitlines()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False),
        args=SFTConfig(
            output_dir=str(out / "tuned"),
            max_steps=steps,
            learning_rate=lr,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(
            [{"messages": json.loads(line)["messages"]} for line in lines]
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    trainer.save_model()
    if not lora:
        return out / "tuned"
    merged = AutoPeftModelForCausalLM.from_pretrained(
        out / "tuned", dtype="auto"
    ).merge_and_unload()
    merged.save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    return out / "merged"


def redraft(*words: str) -> int:
    print("$ redraft", *words, flush=True)
    return subprocess.run([sys.executable, "-m", "redraft", *words]).returncode


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--base", "--chats", "--out"):
        flags.add_argument(name, required=True)
    flags.add_argument("--lora", action="store_true")
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--lr", type=float, default=2e-5)
    asked, more = flags.parse_known_args()
    out = Path(asked.out)
    tuned = tune(asked.base, asked.chats, out, lora=asked.lora, steps=asked.steps, lr=asked.lr)
    redraft("inspect", str(tuned), "--base", asked.base)  # ends with 3: the head is missing
    run = ("--prompts", asked.chats, "--out", str(out / "mtp"))
    if code := redraft("mtp", "--target", str(tuned), "--base", asked.base, *run, *more):
        return code
    return redraft("inspect", str(out / "mtp" / "checkpoint"), "--base", asked.base)


if __name__ == "__main__":
    sys.exit(main())
