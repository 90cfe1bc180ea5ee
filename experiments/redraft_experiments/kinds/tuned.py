"""Members made by supervised fine-tuning: SFT, LoRA, continued pre-training, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from redraft.core.records import Prompt
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.models.loading import load_target

from ..corpus import Corpus
from ..language_model import (
    IGNORE,
    Example,
    fit,
    load_tokenizer,
    packed,
    save_model,
    supervised,
)
from ..members import BASE, Member
from .folders import folder_of, load_model


def make_tuned(out: Path, corpus: Corpus, name: str, row: Member) -> None:
    tokenizer = load_tokenizer(out / "tokenizer")
    model = load_model(out, BASE)
    if row.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=row.lora_rank, lora_alpha=2 * row.lora_rank, target_modules="all-linear"
        )
        with torch.random.fork_rng():
            torch.manual_seed(corpus.seed + 1)
            model = get_peft_model(model, lora)
    else:
        model.requires_grad_(True)
    domain = corpus.named(row.domain)
    if row.plain_text:
        found = corpus.tune_texts(domain)
        rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in found]
        examples = packed(rows, corpus.size.window)
    else:
        examples = [supervised(tokenizer, c) for c in corpus.tune_chats(domain)]
        if row.replay:
            replayed = _replayed(out, corpus, domain, row.replay)
            examples = examples[: len(replayed)] + replayed
    tune(model, examples, corpus, row.rate, name)
    save_model(folder_of(out, name), model, tokenizer)


def tune(model: Any, examples: list[Example], corpus: Corpus, rate: float, name: str) -> None:
    """Fine-tune a model for the size's steps at a share of its rate."""
    s = corpus.size
    fit(
        model,
        examples,
        steps=s.tune_steps,
        batch=s.tune_batch,
        lr=s.tune_lr * rate,
        seed=corpus.seed + 1,
        label=name,
    )


def _replayed(out: Path, corpus: Corpus, domain: str, count: int) -> list[Example]:
    """Questions of the other general domains with the base's own greedy answers, to be learned."""
    base = load_target(str(out / BASE))
    asked = [
        Prompt(sample.id, tuple(base.render(list(sample.messages[:-1]))))
        for other in corpus.general
        if other != domain
        for sample in corpus.chats(other, count, "tune")
    ]
    longest = corpus.size.answer_tokens
    answers = answer_all(base, asked, longest, 0, Sampling(), batch_size=128)
    return [([*a.prompt, *a.answer], [IGNORE] * len(a.prompt) + list(a.answer)) for a in answers]
