"""`redraft bench first-run`: the run that README and docs/getting-started.md show, on a real model.

SmolLM2-135M-Instruct, a LoRA of it tuned on word problems, a draft of the base trained on its own answers, and
`adapt`. The draft trains for minutes and is weak: the run shows that every step works on a pretrained model in
bf16, not what adapting is worth.

    smollm2, smollm2-lora   the model, and the adapter of its fine-tune
    base*.jsonl             questions of four domains and the base's answers; heldout* stop the training
    draft                   the base's draft
    math, medical.jsonl     what is adapted on, and measured off domain
    run                     the run folder of `adapt`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redraft.config import RegenerateConfig, TrainConfig, resolve
from redraft.core.console import say
from redraft.core.errors import UserError
from redraft.core.files import write_text
from redraft.generation.regenerate import regenerate
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.adapt import AdaptResult, adapt
from redraft.pipeline.stages import Shape, train_files
from redraft.prompts.prompts import read_prompts

from .datasets import VARIABLE, chats, data_folder
from .pretrained import build_model, tune
from .synthetic import Sample

MODEL, LORA, DOMAIN, OTHER = "smollm2", "smollm2-lora", "math", "medical"
DOMAINS = ("math", "dialogue", "medical", "code")
"""Of the questions that the base's draft is trained on."""
K, PER_DOMAIN, HELDOUT, ADAPT, OFF_DOMAIN, LORA_STEPS = 4, 50, 6, 100, 24, 16
ANSWERS = RegenerateConfig(max_new_tokens=96)
TRAIN = TrainConfig(method="scratch", loss="ce", epochs=1, batch_tokens=2048)
SETTINGS = {
    "regenerate.max_new_tokens": ANSWERS.max_new_tokens,
    "train.batch_tokens": 2048,
    "measure.eval_new_tokens": 64,
}


def first_run(out: Path, data: str | None = None) -> AdaptResult:
    """Every step in `out`; each is taken up where it was left. Raises UserError without a folder of data."""
    folder = data_folder(data)
    if folder is None:
        raise UserError(f"name a folder of real data: --data FOLDER, or ${VARIABLE}")
    build_model(MODEL, out / MODEL)
    if not (out / LORA / "adapter_config.json").is_file():
        tune(out / MODEL, chats(folder, DOMAIN, split="tune")[:800], out / LORA, steps=LORA_STEPS)
    if not (out / "draft" / "config.json").is_file():
        _base_draft(out, folder)
    prompts = _questions(out / f"{DOMAIN}.jsonl", chats(folder, DOMAIN, split="adapt")[:ADAPT])
    other = _questions(out / f"{OTHER}.jsonl", chats(folder, OTHER, split="eval")[:OFF_DOMAIN])
    return adapt(
        load_target(str(out / MODEL), adapter=str(out / LORA)),
        str(out / "draft"),
        prompts,
        out=out / "run",
        off_domain={OTHER: other},
        config=resolve([("bench first-run", SETTINGS)]),
    )


def _base_draft(out: Path, data: Path) -> None:
    """The base answers questions of every domain, and a draft is trained on its answers."""
    base = load_target(str(out / MODEL))
    answers = _answered(base, out, data, "base", PER_DOMAIN, 0)
    heldout = _answered(base, out, data, "heldout", HELDOUT, K)
    shape = Shape(draft_vocab_size=8192, width=1152)
    train_files(base, answers, heldout, out / "draft", TRAIN, K, shape=shape)


def _answered(
    target: Target, out: Path, data: Path, split: str, count: int, lookahead: int
) -> Path:
    """The answers to `count` questions of each domain."""
    samples = [s for domain in DOMAINS for s in chats(data, domain, split=split)[:count]]
    found = read_prompts(_questions(out / f"{split}.jsonl", samples), target)
    say(found.summary())
    answers = out / f"{split}-answers.jsonl"
    regenerate(target, found.prompts, answers, ANSWERS, lookahead)
    return answers


def _questions(path: Path, samples: Sequence[Sample]) -> str:
    """The first question of each chat as a prompts file."""
    rows = [{"id": s.id, "messages": [_first(s)]} for s in samples]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _first(sample: Sample) -> dict[str, Any]:
    return dict(next(turn for turn in sample.messages if turn["role"] == "user"))
